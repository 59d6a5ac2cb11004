"""The updates of an attack, in place, on the fastest back end."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from wcmi_fast import reference
from wcmi_fast._ops import DTYPES, accumulation_dtype
from wcmi_fast.backends import registry
from wcmi_fast.backends.layout import dense


def _check_alike(function: str, name: str, written: Tensor, others: dict[str, Tensor]) -> None:
    """Check a tensor that `function` writes, and that others have its shape, dtype and device."""
    if written.dtype not in DTYPES:
        raise TypeError(
            f"{function}: {name} has dtype {written.dtype}, wanted a float dtype of {DTYPES}"
        )
    for other_name, other in others.items():
        who = f"{function}: {other_name}"
        if other.shape != written.shape:
            raise ValueError(
                f"{who} has shape {tuple(other.shape)}, wanted {name}'s, {tuple(written.shape)}"
            )
        if other.dtype != written.dtype:
            raise TypeError(f"{who} has dtype {other.dtype}, wanted {name}'s, {written.dtype}")
        if other.device != written.device:
            raise ValueError(f"{who} is on {other.device}, wanted {name}'s, {written.device}")
    if written.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {name} requires grad, wanted {name}.detach(): the update has no gradient"
        )


def _check_apart(function: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Check that what `function` writes shares no memory with its other arguments.

    Of strided tensors the kernels get copies. A compiler's graph has copies where it needs them.
    """
    if torch.compiler.is_compiling():
        return
    others = dict(read)
    for name, own in written.items():
        for other_name, other in others.items():
            if _overlap(own, other):
                raise ValueError(
                    f"{function}: {name} shares memory with {other_name}, wanted tensors apart, "
                    f"as {other_name}.clone() is"
                )
        others[name] = own


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta" or not (a.numel() and b.numel()):
        return False
    if dense(a) is not a or dense(b) is not b:
        return False
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def check_budget(
    function: str, eps: float, step_size: float, clip: tuple[float, float]
) -> tuple[float, float]:
    """Check an attack's eps, step_size and clip for `function`; return clip as floats."""
    _check_eps(function, eps)
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"{function}: step_size is {step_size}, wanted a finite number > 0")
    return _check_clip(function, clip)


def _check_eps(function: str, eps: float) -> None:
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{function}: eps is {eps}, wanted a finite number >= 0")


def _check_clip(function: str, clip: tuple[float, float]) -> tuple[float, float]:
    lo, hi = clip
    if not lo < hi:
        raise ValueError(f"{function}: clip is {clip}, wanted (low, high) with low < high")
    return float(lo), float(hi)


def _check_seed(function: str, seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"{function}: seed is {seed!r}, wanted an integer")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"{function}: seed is {seed}, wanted one from 0 to 2**63 - 1")


def linf_step_(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    *,
    eps: float,
    step_size: float,
    clip: tuple[float, float] = (0.0, 1.0),
    impl: str | None = None,
) -> Tensor:
    """Move x by step_size along sgn(grad), project on the eps-ball around origin, clip; in place.

    Bitwise equal to the torch program below as it runs on a CPU, on every back end, at every
    instruction set and thread count. (Where a zero's sign depends on the lane in torch itself, the
    zero's sign may differ.) The ball's faces, ``origin - eps`` and ``origin + eps``, are rounded
    once, so the result may lie outside the exact ball by half a unit in the last place; the form
    ``origin + clamp(x - origin, -eps, eps)`` rounds twice and even moves an x that is inside the
    ball.

    Args:
        x: any shape, float32, float64, bfloat16 or float16; changed in place. Dense memory formats
            (contiguous, channels-last) are used as they are, others are copied once.
        grad: x's shape, dtype and device. sgn(0) = 0; a NaN leaves its element of x as it was.
        origin: x's shape, dtype and device; centre of the ball.
        eps: radius of the ball, in units of x.
        step_size: length of the step, in units of x.
        clip: lowest and highest value of x.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        x.

    Raises:
        ValueError: shapes or devices that differ, eps < 0 or NaN, step_size <= 0, clip reversed,
            an unknown impl, an x that requires grad.
        TypeError: integer tensors, or dtypes that differ.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program::

        x.copy_(torch.clamp(x + step_size * grad.sign(), origin - eps, origin + eps).clamp(*clip))

    Source: Zhu et al. 2020, supplement B, algorithm 1.
    """
    _check_alike("linf_step_", "x", x, {"grad": grad, "origin": origin})
    lo, hi = check_budget("linf_step_", eps, step_size, clip)
    chosen = registry.choose("linf_step_", "linf_step_", registry.case_of(x), impl)
    if chosen == registry.REFERENCE:
        return reference.linf_step_(x, grad, origin, eps=eps, step_size=step_size, clip=(lo, hi))
    torch.ops.wcmi_fast.linf_step_(x, grad, origin, float(eps), float(step_size), lo, hi, chosen)
    return x


def linf_start_(
    x: Tensor,
    origin: Tensor,
    *,
    eps: float,
    seed: int,
    clip: tuple[float, float] = (0.0, 1.0),
    first: int = 0,
    impl: str | None = None,
) -> Tensor:
    """Put x at a uniform random point of the l-infinity ball around origin, clip; in place.

    The random numbers are those of Philox4x32-10, counted by the element's index: they depend on
    the seed alone, and not on back end, instruction set, threads, memory format or dtype. They are
    multiples of 2**-23, from -1 up to and without 1. Every back end returns the same bits. The
    point is computed in float32 (float64 for float64) and rounded once to x's dtype, so the result
    may lie outside the exact ball by half a unit in the last place.

    Args:
        x: any shape, float32, float64, bfloat16 or float16; overwritten.
        origin: x's shape, dtype and device; centre of the ball. NaN stays.
        eps: radius of the ball, in units of x; no more than origin's arithmetic holds.
        seed: key of the random numbers, from 0 to 2**63 - 1.
        clip: lowest and highest value of x.
        first: index of x's first element in a larger tensor, 0 or more: x gets the numbers which
            that has there, so that its parts may be made apart. Not 0, it is the oracle that runs.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        x.

    Raises:
        ValueError: shapes or devices that differ, eps < 0, NaN or too large, clip reversed, a seed
            out of range, first < 0, first with an impl that makes no parts, an unknown impl, an x
            that requires grad or shares memory with origin.
        TypeError: integer tensors, dtypes that differ, a seed that is no integer.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program, but for the source of the random numbers::

        noise = torch.empty_like(origin).uniform_(-1, 1)
        x.copy_((origin + eps * noise).clamp(*clip))

    Source: Madry et al. 2018, section 2.1; the numbers: Salmon et al. 2011.
    """
    _check_alike("linf_start_", "x", x, {"origin": origin})
    _check_apart("linf_start_", {"x": x}, {"origin": origin})
    _check_eps("linf_start_", eps)
    largest = torch.finfo(accumulation_dtype(x.dtype)).max
    if eps > largest:
        raise ValueError(f"linf_start_: eps is {eps}, wanted at most {largest} for {x.dtype}")
    _check_seed("linf_start_", seed)
    if first < 0:
        raise ValueError(f"linf_start_: first is {first}, wanted 0 or more")
    if first and impl not in (None, registry.REFERENCE):
        raise ValueError(
            f"linf_start_: first is {first} with impl={impl!r}, wanted impl None or 'reference', "
            "which alone makes parts"
        )
    lo, hi = _check_clip("linf_start_", clip)
    chosen = registry.choose("linf_start_", "linf_start_", registry.case_of(x), impl)
    if chosen == registry.REFERENCE or first:
        return reference.linf_start_(x, origin, eps=eps, seed=seed, clip=(lo, hi), first=first)
    torch.ops.wcmi_fast.linf_start_(x, origin, float(eps), int(seed), lo, hi, chosen)
    return x


def l2_step_(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    *,
    eps: float,
    step_size: float,
    clip: tuple[float, float] = (0.0, 1.0),
    impl: str | None = None,
) -> Tensor:
    """Move each row of x by step_size along grad, project on its l2 ball, clip; in place.

    The order is that of the usual l2 PGD: the clip comes last. It keeps a row in the ball if its
    origin is within clip, because clipping towards a box never moves a point away from a point of
    the box. The result may be outside the exact ball by its rounding to x's dtype. The norms are
    right for gradients of any size that x's dtype holds. The cpu back end computes in float64, and
    its result depends neither on threads nor on the instruction set; the others compute in float32
    (float64 for float64).

    Args:
        x: (N, ...) float32, float64, bfloat16 or float16; changed in place. A row is one image,
            x[n]. Dense memory formats (contiguous, channels-last) are used as they are, others are
            copied once.
        grad: x's shape, dtype and device. A row of zeros does not move its row of x, which is
            projected and clipped; a row with a NaN leaves its row of x as it was. Infinities
            outweigh the rest of a row: they count as +-1, the rest as 0.
        origin: x's shape, dtype and device; centres of the balls.
        eps: radius of the balls, in units of x.
        step_size: length of the step, in units of x.
        clip: lowest and highest value of x.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        x.

    Raises:
        ValueError: an x without rows, shapes or devices that differ, eps < 0 or NaN, step_size
            <= 0, clip reversed, an unknown impl, an x that requires grad or shares memory with
            grad or origin.
        TypeError: integer tensors, or dtypes that differ.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program, for grad that is not 0::

        d = x + step_size * grad / norm(grad) - origin  # norm: vector_norm of each row
        x.copy_((origin + d * (eps / norm(d)).clamp(max=1)).clamp(*clip))

    Source: Madry et al. 2018, section 2.1, for the l2 ball; theorem 3.4 of Zhu et al. 2020 holds
    for every norm.
    """
    _check_alike("l2_step_", "x", x, {"grad": grad, "origin": origin})
    _check_apart("l2_step_", {"x": x}, {"grad": grad, "origin": origin})
    if x.dim() == 0:
        raise ValueError("l2_step_: x has shape (), wanted (N, ...), one row per image")
    lo, hi = check_budget("l2_step_", eps, step_size, clip)
    chosen = registry.choose("l2_step_", "l2_step_", registry.case_of(x), impl)
    if chosen == registry.REFERENCE:
        return reference.l2_step_(x, grad, origin, eps=eps, step_size=step_size, clip=(lo, hi))
    torch.ops.wcmi_fast.l2_step_(x, grad, origin, float(eps), float(step_size), lo, hi, chosen)
    return x


def keep_best_(
    best_x: Tensor,
    best_value: Tensor,
    x: Tensor,
    value: Tensor,
    *,
    impl: str | None = None,
) -> None:
    """Copy the rows of x whose value is greater than the best, with their values; in place.

    A NaN value is never kept, and a NaN best value is replaced by any number. Of equal values the
    best stays, so that -inf never replaces -inf.

    Args:
        best_x: (N, ...) float32, float64, bfloat16 or float16; the best rows so far. Dense memory
            formats (contiguous, channels-last) are used as they are, others are copied once.
        best_value: (N,), or () where the whole batch has one value; of any of these dtypes, on
            best_x's device.
        x: best_x's shape, dtype and device.
        value: best_value's shape, dtype and device.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Raises:
        ValueError: shapes or devices that differ, an unknown impl, a best_x or best_value that
            requires grad or shares memory with another argument.
        TypeError: integer tensors, or dtypes that differ.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program, for values (N,) without NaN and x (N, D)::

        better = value > best_value
        best_x[better], best_value[better] = x[better], value[better]

    Source: Madry et al. 2018 keep the worst of all restarts; here of all iterates too.
    """
    _check_alike("keep_best_", "best_x", best_x, {"x": x})
    if best_value.shape not in ((), best_x.shape[:1]):
        raise ValueError(
            f"keep_best_: best_value has shape {tuple(best_value.shape)}, "
            f"wanted () or {tuple(best_x.shape[:1])}, one for the batch or one per row"
        )
    if best_value.device != best_x.device:
        raise ValueError(
            f"keep_best_: best_value is on {best_value.device}, wanted best_x's, {best_x.device}"
        )
    _check_alike("keep_best_", "best_value", best_value, {"value": value})
    written = {"best_x": best_x, "best_value": best_value}
    _check_apart("keep_best_", written, {"x": x, "value": value})
    chosen = registry.choose("keep_best_", "keep_best_", registry.case_of(best_x), impl)
    if chosen == registry.REFERENCE:
        reference.keep_best_(best_x, best_value, x, value)
    else:
        torch.ops.wcmi_fast.keep_best_(best_x, best_value, x, value, chosen)
