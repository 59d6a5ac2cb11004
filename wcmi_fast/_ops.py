"""Every operator's schema and fake; kernels are in backends/, one per operator and back end.

An operator takes contiguous tensors that functional/ has checked, and has no autograd of its
own: the differentiable functions are in functional/.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The dtypes that every operator takes.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Kept alive by this name for as long as the module: the operators go when it goes.
LIBRARY = torch.library.Library("wcmi_fast", "DEF")

# positives (N, P), lse (P,), scores (N * P, N) or empty: T, kept for the backward pass when asked.
LIBRARY.define(
    "critic_stats_fwd(Tensor z, Tensor h, bool zero_diagonal, bool keep_scores)"
    " -> (Tensor positives, Tensor lse, Tensor scores)"
)
# dz (N, U), dh (N, P, U); one that is not needed comes back empty.
LIBRARY.define(
    "critic_stats_bwd(Tensor dpositives, Tensor dlse, Tensor z, Tensor h, Tensor lse,"
    " Tensor scores, bool need_dz, bool need_dh) -> (Tensor dz, Tensor dh)"
)
LIBRARY.define(
    "linf_step_(Tensor(a!) x, Tensor grad, Tensor origin, float eps, float step_size,"
    " float lo, float hi) -> ()"
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that scores and their statistics have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("wcmi_fast::critic_stats_fwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    z: Tensor, h: Tensor, zero_diagonal: bool, keep_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, p, _ = h.shape
    dtype = accumulation_dtype(z.dtype)
    scores = z.new_empty((n * p, n) if keep_scores else (0,), dtype=dtype)
    return z.new_empty((n, p), dtype=dtype), z.new_empty((p,), dtype=dtype), scores


@torch.library.register_fake("wcmi_fast::critic_stats_bwd", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    dpositives: Tensor,
    dlse: Tensor,
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    need_dz: bool,
    need_dh: bool,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape if need_dz else (0,)), h.new_empty(h.shape if need_dh else (0,))


@torch.library.register_fake("wcmi_fast::linf_step_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    return None
