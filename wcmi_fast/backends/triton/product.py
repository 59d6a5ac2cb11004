"""Matrix products of operands of any strides, with what layers do to a product in its epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.triton.launch import (
    KINDS,
    PROCESSORS,
    TYPE_NAMES,
    all_registers,
    ceil_div,
    configuration,
    dot_precision,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.program import Program

# A multiple of every configuration's BK: products over a multiple of it need no masks along K.
WHOLE_STEPS = 128

# Partial products are at least so long, and take at most so much memory.
SPLIT_LENGTH = 1024
SPLIT_BYTES = 64 << 20

HALF_CONFIGURATIONS = (
    all_registers(8, 3, BM=128, BN=128, BK=64),
    all_registers(4, 3, BM=64, BN=64, BK=64),
    all_registers(8, 3, BM=128, BN=256, BK=64),
    all_registers(8, 3, BM=256, BN=128, BK=64),
    all_registers(4, 4, BM=128, BN=128, BK=32),
    all_registers(4, 4, BM=128, BN=64, BK=64),
    all_registers(4, 4, BM=64, BN=128, BK=64),
    all_registers(4, 4, BM=64, BN=64, BK=128),
)
TF32_CONFIGURATIONS = (
    all_registers(8, 3, BM=128, BN=128, BK=32),
    all_registers(4, 3, BM=64, BN=64, BK=32),
    all_registers(8, 3, BM=128, BN=256, BK=32),
    all_registers(8, 3, BM=256, BN=128, BK=32),
    all_registers(4, 4, BM=128, BN=64, BK=32),
    all_registers(4, 4, BM=64, BN=128, BK=32),
)
# No matrix instructions: a tile's operands lie in registers.
IEEE_CONFIGURATIONS = (
    all_registers(8, 3, BM=128, BN=64, BK=16),
    all_registers(8, 3, BM=64, BN=64, BK=16),
    all_registers(8, 3, BM=128, BN=128, BK=16),
    all_registers(8, 3, BM=128, BN=128, BK=32),
    all_registers(8, 3, BM=64, BN=64, BK=32),
    all_registers(4, 2, BM=32, BN=64, BK=32),
)
# Of partial products, which get their epilogue when they are added up.
NO_EPILOGUE = {"add_row": 0, "add_column": 0, "mask_row": 0, "mask_column": 0, "RELU": False}
SUM_CONFIGURATION = configuration(4, 1, BM=16, BN=128)


@triton.jit
def add_product(
    acc: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    a_row: tl.tensor,
    a_step: tl.tensor,
    b_step: tl.tensor,
    b_column: tl.tensor,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return acc + a[rows, first:last] b[first:last, columns]; WHOLE: BK divides last - first."""
    steps = tl.arange(0, BK)
    k = steps.to(tl.int64) + first
    a += rows.to(tl.int64)[:, None] * a_row + k[None, :] * a_step
    b += k[:, None] * b_step + columns.to(tl.int64)[None, :] * b_column
    a_mask = (rows < M)[:, None]
    b_mask = (columns < N)[None, :]
    for done in range(0, last - first, BK):
        if WHOLE:
            x = tl.load(a, mask=a_mask, other=0.0)
            y = tl.load(b, mask=b_mask, other=0.0)
        else:
            left = last - first - done
            x = tl.load(a, mask=a_mask & (steps < left)[None, :], other=0.0)
            y = tl.load(b, mask=b_mask & (steps < left)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a += tl.full((), BK, tl.int64) * a_step
        b += tl.full((), BK, tl.int64) * b_step
    return acc


@triton.jit
def tile_of(
    program: tl.tensor, M: tl.tensor, N: tl.tensor, BM: tl.constexpr, BN: tl.constexpr
) -> tl.tensor:
    """Return a program's rows and columns: programs that run together share operands in L2."""
    column_tiles = tl.cdiv(N, BN)
    group = program // (8 * column_tiles)
    height = tl.minimum(tl.cdiv(M, BM) - group * 8, 8)
    inside = program - group * 8 * column_tiles
    row_tile = group * 8 + inside % height
    rows = row_tile * BM + tl.arange(0, BM)
    columns = inside // height * BN + tl.arange(0, BN)
    return rows, columns


@triton.jit
def _finish(
    acc: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    add: tl.tensor,
    bias: tl.tensor,
    relu_mask: tl.tensor,
    out: tl.tensor,
    add_row: tl.tensor,
    add_column: tl.tensor,
    mask_row: tl.tensor,
    mask_column: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    RELU: tl.constexpr,
) -> None:
    rows = rows.to(tl.int64)[:, None]
    columns = columns.to(tl.int64)[None, :]
    if scale is not None:
        acc *= tl.load(scale)
    if add is not None:
        acc += tl.load(add + rows * add_row + columns * add_column, mask=mask).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + columns + 0 * rows, mask=mask).to(tl.float32)
    if RELU:
        # Not the maximum, which would lose a NaN.
        acc = tl.where(acc < 0, 0.0, acc)
    if relu_mask is not None:
        value = tl.load(relu_mask + rows * mask_row + columns * mask_column, mask=mask)
        acc = tl.where(value.to(tl.float32) <= 0, 0.0, acc)
    tl.store(out + rows * out_row + columns * out_column, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def matrix_product(
    a: tl.tensor,
    b: tl.tensor,
    a2: tl.tensor,
    b2: tl.tensor,
    scale: tl.tensor,
    add: tl.tensor,
    bias: tl.tensor,
    relu_mask: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    K2: tl.tensor,
    span: tl.tensor,
    span2: tl.tensor,
    a_row: tl.tensor,
    a_step: tl.tensor,
    b_step: tl.tensor,
    b_column: tl.tensor,
    a2_row: tl.tensor,
    a2_step: tl.tensor,
    b2_step: tl.tensor,
    b2_column: tl.tensor,
    add_row: tl.tensor,
    add_column: tl.tensor,
    mask_row: tl.tensor,
    mask_column: tl.tensor,
    out_part: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Write one tile of the product over one part of K; parts lie out_part apart."""
    rows, columns = tile_of(tl.program_id(0), M, N, BM, BN)
    part = tl.program_id(1)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    first = part * span
    last = tl.minimum(first + span, K)
    acc = add_product(
        acc, a, b, rows, columns, M, N, first, last, a_row, a_step, b_step, b_column,
        BK, WHOLE, PRECISION,
    )  # fmt: skip
    if a2 is not None:
        first = part * span2
        last = tl.minimum(first + span2, K2)
        acc = add_product(
            acc, a2, b2, rows, columns, M, N, first, last, a2_row, a2_step, b2_step, b2_column,
            BK, WHOLE, PRECISION,
        )  # fmt: skip
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    _finish(
        acc, rows, columns, mask, scale, add, bias, relu_mask, out + part.to(tl.int64) * out_part,
        add_row, add_column, mask_row, mask_column, out_row, out_column, RELU,
    )  # fmt: skip


@triton.jit
def sum_of_parts(
    parts: tl.tensor,
    scale: tl.tensor,
    add: tl.tensor,
    bias: tl.tensor,
    relu_mask: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    add_row: tl.tensor,
    add_column: tl.tensor,
    mask_row: tl.tensor,
    mask_column: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Add up the (count, M, N) partial products in their order."""
    rows, columns = tile_of(tl.program_id(0), M, N, BM, BN)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    at = parts + rows.to(tl.int64)[:, None] * N + columns[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(count):
        acc += tl.load(at, mask=mask, other=0.0)
        at += tl.full((), N, tl.int64) * M
    _finish(
        acc, rows, columns, mask, scale, add, bias, relu_mask, out,
        add_row, add_column, mask_row, mask_column, out_row, out_column, RELU,
    )  # fmt: skip


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    add: Tensor | None = None,
    bias: Tensor | None = None,
    relu: bool = False,
    relu_mask: Tensor | None = None,
) -> Tensor:
    """Write scale (a b + a2 b2) + add + bias to out (M, N), then the rectifier; return out.

    Any strides; sums are in float32 and in an order that depends on the shapes only.

    Args:
        a: (M, K), of one dtype with b.
        b: (K, N).
        out: (M, N), of any dtype; may be `add`.
        second: a2 (M, K2) and b2 (K2, N) of the same dtype.
        scale: one float32 number on the device.
        add: (M, N), of any dtype.
        bias: (N,), contiguous.
        relu: whether to put 0 in place of negative results.
        relu_mask: (M, N); where it is <= 0 the result is 0.
    """
    m, k = a.shape
    n, k2 = b.shape[1], second[0].shape[1] if second else 0
    epilogue = {
        "scale": scale, "add": add, "bias": bias, "relu_mask": relu_mask,
        **_strides(add, "add_row", "add_column"),
        **_strides(relu_mask, "mask_row", "mask_column"),
        "RELU": relu,
    }  # fmt: skip
    count = _parts(m, n, max(k, k2), a.dtype)
    if count == 1:
        _multiply(a, b, second, out, (k, k2), 0, epilogue)
        return out
    parts = torch.empty((count, m, n), dtype=torch.float32, device=out.device)
    spans = (_span(k, count), _span(k2, count))
    _multiply(a, b, second, parts[0], spans, m * n, {**dict.fromkeys(epilogue), **NO_EPILOGUE})
    arguments = {
        "parts": parts, **epilogue, "out": out, "count": count, "M": m, "N": n,
        **_strides(out, "out_row", "out_column"),
    }  # fmt: skip
    grid = tiles_grid(m, n)
    launch(sum_of_parts, grid, arguments, SUM_CONFIGURATION, (SUM_CONFIGURATION,), ())
    return out


def _multiply(
    a: Tensor,
    b: Tensor,
    second: tuple[Tensor, Tensor] | None,
    out: Tensor,
    spans: tuple[int, int],
    out_part: int,
    epilogue: dict[str, Any],
) -> None:
    """Run matrix_product over parts of K, and of K2, of these lengths."""
    m, n = out.shape
    k, k2 = a.shape[1], second[0].shape[1] if second else 0
    a2, b2 = second if second else (None, None)
    arguments = {
        "a": a, "b": b, "a2": a2, "b2": b2, **epilogue, "out": out,
        "M": m, "N": n, "K": k, "K2": k2, "span": spans[0], "span2": spans[1],
        **_strides(a, "a_row", "a_step"), **_strides(b, "b_step", "b_column"),
        **_strides(a2, "a2_row", "a2_step"), **_strides(b2, "b2_step", "b2_column"),
        "out_part": out_part, **_strides(out, "out_row", "out_column"),
        "WHOLE": k % WHOLE_STEPS == 0 and k2 % WHOLE_STEPS == 0,
        "PRECISION": dot_precision(a.dtype),
    }  # fmt: skip
    count = max(ceil_div(length, span) for length, span in zip((k, k2), spans, strict=True) if span)
    launch(
        matrix_product, tiles_grid(m, n, count), arguments,
        default_configuration(m, n, a.dtype), configurations(a.dtype), ("M", "N", "K"),
    )  # fmt: skip


def _strides(x: Tensor | None, *names: str) -> dict[str, int]:
    return dict(zip(names, x.stride() if x is not None else (0, 0), strict=True))


def tiles_grid(m: int, n: int, count: int = 1) -> Callable[[dict[str, Any]], tuple[int, ...]]:
    """Return the grid of the tiles of an (m, n) matrix, in the order of tile_of, times count."""
    return lambda tile: (ceil_div(m, tile["BM"]) * ceil_div(n, tile["BN"]), count)


def configurations(dtype: torch.dtype, precision: str | None = None) -> tuple[triton.Config, ...]:
    """Return every configuration for operands of a dtype, the default ones first."""
    if dtype != torch.float32:
        return HALF_CONFIGURATIONS
    precision = precision or dot_precision(dtype)
    return IEEE_CONFIGURATIONS if precision == "ieee" else TF32_CONFIGURATIONS


def default_configuration(m: int, n: int, dtype: torch.dtype) -> triton.Config:
    """Return the large tiles unless they would leave processors idle."""
    large, small = configurations(dtype)[:2]
    return large if _tiles(m, n, large) >= PROCESSORS else small


def _tiles(m: int, n: int, configuration: triton.Config) -> int:
    tile = configuration.kwargs
    return ceil_div(m, tile["BM"]) * ceil_div(n, tile["BN"])


def _parts(m: int, n: int, k: int, dtype: torch.dtype) -> int:
    """Return into how many parts to split K, that the tiles of a small result fill the GPU."""
    wanted = PROCESSORS // _tiles(m, n, default_configuration(m, n, dtype))
    return max(1, min(wanted, k // SPLIT_LENGTH, SPLIT_BYTES // (4 * m * n)))


def _span(length: int, count: int) -> int:
    """Return the length of each of at most `count` parts of K."""
    return ceil_div(ceil_div(length, count), WHOLE_STEPS) * WHOLE_STEPS


def programs() -> list[Program]:
    """Return both kernels for each dtype: every configuration, and the layouts that are used."""
    return [
        *(
            _product_program(dtype, precision, configuration, layout)
            for dtype, precision in KINDS
            for configuration in configurations(dtype, precision)
            for layout in ("nn", "tn", "nt")
            if layout == "nn" or _is_default(dtype, precision, configuration)
        ),
        *(_sum_program(dtype) for dtype in TYPE_NAMES),
    ]


def _is_default(dtype: torch.dtype, precision: str, configuration: triton.Config) -> bool:
    return configuration in configurations(dtype, precision)[:2]


def _product_program(
    dtype: torch.dtype, precision: str, configuration: triton.Config, layout: str
) -> Program:
    """Of a (transposed: "t") by b (transposed: "t"), whose inner strides are 1."""
    tile = configuration.kwargs
    pointer = f"*{TYPE_NAMES[dtype]}"
    none = ("a2", "b2", "scale", "add", "bias", "relu_mask")
    ones = ("a_row" if layout[0] == "t" else "a_step", "b_step" if layout[1] == "t" else "b_column")
    constants = {
        **dict.fromkeys(none), **dict.fromkeys((*ones, "out_column"), 1),
        "RELU": False, "WHOLE": True, "PRECISION": precision, **tile,
    }  # fmt: skip
    pointers = {"a": pointer, "b": pointer, "out": pointer}
    elements = tile["BK"] * (tile["BM"] + tile["BN"])
    return Program(
        name=f"product/matrix_product {layout} {program_name(dtype, configuration, precision)}",
        kernel=matrix_product,
        signature=signature(matrix_product, pointers, constants),
        constants=constants,
        options=options(configuration),
        default=_is_default(dtype, precision, configuration),
        matrix=dtype != torch.float32,
        flops=2 * tile["BM"] * tile["BN"] * tile["BK"],
        bytes=elements * dtype.itemsize,
    )


def _sum_program(dtype: torch.dtype) -> Program:
    none = ("scale", "add", "bias", "relu_mask")
    tile = SUM_CONFIGURATION.kwargs
    constants = {**dict.fromkeys(none), "out_column": 1, "RELU": False, **tile}
    pointers = {"parts": "*fp32", "out": f"*{TYPE_NAMES[dtype]}"}
    return Program(
        name=f"product/sum_of_parts {program_name(dtype, SUM_CONFIGURATION)}",
        kernel=sum_of_parts,
        signature=signature(sum_of_parts, pointers, constants),
        constants=constants,
        options=options(SUM_CONFIGURATION),
        default=True,
        matrix=False,
        flops=0,
        bytes=4 * tile["BM"] * tile["BN"],
    )
