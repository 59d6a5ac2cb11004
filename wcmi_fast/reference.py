"""The oracle: every operator in plain torch, as spec.md writes it.

It is the fallback where a device has no kernel, the tests' oracle (in float64) and the benchmarks'
baseline. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid, relu

from wcmi_fast import philox
from wcmi_fast._ops import (
    CLAMPED_LSE,
    LSE,
    SOFTPLUS,
    SQUARE,
    SUM,
    accumulation_dtype,
    asked,
    tail_width,
)


def scores(z: Tensor, h: Tensor) -> Tensor:
    """Return T (N, N, P), T[i, j, p] = <z[i], h[j, p]>, for z (N, U) and h (N, P, U)."""
    dtype = accumulation_dtype(z.dtype)
    with _without_autocast(z):
        return torch.einsum("iu,jpu->ijp", z.to(dtype), h.to(dtype))


def _without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Keep products in the dtype of the docs; the meta device has no autocast to turn off."""
    available = torch.amp.is_autocast_available(like.device.type)
    return torch.autocast(like.device.type, enabled=False) if available else nullcontext()


def own_pairs(T: Tensor) -> Tensor:
    """Return the (N, N, 1) mask of positive pairs, i = j."""
    return torch.eye(T.shape[0], dtype=torch.bool, device=T.device)[:, :, None]


def positive_scores(T: Tensor) -> Tensor:
    """Return T[i, i, p] (N, P)."""
    return T.diagonal(dim1=0, dim2=1).t()


def negative_mean(values: Tensor) -> Tensor:
    """Return the mean over i != j of values (N, N, P), per location."""
    n = values.shape[0]
    return values.masked_fill(own_pairs(values), 0.0).sum(dim=(0, 1)) / (n * (n - 1))


def logsumexp(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return x.logsumexp(dim) with a gradient of 0, where torch's is NaN, if every x is -inf."""
    none = x.detach().amax(dim, keepdim=True) == -math.inf
    result = x.masked_fill(none, 0.0).logsumexp(dim, keepdim=True)
    return result.masked_fill(none, -math.inf).squeeze(dim)


def dv(T: Tensor, *, diagonal: str = "exclude") -> Tensor:
    """Return the Donsker-Varadhan bound, averaged over locations (spec section 2)."""
    n = T.shape[0]
    negatives = T.masked_fill(own_pairs(T), 0.0 if diagonal == "zero" else -math.inf)
    lse = negatives.logsumexp(dim=(0, 1))
    return (positive_scores(T) - lse).mean() + math.log(n * (n - 1))


def infonce(T: Tensor, *, candidates: str = "location") -> Tensor:
    """Return InfoNCE, with log N, or over all locations, without it (spec section 2)."""
    n = T.shape[0]
    positives = positive_scores(T)
    if candidates == "location":
        return (positives - T.logsumexp(dim=1)).mean() + math.log(n)
    negatives = logsumexp(T.masked_fill(own_pairs(T), -math.inf), (1, 2))
    return (positives - torch.logaddexp(positives, negatives[:, None])).mean()


def nwj(T: Tensor) -> Tensor:
    """Return NWJ, also called TUBA with baseline e (spec section 2)."""
    return (positive_scores(T).mean(dim=0) - negative_mean((T - 1).exp())).mean()


def jsd(T: Tensor) -> Tensor:
    """Return the Jensen-Shannon bound (spec section 2); softplus(x) is -logsigmoid(-x)."""
    positive = logsigmoid(positive_scores(T)).mean(dim=0)
    return (positive + negative_mean(logsigmoid(-T))).mean() + 2 * math.log(2)


def smile(T: Tensor, *, tau: float) -> Tensor:
    """Return SMILE: DV with clamped negatives, with the gradient of the Jensen-Shannon bound."""
    n = T.shape[0]
    negatives = T.clamp(-tau, tau).masked_fill(own_pairs(T), -math.inf)
    value = (positive_scores(T) - negatives.logsumexp(dim=(0, 1))).mean() + math.log(n * (n - 1))
    return value_with_gradient(value, jsd(T))


def log_mean_exp(T: Tensor) -> Tensor:
    """Return log of the mean of exp(T) over the negative pairs, per location (P,)."""
    n = T.shape[0]
    return T.masked_fill(own_pairs(T), -math.inf).logsumexp(dim=(0, 1)) - math.log(n * (n - 1))


def fenchel_dual(T: Tensor, *, measure: str) -> Tensor:
    """Return the dual form of an f-divergence (spec section 2; Hjelm et al. 2018)."""
    positives, one = positive_scores(T), torch.ones((), dtype=T.dtype, device=T.device)
    expectations = {
        "GAN": lambda: (logsigmoid(positives), -logsigmoid(-T)),
        "X2": lambda: (positives**2, -0.5 * (T.abs() + one) ** 2),
        "KL": lambda: (positives + one, T.exp()),
        "RKL": lambda: (-(-positives).exp(), T - one),
        "H2": lambda: (one - (-positives).exp(), T.exp() - one),
        "W1": lambda: (positives, T),
    }
    positive, negative = expectations[measure]()
    return (positive.mean(dim=0) - negative_mean(negative)).mean()


class _ValueWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor]:
        return None, d


def value_with_gradient(value: Tensor, carrier: Tensor) -> Tensor:
    """Return exactly `value`, differentiated as `carrier` (x + (value - x).detach() rounds)."""
    result: Tensor = _ValueWithGradient.apply(value, carrier)
    return result


def score_stats(T: Tensor, which: int, tau: float) -> list[Tensor]:
    """Return the positives and the statistics of T that `which` names, each (N, P); see _ops.py."""
    own = own_pairs(T)
    statistics = {
        LSE: lambda: logsumexp(T.masked_fill(own, -math.inf), 1),
        SOFTPLUS: lambda: -logsigmoid(-T).masked_fill(own, 0.0).sum(dim=1),
        CLAMPED_LSE: lambda: (
            T.detach().clamp(-tau, tau).masked_fill(own, -math.inf).logsumexp(dim=1)
        ),
        SUM: lambda: T.masked_fill(own, 0.0).sum(dim=1),
        SQUARE: lambda: (0.5 * (T.abs() + 1) ** 2).masked_fill(own, 0.0).sum(dim=1),
    }
    return [positive_scores(T), *(statistics[statistic]() for statistic in asked(which))]


def critic_tail(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor, eps: float
) -> Tensor:
    """Return layer_norm(W2 relu(W1 v + b1) + b2 + S v) for rows v, followed by 1, 0, 0, ..."""
    units, dtype = len(w2), rows.dtype
    rows, w1, b1, w2, b2, s = (x.to(accumulation_dtype(dtype)) for x in (rows, w1, b1, w2, b2, s))
    with _without_autocast(rows):
        v = linear(relu(linear(rows, w1, b1)), w2, b2) + linear(rows, s)
    constant = torch.zeros(tail_width(units) - units, dtype=rows.dtype, device=rows.device)
    constant[0] = 1
    features = torch.cat([layer_norm(v, (units,), eps=eps), constant.expand(len(rows), -1)], dim=1)
    return features.to(dtype)


@torch.no_grad()
def linf_step_(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    *,
    eps: float,
    step_size: float,
    clip: tuple[float, float],
) -> Tensor:
    """Step x along sgn(grad), project on the eps-ball around origin and on clip, in place."""
    moved = torch.clamp(x + step_size * grad.sign(), origin - eps, origin + eps).clamp(*clip)
    return x.copy_(torch.where(grad.isnan(), x, moved))


@torch.no_grad()
def linf_start_(
    x: Tensor, origin: Tensor, *, eps: float, seed: int, clip: tuple[float, float], first: int = 0
) -> Tensor:
    """Put x at a uniform random point of the eps-ball around origin, clipped, in place."""
    centre = origin.to(accumulation_dtype(origin.dtype))
    noise = philox.uniform(origin.numel(), seed, origin.device, first=first)
    noise = noise.to(centre.dtype).view(origin.shape)
    return x.copy_((centre + eps * noise).clamp(*clip))


def unit_rows(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of v (N, D) divided by their l2 norms, and the norms (N, 1).

    A row of zeros stays. Infinities outweigh finite numbers: they count as +-1, the rest as 0.
    """
    largest = v.abs().amax(dim=1, keepdim=True)
    infinities = torch.where(v.isinf(), v.sign(), 0.0)
    # Divided by the largest first: squares stay in range, and the norm of what is not 0 is over 1.
    v = torch.where(largest.isinf(), infinities, v / torch.where(largest == 0, 1.0, largest))
    norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / norms.clamp(min=1.0), largest * norms


@torch.no_grad()
def l2_step_(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    *,
    eps: float,
    step_size: float,
    clip: tuple[float, float],
) -> Tensor:
    """Step the rows of x along grad / |grad|, project on the eps-ball around origin, clip."""
    if not x.numel():
        return x
    dtype = accumulation_dtype(x.dtype)
    before, gradient, centre = (t.to(dtype).reshape(len(x), -1) for t in (x, grad, origin))
    direction, _ = unit_rows(gradient)
    moved = before + step_size * direction
    outward, distance = unit_rows(moved - centre)
    moved = torch.where(distance <= eps, moved, centre + eps * outward).clamp(*clip)
    moved = torch.where(gradient.isnan().any(dim=1, keepdim=True), before, moved)
    return x.copy_(moved.view(x.shape))


@torch.no_grad()
def keep_best_(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> None:
    """Copy the rows of x, and their values, where value is greater than best_value, in place."""
    better = (value > best_value) | (best_value.isnan() & ~value.isnan())
    rows = better.reshape(better.shape + (1,) * (x.dim() - better.dim()))
    best_x.copy_(torch.where(rows, x, best_x))
    best_value.copy_(torch.where(better, value, best_value))
