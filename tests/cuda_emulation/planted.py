"""Runs the kernels of planted.cu, right or with a bug, and says whether their results are right."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

from cuda_emulation.control import controls

ROWS, COLUMNS, BINS = 16, 36, 8
SOURCE = Path(__file__).with_name("planted.cu").read_text()


def _members(enumeration: str) -> list[str]:
    body = SOURCE.split(f"enum {enumeration} : int {{")[1].split("}")[0]
    return [name.strip().removeprefix("k") for name in body.split(",")]


BUGS, KERNELS = _members("Bug"), _members("Kernel")


def wanted_results(kernel: str, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the kernel writes to `out` and `counts`; NaN and 0 where it writes nothing."""
    out, counts = np.full(1 + inputs.size, np.nan, np.float32), np.zeros(BINS, np.int32)
    match kernel:
        case "Sum":
            out[:ROWS] = 3 * inputs.sum(axis=1)
        case "Transpose":
            out[: inputs.size] = inputs.T.ravel()
        case "Blocks" | "Threads":
            counts[:] = np.bincount((inputs.ravel() * BINS).astype(int), minlength=BINS)
        case "Reverse":
            out[: inputs.size] = inputs.reshape(-1, 32)[:, ::-1].ravel()
        case "Last":
            out[0], out[1 : 1 + ROWS], counts[0] = inputs.sum(), inputs.sum(axis=1), ROWS
        case "Copy":
            out[: inputs.size] = inputs.ravel()
    return out, counts


def run(path: str, kernel: str, bug: str, margin: int) -> tuple[bool, str]:
    """Return whether the results are right, and what the emulation found wrong.

    The margin keeps what a bug writes out of bounds from the process's other memory.
    """
    # Sums of these are exact in every order.
    inputs = np.random.default_rng(0).integers(0, 64, (ROWS, COLUMNS)).astype(np.float32) / 64
    wanted = wanted_results(kernel, inputs)
    start = (inputs.ravel(), np.full_like(wanted[0], np.nan), np.zeros_like(wanted[1]))
    buffers = [np.pad(array, margin, constant_values=1) for array in start]
    given, *got = (buffer[margin : len(buffer) - margin] for buffer in buffers)
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (given, *got)]
    library = controls(path)
    library.planted(KERNELS.index(kernel), BUGS.index(bug), *addresses, ROWS, COLUMNS)
    equal = (np.array_equal(g, w, equal_nan=True) for g, w in zip(got, wanted, strict=True))
    return all(equal), library.wcmi_emulation_error().decode()


if __name__ == "__main__":
    for case in sys.argv[1:]:
        sys.stderr.write(f"case {case}\n")
        sys.stderr.flush()
        run(os.environ["WCMI_EMULATION_MODULE"], *case.split(":"), margin=0)
