"""A measurement that takes a fraction of a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wcmi_fast import CriticConfig, Report, representation_vulnerability

SHAPE = (1, 8, 8)
SMALL = CriticConfig(units=8, epochs=1, batch_size=20, learning_rate=1e-2)


def images(n: int, seed: int = 0) -> Tensor:
    """Images (n, 1, 8, 8) of random brightness, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(n, 1, 1, 1, generator=generator)
    return (0.9 * level + 0.1 * torch.rand(n, *SHAPE, generator=generator)).clamp(0, 1)


def labelled(n: int, seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images and equally frequent labels that follow their brightness."""
    x = images(n, seed)
    order = x.flatten(1).mean(1).argsort().argsort()
    return x, order * classes // n


def linear(outputs: int = 4) -> nn.Module:
    """A smooth representation."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))


def measured(model: nn.Module | None = None, data: Any = None, **options: Any) -> Report:
    """Measure a small model with few images, steps and trials."""
    small = {"eps": 0.1, "steps": 2, "trials": 1, "critic": SMALL, "progress": False}
    pair = (images(40, 0), images(40, 1))
    return representation_vulnerability(
        linear() if model is None else model, pair if data is None else data, **(small | options)
    )
