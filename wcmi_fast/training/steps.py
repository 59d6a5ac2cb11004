"""The parts of a training step that every kind of training has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from wcmi_fast.attacks import PGD
from wcmi_fast.distributed import ranks
from wcmi_fast.training.config import TrainingConfig
from wcmi_fast.training.schedule import factor


def scaled(attack: PGD, part: float) -> PGD:
    """Return the attack with eps and step size multiplied by a part."""
    # A part of 0 makes eps 0, where the step size does not matter but must not be 0.
    return replace(attack, eps=attack.eps * part, step_size=attack.step_size * (part or 1.0))


def ramp(done: float, warmup: float) -> float:
    """Return the part of eps that applies when a part of training is done."""
    return min(1.0, done / warmup) if warmup > 0 else 1.0


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


def descend(optimizer: Optimizer, loss: Tensor) -> float:
    """Take a step down a loss, a mean over images; return its value, over all processes."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return ranks.mean(loss)


@torch.no_grad()
def average_(averaged: Iterable[nn.Module], trained: Iterable[nn.Module], decay: float) -> None:
    """Move averaged weights and statistics towards the trained ones, by 1 - decay."""
    for slow, fast in zip(averaged, trained, strict=True):
        states = zip(slow.state_dict().values(), fast.state_dict().values(), strict=True)
        for old, new in states:
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)
