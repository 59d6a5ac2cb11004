"""linf_start_ in Triton: the numbers of Philox4x32-10, bit for bit those of wcmi_fast/philox.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.layout import written
from wcmi_fast.backends.triton.launch import (
    TYPE_NAMES,
    ceil_div,
    configuration,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.linf_step import UNFUSED, at_least, at_most
from wcmi_fast.backends.triton.program import Program

# Two counters, eight elements, for each thread.
CONFIGURATION = configuration(4, 1, COUNTERS=256)


@triton.jit
def uniform(counters: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """Return four numbers in [-1, 1) for each int64 counter, in the order of the elements."""
    zero = tl.zeros_like(counters).to(tl.uint32)
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * counters.shape[0])
    # 24 bits, which float32 holds exactly.
    return (words >> 8).to(tl.int32).to(tl.float32) * (2.0**-23) - 1.0


@triton.jit
def random_start(
    x: tl.tensor,
    origin: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    seed: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    COUNTERS: tl.constexpr,
) -> None:
    """Write the elements of some whole counters."""
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    at = first * 4 + tl.arange(0, 4 * COUNTERS)
    mask = at < count
    u = uniform(first + tl.arange(0, COUNTERS), tl.full((), seed, tl.int64))
    centre = tl.load(origin + at, mask=mask).to(tl.float32)
    point = centre + tl.full((), eps, tl.float32) * u
    point = at_most(at_least(point, lo), hi)
    tl.store(x + at, point.to(x.dtype.element_ty), mask=mask)


def linf_start_(x: Tensor, origin: Tensor, eps: float, seed: int, lo: float, hi: float) -> None:
    """Write a random start; in index order, so that the memory format changes nothing."""
    target = x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    count = x.numel()
    if count:
        arguments = {
            "x": target, "origin": origin.contiguous(), "count": count, "eps": eps, "seed": seed,
            "lo": lo, "hi": hi, **UNFUSED,
        }  # fmt: skip
        grid = (ceil_div(count, 4 * CONFIGURATION.kwargs["COUNTERS"]),)
        launch(random_start, lambda _: grid, arguments, CONFIGURATION, (CONFIGURATION,), ())
    written(x, target)


def programs() -> list[Program]:
    """Return the kernel for each dtype."""
    return [_program(dtype) for dtype in TYPE_NAMES]


def _program(dtype: torch.dtype) -> Program:
    elements = 4 * CONFIGURATION.kwargs["COUNTERS"]
    pointers = dict.fromkeys(("x", "origin"), f"*{TYPE_NAMES[dtype]}")
    numbers = {**dict.fromkeys(("eps", "lo", "hi"), "fp32"), "seed": "i64"}
    return Program(
        name=f"linf_start_/random_start {program_name(dtype, CONFIGURATION)}",
        kernel=random_start,
        signature=signature(random_start, {**pointers, **numbers}, CONFIGURATION.kwargs),
        constants=CONFIGURATION.kwargs,
        options={**options(CONFIGURATION), **UNFUSED},
        default=True,
        matrix=False,
        flops=0,
        bytes=2 * elements * dtype.itemsize,
    )
