"""linf_step_ in Triton: the bits of torch's formula."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.layout import dense, laid_out_as, written
from wcmi_fast.backends.triton.launch import (
    TYPE_NAMES,
    ceil_div,
    configuration,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.program import Program

# Eight elements for each thread: one access of 16 bytes for half types.
CONFIGURATION = configuration(4, 1, BLOCK=1024)

# A product that is fused with a sum rounds once where torch rounds twice.
UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def at_least(x: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """Return the maximum; a NaN x stays, a NaN bound counts as none."""
    return tl.where(bound > x, bound, x)


@triton.jit
def at_most(x: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """Return the minimum; a NaN x stays, a NaN bound counts as none."""
    return tl.where(bound < x, bound, x)


@triton.jit
def stored(number: tl.tensor, storage: tl.constexpr) -> tl.tensor:
    """Return a number as a storage type holds it, in float32."""
    return tl.full((), number, tl.float32).to(storage).to(tl.float32)


@triton.jit
def sign_step(
    x: tl.tensor,
    grad: tl.tensor,
    origin: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Step one block of flat memory; the numbers are rounded to the storage type first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    before = tl.load(x + at, mask=mask)
    g = tl.load(grad + at, mask=mask).to(tl.float32)
    centre = tl.load(origin + at, mask=mask).to(tl.float32)
    eps, step_size = stored(eps, before.dtype), stored(step_size, before.dtype)
    low, high = centre - eps, centre + eps
    step = tl.where(g > 0, step_size, 0.0) - tl.where(g < 0, step_size, 0.0)
    # Torch rounds each sum to the storage type. Rounding is monotone, so that it may as well follow
    # the maxima and minima.
    moved = before.to(tl.float32) + step.to(tl.float32)
    moved = at_most(at_least(moved, low), high)
    moved = at_most(at_least(moved, stored(lo, before.dtype)), stored(hi, before.dtype))
    # NaN where a face of the ball is: torch's bounds pass it on.
    moved = tl.where((low == low) & (high == high), moved, low + high)
    tl.store(x + at, tl.where(g == g, moved.to(before.dtype), before), mask=mask)


def linf_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected sign step in place; see _ops.py."""
    target = dense(x)
    count = x.numel()
    if count:
        arguments = {
            "x": target, "grad": laid_out_as(grad, target), "origin": laid_out_as(origin, target),
            "count": count, "eps": eps, "step_size": step_size, "lo": lo, "hi": hi, **UNFUSED,
        }  # fmt: skip
        grid = (ceil_div(count, CONFIGURATION.kwargs["BLOCK"]),)
        launch(sign_step, lambda _: grid, arguments, CONFIGURATION, (CONFIGURATION,), ())
    written(x, target)


def programs() -> list[Program]:
    """Return the kernel for each dtype."""
    return [_program(dtype) for dtype in TYPE_NAMES]


def _program(dtype: torch.dtype) -> Program:
    block = CONFIGURATION.kwargs["BLOCK"]
    pointers = dict.fromkeys(("x", "grad", "origin"), f"*{TYPE_NAMES[dtype]}")
    numbers = dict.fromkeys(("eps", "step_size", "lo", "hi"), "fp32")
    return Program(
        name=f"linf_step_/sign_step {program_name(dtype, CONFIGURATION)}",
        kernel=sign_step,
        signature=signature(sign_step, {**pointers, **numbers}, CONFIGURATION.kwargs),
        constants=CONFIGURATION.kwargs,
        options={**options(CONFIGURATION), **UNFUSED},
        default=True,
        matrix=False,
        flops=0,
        bytes=4 * block * dtype.itemsize,
    )
