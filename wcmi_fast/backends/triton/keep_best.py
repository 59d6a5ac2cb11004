"""keep_best_ in Triton: the better rows are copied, then, in a second launch, their values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.layout import dense, laid_out_as, written
from wcmi_fast.backends.triton.launch import (
    TYPE_NAMES,
    ceil_div,
    configuration,
    launch,
    options,
    signature,
)
from wcmi_fast.backends.triton.program import Program

# Rows are copied as integers, so that every bit of a NaN stays.
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

ROWS = configuration(4, 1, BLOCK=2048)
VALUES = configuration(4, 1, BLOCK=256)

VALUE_NAMES = {**TYPE_NAMES, torch.float64: "fp64"}


@triton.jit
def is_better(value: tl.tensor, best: tl.tensor) -> tl.tensor:
    """Return where a value is greater than the best, or a number where that is NaN."""
    return (value > best) | ((best != best) & (value == value))


@triton.jit
def copy_rows(
    best_x: tl.tensor,
    best_value: tl.tensor,
    x: tl.tensor,
    value: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Copy one block of one row if its value is better."""
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    better = is_better(tl.load(value + row), tl.load(best_value + row))
    mask = (columns < size) & better
    at = row.to(tl.int64) * size + columns
    tl.store(best_x + at, tl.load(x + at, mask=mask), mask=mask)


@triton.jit
def copy_values(
    best_value: tl.tensor, value: tl.tensor, rows: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Copy the better ones of a block of values."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    new = tl.load(value + at, mask=mask)
    better = is_better(new, tl.load(best_value + at, mask=mask))
    tl.store(best_value + at, new, mask=mask & better)


def keep_best_(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> None:
    """Keep the rows of greater value; see _ops.py."""
    target, target_value = dense(best_x), best_value.contiguous()
    x, value, rows = laid_out_as(x, target), value.contiguous(), value.numel()
    words = WORDS[x.dtype.itemsize]
    if x.numel():
        size = x.numel() // rows
        grid = (rows * ceil_div(size, ROWS.kwargs["BLOCK"]),)
        arguments = {
            "best_x": target.view(words), "best_value": target_value, "x": x.view(words),
            "value": value, "size": size,
        }  # fmt: skip
        launch(copy_rows, lambda _: grid, arguments, ROWS, (ROWS,), ())
    if rows:
        arguments = {"best_value": target_value, "value": value, "rows": rows}
        blocks = (ceil_div(rows, VALUES.kwargs["BLOCK"]),)
        launch(copy_values, lambda _: blocks, arguments, VALUES, (VALUES,), ())
    written(best_x, target)
    written(best_value, target_value)


def programs() -> list[Program]:
    """Return the copy of rows for each size of an element, and that of values for each dtype."""
    return [
        *(_rows_program(dtype, word) for dtype in VALUE_NAMES for word in WORDS),
        *(_values_program(dtype) for dtype in VALUE_NAMES),
    ]


def _rows_program(dtype: torch.dtype, word: int) -> Program:
    rows, values = f"*i{8 * word}", f"*{VALUE_NAMES[dtype]}"
    pointers = {"best_x": rows, "best_value": values, "x": rows, "value": values}
    return Program(
        name=f"keep_best_/copy_rows i{8 * word} {VALUE_NAMES[dtype]}",
        kernel=copy_rows,
        signature=signature(copy_rows, pointers, ROWS.kwargs),
        constants=ROWS.kwargs,
        options=options(ROWS),
        default=True,
        matrix=False,
        flops=0,
        bytes=2 * ROWS.kwargs["BLOCK"] * word,
    )


def _values_program(dtype: torch.dtype) -> Program:
    pointers = dict.fromkeys(("best_value", "value"), f"*{VALUE_NAMES[dtype]}")
    return Program(
        name=f"keep_best_/copy_values {VALUE_NAMES[dtype]}",
        kernel=copy_values,
        signature=signature(copy_values, pointers, VALUES.kwargs),
        constants=VALUES.kwargs,
        options=options(VALUES),
        default=True,
        matrix=False,
        flops=0,
        bytes=3 * VALUES.kwargs["BLOCK"] * dtype.itemsize,
    )
