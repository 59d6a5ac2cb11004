"""The updates of an attack, in place, on the fastest back end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wcmi_fast import reference
from wcmi_fast._ops import DTYPES
from wcmi_fast.backends import registry


def _check_step(x: Tensor, grad: Tensor, origin: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"linf_step_: x has dtype {x.dtype}, wanted a float dtype of {DTYPES}")
    for name, other in (("grad", grad), ("origin", origin)):
        if other.shape != x.shape:
            raise ValueError(
                f"linf_step_: {name} has shape {tuple(other.shape)}, wanted x's, {tuple(x.shape)}"
            )
        if other.dtype != x.dtype:
            raise TypeError(f"linf_step_: {name} has dtype {other.dtype}, wanted x's, {x.dtype}")
        if other.device != x.device:
            raise ValueError(f"linf_step_: {name} is on {other.device}, wanted x's, {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("linf_step_: x requires grad, wanted x.detach(): the step has no gradient")


def check_budget(
    function: str, eps: float, step_size: float, clip: tuple[float, float]
) -> tuple[float, float]:
    """Check an attack's eps, step_size and clip for `function`; return clip as floats."""
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{function}: eps is {eps}, wanted a finite number >= 0")
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"{function}: step_size is {step_size}, wanted a finite number > 0")
    lo, hi = clip
    if not lo < hi:
        raise ValueError(f"{function}: clip is {clip}, wanted (low, high) with low < high")
    return float(lo), float(hi)


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

    Bitwise equal to the torch program below, at every instruction set and thread count. (Where a
    zero's sign depends on the lane in torch itself, the zero's sign may differ.) The ball's faces
    are ``origin - eps`` and ``origin + eps``, each rounded once, so the result may lie outside the
    exact ball by half a unit in the last place; the form ``origin + clamp(x - origin, -eps, eps)``
    rounds twice and even moves an x that is inside the ball.

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
    _check_step(x, grad, origin)
    lo, hi = check_budget("linf_step_", eps, step_size, clip)
    if registry.choose("linf_step_", "linf_step_", x.device.type, impl) == registry.REFERENCE:
        return reference.linf_step_(x, grad, origin, eps=eps, step_size=step_size, clip=(lo, hi))
    torch.ops.wcmi_fast.linf_step_(x, grad, origin, float(eps), float(step_size), lo, hi)
    return x
