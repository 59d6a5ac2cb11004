"""Timing variants against each other in one run, and the memory and the machine they ran on."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from schema import Environment, Ratio

import wcmi_fast
from wcmi_fast.backends import cpu

Call = Callable[[], object]
Clock = Callable[[], float]


def interleaved(
    variants: Mapping[str, Call],
    *,
    rounds: int = 15,
    warmup: int = 2,
    min_sample_s: float = 2e-3,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Return each variant's seconds per call, one sample a round.

    Every round samples every variant, so that what disturbs the machine for longer than a round
    disturbs all alike; the order changes from round to round. A sample is one call, or as many as
    take `min_sample_s`.
    """
    calls = {name: _calibrate(call, warmup, min_sample_s, clock) for name, call in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        gc.collect()
        for name in _order(list(variants), index):
            times[name].append(_sample(variants[name], calls[name], clock) / calls[name])
    return times


def _order(names: list[str], index: int) -> list[str]:
    """Rotate by one every second round, and run the other one backwards."""
    start = index // 2 % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if index % 2 else order


def _calibrate(call: Call, warmup: int, min_sample_s: float, clock: Clock) -> int:
    for _ in range(warmup):
        call()
    count = 1
    while (taken := _sample(call, count, clock)) < min_sample_s:
        count = max(2 * count, math.ceil(count * min_sample_s / taken) if taken > 0 else 0)
    return count


def _sample(call: Call, count: int, clock: Clock) -> float:
    # As timeit does: a collection in the middle would be charged to whoever ran then.
    gc.disable()
    try:
        start = clock()
        for _ in range(count):
            call()
        return clock() - start
    finally:
        gc.enable()


def ratio(
    times: Mapping[str, Sequence[float]],
    a: str,
    b: str,
    *,
    better: Literal["lower", "higher"] = "lower",
    target: float | None = None,
) -> Ratio:
    """Return the median over rounds of a's time / b's, with its 95 % interval.

    The interval is the one between two order statistics that holds the median with probability
    0.95 whatever the distribution; with fewer than six rounds it is the whole range.
    """
    ratios = np.sort(np.asarray(times[a]) / np.asarray(times[b]))
    last = len(ratios) - 1
    below = _below(len(ratios))
    return Ratio(
        low=float(ratios[below]),
        median=float(np.median(ratios)),
        high=float(ratios[last - below]),
        better=better,
        target=target,
    )


def _below(count: int) -> int:
    """Return how many of `count` sorted samples lie below the 95 % interval of their median."""
    below, tail = 0, 0.5**count
    while (tail := tail + math.comb(count, below + 1) * 0.5**count) <= 0.025:
        below += 1
    return below


def peak_memory(call: Call) -> int:
    """Return the bytes of resident memory that a call needs at its peak, its result among them.

    The kernel's own high-water mark, set back before; where that is forbidden, a thread's samples.
    The mark is right to some hundred KiB: Linux adds up what each core has counted now and then.
    A first call is not counted: it may load code and fill caches that stay.
    """
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled_peak(call)
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _sampled_peak(call: Call, every_s: float = 1e-3) -> int:
    before = peak = _status_bytes("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every_s):
            peak = max(peak, _status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, _status_bytes("VmRSS"))
        del result
    finally:
        done.set()
        watcher.join()
    return peak - before


def environment() -> Environment:
    """Return what a figure depends on beside the code that is timed."""
    return Environment(
        threads=torch.get_num_threads(),
        simd=cpu.simd_levels()[1],
        cpu=_cpu_model(),
        blas="MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other",
        versions={
            "wcmi_fast": wcmi_fast.__version__,
            "torch": str(torch.__version__),  # a class of its own, which JSON does not know
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
    )


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unknown"


def _command() -> str:
    """Return the command line of this process, with the variables that decide its figures."""
    names = [name for name in ("OMP_NUM_THREADS", "WCMI_FAST_SIMD") if name in os.environ]
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    else:
        words = ["python", str(program)] if program.suffix == ".py" else [program.name]
    variables = [f"{name}={os.environ[name]}" for name in names]
    return shlex.join([*variables, *words, *sys.argv[1:]])
