"""The parts of a training step that every kind of training has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from wcmi_fast.attacks import PGD
from wcmi_fast.distributed import ranks
from wcmi_fast.training.config import TrainingConfig
from wcmi_fast.training.schedule import factor
from wcmi_fast.training.seeds import starts_generator


def scaled(attack: PGD, part: float) -> PGD:
    """Return the attack with eps and step size multiplied by a part."""
    # A part of 0 makes eps 0, where the step size does not matter but must not be 0.
    return replace(attack, eps=attack.eps * part, step_size=attack.step_size * (part or 1.0))


def attacked(
    attack: PGD,
    loss_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    part: float,
    generator: torch.Generator,
) -> Tensor:
    """Attack a batch, of which every process has a part, at a part of the radius."""
    starts, whole = starts_generator(generator, images.device), ranks.part_of(images)
    return scaled(attack, part).attack(loss_fn, images, generator=starts, part_of=whole)


def ramp(done: float, warmup: float) -> float:
    """Return the part of eps that applies when a part of training is done."""
    return min(1.0, done / warmup) if warmup > 0 else 1.0


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the context of a config's attacks and steps.

    Raises:
        ValueError: the config wants bfloat16, and the device computes no products in it.
    """
    if config.amp and not has_bfloat16(device.type):
        raise ValueError(
            f"{type(config).__name__}: amp is True, and {device.type} has no products in bfloat16 "
            "here, wanted False"
        )
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp)


def has_bfloat16(device_type: str) -> bool:
    """Whether products in bfloat16 have instructions of their own on a device."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    # Older releases of torch do not tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def stepped(config: TrainingConfig, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a training step calls for a module: itself, or compiled."""
    return torch.compile(module) if config.compile else module


def new_optimizer(config: TrainingConfig, weights: Iterable[nn.Parameter]) -> Optimizer:
    """Build a config's optimiser; torch's fused form, a kernel for all weights."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adam":
        return Adam(weights, lr=rate, weight_decay=decay, fused=True)
    momentum = config.momentum
    return SGD(weights, rate, momentum, weight_decay=decay, nesterov=momentum > 0, fused=True)


def set_learning_rate(optimizer: Optimizer, config: TrainingConfig, done: float) -> None:
    """Set what a config's schedule wants when a part of training is done."""
    value = config.learning_rate * factor(config.schedule, done)
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def average_(averaged: Iterable[nn.Module], trained: Iterable[nn.Module], decay: float) -> None:
    """Move averaged weights and statistics towards the trained ones, by 1 - decay."""
    for slow, fast in zip(averaged, trained, strict=True):
        states = zip(slow.state_dict().values(), fast.state_dict().values(), strict=True)
        for old, new in states:
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)
