"""The oracle: every operator in plain torch, as spec.md writes it.

It is the fallback where a device has no kernel, the tests' oracle (in float64) and the benchmarks'
baseline. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from wcmi_fast._ops import accumulation_dtype


def scores(z: Tensor, h: Tensor) -> Tensor:
    """Return T (N, N, P), T[i, j, p] = <z[i], h[j, p]>, for z (N, U) and h (N, P, U)."""
    dtype = accumulation_dtype(z.dtype)
    # Scores in the dtype of the docs, also under autocast; the meta device has none to turn off.
    available = torch.amp.is_autocast_available(z.device.type)
    with torch.autocast(z.device.type, enabled=False) if available else nullcontext():
        return torch.einsum("iu,jpu->ijp", z.to(dtype), h.to(dtype))


def dv(z: Tensor, h: Tensor, *, diagonal: str = "exclude") -> Tensor:
    """Return the Donsker-Varadhan bound, averaged over locations (spec section 2)."""
    T = scores(z, h)
    n = z.shape[0]
    positives = T.diagonal(dim1=0, dim2=1).t()
    same = torch.eye(n, dtype=torch.bool, device=T.device)[:, :, None]
    negatives = T.masked_fill(same, 0.0 if diagonal == "zero" else -math.inf)
    lse = negatives.logsumexp(dim=(0, 1))
    return (positives - lse).mean() + math.log(n * (n - 1))


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
