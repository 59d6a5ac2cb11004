"""CPU kernels: torch's matrix products tile by tile, our reductions while a tile is in cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

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
from wcmi_fast.backends.backend import Backend, Case, operators_of
from wcmi_fast.backends.binary import DTYPES, load
from wcmi_fast.backends.layout import dense, laid_out_as, written
from wcmi_fast.backends.memory import empty

# A tile of T stays in the second-level cache between the product and the reductions. It has so many
# rows that its product runs at full rate, and as many images as fit.
TILE_BYTES = 1 << 20
TILE_ROWS = 128

# Columns of T that one product computes when all of T is kept: so few that the rows of h that it
# packs stay in the second-level cache.
PRODUCT_COLUMNS = 1024

# Rows of the critic's 1x1 block that are computed together: so many that the sum of the weights'
# gradient over blocks costs little beside its products, so few that intermediates stay small.
TAIL_ROWS = 1024

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


Tile = tuple[int, int, int, int]


def _tiles(n: int, p: int, itemsize: int) -> list[Tile]:
    """Split T into tiles of about TILE_BYTES: (first row, rows, first image, images).

    All rows of some images come before other images, so that these are read once.
    """
    rows = min(n, TILE_ROWS)
    images = min(n, max(1, TILE_BYTES // (rows * p * itemsize)))
    return [
        (row, min(rows, n - row), image, min(images, n - image))
        for image in range(0, n, images)
        for row in range(0, n, rows)
    ]


# Where CriticStatsArrays (kernels.h) has each statistic, after the positives and row_max.
PLACES = {LSE: 2, SOFTPLUS: 3, CLAMPED_LSE: 4, SUM: 5, SQUARE: 6}


class _Statistics:
    """The statistics of T while its tiles come in, all rows of some images before other images."""

    def __init__(self, n: int, p: int, dtype: torch.dtype, which: int, tau: float) -> None:
        self.locations, self.tau, self.threads, self.count = p, tau, torch.get_num_threads(), n * p
        places = [PLACES[statistic] for statistic in asked(which)]
        self.stats = torch.empty((1 + len(places), n, p), dtype=dtype)
        workspace = self.threads * _binary.critic_stats_workspace(p)
        self.scratch = torch.empty(self.count + workspace, dtype=dtype)
        step = self.count * dtype.itemsize
        first, row_max = self.stats.data_ptr(), self.scratch.data_ptr()
        self.arrays, self.workspace = [first, row_max, *5 * [0]], row_max + step
        for k, place in enumerate(places):
            self.arrays[place] = first + (k + 1) * step
        self.kernels = _kernels(dtype)

    def add(self, scores: Tensor, tile: Tile) -> None:
        self.kernels.fwd(
            scores.data_ptr(), (*tile, self.locations), self.arrays, self.tau, self.workspace,
            self.threads,
        )  # fmt: skip

    def finish(self) -> Tensor:
        self.kernels.finish(self.arrays, self.count, self.tau, self.threads)
        return self.stats


class _Gradients:
    """The gradient of T, tile by tile, from those of its statistics."""

    def __init__(
        self, dstats: Sequence[Tensor], lse: Tensor, p: int, dtype: torch.dtype, which: int
    ) -> None:
        self.locations, self.threads = p, torch.get_num_threads()
        self.read = (lse, *(d.contiguous() for d in dstats))
        self.lse = lse.data_ptr() if which & LSE else 0
        self.arrays = [self.read[1].data_ptr(), *6 * [0]]
        for statistic, d in zip(asked(which), self.read[2:], strict=True):
            self.arrays[PLACES[statistic]] = d.data_ptr()
        self.workspace = torch.empty(self.threads * _binary.critic_stats_workspace(p), dtype=dtype)
        self.kernels = _kernels(dtype)

    def write(self, scores: Tensor, tile: Tile, grad: Tensor) -> None:
        self.kernels.bwd(
            scores.data_ptr(), (*tile, self.locations), self.lse, self.arrays, grad.data_ptr(),
            self.workspace.data_ptr(), self.threads,
        )  # fmt: skip


def _kernels(dtype: torch.dtype) -> Any:
    return _binary.critic_stats_f64 if dtype == torch.float64 else _binary.critic_stats_f32


def _without_autocast() -> AbstractContextManager[object]:
    """Keep products in the dtype of their operands; entering torch.autocast costs 6 us."""
    enabled = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if enabled else nullcontext()


def critic_stats_fwd(
    z: Tensor, h: Tensor, which: int, tau: float, keep_scores: bool
) -> tuple[Tensor, Tensor]:
    """Reduce T to the positives and the statistics asked for; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    with _without_autocast():
        z = z.to(dtype)
        if keep_scores:
            scores = _all_scores(z, h.to(dtype).view(n * p, u)).view(n, n, p)
            return score_stats_fwd(scores, which, tau), scores
        statistics = _Statistics(n, p, dtype, which, tau)
        tiles = _tiles(n, p, dtype.itemsize)
        buffer = torch.empty(tiles[0][1] * tiles[0][3] * p, dtype=dtype)
        for tile in tiles:
            row, rows, image, images = tile
            if row == 0:
                features = h[image : image + images].to(dtype).view(-1, u)
            part = buffer[: rows * images * p].view(rows, images * p)
            torch.mm(z[row : row + rows], features.t(), out=part)
            statistics.add(part, tile)
    return statistics.finish(), buffer.new_empty(0)


def _all_scores(z: Tensor, features: Tensor) -> Tensor:
    """Return z features', some columns at a time: faster than as one product."""
    if len(features) <= PRODUCT_COLUMNS:
        return torch.mm(z, features.t())
    scores = z.new_empty((len(z), len(features)))
    parts = zip(scores.split(PRODUCT_COLUMNS, dim=1), features.split(PRODUCT_COLUMNS), strict=True)
    for part, some in parts:
        torch.mm(z, some.t(), out=part)
    return scores


def critic_stats_bwd(
    dstats: list[Tensor],
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    which: int,
    need_dz: bool,
    need_dh: bool,
) -> tuple[Tensor, Tensor]:
    """Turn gradients of the statistics into dz and dh; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    none = h.new_empty(0)
    with _without_autocast():
        if not scores.numel():
            gradients = _Gradients(dstats, lse, p, dtype, which)
            return _critic_stats_bwd_tiled(gradients, z, h, need_dz, need_dh)
        grad = score_stats_bwd(dstats, scores, lse, which).view(n, n * p)
        dz = torch.mm(grad, h.to(dtype).view(n * p, u)).to(z.dtype) if need_dz else none
        if not need_dh:
            return dz, none
        dh = torch.mm(grad.t(), z.to(dtype), out=empty((n * p, u), grad))
    return dz, dh.to(h.dtype).view(h.shape)


def _critic_stats_bwd_tiled(
    gradients: _Gradients, z: Tensor, h: Tensor, need_dz: bool, need_dh: bool
) -> tuple[Tensor, Tensor]:
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    tiles = _tiles(n, p, dtype.itemsize)
    columns = tiles[0][3] * p
    part_buffer, grad_buffer = torch.empty((2, tiles[0][1] * columns), dtype=dtype).unbind()
    wide_z = z.to(dtype)
    dz = torch.empty((n, u) if need_dz else 0, dtype=dtype)
    dh = empty(h.shape, h) if need_dh else h.new_empty(0)
    # Of half types the sums over the rows are kept in float32 until they are complete.
    wide_dh = None if h.dtype == dtype or not need_dh else torch.empty((columns, u), dtype=dtype)
    for tile in tiles:
        row, rows, image, images = tile
        if row == 0:
            features = h[image : image + images].to(dtype).view(-1, u)
        own = wide_z[row : row + rows]
        part = part_buffer[: rows * images * p].view(rows, images * p)
        grad = grad_buffer[: rows * images * p].view(rows, images * p)
        torch.mm(own, features.t(), out=part)
        gradients.write(part, tile, grad)
        if need_dz:
            dz[row : row + rows].addmm_(grad, features, beta=0 if image == 0 else 1)
        if need_dh:
            result = dh[image : image + images].view(-1, u)
            sums = result if wide_dh is None else wide_dh[: images * p]
            sums.addmm_(grad.t(), own, beta=0 if row == 0 else 1)
            if wide_dh is not None and row + rows == n:
                result.copy_(sums)
    return dz.to(z.dtype), dh


def dv_value(positives: Tensor, lse: Tensor, zero_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Return dv and its gradient in lse; see _ops.py."""
    n, p = lse.shape
    value, dlse = lse.new_empty(()), torch.empty((n, p), dtype=lse.dtype)
    _kernels(lse.dtype).dv_value(
        positives.data_ptr(), lse.data_ptr(), n, p, zero_diagonal, value.data_ptr(), dlse.data_ptr()
    )
    return value, dlse


def _score_tiles(scores: Tensor) -> list[Tile]:
    """Split given scores into tiles of whole rows: one, unless they must be converted."""
    n, _, p = scores.shape
    dtype = accumulation_dtype(scores.dtype)
    rows = n if scores.dtype == dtype else min(n, max(1, TILE_BYTES // (n * p * dtype.itemsize)))
    return [(row, min(rows, n - row), 0, n) for row in range(0, n, rows)]


def score_stats_fwd(scores: Tensor, which: int, tau: float) -> Tensor:
    """Reduce given scores to the positives and the statistics asked for; see _ops.py."""
    n, _, p = scores.shape
    dtype = accumulation_dtype(scores.dtype)
    statistics = _Statistics(n, p, dtype, which, tau)
    for tile in _score_tiles(scores):
        # Named, so that a converted tile lives until the kernel has read it.
        part = scores[tile[0] : tile[0] + tile[1]].to(dtype)
        statistics.add(part, tile)
    return statistics.finish()


def score_stats_bwd(dstats: list[Tensor], scores: Tensor, lse: Tensor, which: int) -> Tensor:
    """Turn gradients of the statistics into that of the scores; see _ops.py."""
    dtype = accumulation_dtype(scores.dtype)
    gradients = _Gradients(dstats, lse, scores.shape[2], dtype, which)
    dscores = torch.empty_like(scores)
    for tile in _score_tiles(scores):
        rows = slice(tile[0], tile[0] + tile[1])
        part = scores[rows].to(dtype)
        grad = dscores[rows] if scores.dtype == dtype else torch.empty_like(part)
        gradients.write(part, tile, grad)
        if scores.dtype != dtype:
            dscores[rows].copy_(grad)
    return dscores


def _tail(dtype: torch.dtype) -> Any:
    return _binary.critic_tail_f64 if dtype == torch.float64 else _binary.critic_tail_f32


def critic_tail_fwd(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Map rows to features, a block of rows at a time; see _ops.py."""
    units, width = len(w2), tail_width(len(w2))
    features, rstd = empty((len(rows), width), rows), rows.new_empty(len(rows))
    kernel, threads = _tail(rows.dtype).fwd, torch.get_num_threads()
    with _without_autocast():
        for first in range(0, len(rows), TAIL_ROWS):
            block = rows[first : first + TAIL_ROWS]
            out = features[first : first + TAIL_ROWS]
            hidden = torch.addmm(b1, block, w1.t()).relu_()
            torch.mm(hidden, w2.t(), out=out[:, :units])
            out[:, :units].addmm_(block, s.t())
            kernel(
                out.data_ptr(), width, len(block), units, b2.data_ptr(), eps,
                rstd[first:].data_ptr(), threads,
            )  # fmt: skip
    return features, rstd


def critic_tail_bwd(
    dfeatures: Tensor,
    features: Tensor,
    rstd: Tensor,
    rows: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    s: Tensor,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of rows and weights, a block of rows at a time; see _ops.py.

    The hidden layer is computed again: two hundredths of the whole, for half of the memory.
    """
    units, width = len(w2), dfeatures.shape[1]
    kernel, threads = _tail(rows.dtype).bwd, torch.get_num_threads()
    drows = torch.empty_like(rows)
    dw1, dw2, ds = (_zeros_or_empty(w, need_weights) for w in (w1, w2, s))
    db1, db2 = (_zeros_or_empty(b1, need_weights) for _ in range(2))
    buffer = rows.new_empty((min(TAIL_ROWS, len(rows)), units))
    with _without_autocast():
        for first in range(0, len(rows), TAIL_ROWS):
            block = rows[first : first + TAIL_ROWS]
            dv = buffer[: len(block)]
            kernel(
                dfeatures[first:].data_ptr(), features[first:].data_ptr(), width, len(block), units,
                rstd[first:].data_ptr(), dv.data_ptr(), threads,
            )  # fmt: skip
            hidden = torch.addmm(b1, block, w1.t()).relu_()
            dhidden = torch.mm(dv, w2)
            torch.ops.aten.threshold_backward(dhidden, hidden, 0, grad_input=dhidden)
            if need_weights:
                db1 += dhidden.sum(0)
                dw1.addmm_(dhidden.t(), block)
                db2 += dv.sum(0)
                dw2.addmm_(dv.t(), hidden)
                ds.addmm_(dv.t(), block)
            dblock = drows[first : first + TAIL_ROWS]
            torch.mm(dhidden, w1, out=dblock)
            dblock.addmm_(dv, s)
    return drows, dw1, db1, dw2, db2, ds


def _zeros_or_empty(like: Tensor, wanted: bool) -> Tensor:
    return torch.zeros_like(like) if wanted else like.new_empty(0)


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
    written(x, target)


def linf_start_(x: Tensor, origin: Tensor, eps: float, seed: int, lo: float, hi: float) -> None:
    """Write a random start; in index order, so that the memory format changes nothing."""
    target = x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype)
    origin = origin.contiguous()
    _binary.linf_start(
        DTYPES[x.dtype], target.data_ptr(), origin.data_ptr(), x.numel(), eps, seed, lo, hi,
        torch.get_num_threads(),
    )  # fmt: skip
    written(x, target)


def l2_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected step along the normalised gradient in place; see kernels.h."""
    target = dense(x)
    grad, origin = laid_out_as(grad, target), laid_out_as(origin, target)
    rows = len(x)
    _binary.l2_step(
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), rows,
        x.numel() // max(rows, 1), eps, step_size, lo, hi, torch.get_num_threads(),
    )  # fmt: skip
    written(x, target)


def keep_best_(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> None:
    """Keep the rows of greater value; see kernels.h."""
    target, target_value = dense(best_x), best_value.contiguous()
    x, value = laid_out_as(x, target), value.contiguous()
    rows = value.numel()
    _binary.keep_best(
        DTYPES[value.dtype], target.data_ptr(), target_value.data_ptr(), x.data_ptr(),
        value.data_ptr(), rows, x.nbytes // max(rows, 1), torch.get_num_threads(),
    )  # fmt: skip
    written(best_x, target)
    written(best_value, target_value)


KERNELS: dict[str, Callable[..., Any]] = {
    "critic_stats_fwd": critic_stats_fwd,
    "critic_stats_bwd": critic_stats_bwd,
    "dv_value": dv_value,
    "score_stats_fwd": score_stats_fwd,
    "score_stats_bwd": score_stats_bwd,
    "critic_tail_fwd": critic_tail_fwd,
    "critic_tail_bwd": critic_tail_bwd,
    "linf_step_": linf_step_,
    "linf_start_": linf_start_,
    "l2_step_": l2_step_,
    "keep_best_": keep_best_,
}


def _unsupported(operator: str, case: Case) -> str | None:
    if operator == "critic_tail" and case.dtype not in (torch.float32, torch.float64):
        return f"its kernel takes float32 and float64, not {case.dtype}"
    return None


BACKEND = Backend("cpu", operators_of(KERNELS), KERNELS, MISSING, _unsupported)
