"""critic_tail in Triton: products with the layer normalisation's statistics in their epilogue."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast._ops import tail_width
from wcmi_fast.backends.triton.launch import (
    PROCESSORS,
    TYPE_NAMES,
    ceil_div,
    configuration,
    dot_precision,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.product import (
    WHOLE_STEPS,
    add_product,
    product,
    tile_of,
    tiles_grid,
)
from wcmi_fast.backends.triton.program import Program

# Rows are computed in blocks whose intermediate results together take at most so much memory.
BLOCK_BYTES = 256 << 20

# Columns that one tile's statistics are of, in every configuration: normalise_rows merges them.
TILE_COLUMNS = 128

HALF_CONFIGURATIONS = (
    configuration(8, 3, BM=128, BN=TILE_COLUMNS, BK=64),
    configuration(4, 3, BM=64, BN=TILE_COLUMNS, BK=64),
    configuration(4, 4, BM=128, BN=TILE_COLUMNS, BK=32),
    configuration(8, 4, BM=128, BN=TILE_COLUMNS, BK=32),
    configuration(8, 3, BM=256, BN=TILE_COLUMNS, BK=64),
)
FLOAT_CONFIGURATIONS = (
    configuration(8, 3, BM=64, BN=TILE_COLUMNS, BK=16),
    configuration(4, 3, BM=32, BN=TILE_COLUMNS, BK=16),
    configuration(8, 3, BM=64, BN=TILE_COLUMNS, BK=32),
    configuration(8, 3, BM=128, BN=TILE_COLUMNS, BK=16),
    configuration(8, 2, BM=128, BN=TILE_COLUMNS, BK=32),
)
ROWS_CONFIGURATION = configuration(4, 1, ROWS=8, COLUMNS=256)


@triton.jit
def layer_tile(
    hidden: tl.tensor,
    w2: tl.tensor,
    rows: tl.tensor,
    s: tl.tensor,
    b2: tl.tensor,
    features: tl.tensor,
    moments: tl.tensor,
    R: tl.tensor,
    U: tl.tensor,
    C: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Write a tile of V = hidden w2' + rows s' + b2, and the moments of each of its rows."""
    row, column = tile_of(tl.program_id(0), R, U, BM, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    acc = add_product(
        acc, hidden, w2, row, column, R, U, 0, U, U, 1, 1, U, BK, WHOLE, PRECISION
    )  # fmt: skip
    acc = add_product(
        acc, rows, s, row, column, R, U, 0, C, C, 1, 1, C, BK, WHOLE, PRECISION
    )  # fmt: skip
    in_row, in_column = row < R, (column < U)[None, :]
    acc += tl.load(b2 + column, mask=column < U, other=0.0).to(tl.float32)[None, :]
    first = tl.min(column, 0)
    count = tl.minimum(U - first, BN).to(tl.float32)
    mean = tl.sum(tl.where(in_column, acc, 0.0), 1) / count
    # A sum of values far from 0 has lost what their differences from its mean still show.
    mean += tl.sum(tl.where(in_column, acc - mean[:, None], 0.0), 1) / count
    centred = tl.where(in_column, acc - mean[:, None], 0.0)
    at = moments + (first // BN).to(tl.int64) * 2 * R + row
    tl.store(at, mean, mask=in_row)
    tl.store(at + R, tl.sum(centred * centred, 1), mask=in_row)
    # In the features' own buffer, rounded to their type: half types lose no more than the
    # operands of the next product do, and the statistics are those of the accumulators.
    out = features + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, acc.to(features.dtype.element_ty), mask=in_row[:, None] & in_column)


@triton.jit
def normalise_rows(
    features: tl.tensor,
    moments: tl.tensor,
    rstd: tl.tensor,
    R: tl.tensor,
    U: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Merge the tiles' moments of some rows in their order, normalise the rows, end them 1, 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_row = row < R
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    at = moments + row
    for first in range(0, U, TILE):
        count = tl.minimum(U - first, TILE)
        share = count.to(tl.float32) / (first + count)
        # Chan et al. 1983: squares of deviations add up, and those of the means from each other.
        delta = tl.load(at, mask=in_row, other=0.0) - mean
        mean += delta * share
        squares += tl.load(at + R, mask=in_row, other=0.0) + delta * delta * (first * share)
        at += tl.full((), 2, tl.int64) * R
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(squares / U + tl.full((), eps, tl.float32)))
    tl.store(rstd + row, scale, mask=in_row)
    for first in range(0, width, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        out = features + row[:, None] * width + column
        v = tl.load(out, mask=in_row[:, None] & (column < U), other=0.0).to(tl.float32)
        constant = tl.where(column == U, 1.0, 0.0)
        x = tl.where(column < U, (v - mean[:, None]) * scale[:, None], constant)
        tl.store(out, x.to(features.dtype.element_ty), mask=in_row[:, None] & (column < width))


@triton.jit
def rows_backward(
    dfeatures: tl.tensor,
    features: tl.tensor,
    rstd: tl.tensor,
    dv: tl.tensor,
    R: tl.tensor,
    U: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write the gradient of some rows of V."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_row = row < R
    sum_d = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, U, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        at, mask = row[:, None] * width + column, in_row[:, None] & (column < U)
        d = tl.load(dfeatures + at, mask=mask, other=0.0).to(tl.float32)
        sum_d += d
        sum_dx += d * tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
    mean_d = (tl.sum(sum_d, 1) / U)[:, None]
    mean_dx = (tl.sum(sum_dx, 1) / U)[:, None]
    scale = tl.load(rstd + row, mask=in_row, other=0.0)[:, None]
    for first in range(0, U, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        at, mask = row[:, None] * width + column, in_row[:, None] & (column < U)
        d = tl.load(dfeatures + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
        result = scale * (d - mean_d - x * mean_dx)
        tl.store(dv + row[:, None] * U + column, result.to(dv.dtype.element_ty), mask=mask)


def critic_tail_fwd(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Map rows to features, a block of rows at a time; see _ops.py."""
    features = rows.new_empty((len(rows), tail_width(len(w2))))
    rstd = rows.new_empty(len(rows), dtype=torch.float32)
    for block in _blocks(rows, len(w2), 1):
        some = rows[block]
        hidden = product(some, w1.t(), some.new_empty((len(some), len(w2))), bias=b1, relu=True)
        _layer(hidden, some, w2, b2, s, eps, features[block], rstd[block])
    return features, rstd


def _blocks(rows: Tensor, units: int, intermediates: int) -> list[slice]:
    """Split rows into blocks, each with so many intermediate results of its rows and U columns."""
    most = BLOCK_BYTES // (intermediates * units * rows.dtype.itemsize)
    size = max(most // 128 * 128, 128)
    return [slice(first, first + size) for first in range(0, len(rows), size)]


def _layer(
    hidden: Tensor,
    rows: Tensor,
    w2: Tensor,
    b2: Tensor,
    s: Tensor,
    eps: float,
    features: Tensor,
    rstd: Tensor,
) -> None:
    """Write the features and rstd of a block of rows."""
    (r, c), u, width = rows.shape, len(w2), features.shape[1]
    moments = torch.empty(
        (ceil_div(u, TILE_COLUMNS), 2, r), dtype=torch.float32, device=rows.device
    )
    sizes = {"R": r, "U": u, "width": width}
    arguments = {
        "hidden": hidden, "w2": w2, "rows": rows, "s": s, "b2": b2, "features": features,
        "moments": moments, **sizes, "C": c,
        "WHOLE": u % WHOLE_STEPS == 0 and c % WHOLE_STEPS == 0,
        "PRECISION": dot_precision(rows.dtype),
    }  # fmt: skip
    launch(
        layer_tile, tiles_grid(r, u), arguments, _default(r, u, rows.dtype),
        _configurations(rows.dtype), ("R", "U", "C"),
    )  # fmt: skip
    arguments = {
        "features": features, "moments": moments, "rstd": rstd, **sizes,
        "eps": eps, "TILE": TILE_COLUMNS,
    }  # fmt: skip
    _launch_rows(normalise_rows, r, arguments)


def _launch_rows(kernel: Any, rows: int, arguments: dict[str, Any]) -> None:
    grid = (ceil_div(rows, ROWS_CONFIGURATION.kwargs["ROWS"]),)
    launch(kernel, lambda _: grid, arguments, ROWS_CONFIGURATION, (ROWS_CONFIGURATION,), ())


def _configurations(dtype: torch.dtype) -> tuple[triton.Config, ...]:
    return FLOAT_CONFIGURATIONS if dtype == torch.float32 else HALF_CONFIGURATIONS


def _default(r: int, u: int, dtype: torch.dtype) -> triton.Config:
    """Return the large tiles unless they would leave processors idle."""
    large, small = _configurations(dtype)[:2]
    tiles = ceil_div(r, large.kwargs["BM"]) * ceil_div(u, TILE_COLUMNS)
    return large if tiles >= PROCESSORS else small


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

    The hidden layer is computed again, so that it takes no memory between the passes.
    """
    drows = torch.empty_like(rows)
    blocks = _blocks(rows, len(w2), 3)
    weights = (w1, b1, w2, b1, s)
    # Sums over several blocks stay in float32 until they are complete.
    wide = torch.float32 if len(blocks) > 1 else rows.dtype
    totals = [torch.zeros_like(w, dtype=wide) if need_weights else w.new_empty(0) for w in weights]
    for block in blocks:
        some = rows[block]
        dv, hidden, dhidden = some.new_empty((3, len(some), len(w2))).unbind()
        _rows_backward(dfeatures[block], features[block], rstd[block], dv)
        product(some, w1.t(), hidden, bias=b1, relu=True)
        product(dv, w2, dhidden, relu_mask=hidden)
        product(dhidden, w1, drows[block], second=(dv, s))
        if need_weights:
            _add_weights(totals, some, dv, hidden, dhidden, block.start > 0)
    return drows, *(total.to(rows.dtype) for total in totals)


def _rows_backward(dfeatures: Tensor, features: Tensor, rstd: Tensor, dv: Tensor) -> None:
    r, u = dv.shape
    arguments = {
        "dfeatures": dfeatures, "features": features, "rstd": rstd, "dv": dv, "R": r, "U": u,
        "width": features.shape[1],
    }  # fmt: skip
    _launch_rows(rows_backward, r, arguments)


def _add_weights(
    totals: list[Tensor], rows: Tensor, dv: Tensor, hidden: Tensor, dhidden: Tensor, more: bool
) -> None:
    """Add a block's part of the weights' gradients, or write it if there are none yet."""
    dw1, db1, dw2, db2, ds = totals
    for total, left, right in ((dw1, dhidden, rows), (dw2, dv, hidden), (ds, dv, rows)):
        product(left.t(), right, total, add=total if more else None)
    for total, summands in ((db1, dhidden), (db2, dv)):
        # In one block the sum is float32 until it is rounded to the result's type.
        total += summands.sum(0, dtype=torch.float32)


def programs() -> list[Program]:
    """Return the tile's kernel in every configuration, and those of whole rows."""
    return [
        *(
            _tile_program(dtype, configuration)
            for dtype in TYPE_NAMES
            for configuration in _configurations(dtype)
        ),
        *(
            _rows_program(kernel, dtype)
            for dtype in TYPE_NAMES
            for kernel in (normalise_rows, rows_backward)
        ),
    ]


def _tile_program(dtype: torch.dtype, configuration: triton.Config) -> Program:
    tile, pointer = configuration.kwargs, f"*{TYPE_NAMES[dtype]}"
    constants = {"WHOLE": True, "PRECISION": dot_precision(dtype), **tile}
    names = ("hidden", "w2", "rows", "s", "b2", "features")
    pointers = {**dict.fromkeys(names, pointer), "moments": "*fp32"}
    return Program(
        name=f"critic_tail/layer_tile {program_name(dtype, configuration)}",
        kernel=layer_tile,
        signature=signature(layer_tile, pointers, constants),
        constants=constants,
        options=options(configuration),
        default=configuration in _configurations(dtype)[:2],
        matrix=dtype != torch.float32,
        flops=2 * tile["BM"] * tile["BN"] * tile["BK"],
        bytes=tile["BK"] * (tile["BM"] + tile["BN"]) * dtype.itemsize,
    )


def _rows_program(kernel: Any, dtype: torch.dtype) -> Program:
    tile, pointer = ROWS_CONFIGURATION.kwargs, f"*{TYPE_NAMES[dtype]}"
    forward = kernel is normalise_rows
    names = ("features",) if forward else ("dfeatures", "features", "dv")
    pointers = {**dict.fromkeys(names, pointer), "rstd": "*fp32", "eps": "fp32"}
    pointers |= {"moments": "*fp32"} if forward else {}
    constants = {"TILE": TILE_COLUMNS, **tile} if forward else tile
    name = "normalise_rows" if forward else "rows_backward"
    return Program(
        name=f"critic_tail/{name} {program_name(dtype, ROWS_CONFIGURATION)}",
        kernel=kernel,
        signature=signature(kernel, pointers, constants),
        constants=constants,
        options=options(ROWS_CONFIGURATION),
        default=True,
        matrix=False,
        flops=0,
        bytes=(2 if forward else 3) * tile["ROWS"] * tile["COLUMNS"] * dtype.itemsize,
    )
