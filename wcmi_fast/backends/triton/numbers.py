"""Functions of numbers that kernels share: infinities are no special case, a NaN is never lost."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finite_or_zero(x: tl.tensor) -> tl.tensor:
    """Return x where it is finite, else 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def clamped(x: tl.tensor, tau: tl.tensor) -> tl.tensor:
    """Return x clamped to [-tau, tau]; tl.clamp would lose a NaN."""
    x = tl.where(x < -tau, -tau, x)
    return tl.where(x > tau, tau, x)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """Return log(1 + x) for 0 <= x <= 1 to float32 accuracy, which log has not near 1.

    The series of 2 artanh(s), s = x / (2 + x) <= 1/3.
    """
    s = x / (2 + x)
    q = s * s
    series = 1 / 13 + q * (1 / 15)
    series = 1 / 9 + q * (1 / 11 + q * series)
    series = 1 / 5 + q * (1 / 7 + q * series)
    return 2 * (s + s * q * (1 / 3 + q * series))


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """Return log(1 + exp(x))."""
    return tl.where(x < 0, 0.0, x) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def rescaled(total: tl.tensor, largest: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """Return a sum of exponentials relative to finite_or_zero(largest) relative to shift."""
    # 0 times what may be infinite stays 0.
    return tl.where(total == 0, 0.0, total * tl.exp(finite_or_zero(largest) - shift))


@triton.jit
def add_exponentials(largest: tl.tensor, total: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Add exp(x) (R, C) to sums (R,) relative to finite_or_zero(largest); return both.

    Only finite maxima shift: a +inf makes its sum +inf. A maximum may skip a NaN, its sum does not.
    """
    now = tl.maximum(largest, tl.max(x, axis=1))
    shift = finite_or_zero(now)
    total = rescaled(total, largest, shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
    return now, total


@triton.jit
def log_of_sum(largest: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return the log-sum-exp of a sum relative to finite_or_zero(largest)."""
    # In float64: float32's log is an approximation near 1, where a single score is the sum.
    return (finite_or_zero(largest) + tl.log(total.to(tl.float64))).to(tl.float32)
