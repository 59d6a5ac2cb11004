"""SIGINT and SIGTERM that wait for the end of a training step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[signal.Signals] = []


class StoppedError(Exception):
    """A signal stopped a stage after a step, and its state was saved.

    Attributes:
        signal: which one.
        stage: name of the stage.
        epoch, batch: how far it came, in whole epochs and batches of the next.
    """

    def __init__(self, received: signal.Signals, stage: str, epoch: int, batch: int) -> None:
        super().__init__(
            f"stopped by {received.name} in stage {stage!r} after epoch {epoch}, batch {batch}"
        )
        self.signal, self.stage, self.epoch, self.batch = received, stage, epoch, batch


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Let SIGINT and SIGTERM end a stage after its step, saved; a second one acts at once.

    Only the main thread may install handlers.
    """
    earlier: dict[signal.Signals, object] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        _received.append(signal.Signals(number))
        restore()

    def restore() -> None:
        for each, handler in earlier.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    _received.clear()
    for each in (signal.SIGINT, signal.SIGTERM):
        earlier[each] = signal.signal(each, receive)
    try:
        yield
    finally:
        restore()
        _received.clear()


def received() -> signal.Signals | None:
    """Return the signal that asks for an end, or None."""
    return _received[0] if _received else None
