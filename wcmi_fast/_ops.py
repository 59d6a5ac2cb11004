"""Every operator's schema and fake; kernels are in backends/, one per operator and back end.

An operator takes contiguous tensors that functional/ has checked, and the name of the back end that
registry.choose has found. It has no autograd of its own: the differentiable functions are in
functional/.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The dtypes that every operator takes.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Kept alive by this name for as long as the module: the operators go when it goes.
LIBRARY = torch.library.Library("wcmi_fast", "DEF")

# The statistics of T that critic_stats computes beside the positives, each (N, P) and over the
# images j != i. They are asked for by the sum of their bits, and come in this order.
LSE, SOFTPLUS, CLAMPED_LSE, SUM, SQUARE = 1, 2, 4, 8, 16
STATISTICS = (LSE, SOFTPLUS, CLAMPED_LSE, SUM, SQUARE)

# stats (1 + S, N, P): the positives and the S statistics of `which`; scores (N, N, P) or empty: T,
# kept for the backward pass when asked.
LIBRARY.define(
    "critic_stats_fwd(Tensor z, Tensor h, int which, float tau, bool keep_scores, str impl)"
    " -> (Tensor stats, Tensor scores)"
)
# dstats: one (N, P) for each of stats; dz (N, U), dh (N, P, U); one not needed comes back empty.
LIBRARY.define(
    "critic_stats_bwd(Tensor[] dstats, Tensor z, Tensor h, Tensor lse, Tensor scores, int which,"
    " bool need_dz, bool need_dh, str impl) -> (Tensor dz, Tensor dh)"
)
# dv from positives (N, P) and lse (N, P); dlse (N, P) is its gradient.
LIBRARY.define(
    "dv_value(Tensor positives, Tensor lse, bool zero_diagonal, str impl)"
    " -> (Tensor value, Tensor dlse)"
)
# The same statistics of given scores (N, N, P).
LIBRARY.define("score_stats_fwd(Tensor scores, int which, float tau, str impl) -> Tensor")
LIBRARY.define(
    "score_stats_bwd(Tensor[] dstats, Tensor scores, Tensor lse, int which, str impl) -> Tensor"
)
# The critic's 1x1 block on rows (R, C), batch norm folded into w1 and b1, without the affine part
# of its layer norm: features (R, tail_width(U)), of which the columns from U on are 1, 0, 0, ...
LIBRARY.define(
    "critic_tail_fwd(Tensor rows, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor s, float eps,"
    " str impl) -> (Tensor features, Tensor rstd)"
)
LIBRARY.define(
    "critic_tail_bwd(Tensor dfeatures, Tensor features, Tensor rstd, Tensor rows, Tensor w1,"
    " Tensor b1, Tensor w2, Tensor s, bool need_weights,"
    " str impl)"
    " -> (Tensor drows, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor ds)"
)
LIBRARY.define(
    "linf_step_(Tensor(a!) x, Tensor grad, Tensor origin, float eps, float step_size,"
    " float lo, float hi, str impl) -> ()"
)
LIBRARY.define(
    "linf_start_(Tensor(a!) x, Tensor origin, float eps, int seed, float lo, float hi, str impl)"
    " -> ()"
)
LIBRARY.define(
    "l2_step_(Tensor(a!) x, Tensor grad, Tensor origin, float eps, float step_size,"
    " float lo, float hi, str impl) -> ()"
)
# best_x and x (N, ...), values (N,), or () where the batch is one row.
LIBRARY.define(
    "keep_best_(Tensor(a!) best_x, Tensor(b!) best_value, Tensor x, Tensor value, str impl) -> ()"
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that scores and their statistics have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def asked(which: int) -> list[int]:
    """Return the statistics in `which`, in the order in which they come."""
    return [statistic for statistic in STATISTICS if which & statistic]


@torch.library.register_fake("wcmi_fast::critic_stats_fwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    z: Tensor, h: Tensor, which: int, tau: float, keep_scores: bool, impl: str
) -> tuple[Tensor, Tensor]:
    n, p, _ = h.shape
    dtype = accumulation_dtype(z.dtype)
    scores = z.new_empty((n, n, p) if keep_scores else (0,), dtype=dtype)
    return z.new_empty((1 + len(asked(which)), n, p), dtype=dtype), scores


@torch.library.register_fake("wcmi_fast::critic_stats_bwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    dstats: list[Tensor],
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    which: int,
    need_dz: bool,
    need_dh: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape if need_dz else (0,)), h.new_empty(h.shape if need_dh else (0,))


@torch.library.register_fake("wcmi_fast::dv_value", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(positives: Tensor, lse: Tensor, zero_diagonal: bool, impl: str) -> tuple[Tensor, Tensor]:
    return positives.new_empty(()), lse.new_empty(lse.shape)


@torch.library.register_fake("wcmi_fast::score_stats_fwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(scores: Tensor, which: int, tau: float, impl: str) -> Tensor:
    n, _, p = scores.shape
    shape = (1 + len(asked(which)), n, p)
    return scores.new_empty(shape, dtype=accumulation_dtype(scores.dtype))


@torch.library.register_fake("wcmi_fast::score_stats_bwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(dstats: list[Tensor], scores: Tensor, lse: Tensor, which: int, impl: str) -> Tensor:
    return scores.new_empty(scores.shape)


def tail_width(units: int) -> int:
    """Return the columns of critic features: U, and one or more for the constant, aligned."""
    return (units // 16 + 1) * 16


@torch.library.register_fake("wcmi_fast::critic_tail_fwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor]:
    return rows.new_empty((len(rows), tail_width(len(w2)))), rows.new_empty(
        len(rows), dtype=accumulation_dtype(rows.dtype)
    )


@torch.library.register_fake("wcmi_fast::critic_tail_bwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    dfeatures: Tensor,
    features: Tensor,
    rstd: Tensor,
    rows: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    s: Tensor,
    need_weights: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    weights = (torch.empty_like(x) if need_weights else x.new_empty(0) for x in (w1, b1, w2, b1, s))
    return torch.empty_like(rows), *weights


@torch.library.register_fake("wcmi_fast::linf_step_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    lo: float,
    hi: float,
    impl: str,
) -> None:
    return None


@torch.library.register_fake("wcmi_fast::linf_start_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, origin: Tensor, eps: float, seed: int, lo: float, hi: float, impl: str) -> None:
    return None


@torch.library.register_fake("wcmi_fast::l2_step_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    lo: float,
    hi: float,
    impl: str,
) -> None:
    return None


@torch.library.register_fake("wcmi_fast::keep_best_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor, impl: str) -> None:
    return None
