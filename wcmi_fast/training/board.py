"""Metrics for TensorBoard, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def writer(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """Return what writes records of `RunFolder` as TensorBoard's scalars STAGE/NAME, by epoch.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "train: tensorboard=True needs the package tensorboard: "
            "pip install 'wcmi_fast[tensorboard]'"
        ) from None
    board = SummaryWriter(str(folder))

    def write(record: Mapping[str, Any]) -> None:
        for name in sorted(record.keys() - {"stage", "epoch"}):
            board.add_scalar(f"{record['stage']}/{name}", record[name], record["epoch"])
        board.flush()

    return write
