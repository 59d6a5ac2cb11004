"""Differentiable lower bounds on mutual information, on the fastest back end.

Every bound is a small function of a few statistics of the scores (`CriticStats`), which one sweep
over T gives; the formulas below are in those, the oracle's (reference.py) are in T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from wcmi_fast import reference
from wcmi_fast._ops import (
    CLAMPED_LSE,
    DTYPES,
    LSE,
    SOFTPLUS,
    SQUARE,
    SUM,
    accumulation_dtype,
    asked,
)
from wcmi_fast.backends import registry
from wcmi_fast.functional.ema import EMAState

DIAGONALS = ("exclude", "zero")
CANDIDATES = ("location", "all_locations")

# The statistic that the mean over negative pairs of each measure is made of.
MEASURES = {"GAN": SOFTPLUS, "X2": SQUARE, "KL": LSE, "RKL": SUM, "H2": LSE, "W1": SUM}

# What each name of critic_stats' `which` needs.
NEEDS = {
    "dv": LSE,
    "infonce": LSE,
    "nwj": LSE,
    "mine": LSE,
    "jsd": SOFTPLUS,
    "smile": SOFTPLUS | CLAMPED_LSE,
    **MEASURES,
}
FIELDS = {
    LSE: "lse",
    SOFTPLUS: "softplus",
    CLAMPED_LSE: "clamped_lse",
    SUM: "sum",
    SQUARE: "square",
}

# T up to this size is kept from the forward to the backward pass, which then needs one matrix
# product less: 4 MiB is N = 128, P = 64 in float32.
KEPT_SCORES_BYTES = 4 << 20


@dataclass(frozen=True)
class CriticStats:
    """Statistics of the scores T, each (N, P), over the images j != i; None where not computed.

    float32, or float64 for float64 scores; differentiable, but for clamped_lse.

    Attributes:
        positives: T[i, i, p].
        lse: log of the sum of exp(T[i, j, p]).
        softplus: sum of log(1 + exp(T[i, j, p])).
        clamped_lse: lse of T clamped to [-tau, tau].
        sum: sum of T[i, j, p].
        square: sum of (|T[i, j, p]| + 1)**2 / 2.
        tau: that of clamped_lse.
    """

    positives: Tensor
    lse: Tensor | None = None
    softplus: Tensor | None = None
    clamped_lse: Tensor | None = None
    sum: Tensor | None = None
    square: Tensor | None = None
    tau: float | None = None


class _CriticStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, h: Tensor, which: int, tau: float, impl: str
    ) -> tuple[Tensor, ...]:
        keep = _keeps_scores(ctx, z, h, impl)
        stats, scores = torch.ops.wcmi_fast.critic_stats_fwd(z, h, which, tau, keep, impl)
        ctx.which, ctx.tau, ctx.impl = which, tau, impl
        outputs: tuple[Tensor, ...] = stats.unbind()
        ctx.save_for_backward(z, h, _lse_of(outputs, which), scores)
        return outputs

    @staticmethod
    def backward(ctx: Any, *dstats: Tensor) -> tuple[Tensor | None, ...]:
        z, h, lse, scores = ctx.saved_tensors
        need_dz, need_dh = ctx.needs_input_grad[:2]
        if _wants_graph():
            dz, dh = _through_oracle(
                lambda a, b: reference.score_stats(reference.scores(a, b), ctx.which, ctx.tau),
                (z, h),
                dstats,
            )
        else:
            dz, dh = torch.ops.wcmi_fast.critic_stats_bwd(
                dstats, z, h, lse, scores, ctx.which, need_dz, need_dh, ctx.impl
            )
        return dz if need_dz else None, dh if need_dh else None, None, None, None


class _ScoreStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, which: int, tau: float, impl: str) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...]
        outputs = torch.ops.wcmi_fast.score_stats_fwd(scores, which, tau, impl).unbind()
        ctx.which, ctx.tau, ctx.impl = which, tau, impl
        ctx.save_for_backward(scores, _lse_of(outputs, which))
        return outputs

    @staticmethod
    def backward(ctx: Any, *dstats: Tensor) -> tuple[Tensor | None, ...]:
        scores, lse = ctx.saved_tensors
        if _wants_graph():
            (dscores,) = _through_oracle(
                lambda T: reference.score_stats(_wide(T), ctx.which, ctx.tau), (scores,), dstats
            )
        else:
            dscores = torch.ops.wcmi_fast.score_stats_bwd(dstats, scores, lse, ctx.which, ctx.impl)
        return dscores, None, None, None


class _DVValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positives: Tensor, lse: Tensor, zero_diagonal: bool, impl: str) -> Tensor:
        value: Tensor
        value, dlse = torch.ops.wcmi_fast.dv_value(
            positives.contiguous(), lse.contiguous(), zero_diagonal, impl
        )
        ctx.zero_diagonal = zero_diagonal
        ctx.save_for_backward(positives, lse, dlse)
        return value

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        positives, lse, dlse = ctx.saved_tensors
        if _wants_graph():
            return (
                *_through_oracle(
                    lambda a, b: [_dv_value(a, b, ctx.zero_diagonal)], (positives, lse), (d,)
                ),
                None,
                None,
            )
        return (d / positives.numel()).expand_as(positives), d * dlse, None, None


class _DV(torch.autograd.Function):
    """critic_stats and dv_value in one node, which for small inputs is most of the time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, zero_diagonal: bool, impl: str) -> Tensor:
        value: Tensor
        keep = _keeps_scores(ctx, z, h, impl)
        stats, scores = torch.ops.wcmi_fast.critic_stats_fwd(z, h, LSE, 1.0, keep, impl)
        value, dlse = torch.ops.wcmi_fast.dv_value(stats[0], stats[1], zero_diagonal, impl)
        ctx.diagonal, ctx.impl = DIAGONALS[zero_diagonal], impl
        ctx.save_for_backward(z, h, stats, scores, dlse)
        return value

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        z, h, stats, scores, dlse = ctx.saved_tensors
        need_dz, need_dh = ctx.needs_input_grad[:2]
        if _wants_graph():
            dz, dh = _through_oracle(
                lambda a, b: [reference.dv(reference.scores(a, b), diagonal=ctx.diagonal)],
                (z, h),
                (d,),
            )
        else:
            dpositives = (d / dlse.numel()).expand_as(dlse)
            dz, dh = torch.ops.wcmi_fast.critic_stats_bwd(
                [dpositives, d * dlse], z, h, stats[1], scores, LSE, need_dz, need_dh, ctx.impl
            )
        return dz if need_dz else None, dh if need_dh else None, None, None


def _keeps_scores(ctx: Any, z: Tensor, h: Tensor, impl: str) -> bool:
    """Whether the backward pass is to find T; on a GPU it always computes T again."""
    if impl != "cpu":
        return False
    n, p, _ = h.shape
    size = n * n * p * accumulation_dtype(z.dtype).itemsize
    return any(ctx.needs_input_grad[:2]) and size <= KEPT_SCORES_BYTES


def _lse_of(stats: tuple[Tensor, ...], which: int) -> Tensor:
    # LSE comes first among the statistics; without it the backward pass takes any tensor.
    return stats[1] if which & LSE else stats[0]


def _wants_graph() -> bool:
    """Whether the backward pass itself is to be differentiated (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _through_oracle(
    program: Any, inputs: tuple[Tensor, ...], dstats: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs by the oracle, as functions of inputs and dstats.

    The aliases keep one input's history, in which another may occur, out of the derivative.
    """
    aliases = tuple(x.view_as(x).requires_grad_() for x in inputs)
    # The clamped statistic has no gradient, and the oracle's does not require one.
    pairs = [(s, d) for s, d in zip(program(*aliases), dstats, strict=True) if s.requires_grad]
    stats, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(stats, aliases, gradients, create_graph=True)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(accumulation_dtype(scores.dtype))


# ---- arguments ----------------------------------------------------------------------------------


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


def _check_scores(function: str, scores: Tensor) -> Tensor:
    """Check the scores of a bound; return them as (N, N, P)."""
    shape = tuple(scores.shape)
    if scores.dim() not in (2, 3) or shape[0] != shape[1]:
        raise ValueError(f"{function}: scores has shape {shape}, wanted (N, N, P) or (N, N)")
    if scores.dtype not in DTYPES:
        raise TypeError(
            f"{function}: scores has dtype {scores.dtype}, wanted a float dtype of {DTYPES}"
        )
    if shape[0] < 2:
        raise ValueError(
            f"{function}: scores has N = {shape[0]}, wanted N >= 2: fewer have no negative pair"
        )
    if 0 in shape:
        raise ValueError(f"{function}: scores has shape {shape}, wanted no empty dimension")
    return scores if scores.dim() == 3 else scores.unsqueeze(2)


def _valid_rows(function: str, mask: Tensor, n: int, device: torch.device) -> slice | Tensor:
    """Return the rows that `mask` keeps: a slice where they come first, else their indices."""
    if mask.shape != (n,):
        raise ValueError(f"{function}: mask has shape {tuple(mask.shape)}, wanted (N,), ({n},)")
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask has dtype {mask.dtype}, wanted torch.bool")
    if mask.device != device:
        raise ValueError(f"{function}: mask is on {mask.device}, wanted the inputs', {device}")
    rows = mask.nonzero().squeeze(1)
    if len(rows) < 2:
        raise ValueError(
            f"{function}: mask keeps {len(rows)} of {n} rows, wanted 2 or more: fewer have no "
            "negative pair"
        )
    return slice(0, len(rows)) if bool(mask[: len(rows)].all()) else rows


def _check_tau(function: str, tau: float) -> float:
    if not 0.0 < tau < math.inf:
        raise ValueError(f"{function}: tau is {tau}, wanted a finite number > 0")
    return float(tau)


def _check_inputs(function: str, **given: object) -> None:
    names = [name for name, value in given.items() if value is not None]
    if names not in (["z", "h"], ["scores"], ["stats"]):
        got = " and ".join(names) or "nothing"
        others = "or scores" if function == "critic_stats" else "or scores, or stats"
        raise TypeError(f"{function}: got {got}, wanted z and h, {others}")


def _check_stats(
    function: str, stats: CriticStats, mask: Tensor | None, impl: str | None, which: int, tau: float
) -> CriticStats:
    if mask is not None or impl is not None:
        name = "mask" if mask is not None else "impl"
        raise TypeError(f"{function}: got {name} with stats, wanted it in critic_stats' own call")
    for statistic in asked(which):
        if getattr(stats, FIELDS[statistic]) is None:
            raise ValueError(
                f"{function}: stats.{FIELDS[statistic]} is None, wanted the stats of "
                f"critic_stats(..., which=) with this bound among the names"
            )
    if which & CLAMPED_LSE and stats.tau != tau:
        raise ValueError(f"{function}: tau is {tau}, wanted that of stats, {stats.tau}")
    return stats


def _named(found: tuple[Tensor, ...], which: int, tau: float) -> CriticStats:
    named = {FIELDS[s]: x for s, x in zip(asked(which), found[1:], strict=True)}
    if which & CLAMPED_LSE:
        named["clamped_lse"] = named["clamped_lse"].detach()
    return CriticStats(found[0], **named, tau=tau if which & CLAMPED_LSE else None)


def _reduce(
    function: str,
    z: Tensor | None,
    h: Tensor | None,
    scores: Tensor | None,
    stats: CriticStats | None,
    mask: Tensor | None,
    impl: str | None,
    which: int,
    tau: float = 1.0,
) -> CriticStats | Tensor:
    """Check the arguments that every bound has; return the statistics, or T on the reference."""
    _check_inputs(function, z=z, h=h, scores=scores, stats=stats)
    if stats is not None:
        return _check_stats(function, stats, mask, impl, which, tau)
    if scores is not None:
        return _reduce_scores(function, scores, mask, impl, which, tau)
    return _reduce_features(function, z, h, mask, impl, which, tau)  # type: ignore[arg-type]


def _reduce_features(
    function: str,
    z: Tensor,
    h: Tensor,
    mask: Tensor | None,
    impl: str | None,
    which: int,
    tau: float,
) -> CriticStats | Tensor:
    z, h = _features(function, z, h, mask)
    chosen = _choose_critic_stats(function, z, h, impl)
    if chosen == registry.REFERENCE:
        return reference.scores(z, h)
    found = _CriticStats.apply(z.contiguous(), h.contiguous(), which, tau, chosen)
    return _named(found, which, tau)


def _choose_critic_stats(function: str, z: Tensor, h: Tensor, impl: str | None) -> str:
    n, p, u = h.shape
    case = registry.case_of(z, units=u, products=n * n * p * u)
    return registry.choose(function, "critic_stats", case, impl)


def _features(function: str, z: Tensor, h: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return z (N, U) and h (N, P, U), checked, N counting the valid rows."""
    h = _check_features(function, z, h)
    if mask is None:
        return z, h
    rows = _valid_rows(function, mask, len(z), z.device)
    return z[rows], h[rows]


def _reduce_scores(
    function: str, scores: Tensor, mask: Tensor | None, impl: str | None, which: int, tau: float
) -> CriticStats | Tensor:
    scores = _check_scores(function, scores)
    if mask is not None:
        rows = _valid_rows(function, mask, len(scores), scores.device)
        scores = scores[rows][:, rows]
    chosen = registry.choose(function, "score_stats", registry.case_of(scores), impl)
    if chosen == registry.REFERENCE:
        return _wide(scores)
    return _named(_ScoreStats.apply(scores.contiguous(), which, tau, chosen), which, tau)


# ---- the bounds ---------------------------------------------------------------------------------


def _log_pairs(positives: Tensor) -> float:
    n = len(positives)
    return math.log(n * (n - 1))


def _log_mean_exp(found: CriticStats | Tensor) -> Tensor:
    """Return log of the mean of exp(T) over the negative pairs, per location (P,)."""
    if isinstance(found, Tensor):
        return reference.log_mean_exp(found)
    lse: Tensor = found.lse  # type: ignore[assignment]
    return reference.logsumexp(lse, 0) - _log_pairs(found.positives)


def _negative_mean(statistic: Tensor) -> Tensor:
    """Return the mean over negative pairs and locations from sums (N, P) over j != i."""
    n, p = statistic.shape
    return statistic.sum() / (n * (n - 1) * p)


def critic_stats(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    which: Iterable[str],
    scores: Tensor | None = None,
    mask: Tensor | None = None,
    tau: float | None = None,
    impl: str | None = None,
) -> CriticStats:
    """Return in one sweep over T what several bounds need; give it to them as ``stats=``.

    The products z h' are computed once, whatever the number of bounds. Differentiable like `dv`.

    Args:
        z, h, scores, mask, impl: as for `dv`.
        which: names of bounds ("dv", "infonce", "nwj", "jsd", "smile", "mine") and of
            fenchel_dual's measures ("GAN", "X2", "KL", "RKL", "H2", "W1").
        tau: smile's; wanted if and only if "smile" is among the names.

    Returns:
        Statistics (N, P) each, those that the names need; N counts the valid rows.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`; an unknown name, or none; tau <= 0.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h); own = torch.eye(N, dtype=torch.bool)[:, :, None]
        T.diagonal().t(), T.masked_fill(own, -math.inf).logsumexp(1)  # positives, lse

    Source: spec section 2.
    """
    names = (which,) if isinstance(which, str) else tuple(which)
    unknown = [name for name in names if name not in NEEDS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "empty"
        raise ValueError(f"critic_stats: which is {got}, wanted names out of {tuple(NEEDS)}")
    if ("smile" in names) != (tau is not None):
        wanted = "a number > 0 for smile" if tau is None else "None without smile"
        raise ValueError(f"critic_stats: tau is {tau}, wanted {wanted}")
    bound_tau = 1.0 if tau is None else _check_tau("critic_stats", tau)
    bits = 0
    for name in names:
        bits |= NEEDS[name]
    found = _reduce("critic_stats", z, h, scores, None, mask, impl, bits, bound_tau)
    if isinstance(found, Tensor):
        return _named(tuple(reference.score_stats(found, bits, bound_tau)), bits, bound_tau)
    return found


def dv(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    diagonal: str = "exclude",
    impl: str | None = None,
) -> Tensor:
    """Return the Donsker-Varadhan lower bound on mutual information of a batch, in nats.

    The scores T[i, j, p] = <z[i], h[j, p]> are reduced tile by tile and never stored beyond a few
    MiB; the bound is taken per location p and averaged. Differentiable in z and h, or in scores;
    second derivatives (create_graph=True) go through the oracle, which stores T: slower.

    Args:
        z: (N, U) float32, float64, bfloat16 or float16; critic features of the representations.
        h: (N, P, U) or (N, U), z's dtype and device; critic features of the images.
        scores: (N, N, P) or (N, N), the dtypes of z; T itself, in place of z and h, for a critic
            that is not a dot product.
        stats: what `critic_stats` returned, in place of z and h.
        mask: (N,) bool; False takes a row (a batch's padding) out of positives and negatives. Needs
            the number of valid rows on the host; under torch.compile it breaks the graph.
        diagonal: "exclude" takes the N(N - 1) pairs i != j as negatives; "zero" adds N scores of
            0, as the authors' multiplicative mask does, which makes the value depend on a constant
            added to T.
        impl: "reference", "cpu", "cuda", "triton", or None for the best there is.

    Returns:
        A scalar, float64 for float64 inputs and float32 for all others (their scores and sums are
        computed in float32).

    Raises:
        ValueError: shapes or devices that do not fit, N < 2 or fewer than 2 valid rows, an unknown
            diagonal or impl, stats that lack what the bound needs.
        TypeError: integer tensors, z and h of different dtypes, a mask that is not bool, or
            anything but one of the three forms of input.
        RuntimeError: an impl that cannot be honoured.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h); off = ~torch.eye(N, dtype=torch.bool)
        (T.diagonal().t().mean(0) - T[off].logsumexp(0) + math.log(N * (N - 1))).mean()

    Source: Zhu et al. 2020, section 4; spec section 2, including the authors' masking slip.
    """
    if diagonal not in DIAGONALS:
        raise ValueError(f"dv: diagonal is {diagonal!r}, wanted one of {DIAGONALS}")
    zero = diagonal == "zero"
    if scores is None and stats is None and z is not None and h is not None:
        z, h = _features("dv", z, h, mask)
        chosen = _choose_critic_stats("dv", z, h, impl)
        if chosen == registry.REFERENCE:
            return reference.dv(reference.scores(z, h), diagonal=diagonal)
        fused: Tensor = _DV.apply(z.contiguous(), h.contiguous(), zero, chosen)
        return fused
    found = _reduce("dv", z, h, scores, stats, mask, impl, LSE)
    if isinstance(found, Tensor):
        return reference.dv(found, diagonal=diagonal)
    chosen = registry.choose("dv", "dv_value", registry.case_of(found.positives), None)
    if chosen == registry.REFERENCE:
        return _dv_value(found.positives, found.lse, zero)  # type: ignore[arg-type]
    value: Tensor = _DVValue.apply(found.positives, found.lse, zero, chosen)
    return value


def _dv_value(positives: Tensor, lse: Tensor, zero_diagonal: bool) -> Tensor:
    joint = lse.logsumexp(0)
    if zero_diagonal:
        joint = torch.logaddexp(joint, joint.new_full((), math.log(len(lse))))
    return (positives - joint).mean() + _log_pairs(positives)


def infonce(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    candidates: str = "location",
    impl: str | None = None,
) -> Tensor:
    """Return the InfoNCE lower bound on mutual information of a batch, in nats.

    For each representation the image it belongs to is one of N candidates, so that the value never
    exceeds log N: near it the bound says little.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.
        candidates: "location" compares a location with the same one of all images; "all_locations"
            with every location of all other images, and leaves log of their number away, as the
            authors' ``nce`` does, whose values are therefore negative.

    Returns:
        A scalar, of the dtype that `dv` returns.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`; unknown candidates.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h)
        (T.diagonal().t() - T.logsumexp(1) + math.log(N)).mean()

    Source: van den Oord et al. 2018; spec section 2.
    """
    if candidates not in CANDIDATES:
        raise ValueError(f"infonce: candidates is {candidates!r}, wanted one of {CANDIDATES}")
    found = _reduce("infonce", z, h, scores, stats, mask, impl, LSE)
    if isinstance(found, Tensor):
        return reference.infonce(found, candidates=candidates)
    negatives: Tensor = found.lse  # type: ignore[assignment]
    if candidates == "all_locations":
        negatives = reference.logsumexp(negatives, 1)[:, None]
    value = (found.positives - torch.logaddexp(found.positives, negatives)).mean()
    return value if candidates == "all_locations" else value + math.log(len(found.positives))


def nwj(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return the lower bound of Nguyen, Wainwright and Jordan (TUBA with baseline e), in nats.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.

    Returns:
        A scalar, of the dtype that `dv` returns; -inf where exp(T) overflows.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h); off = ~torch.eye(N, dtype=torch.bool)
        (T.diagonal().t().mean(0) - (T[off] - 1).exp().mean(0)).mean()

    Source: Nguyen et al. 2010; Poole et al. 2019; spec section 2.
    """
    found = _reduce("nwj", z, h, scores, stats, mask, impl, LSE)
    if isinstance(found, Tensor):
        return reference.nwj(found)
    return found.positives.mean() - (_log_mean_exp(found) - 1).exp().mean()


def jsd(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return the Jensen-Shannon bound of a batch: at most 2 log 2, not an estimate of nats.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.

    Returns:
        A scalar, of the dtype that `dv` returns.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`.

    Equivalent torch program::

        T = torch.einsum("iu,jpu->ijp", z, h); off = ~torch.eye(N, dtype=torch.bool)
        2 * math.log(2) - softplus(-T.diagonal()).mean() - softplus(T[off]).mean()

    Source: Nowozin et al. 2016; Hjelm et al. 2018; spec section 2.
    """
    found = _reduce("jsd", z, h, scores, stats, mask, impl, SOFTPLUS)
    return reference.jsd(found) if isinstance(found, Tensor) else _jsd(found)


def _jsd(stats: CriticStats) -> Tensor:
    negative = _negative_mean(stats.softplus)  # type: ignore[arg-type]
    return logsigmoid(stats.positives).mean() - negative + 2 * math.log(2)


def smile(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    tau: float,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return SMILE: the value of dv with clamped negatives, the gradient of jsd; in nats.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.
        tau: > 0; the negatives' scores are clamped to [-tau, tau], which bounds the variance and
            gives up that the value is a lower bound.

    Returns:
        A scalar, of the dtype that `dv` returns.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`; tau <= 0 or not that of stats.

    Equivalent torch program::

        value = dv(T with its off-diagonal entries clamped to [-tau, tau]); surrogate = jsd(T)
        surrogate + (value - surrogate).detach()

    Source: Song and Ermon 2020; spec section 2.
    """
    tau = _check_tau("smile", tau)
    found = _reduce("smile", z, h, scores, stats, mask, impl, NEEDS["smile"], tau)
    if isinstance(found, Tensor):
        return reference.smile(found, tau=tau)
    lse: Tensor = found.clamped_lse.logsumexp(0)  # type: ignore[union-attr]
    value = (found.positives.detach() - lse).mean() + _log_pairs(found.positives)
    return reference.value_with_gradient(value, _jsd(found))


def mine(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    ema_state: EMAState,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return MINE: the value of dv, with less bias in the gradient of its log term; in nats.

    The gradient of log mean exp(T) is divided by a running mean of mean exp(T) over batches, of
    which the present one is a part, instead of by the batch's own. Every call updates ema_state; to
    evaluate without, use dv.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.
        ema_state: the running mean, per location.

    Returns:
        A scalar, of the dtype that `dv` returns.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`; an ema_state of another dtype, device or P.

    Equivalent torch program::

        et = T[off].exp().mean(0); ema = (decay * ema + (1 - decay) * et).detach()
        T.diagonal().t().mean() - et.log().mean()  # the last term has the gradient of et / ema

    Source: Belghazi et al. 2018, section 3.2; spec section 2.
    """
    found = _reduce("mine", z, h, scores, stats, mask, impl, LSE)
    log_mean = _log_mean_exp(found)
    positives = reference.positive_scores(found) if isinstance(found, Tensor) else found.positives
    ratio = (log_mean - ema_state.update("mine", log_mean.detach())).exp()
    value = positives.detach().mean() - log_mean.detach().mean()
    carrier = positives.mean() - ratio.mean()
    return reference.value_with_gradient(value, carrier)


def fenchel_dual(
    z: Tensor | None = None,
    h: Tensor | None = None,
    *,
    measure: str,
    scores: Tensor | None = None,
    stats: CriticStats | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Return the dual form of an f-divergence between positive and negative pairs.

    Args:
        z, h, scores, stats, mask, impl: as for `dv`.
        measure: "GAN", "X2" (Pearson chi squared), "KL", "RKL" (reverse KL), "H2" (squared
            Hellinger) or "W1" (Wasserstein; the critic must be 1-Lipschitz). The formulas are those
            of Hjelm et al.'s code, also where they are no lower bound: X2 grows with any |T|, GAN
            is jsd without 2 log 2.

    Returns:
        A scalar, of the dtype that `dv` returns.

    Raises:
        ValueError, TypeError, RuntimeError: as `dv`; an unknown measure.

    Equivalent torch program (KL)::

        T = torch.einsum("iu,jpu->ijp", z, h); off = ~torch.eye(N, dtype=torch.bool)
        (T.diagonal() + 1).mean() - T[off].exp().mean()

    Source: Nowozin et al. 2016; Hjelm et al. 2018 (``gan_losses.py``); spec section 2.
    """
    if measure not in MEASURES:
        raise ValueError(f"fenchel_dual: measure is {measure!r}, wanted one of {tuple(MEASURES)}")
    found = _reduce("fenchel_dual", z, h, scores, stats, mask, impl, MEASURES[measure])
    if isinstance(found, Tensor):
        return reference.fenchel_dual(found, measure=measure)
    return _positive_mean(found.positives, measure) - _negative_expectation(found, measure)


def _positive_mean(positives: Tensor, measure: str) -> Tensor:
    if measure == "GAN":
        return logsigmoid(positives).mean()
    if measure == "X2":
        return (positives**2).mean()
    if measure == "KL":
        return positives.mean() + 1
    if measure == "RKL":
        return -(-positives).exp().mean()
    return 1 - (-positives).exp().mean() if measure == "H2" else positives.mean()


def _negative_expectation(stats: CriticStats, measure: str) -> Tensor:
    if MEASURES[measure] == LSE:
        mean = _log_mean_exp(stats).exp().mean()
        return mean - 1 if measure == "H2" else mean
    mean = _negative_mean(getattr(stats, FIELDS[MEASURES[measure]]))
    return {"GAN": mean, "X2": -mean, "RKL": mean - 1, "W1": mean}[measure]
