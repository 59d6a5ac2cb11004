"""The statistics of scores that _ops.py names: running states, their sum, and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast import _ops
from wcmi_fast.backends.triton.launch import (
    ceil_div,
    configuration,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.numbers import (
    add_exponentials,
    clamped,
    finite_or_zero,
    log_of_sum,
    rescaled,
    softplus,
)
from wcmi_fast.backends.triton.program import Program

LSE = tl.constexpr(_ops.LSE)
SOFTPLUS = tl.constexpr(_ops.SOFTPLUS)
CLAMPED_LSE = tl.constexpr(_ops.CLAMPED_LSE)
SUM = tl.constexpr(_ops.SUM)
SQUARE = tl.constexpr(_ops.SQUARE)

# A state: positives; the maximum and the sum of exponentials for LSE; softplus; both for
# CLAMPED_LSE; sum; square.
PLANES = 8
FINISH_CONFIGURATION = configuration(4, 1, BLOCK=256)


@triton.jit
def no_scores(ROWS: tl.constexpr) -> tl.tensor:
    """Return the state of rows, but the positives, before their first score."""
    zero = tl.zeros((ROWS,), dtype=tl.float32)
    none = zero - float("inf")
    return none, zero, zero, none, zero, zero, zero


@triton.jit
def add_scores(
    state: tl.tensor,
    T: tl.tensor,
    others: tl.tensor,
    tau: tl.tensor,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """Add scores T (R, C) to the state of R rows; T is -inf but where `others` is set."""
    largest, total, plus, clamped_largest, clamped_total, plain, square = state
    if LSE & WHICH:
        largest, total = add_exponentials(largest, total, T)
    if SOFTPLUS & WHICH:
        plus += tl.sum(softplus(T), axis=1)
    if CLAMPED_LSE & WHICH:
        x = tl.where(others, clamped(T, tau), -float("inf"))
        clamped_largest, clamped_total = add_exponentials(clamped_largest, clamped_total, x)
    if SUM & WHICH:
        plain += tl.sum(tl.where(others, T, 0.0), axis=1)
    if SQUARE & WHICH:
        x = tl.abs(T) + 1
        square += tl.sum(tl.where(others, 0.5 * x * x, 0.0), axis=1)
    return largest, total, plus, clamped_largest, clamped_total, plain, square


@triton.jit
def store_state(
    states: tl.tensor,
    state: tl.tensor,
    at: tl.tensor,
    size: tl.tensor,
    mask: tl.tensor,
    WHICH: tl.constexpr,
) -> None:
    """Write a state to its planes, `size` apart, but the first, which is for the positives."""
    largest, total, plus, clamped_largest, clamped_total, plain, square = state
    step = tl.full((), size, tl.int64)
    if LSE & WHICH:
        tl.store(states + step + at, largest, mask=mask)
        tl.store(states + 2 * step + at, total, mask=mask)
    if SOFTPLUS & WHICH:
        tl.store(states + 3 * step + at, plus, mask=mask)
    if CLAMPED_LSE & WHICH:
        tl.store(states + 4 * step + at, clamped_largest, mask=mask)
        tl.store(states + 5 * step + at, clamped_total, mask=mask)
    if SUM & WHICH:
        tl.store(states + 6 * step + at, plain, mask=mask)
    if SQUARE & WHICH:
        tl.store(states + 7 * step + at, square, mask=mask)


@triton.jit
def _sum_of_planes(
    plane: tl.tensor, part: tl.tensor, parts: tl.tensor, mask: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(plane, mask=mask, other=0.0)
        plane += part
    return total


@triton.jit
def _log_of_planes(
    plane: tl.tensor,
    step: tl.tensor,
    part: tl.tensor,
    parts: tl.tensor,
    mask: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    largest = total - float("inf")
    for _ in range(parts):
        other = tl.load(plane, mask=mask, other=0.0)
        now = tl.maximum(largest, other)
        shift = finite_or_zero(now)
        more = tl.load(plane + step, mask=mask, other=0.0)
        total = rescaled(total, largest, shift) + rescaled(more, other, shift)
        largest = now
        plane += part
    return log_of_sum(largest, total)


@triton.jit
def finish(
    states: tl.tensor,
    stats: tl.tensor,
    parts: tl.tensor,
    size: tl.tensor,
    WHICH: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the (parts, PLANES, size) states in their order, and write the statistics."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    step = tl.full((), size, tl.int64)
    part = PLANES * step
    states += at
    stats += at
    tl.store(stats, _sum_of_planes(states, part, parts, mask, BLOCK), mask=mask)
    if LSE & WHICH:
        stats += step
        result = _log_of_planes(states + step, step, part, parts, mask, BLOCK)
        tl.store(stats, result, mask=mask)
    if SOFTPLUS & WHICH:
        stats += step
        tl.store(stats, _sum_of_planes(states + 3 * step, part, parts, mask, BLOCK), mask=mask)
    if CLAMPED_LSE & WHICH:
        stats += step
        result = _log_of_planes(states + 4 * step, step, part, parts, mask, BLOCK)
        tl.store(stats, result, mask=mask)
    if SUM & WHICH:
        stats += step
        tl.store(stats, _sum_of_planes(states + 6 * step, part, parts, mask, BLOCK), mask=mask)
    if SQUARE & WHICH:
        stats += step
        tl.store(stats, _sum_of_planes(states + 7 * step, part, parts, mask, BLOCK), mask=mask)


def finished(states: Tensor, which: int) -> Tensor:
    """Return the statistics (1 + S, N, P) of states (parts, PLANES, N, P)."""
    parts, _, n, p = states.shape
    stats = states.new_empty((1 + len(_ops.asked(which)), n, p))
    arguments = {
        "states": states, "stats": stats, "parts": parts, "size": n * p,
        "WHICH": which, "PLANES": PLANES,
    }  # fmt: skip
    launch(
        finish, lambda tile: (ceil_div(n * p, tile["BLOCK"]),), arguments,
        FINISH_CONFIGURATION, (FINISH_CONFIGURATION,), (),
    )  # fmt: skip
    return stats


@triton.jit
def slopes(
    T: tl.tensor,
    own: tl.tensor,
    mask: tl.tensor,
    at: tl.tensor,
    lse: tl.tensor,
    dstats: tl.tensor,
    size: tl.tensor,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """Return the gradient of scores T whose statistics' gradients lie at `at` of each plane."""
    result = tl.zeros_like(T)
    step = tl.full((), size, tl.int64)
    d = dstats
    if LSE & WHICH:
        d += step
        shift = tl.load(lse + at, mask=mask, other=0.0)
        # Where every score is -inf the weights are 0 rather than exp(-inf + inf).
        shift = tl.where(shift == -float("inf"), 0.0, shift)
        result += tl.load(d + at, mask=mask, other=0.0) * tl.exp(T - shift)
    if SOFTPLUS & WHICH:
        d += step
        result += tl.load(d + at, mask=mask, other=0.0) * tl.sigmoid(T)
    if CLAMPED_LSE & WHICH:
        d += step
    if SUM & WHICH:
        d += step
        result += tl.load(d + at, mask=mask, other=0.0)
    if SQUARE & WHICH:
        d += step
        slope = T + tl.where(T > 0, 1.0, tl.where(T < 0, -1.0, 0.0))
        result += tl.load(d + at, mask=mask, other=0.0) * slope
    return tl.where(own, tl.load(dstats + at, mask=mask & own, other=0.0), result)


def programs() -> list[Program]:
    """Return the kernel that finishes, for every statistic."""
    constants = {"WHICH": sum(_ops.STATISTICS), "PLANES": PLANES, **FINISH_CONFIGURATION.kwargs}
    return [
        Program(
            name=f"critic_stats/finish {program_name(torch.float32, FINISH_CONFIGURATION)}",
            kernel=finish,
            signature=signature(finish, {"states": "*fp32", "stats": "*fp32"}, constants),
            constants=constants,
            options=options(FINISH_CONFIGURATION),
            default=True,
            matrix=False,
            flops=0,
            bytes=4 * (PLANES + 6) * FINISH_CONFIGURATION.kwargs["BLOCK"],
        )
    ]
