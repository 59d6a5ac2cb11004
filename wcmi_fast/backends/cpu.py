"""CPU kernels: torch's matrix products tile by tile, our reductions while a tile is in cache."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from wcmi_fast._ops import LIBRARY, accumulation_dtype
from wcmi_fast.backends.binary import DTYPES, load
from wcmi_fast.backends.layout import dense, laid_out_as

OPERATORS: tuple[str, ...] = ("critic_stats", "linf_step_")

# A tile of T stays in the second-level cache between the product and the reductions.
TILE_BYTES = 1 << 20

_binary, MISSING = load(
    "_cpu",
    "reinstall with a C++17 compiler by `pip install --force-reinstall --no-deps .`",
)


def _select_level(binary: Any) -> str | None:
    """Apply WCMI_FAST_SIMD; return the sentence to raise at the first call if it is wrong."""
    wanted = os.environ.get("WCMI_FAST_SIMD")
    if binary is None or wanted is None:
        return None
    levels = binary.levels()
    if wanted not in levels:
        return f"WCMI_FAST_SIMD is {wanted!r}, wanted one of this machine's levels {levels}"
    binary.set_level(wanted)
    return None


BAD_LEVEL = _select_level(_binary)


def simd_levels() -> tuple[list[str], str]:
    """Return the levels that run here, best last, and the one in use."""
    return ([], "none") if _binary is None else (_binary.levels(), _binary.level())


def _tiles(n: int, p: int, itemsize: int) -> list[tuple[int, int]]:
    """Split n images into (first, count) tiles whose scores take about TILE_BYTES."""
    images = max(1, TILE_BYTES // (n * p * itemsize))
    return [(first, min(images, n - first)) for first in range(0, n, images)]


def critic_stats_fwd(
    z: Tensor, h: Tensor, zero_diagonal: bool, keep_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce T to the positives and the log-sum-exp per location; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    code, threads = DTYPES[dtype], torch.get_num_threads()
    positives, lse = torch.empty((n, p), dtype=dtype), torch.empty(p, dtype=dtype)
    row_max, row_sum = torch.empty((2, n, p), dtype=dtype).unbind()
    tiles = _tiles(n, p, dtype.itemsize)
    buffer = torch.empty((n if keep_scores else tiles[0][1]) * p, n, dtype=dtype)
    z = z.to(dtype)
    with torch.autocast("cpu", enabled=False):
        for first, count in tiles:
            start = first * p if keep_scores else 0
            tile = buffer[start : start + count * p]
            torch.mm(h[first : first + count].to(dtype).view(-1, u), z.t(), out=tile)
            _binary.critic_stats_fwd(
                code, tile.data_ptr(), first, count, n, p,
                positives.data_ptr(), row_max.data_ptr(), row_sum.data_ptr(), threads,
            )  # fmt: skip
    _binary.critic_stats_lse(
        code, row_max.data_ptr(), row_sum.data_ptr(), n, p, zero_diagonal, lse.data_ptr()
    )
    return positives, lse, buffer if keep_scores else z.new_empty(0)


def critic_stats_bwd(
    dpositives: Tensor,
    dlse: Tensor,
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    need_dz: bool,
    need_dh: bool,
) -> tuple[Tensor, Tensor]:
    """Turn gradients of the statistics into dz and dh, tile by tile; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    code, threads = DTYPES[dtype], torch.get_num_threads()
    tiles = _tiles(n, p, dtype.itemsize)
    buffer = torch.empty(tiles[0][1] * p, n, dtype=dtype)
    wide_z = z.to(dtype)
    dz = torch.zeros((n, u), dtype=dtype) if need_dz else torch.empty(0, dtype=dtype)
    dh = torch.empty_like(h) if need_dh else h.new_empty(0)
    with torch.autocast("cpu", enabled=False):
        for first, count in tiles:
            rows = h[first : first + count].to(dtype).view(-1, u)
            grad = buffer[: count * p]
            tile = scores[first * p : (first + count) * p] if scores.numel() else grad
            if not scores.numel():
                torch.mm(rows, wide_z.t(), out=tile)
            _binary.critic_stats_bwd(
                code, tile.data_ptr(), first, count, n, p,
                lse.data_ptr(), dpositives.data_ptr(), dlse.data_ptr(), grad.data_ptr(), threads,
            )  # fmt: skip
            if need_dz:
                dz.addmm_(grad.t(), rows)
            if need_dh:
                dh[first : first + count].view(-1, u).copy_(torch.mm(grad, wide_z))
    return dz.to(z.dtype), dh


def linf_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected sign step in place; see kernels.h."""
    target = dense(x)
    grad, origin = laid_out_as(grad, target), laid_out_as(origin, target)
    _binary.linf_step(
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), x.numel(),
        eps, step_size, lo, hi, torch.get_num_threads(),
    )  # fmt: skip
    if target is not x:
        x.copy_(target)
    elif not x.is_inference():
        # Else autograd would not see that a tensor saved for a backward pass has changed.
        torch.autograd.graph.increment_version(x)


if _binary is not None:
    LIBRARY.impl("critic_stats_fwd", critic_stats_fwd, "CPU")
    LIBRARY.impl("critic_stats_bwd", critic_stats_bwd, "CPU")
    LIBRARY.impl("linf_step_", linf_step_, "CPU")
