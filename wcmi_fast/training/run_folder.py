"""A run's folder: metrics, checkpoints per stage and results, so that a run can be resumed.

A run is a sequence of named stages. A stage of several epochs leaves a checkpoint after each; a
finished one leaves `stages/<name>.json`. What a killed run had finished is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wcmi_fast.files import discard, write_file
from wcmi_fast.training import checkpoint

METRICS, SETTINGS = "metrics.jsonl", "settings.json"


class RunFolder:
    """The folder of one run; made if it is not there.

    Args:
        path: the folder.

    Raises:
        OSError: it cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        file = self.path / SETTINGS
        wanted = json.loads(json.dumps(settings))
        there = json.loads(file.read_text()) if file.exists() else wanted
        keys = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
        if keys:
            raise ValueError(
                f"{owner}: folder {self.path} holds a run with another {', '.join(keys)}, wanted "
                "the same settings or a new folder"
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
        """Return how many epochs of a stage have a checkpoint."""
        folders = self._epoch_folders(stage)
        return int(folders[-1].name.removeprefix("epoch-")) if folders else 0

    def save_epoch(
        self,
        stage: str,
        epoch: int,
        modules: Mapping[str, nn.Module],
        optimizer: Optimizer,
        metrics: Mapping[str, float],
    ) -> None:
        """Checkpoint a stage after `epoch` epochs, log its metrics, drop the older checkpoint."""
        folder = self._checkpoints(stage) / f"epoch-{epoch:04d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        record = {"stage": stage, "epoch": epoch, **metrics}
        checkpoint.save(folder, checkpoint.pack(modules, optimizer), record)
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        for older in self._epoch_folders(stage)[:-1]:
            discard(older)

    def restore_epoch(
        self, stage: str, modules: Mapping[str, nn.Module], optimizer: Optimizer
    ) -> int:
        """Load a stage's newest checkpoint into modules and optimiser; return its epoch, or 0."""
        folders = self._epoch_folders(stage)
        if not folders:
            self._drop_metrics(stage, after=0)
            return 0
        tensors, record = checkpoint.load(folders[-1])
        checkpoint.unpack(tensors, modules, optimizer)
        epoch = int(record["epoch"])
        self._drop_metrics(stage, after=epoch, newest=record)
        return epoch

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged records; a line that a kill left half-written is passed over."""
        return list(self._records())

    def _epoch_folders(self, stage: str) -> list[Path]:
        return sorted(self._checkpoints(stage).glob("epoch-*"))

    def _checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

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
        # The newest record is rewritten: a kill may have come between checkpoint and log.
        kept = [
            record
            for record in self._records()
            if record["stage"] != stage or record["epoch"] < after
        ]
        kept += [dict(newest)] if newest else []
        write_file(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
