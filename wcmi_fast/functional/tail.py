"""The critic's 1x1 block, differentiable, on the fastest back end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wcmi_fast import reference
from wcmi_fast._ops import DTYPES
from wcmi_fast.backends import registry


class _CriticTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, w1, b1, w2, b2, s, eps, impl = inputs
        features, rstd = torch.ops.wcmi_fast.critic_tail_fwd(rows, w1, b1, w2, b2, s, eps, impl)
        ctx.eps, ctx.impl = eps, impl
        ctx.save_for_backward(rows, w1, b1, w2, b2, s, features, rstd)
        return features  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dfeatures: Tensor) -> tuple[Tensor | None, ...]:
        rows, w1, b1, w2, b2, s, features, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            aliases = [x.view_as(x).requires_grad_() for x in (rows, w1, b1, w2, b2, s)]
            plain = reference.critic_tail(*aliases, ctx.eps)  # type: ignore[call-arg]
            return *torch.autograd.grad(plain, aliases, dfeatures, create_graph=True), None, None
        need_weights = any(ctx.needs_input_grad[1:6])
        gradients = torch.ops.wcmi_fast.critic_tail_bwd(
            dfeatures.contiguous(),
            features,
            rstd,
            rows,
            w1,
            b1,
            w2,
            s,
            need_weights,
            ctx.impl,
        )
        return *(gradients if need_weights else (gradients[0], *5 * [None])), None, None


def critic_tail(
    rows: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    s: Tensor,
    *,
    eps: float = 1e-5,
    impl: str | None = None,
) -> Tensor:
    """Return the critic's 1x1 block on rows: products, shortcut and normalisation, no affine part.

    Differentiable in all tensors; of the intermediates only the result is kept for the backward
    pass. Second derivatives go through the oracle: slower.

    Args:
        rows: (R, C) float32, float64, bfloat16 or float16; one row for each image and location. The
            cpu back end has no kernel for half types: the reference computes them in float32.
        w1: (U, C), b1: (U,); first layer, the batch norm after it folded in.
        w2: (U, U), b2: (U,); second layer.
        s: (U, C); shortcut.
        eps: of the layer normalisation.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        (R, F), F > U the next multiple of 16: U features of mean 0 and variance 1, then a column
        of 1, with which a product can add a constant, then zeros.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown impl.
        TypeError: other dtypes, or dtypes that differ.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program::

        v = linear(relu(linear(rows, w1, b1)), w2, b2) + linear(rows, s)
        torch.cat([layer_norm(v, (U,), eps=eps), constant.expand(R, -1)], 1)  # constant: 1, 0, 0...

    Source: Zhu et al. 2020, supplement; Hjelm et al. 2018; spec section 5.
    """
    if rows.dim() != 2:
        raise ValueError(f"critic_tail: rows has shape {tuple(rows.shape)}, wanted (R, C)")
    if rows.dtype not in DTYPES:
        raise TypeError(f"critic_tail: rows has dtype {rows.dtype}, wanted one of {DTYPES}")
    units, inputs = len(b1), rows.shape[1]
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "s": s}
    shapes = {"w1": (units, inputs), "b1": (units,), "w2": (units, units), "b2": (units,)}
    for name, weight in weights.items():
        wanted = shapes.get(name, (units, inputs))
        if tuple(weight.shape) != wanted:
            raise ValueError(
                f"critic_tail: {name} has shape {tuple(weight.shape)}, wanted {wanted}"
            )
        if weight.dtype != rows.dtype:
            raise TypeError(
                f"critic_tail: {name} has dtype {weight.dtype}, wanted rows', {rows.dtype}"
            )
        if weight.device != rows.device:
            raise ValueError(
                f"critic_tail: {name} is on {weight.device}, wanted rows', {rows.device}"
            )
    products = len(rows) * units * (units + 2 * inputs)
    case = registry.case_of(rows, units=units, products=products)
    chosen = registry.choose("critic_tail", "critic_tail", case, impl)
    if chosen == registry.REFERENCE:
        return reference.critic_tail(rows, w1, b1, w2, b2, s, eps)
    tensors = [x.contiguous() for x in (rows, w1, b1, w2, b2, s)]
    features: Tensor = _CriticTail.apply(*tensors, eps, chosen)
    return features
