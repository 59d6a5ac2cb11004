"""Differentiable lower bounds on mutual information, on the fastest back end."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wcmi_fast import reference
from wcmi_fast._ops import DTYPES, accumulation_dtype
from wcmi_fast.backends import registry

DIAGONALS = ("exclude", "zero")

# T up to this size is kept from the forward to the backward pass, which then needs one matrix
# product less: 4 MiB is N = 128, P = 64 in float32.
KEPT_SCORES_BYTES = 4 << 20


class _CriticStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, zero_diagonal: bool) -> tuple[Tensor, Tensor]:
        itemsize = accumulation_dtype(z.dtype).itemsize
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = needed and z.shape[0] ** 2 * h.shape[1] * itemsize <= KEPT_SCORES_BYTES
        positives, lse, scores = torch.ops.wcmi_fast.critic_stats_fwd(z, h, zero_diagonal, keep)
        ctx.save_for_backward(z, h, lse, scores)
        return positives, lse

    @staticmethod
    def backward(ctx: Any, dpositives: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would not do: it takes the gradients for constants in z and h.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the kernels have no second derivative (create_graph=True); impl='reference' has"
            )
        z, h, lse, scores = ctx.saved_tensors
        need_dz, need_dh, _ = ctx.needs_input_grad
        dz, dh = torch.ops.wcmi_fast.critic_stats_bwd(
            dpositives.contiguous(), dlse.contiguous(), z, h, lse, scores, need_dz, need_dh
        )
        return dz if need_dz else None, dh if need_dh else None, None


def _check_features(function: str, z: Tensor, h: Tensor) -> Tensor:
    """Check z and h of a bound; return h as (N, P, U)."""
    if z.dim() != 2:
        raise ValueError(f"{function}: z has shape {tuple(z.shape)}, wanted (N, U)")
    if h.dim() not in (2, 3):
        raise ValueError(f"{function}: h has shape {tuple(h.shape)}, wanted (N, P, U) or (N, U)")
    if z.dtype not in DTYPES:
        raise TypeError(f"{function}: z has dtype {z.dtype}, wanted a float dtype of {DTYPES}")
    if h.dtype != z.dtype:
        raise TypeError(f"{function}: h has dtype {h.dtype}, wanted z's, {z.dtype}")
    if h.device != z.device:
        raise ValueError(f"{function}: h is on {h.device}, wanted z's device, {z.device}")
    if h.shape[0] != z.shape[0]:
        raise ValueError(f"{function}: h has N = {h.shape[0]}, wanted z's, N = {z.shape[0]}")
    if h.shape[-1] != z.shape[1]:
        raise ValueError(f"{function}: h has U = {h.shape[-1]}, wanted z's, U = {z.shape[1]}")
    if z.shape[0] < 2:
        raise ValueError(
            f"{function}: z has N = {z.shape[0]}, wanted N >= 2: fewer have no negative pair"
        )
    if 0 in h.shape:
        raise ValueError(f"{function}: h has shape {tuple(h.shape)}, wanted no empty dimension")
    return h if h.dim() == 3 else h.unsqueeze(1)


def dv(z: Tensor, h: Tensor, *, diagonal: str = "exclude", impl: str | None = None) -> Tensor:
    """Return the Donsker-Varadhan lower bound on mutual information of a batch, in nats.

    The scores T[i, j, p] = <z[i], h[j, p]> are reduced tile by tile and never stored beyond a few
    MiB; the bound is taken per location p and averaged. Differentiable once in z and h.

    Args:
        z: (N, U) float32, float64, bfloat16 or float16; critic features of the representations.
        h: (N, P, U) or (N, U), z's dtype and device; critic features of the images.
        diagonal: "exclude" takes the N(N - 1) pairs i != j as negatives; "zero" adds N scores of
            0, as the authors' multiplicative mask does, which makes the value depend on a constant
            added to T.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        A scalar, float64 for float64 inputs and float32 for all others (their scores and sums are
        computed in float32).

    Raises:
        ValueError: shapes or devices that do not fit, N < 2, an unknown diagonal or impl.
        TypeError: integer tensors, or z and h of different dtypes.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h); off = ~torch.eye(N, dtype=torch.bool)
        (T.diagonal().t().mean(0) - T[off].logsumexp(0) + math.log(N * (N - 1))).mean()

    Source: Zhu et al. 2020, section 4; spec section 2, including the authors' masking slip.
    """
    h = _check_features("dv", z, h)
    if diagonal not in DIAGONALS:
        raise ValueError(f"dv: diagonal is {diagonal!r}, wanted one of {DIAGONALS}")
    if registry.choose("dv", "critic_stats", z.device.type, impl) == registry.REFERENCE:
        return reference.dv(z, h, diagonal=diagonal)
    n = z.shape[0]
    positives, lse = _CriticStats.apply(z.contiguous(), h.contiguous(), diagonal == "zero")
    value: Tensor = (positives - lse).mean() + math.log(n * (n - 1))
    return value
