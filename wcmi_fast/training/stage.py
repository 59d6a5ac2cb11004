"""The loop over batches that every stage of training has, with its checkpoints and its end."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcmi_fast.data import batches
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.parallel import share_statistics_
from wcmi_fast.training import signals
from wcmi_fast.training.run_folder import Progress, RunFolder
from wcmi_fast.training.seeds import seeded

# What a batch reports, by name: its value first.
Values = Mapping[str, float]
# Indices (B,), the part of training that is done, the epoch's generator -> what the batch reports.
TrainBatch = Callable[[Tensor, float, torch.Generator], Values]
OnBatch = Callable[[Values], None]


def ignore(values: Values) -> None:
    """Do nothing with what a batch reports."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained, on how many rows, and by which step.

    Attributes:
        owner: the function that was called, for errors.
        name: under which checkpoints and metrics go; a part of the seed.
        seed: decides, with the name and the epoch, all that is drawn.
        rows: number of examples.
        epochs: passes over them.
        batch_size: examples per batch; an incomplete last batch is left out.
        modules, optimizer: what a checkpoint holds.
        train_batch: does one step; on several processes, with its part of a batch's indices. Means
            over an epoch of what it reports are its metrics.
        on_batch: told after every batch what it reported.
        after_epoch: told how many epochs are done; returns further metrics.
        ended: whether to leave out the epochs that are left.
    """

    owner: str
    name: str
    seed: int
    rows: int
    epochs: int
    batch_size: int
    modules: Mapping[str, nn.Module]
    optimizer: Optimizer
    train_batch: TrainBatch
    on_batch: OnBatch = ignore
    after_epoch: Callable[[int], Mapping[str, float]] = lambda epoch: {}
    ended: Callable[[], bool] = lambda: False


class Watcher(Protocol):
    """What looks at training after every epoch, and may end it."""

    ended: Tensor

    def after_epoch(self, epoch: int) -> Mapping[str, float]:
        """Return further metrics; see `Stage`."""


def watched_by(watcher: Watcher | None) -> dict[str, Any]:
    """Return what a `Stage` is told of its watcher."""
    if watcher is None:
        return {}
    return {"after_epoch": watcher.after_epoch, "ended": lambda: bool(watcher.ended)}


def run_stage(stage: Stage, run: RunFolder) -> None:
    """Do the batches that a stage still lacks.

    There is a checkpoint after every epoch, every `run.every` batches, and at a signal (see
    `signals.finishing_steps`). Each epoch has its own seed, and a checkpoint within one holds the
    random states: a resumed run is the uninterrupted one, bit for bit.

    On several processes each trains on its part of every batch, the first writes, and a signal to
    one ends all after the same step.

    Raises:
        ValueError: several processes cannot share a batch equally.
        FloatingPointError: a value is not finite; the message names stage, epoch and batch.
        StoppedError: a signal came.
        CheckpointError, OSError: a checkpoint cannot be read, or written.
    """
    ranks.check_batch(stage.owner, stage.batch_size)
    at = run.restore(stage.name, stage.modules, stage.optimizer)
    while at.epoch < stage.epochs and not stage.ended():
        with seeded(stage.seed, stage.name, at.epoch) as generator:
            values = _epoch(stage, run, at, generator)
        at = Progress(epoch=at.epoch + 1)
        metrics = {**_means(values), **stage.after_epoch(at.epoch)}
        run.save_epoch(stage.name, at.epoch, stage.modules, stage.optimizer, metrics)
        _stop_if_asked(stage, at, _asked())


def _means(values: Sequence[Values]) -> dict[str, float]:
    return {name: fmean(each[name] for each in values) for name in values[0]}


def _epoch(stage: Stage, run: RunFolder, at: Progress, generator: torch.Generator) -> list[Values]:
    order = batches(stage.rows, stage.batch_size, generator)
    per_epoch = stage.rows // stage.batch_size
    values = list(at.values)
    if at.batch:
        torch.set_rng_state(at.random["global"])
        generator.set_state(at.random["generator"])
    for batch, indices in enumerate(order):
        if batch < at.batch:
            continue
        done = (at.epoch * per_epoch + batch) / (stage.epochs * per_epoch)
        with ranks.own_random_numbers():
            values.append(stage.train_batch(ranks.own(indices), done, generator))
        share_statistics_(stage.modules.values())
        _check_finite(stage, values[-1], at.epoch, batch)
        stage.on_batch(values[-1])
        if batch + 1 == per_epoch:
            break
        asked = _asked()
        if asked or (run.every and (batch + 1) % run.every == 0):
            random = {"global": torch.get_rng_state(), "generator": generator.get_state()}
            here = Progress(at.epoch, batch + 1, tuple(values), random)
            run.save(stage.name, here, stage.modules, stage.optimizer)
            _stop_if_asked(stage, here, asked)
    return values


def _asked() -> signal.Signals | None:
    """Return the signal that asks for an end, of any process; called by all at the same time."""
    number = ranks.highest(signals.received() or 0)
    return signal.Signals(number) if number else None


def _stop_if_asked(stage: Stage, at: Progress, asked: signal.Signals | None) -> None:
    if asked is not None:
        # Where a process ends, torchrun ends the others: not before the first has saved.
        ranks.wait()
        raise signals.StoppedError(asked, stage.name, at.epoch, at.batch)


def _check_finite(stage: Stage, values: Values, epoch: int, batch: int) -> None:
    for name, value in values.items():
        if math.isfinite(value):
            continue
        raise FloatingPointError(
            f"{stage.owner}: {name} is {value} in stage {stage.name!r}, epoch {epoch}, batch "
            f"{batch}; try a lower learning_rate or grad_clip, or a longer eps_warmup"
        )


def run_epochs(
    run: RunFolder | None,
    stage: str,
    seed: int,
    epochs: int,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    train_epoch: Callable[[int, torch.Generator], dict[str, float]],
) -> None:
    """Run the epochs that a stage still lacks, with a checkpoint after each if there is a folder.

    Every epoch has its own seed, so that a resumed run is the uninterrupted one, bit for bit.
    """
    start = 0 if run is None else run.restore_epoch(stage, modules, optimizer)
    for epoch in range(start, epochs):
        with seeded(seed, stage, epoch) as generator:
            metrics = train_epoch(epoch, generator)
        if run is not None:
            run.save_epoch(stage, epoch + 1, modules, optimizer, metrics)
