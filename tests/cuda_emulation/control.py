"""The settings of an emulated module: order, OS threads and blocks, and what it says of errors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

INTEGER = ctypes.c_int64
CONTROLS = {
    "error": ((), ctypes.c_char_p),
    "set_seed": ((INTEGER,), None),
    "set_os_threads": ((INTEGER,), None),
    "only_blocks": ((INTEGER, INTEGER), None),
    "launches": ((), INTEGER),
    "last_stream": ((), INTEGER),
    "last_device": ((), INTEGER),
}


@cache
def controls(path: str) -> ctypes.CDLL:
    """Return the module's C functions, each with its types, under their names in scheduler.cpp."""
    return _typed(ctypes.CDLL(path), CONTROLS)


def _typed(library: ctypes.CDLL, functions: dict[str, tuple[Any, Any]]) -> ctypes.CDLL:
    for name, (arguments, result) in functions.items():
        function = getattr(library, f"wcmi_emulation_{name}")
        function.argtypes, function.restype = arguments, result
    return library


def error(module: ModuleType) -> str:
    """Return what the last launch did wrong, or nothing."""
    return controls(module.__file__).wcmi_emulation_error().decode()


def launches(module: ModuleType) -> int:
    """Return how many kernels have been launched."""
    return controls(module.__file__).wcmi_emulation_launches()


TRAFFIC = {
    "watch": ((INTEGER, INTEGER), None),
    "bytes_read": ((), INTEGER),
    "bytes_written": ((), INTEGER),
}


class Traffic(NamedTuple):
    """Bytes that kernels read and wrote."""

    read: int
    written: int


def traffic(module: ModuleType, address: int, size: int, work: Callable[[], object]) -> Traffic:
    """Return what kernels of the flavour "count" move in a range of memory during `work`."""
    library = _typed(ctypes.CDLL(module.__file__), TRAFFIC)
    library.wcmi_emulation_watch(address, size)
    work()
    return Traffic(library.wcmi_emulation_bytes_read(), library.wcmi_emulation_bytes_written())


@contextmanager
def seed(module: ModuleType, value: int) -> Iterator[None]:
    """Run blocks and threads in an order of their own; 0 is theirs by number."""
    library = controls(module.__file__)
    library.wcmi_emulation_set_seed(value)
    try:
        yield
    finally:
        library.wcmi_emulation_set_seed(int(os.environ.get("WCMI_EMULATION_SEED", "0")))


@contextmanager
def only_blocks(module: ModuleType, first: int, count: int) -> Iterator[None]:
    """Run of every launch only `count` blocks from `first` on, from the end if it is negative."""
    library = controls(module.__file__)
    library.wcmi_emulation_only_blocks(first, count)
    try:
        yield
    finally:
        library.wcmi_emulation_only_blocks(0, -1)
