"""A run's folder: metrics, checkpoints per stage and results, so that a run can be resumed.

A run is a sequence of named stages. A stage of several epochs leaves a checkpoint after each, and
some between; a finished one leaves `stages/<name>.json`. What a killed run had finished is not
done again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from wcmi_fast.distributed import ranks
from wcmi_fast.files import discard, write_file
from wcmi_fast.training import checkpoint

METRICS, SETTINGS = "metrics.jsonl", "settings.json"
# Names of tensors that are random states begin with it.
RANDOM = "random"


class Progress(NamedTuple):
    """How far a stage came.

    Attributes:
        epoch: whole epochs.
        batch: batches of the next one.
        values: what these batches reported.
        random: random states after them, by name, uint8.
    """

    epoch: int
    batch: int = 0
    values: tuple[Mapping[str, float], ...] = ()
    random: Mapping[str, Tensor] = {}


class RunFolder:
    """The folder of one run; made if it is not there.

    On several processes all must call its methods; only the first reads and writes, and tells the
    others.

    Args:
        path: the folder.
        every: batches between the checkpoints within an epoch; None makes none there.
        keep: how many checkpoints of a stage are kept; if the newest cannot be read, the one before
            it serves.
        on_record: told every record that goes into the metrics.

    Raises:
        OSError: it cannot be made or written to.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int | None = None,
        keep: int = 2,
        on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        self.path, self.every, self.keep, self._on_record = path, every, keep, on_record
        if not ranks.is_first():
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: the output folder {path} cannot be made"
            ) from error
        # What a kill left half-written; it was never under its real name.
        for temporary in path.rglob(".*.tmp"):
            discard(temporary)
        # Fails now, with a sentence, rather than after minutes of training.
        write_file(path / ".writable", b"")
        (path / ".writable").unlink()

    def claim(self, owner: str, settings: Mapping[str, Any]) -> None:
        """Write what the run's results depend on, or raise if the folder holds another run.

        Args:
            owner: the function that was called, for the error.
            settings: plain values.

        Raises:
            ValueError: the folder has other settings; the message names those that differ.
        """
        ranks.from_first(lambda: self._claim(owner, settings))

    def _claim(self, owner: str, settings: Mapping[str, Any]) -> None:
        file = self.path / SETTINGS
        wanted = json.loads(json.dumps(settings))
        there = json.loads(file.read_text()) if file.exists() else wanted
        keys = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
        if keys:
            values = (f"{k} is {there.get(k)!r} there and {wanted.get(k)!r} here" for k in keys)
            raise ValueError(
                f"{owner}: folder {self.path} holds a run with another {', '.join(keys)}, wanted "
                f"the same settings or a new folder; {', '.join(values)}"
            )
        write_file(file, json.dumps(settings, indent=1) + "\n")

    def stage(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a stage reports; its work is done unless an earlier session finished it."""
        if self.stage_result(name) is None:
            self.finish_stage(name, work())
        return self.stage_result(name) or {}

    def stage_result(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage reported, or None."""
        file = self.path / "stages" / f"{stage}.json"
        if not file.exists():
            return None
        result: dict[str, Any] = json.loads(file.read_text())
        return result

    def finish_stage(self, stage: str, result: Mapping[str, Any]) -> None:
        """Mark a stage as finished, with what it reports."""
        (self.path / "stages").mkdir(exist_ok=True)
        write_file(self.path / "stages" / f"{stage}.json", json.dumps(result, indent=1))

    def epochs_done(self, stage: str) -> int:
        """Return how many whole epochs of a stage have a checkpoint."""
        folders = self._checkpoints(stage)
        return int(folders[-1].name.split("-")[1]) if folders else 0

    def save_epoch(
        self,
        stage: str,
        epoch: int,
        modules: Mapping[str, nn.Module],
        optimizer: Optimizer,
        metrics: Mapping[str, float],
    ) -> None:
        """Checkpoint a stage after `epoch` epochs, log its metrics, drop the oldest checkpoints."""
        if not ranks.is_first():
            return
        record = {"stage": stage, "epoch": epoch, **metrics}
        self._write(stage, f"epoch-{epoch:04d}", checkpoint.pack(modules, optimizer), record)
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._on_record(record)

    def save(
        self, stage: str, at: Progress, modules: Mapping[str, nn.Module], optimizer: Optimizer
    ) -> None:
        """Checkpoint a stage within an epoch."""
        if not ranks.is_first():
            return
        tensors = checkpoint.pack(modules, optimizer)
        tensors |= {f"{RANDOM}.{name}": state for name, state in at.random.items()}
        record = {"stage": stage, "epoch": at.epoch, "batch": at.batch, "values": at.values}
        self._write(stage, f"epoch-{at.epoch:04d}-batch-{at.batch:07d}", tensors, record)

    def restore(
        self, stage: str, modules: Mapping[str, nn.Module], optimizer: Optimizer
    ) -> Progress:
        """Load a stage's newest checkpoint that can be read into modules and optimiser.

        Returns:
            How far the stage had come; the beginning if there is no checkpoint.

        Raises:
            CheckpointError: no checkpoint can be read, or the one that can does not fit.
        """
        found = ranks.from_first(lambda: self._newest(stage))
        if found is None:
            self._drop_metrics(stage, after=0)
            return Progress(epoch=0)
        tensors, record = found
        random = {k: tensors.pop(k) for k in list(tensors) if k.startswith(f"{RANDOM}.")}
        checkpoint.unpack(tensors, modules, optimizer)
        epoch = int(record["epoch"])
        whole = "batch" not in record
        self._drop_metrics(stage, after=epoch + (not whole), newest=record if whole else None)
        return Progress(
            epoch=epoch,
            batch=int(record.get("batch", 0)),
            values=tuple(record.get("values", ())),
            random={k.removeprefix(f"{RANDOM}."): state for k, state in random.items()},
        )

    def restore_epoch(
        self, stage: str, modules: Mapping[str, nn.Module], optimizer: Optimizer
    ) -> int:
        """Load a stage's newest checkpoint, made by `save_epoch`; return its epoch, or 0."""
        return self.restore(stage, modules, optimizer).epoch

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged records; a line that a kill left half-written is passed over."""
        return ranks.from_first(lambda: list(self._records()))

    def _write(
        self, stage: str, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> None:
        folder = self.path / "checkpoints" / stage / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder, tensors, record)
        for older in self._checkpoints(stage)[: -self.keep]:
            discard(older)

    def _newest(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest checkpoint that is whole; those that are not are removed."""
        folders = self._checkpoints(stage)
        for folder in reversed(folders):
            try:
                found = checkpoint.load(folder)
            except checkpoint.CheckpointError as error:
                if folder == folders[0]:
                    raise
                warnings.warn(f"{error}; going on from the one before it", stacklevel=4)
                continue
            for broken in folders[folders.index(folder) + 1 :]:
                discard(broken)
            return found
        return None

    def _checkpoints(self, stage: str) -> list[Path]:
        return sorted((self.path / "checkpoints" / stage).glob("epoch-*"))

    def _records(self) -> Iterator[dict[str, Any]]:
        file = self.path / METRICS
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def _drop_metrics(
        self, stage: str, *, after: int, newest: Mapping[str, Any] | None = None
    ) -> None:
        if not ranks.is_first():
            return
        # The newest record is rewritten: a kill may have come between checkpoint and log.
        kept = [
            record
            for record in self._records()
            if record["stage"] != stage or record["epoch"] < after
        ]
        kept += [dict(newest)] if newest else []
        write_file(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
