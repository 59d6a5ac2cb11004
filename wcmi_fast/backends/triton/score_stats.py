"""score_stats: the statistics of given scores, each read once, and their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast._ops import STATISTICS
from wcmi_fast.backends.triton.launch import (
    TYPE_NAMES,
    all_registers,
    ceil_div,
    configuration,
    launch,
    options,
    program_name,
    signature,
)
from wcmi_fast.backends.triton.program import Program
from wcmi_fast.backends.triton.statistics import (
    PLANES,
    add_scores,
    finished,
    no_scores,
    slopes,
    store_state,
)

# A tile is BP locations of BJ images of one row: of many locations, of some, of few.
CONFIGURATIONS = (
    configuration(4, 1, BP=64, BJ=16),
    # Left to itself ptxas keeps to 128 registers and spills.
    all_registers(4, 1, BP=16, BJ=64),
    configuration(4, 1, BP=2, BJ=512),
    configuration(8, 1, BP=64, BJ=32),
    configuration(4, 1, BP=32, BJ=32),
    configuration(8, 1, BP=128, BJ=16),
)


@triton.jit
def row_statistics(
    scores: tl.tensor,
    states: tl.tensor,
    tau: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    WHICH: tl.constexpr,
    BP: tl.constexpr,
    BJ: tl.constexpr,
) -> None:
    """Reduce the scores of one row at some locations to their states."""
    tiles = tl.cdiv(P, BP)
    row = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    at = row.to(tl.int64) * P + p
    scores += row.to(tl.int64) * N * P
    state = no_scores(BP)
    for image in range(0, N, BJ):
        images = image + tl.arange(0, BJ)
        others = ((images < N) & (images != row))[None, :] & (p < P)[:, None]
        column = images.to(tl.int64)[None, :] * P + p[:, None]
        T = tl.load(scores + column, mask=others, other=-float("inf")).to(tl.float32)
        state = add_scores(state, T, others, tau, WHICH)
    own = tl.load(scores + row.to(tl.int64) * P + p, mask=p < P)
    tl.store(states + at, own.to(tl.float32), mask=p < P)
    store_state(states, state, at, tl.full((), N, tl.int64) * P, p < P, WHICH)


@triton.jit
def row_gradient(
    scores: tl.tensor,
    lse: tl.tensor,
    dstats: tl.tensor,
    dscores: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    WHICH: tl.constexpr,
    BP: tl.constexpr,
    BJ: tl.constexpr,
) -> None:
    """Write the gradient of a tile of one row's scores."""
    tiles = tl.cdiv(P, BP)
    image_tiles = tl.cdiv(N, BJ)
    row = tl.program_id(0) // (tiles * image_tiles)
    inside = tl.program_id(0) % (tiles * image_tiles)
    p = (inside % tiles * BP + tl.arange(0, BP))[:, None]
    images = (inside // tiles * BJ + tl.arange(0, BJ))[None, :]
    mask = (p < P) & (images < N)
    column = (row.to(tl.int64) * N + images) * P + p
    T = tl.load(scores + column, mask=mask, other=0.0).to(tl.float32)
    # One row's gradients belong to all of its images.
    at = row.to(tl.int64) * P + p + 0 * images
    result = slopes(T, images == row, mask, at, lse, dstats, tl.full((), N, tl.int64) * P, WHICH)
    tl.store(dscores + column, result.to(dscores.dtype.element_ty), mask=mask)


def score_stats_fwd(scores: Tensor, which: int, tau: float) -> Tensor:
    """Reduce given scores to the positives and the statistics asked for; see _ops.py."""
    n, _, p = scores.shape
    states = torch.empty((1, PLANES, n, p), dtype=torch.float32, device=scores.device)
    arguments = {"scores": scores, "states": states, "tau": tau, "N": n, "P": p, "WHICH": which}
    launch(
        row_statistics, lambda tile: (n * ceil_div(p, tile["BP"]),), arguments,
        _default(p), CONFIGURATIONS, ("N", "P", "WHICH"),
    )  # fmt: skip
    return finished(states, which)


def score_stats_bwd(dstats: Sequence[Tensor], scores: Tensor, lse: Tensor, which: int) -> Tensor:
    """Turn gradients of the statistics into that of the scores; see _ops.py."""
    n, _, p = scores.shape
    dscores = torch.empty_like(scores)
    arguments = {
        "scores": scores, "lse": lse, "dstats": torch.stack(list(dstats)), "dscores": dscores,
        "N": n, "P": p, "WHICH": which,
    }  # fmt: skip
    launch(
        row_gradient, lambda tile: (n * ceil_div(p, tile["BP"]) * ceil_div(n, tile["BJ"]),),
        arguments, _default(p), CONFIGURATIONS, ("N", "P", "WHICH"),
    )  # fmt: skip
    return dscores


def _default(p: int) -> triton.Config:
    """Return the tiles of which locations fill the most."""
    many, some, few = CONFIGURATIONS[:3]
    return many if p > 32 else some if p > 4 else few


def programs() -> list[Program]:
    """Return both kernels for all statistics in every configuration."""
    return [
        _program(kernel, dtype, configuration)
        for kernel in (row_statistics, row_gradient)
        for dtype in TYPE_NAMES
        for configuration in CONFIGURATIONS
    ]


def _program(kernel: Any, dtype: torch.dtype, configuration: triton.Config) -> Program:
    tile, pointer = configuration.kwargs, f"*{TYPE_NAMES[dtype]}"
    constants = {"WHICH": sum(STATISTICS), **tile}
    pointers = {
        "scores": pointer, "dscores": pointer, "states": "*fp32", "lse": "*fp32",
        "dstats": "*fp32", "tau": "fp32",
    }  # fmt: skip
    return Program(
        name=f"score_stats/{kernel.__name__} {program_name(dtype, configuration)}",
        kernel=kernel,
        signature=signature(kernel, pointers, constants),
        constants=constants,
        options=options(configuration),
        default=configuration in CONFIGURATIONS[:3],
        matrix=False,
        flops=0,
        bytes=tile["BP"] * tile["BJ"] * dtype.itemsize * (1 if kernel is row_statistics else 2),
    )
