"""l2_step_ in Triton: one program for each row, float32 arithmetic, sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.layout import dense, laid_out_as, written
from wcmi_fast.backends.triton.launch import (
    TYPE_NAMES,
    configuration,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.linf_step import UNFUSED, at_least, at_most
from wcmi_fast.backends.triton.program import Program

CONFIGURATION = configuration(8, 1, BLOCK=2048)


@triton.jit
def magnitude_bits(v: tl.tensor) -> tl.tensor:
    """Return the bits of |v|: integers in the order of |v|, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaled(v: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """Return v / largest, whose squares stay in range; infinities count as +-1, the rest as 0."""
    infinities = tl.where(v == float("inf"), 1.0, tl.where(v == float("-inf"), -1.0, 0.0))
    divisor = tl.where(largest == 0.0, 1.0, largest)
    return tl.where(largest == float("inf"), infinities, tl.math.div_rn(v, divisor))


@triton.jit
def moved_along(
    start: tl.tensor, length: tl.tensor, v: tl.tensor, largest: tl.tensor, norm: tl.tensor
) -> tl.tensor:
    """Return start + length v / |v|, where norm is that of the scaled v, at least 1 but for 0."""
    return start + length * tl.math.div_rn(scaled(v, largest), at_least(norm, 1.0))


@triton.jit
def _load(x: tl.tensor, columns: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _moved(
    x: tl.tensor,
    grad: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    step_size: tl.tensor,
    largest: tl.tensor,
    norm: tl.tensor,
) -> tl.tensor:
    start = _load(x, columns, mask)
    return moved_along(start, step_size, _load(grad, columns, mask), largest, norm)


@triton.jit
def _vector(
    x: tl.tensor,
    grad: tl.tensor,
    origin: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    step_size: tl.tensor,
    largest: tl.tensor,
    norm: tl.tensor,
    OFFSET: tl.constexpr,
) -> tl.tensor:
    """Return a block of grad, or of what the step leaves between x and origin."""
    if OFFSET:
        v = _moved(x, grad, columns, mask, step_size, largest, norm)
        v -= _load(origin, columns, mask)
    else:
        v = _load(grad, columns, mask)
    return tl.where(mask, v, 0.0)


@triton.jit
def _norm(
    x: tl.tensor,
    grad: tl.tensor,
    origin: tl.tensor,
    size: tl.tensor,
    step_size: tl.tensor,
    largest: tl.tensor,
    norm: tl.tensor,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return a vector's largest magnitude, NaN if it has one, and the norm of the scaled vector."""
    top = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, size, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        mask = columns < size
        v = _vector(x, grad, origin, columns, mask, step_size, largest, norm, OFFSET)
        top = tl.maximum(top, magnitude_bits(v))
    own_largest = tl.max(top, 0).to(tl.float32, bitcast=True)
    squares = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, size, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        mask = columns < size
        v = _vector(x, grad, origin, columns, mask, step_size, largest, norm, OFFSET)
        v = tl.where(mask, scaled(v, own_largest), 0.0)
        squares += v * v
    return own_largest, tl.math.sqrt_rn(tl.sum(squares, 0))


@triton.jit
def normalised_step(
    x: tl.tensor,
    grad: tl.tensor,
    origin: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Step one row, unless its gradient has a NaN."""
    row = tl.program_id(0).to(tl.int64) * size
    x += row
    grad += row
    origin += row
    step_size = tl.full((), step_size, tl.float32)
    eps = tl.full((), eps, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    largest, norm = _norm(x, grad, origin, size, step_size, zero, zero, False, BLOCK)
    farthest, distance = _norm(x, grad, origin, size, step_size, largest, norm, True, BLOCK)
    inside = farthest * distance <= eps
    for at in range(0, size, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        mask = columns < size
        moved = _moved(x, grad, columns, mask, step_size, largest, norm)
        centre = _load(origin, columns, mask)
        cut = moved_along(centre, eps, moved - centre, farthest, distance)
        moved = at_most(at_least(tl.where(inside, moved, cut), lo), hi)
        tl.store(x + columns, moved.to(x.dtype.element_ty), mask=mask & (largest == largest))


def l2_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected step along the normalised gradient in place; see _ops.py."""
    target = dense(x)
    rows = len(x)
    if x.numel():
        arguments = {
            "x": target, "grad": laid_out_as(grad, target), "origin": laid_out_as(origin, target),
            "size": x.numel() // rows, "eps": eps, "step_size": step_size, "lo": lo, "hi": hi,
            **UNFUSED,
        }  # fmt: skip
        launch(normalised_step, lambda _: (rows,), arguments, CONFIGURATION, (CONFIGURATION,), ())
    written(x, target)


def programs() -> list[Program]:
    """Return the kernel for each dtype."""
    return [_program(dtype) for dtype in TYPE_NAMES]


def _program(dtype: torch.dtype) -> Program:
    pointers = dict.fromkeys(("x", "grad", "origin"), f"*{TYPE_NAMES[dtype]}")
    numbers = dict.fromkeys(("eps", "step_size", "lo", "hi"), "fp32")
    return Program(
        name=f"l2_step_/normalised_step {program_name(dtype, CONFIGURATION)}",
        kernel=normalised_step,
        signature=signature(normalised_step, {**pointers, **numbers}, CONFIGURATION.kwargs),
        constants=CONFIGURATION.kwargs,
        options={**options(CONFIGURATION), **UNFUSED},
        default=True,
        matrix=False,
        flops=0,
        bytes=4 * CONFIGURATION.kwargs["BLOCK"] * dtype.itemsize,
    )
