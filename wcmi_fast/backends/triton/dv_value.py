"""dv_value: the Donsker-Varadhan bound of positives and log-sum-exps, in float64 as on CPUs."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast.backends.triton.launch import ceil_div, configuration, launch, options, signature
from wcmi_fast.backends.triton.numbers import finite_or_zero
from wcmi_fast.backends.triton.program import Program

# A tile is BI rows at BP locations: few of these, so that programs are many.
LOCATION_CONFIGURATION = configuration(4, 1, BI=256, BP=4)
VALUE_CONFIGURATION = configuration(4, 1, BLOCK=1024)


@triton.jit
def location_terms(
    positives: tl.tensor,
    lse: tl.tensor,
    terms: tl.tensor,
    dlse: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    ZERO_DIAGONAL: tl.constexpr,
    BI: tl.constexpr,
    BP: tl.constexpr,
) -> None:
    """Write mean(positives) - L of some locations, L the log-sum-exp of lse, and its gradient."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    there = p < P
    rows = tl.arange(0, BI).to(tl.int64)[:, None]
    mean = tl.zeros((BP,), dtype=tl.float64)
    largest = tl.zeros((BP,), dtype=tl.float64)
    if not ZERO_DIAGONAL:
        largest -= float("inf")
    for first in range(0, N, BI):
        at = (first + rows) * P + p[None, :]
        mask = (first + rows < N) & there[None, :]
        mean += tl.sum(tl.load(positives + at, mask=mask, other=0.0).to(tl.float64), axis=0)
        x = tl.load(lse + at, mask=mask, other=-float("inf")).to(tl.float64)
        largest = tl.maximum(largest, tl.max(x, axis=0))
    shift = finite_or_zero(largest)
    total = tl.zeros((BP,), dtype=tl.float64)
    for first in range(0, N, BI):
        at = (first + rows) * P + p[None, :]
        mask = (first + rows < N) & there[None, :]
        x = tl.load(lse + at, mask=mask, other=-float("inf")).to(tl.float64)
        total += tl.sum(tl.exp(x - shift[None, :]), axis=0)
    if ZERO_DIAGONAL:
        total += N * tl.exp(-shift)
    for first in range(0, N, BI):
        at = (first + rows) * P + p[None, :]
        mask = (first + rows < N) & there[None, :]
        x = tl.load(lse + at, mask=mask, other=0.0).to(tl.float64)
        weight = tl.exp(x - shift[None, :]) / (total * P)[None, :]
        # Where every score is -inf the weight is 0 and not 0 / 0.
        weight = tl.where(x == -float("inf"), 0.0, weight)
        tl.store(dlse + at, (-weight).to(tl.float32), mask=mask)
    tl.store(terms + p, mean / N - (shift + tl.log(total)), mask=there)


@triton.jit
def mean_of_terms(
    terms: tl.tensor, value: tl.tensor, N: tl.tensor, P: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Write the mean of the terms (P,), plus log(N (N - 1))."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, P, BLOCK):
        total += tl.load(terms + first + columns, mask=first + columns < P, other=0.0)
    n = tl.full((), N, tl.float64)
    tl.store(value, (tl.sum(total, axis=0) / P + tl.log(n * (n - 1))).to(tl.float32))


def dv_value(positives: Tensor, lse: Tensor, zero_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Return dv and its gradient in lse; see _ops.py."""
    n, p = lse.shape
    value, dlse = lse.new_empty(()), torch.empty_like(lse)
    terms = torch.empty(p, dtype=torch.float64, device=lse.device)
    arguments = {
        "positives": positives, "lse": lse, "terms": terms, "dlse": dlse, "N": n, "P": p,
        "ZERO_DIAGONAL": zero_diagonal,
    }  # fmt: skip
    grid = (ceil_div(p, LOCATION_CONFIGURATION.kwargs["BP"]),)
    _launch(location_terms, grid, arguments, LOCATION_CONFIGURATION)
    arguments = {"terms": terms, "value": value, "N": n, "P": p}
    _launch(mean_of_terms, (1,), arguments, VALUE_CONFIGURATION)
    return value, dlse


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], configuration: triton.Config
) -> None:
    launch(kernel, lambda _: grid, arguments, configuration, (configuration,), ())


def programs() -> list[Program]:
    """Return both kernels, the first for each diagonal."""
    return [
        *(
            _program(
                location_terms,
                LOCATION_CONFIGURATION,
                {"positives": "*fp32", "lse": "*fp32", "terms": "*fp64", "dlse": "*fp32"},
                {"ZERO_DIAGONAL": zero_diagonal},
            )
            for zero_diagonal in (False, True)
        ),
        _program(
            mean_of_terms,
            VALUE_CONFIGURATION,
            {"terms": "*fp64", "value": "*fp32"},
            {},
        ),
    ]


def _program(
    kernel: Any, configuration: triton.Config, types: dict[str, str], constants: dict[str, Any]
) -> Program:
    constants = {**constants, **configuration.kwargs}
    option = " zero diagonal" if constants.get("ZERO_DIAGONAL") else ""
    return Program(
        name=f"dv_value/{kernel.__name__}{option}",
        kernel=kernel,
        signature=signature(kernel, types, constants),
        constants=constants,
        options=options(configuration),
        default=True,
        matrix=False,
        flops=0,
        bytes=4 * math.prod(configuration.kwargs.values()),
    )
