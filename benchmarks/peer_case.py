"""What peers.py checks and times: one program of a peer beside the same one of ours."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class PeerFailedError(Exception):
    """A peer raised; the text says what."""


@dataclass(frozen=True)
class Values:
    """What a check found: the text for the table, and the largest error beside the allowed one."""

    found: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        peer, program: the peer and what of it runs.
        name, size: what is computed, on what.
        definition: "same", or how the peer's definition differs from ours.
        check: compares the values; raises PeerFailedError where the peer does not run.
        programs: what is timed: "ours", "theirs", for attacks also "gradient", the steps' gradients
            alone.
        steps: a time is divided by it; 1 for bounds.
    """

    peer: str
    program: str
    name: str
    size: str
    definition: str
    check: Callable[[], Values]
    programs: dict[str, Callable[[], object]]
    steps: int = 1


@contextmanager
def peer_runs() -> Iterator[None]:
    """Turn whatever a peer raises into PeerFailedError, so that our own errors stay errors."""
    try:
        yield
    except Exception as error:
        raise PeerFailedError(f"{type(error).__name__}: {error}") from error


def import_peer(module: str) -> None:
    """Import a peer's module; raise PeerFailedError if that fails, for whatever reason."""
    with peer_runs():
        importlib.import_module(module)
