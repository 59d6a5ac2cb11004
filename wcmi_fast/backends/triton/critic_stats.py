"""critic_stats: tiles of T stay on chip, in the forward pass and, computed again, in the backward.

The gradient of T is written a slab of images at a time, which stays in the second-level cache until
the products with h and z have read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wcmi_fast._ops import CLAMPED_LSE, LSE, SOFTPLUS, SQUARE, STATISTICS, SUM, asked
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
from wcmi_fast.backends.triton.product import (
    WHOLE_STEPS,
    add_product,
    product,
    tile_of,
    tiles_grid,
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

# The gradient of T that is in memory at a time.
SLAB_BYTES = 32 << 20

# In the names of programs.
NAMES = {1: "lse", 2: "softplus", 4: "clamped_lse", 8: "sum", 16: "square"}

# A part of the images that one program looks at is a multiple of this.
PART_IMAGES = 128

# The defaults first: for LSE or SOFTPLUS, for another single statistic, which needs more registers,
# and for several or few scores. None of these spills, and each fits in the shared memory of every
# GPU since 8.0.
HALF_CONFIGURATIONS = (
    all_registers(8, 4, BM=128, BN=128, BK=32),
    configuration(8, 3, BM=64, BN=128, BK=64),
    all_registers(8, 3, BM=64, BN=64, BK=64),
    all_registers(8, 3, BM=128, BN=128, BK=64),
    all_registers(8, 4, BM=128, BN=128, BK=64),
    all_registers(8, 3, BM=128, BN=256, BK=64),
    all_registers(8, 3, BM=128, BN=64, BK=64),
    all_registers(8, 3, BM=64, BN=256, BK=64),
    all_registers(4, 4, BM=64, BN=64, BK=64),
)
TF32_CONFIGURATIONS = (
    all_registers(8, 4, BM=128, BN=128, BK=16),
    configuration(8, 3, BM=64, BN=128, BK=32),
    all_registers(8, 3, BM=64, BN=64, BK=32),
    all_registers(8, 3, BM=128, BN=128, BK=32),
    all_registers(8, 4, BM=64, BN=128, BK=32),
    all_registers(8, 3, BM=64, BN=128, BK=64),
)
# No matrix instructions: a tile's operands lie in registers.
IEEE_CONFIGURATIONS = (
    all_registers(8, 3, BM=128, BN=64, BK=16),
    all_registers(8, 3, BM=64, BN=32, BK=16),
    all_registers(8, 3, BM=32, BN=32, BK=16),
    all_registers(8, 3, BM=64, BN=64, BK=16),
    all_registers(8, 3, BM=64, BN=64, BK=32),
    all_registers(8, 3, BM=64, BN=128, BK=16),
)


@triton.jit
def halves(T: tl.tensor, BM: tl.constexpr, BN: tl.constexpr) -> tl.tensor:
    """Return the first and the second half of the columns of T (BM, BN)."""
    return tl.split(tl.permute(tl.reshape(T, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def statistics(
    z: tl.tensor,
    h: tl.tensor,
    states: tl.tensor,
    tau: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    U: tl.tensor,
    span: tl.tensor,
    WHICH: tl.constexpr,
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Reduce the scores of some rows with `span` images at one location to their states."""
    row_tiles = tl.cdiv(N, BM)
    # Programs of one location run together and share its features in the second-level cache.
    location = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BM
    rows = first_row + tl.arange(0, BM)
    part = tl.program_id(1)
    first = part * span
    last = tl.minimum(first + span, N)
    h += location.to(tl.int64) * U
    image_step = tl.full((), P, tl.int64) * U
    positives = tl.zeros((BM,), dtype=tl.float32)
    state = no_scores(BM)
    for image in range(first, last, BN):
        images = image + tl.arange(0, BN)
        T = add_product(
            tl.zeros((BM, BN), dtype=tl.float32), z, h, rows, images, N, last, 0, U,
            U, 1, 1, image_step, BK, WHOLE, PRECISION,
        )  # fmt: skip
        own = rows[:, None] == images[None, :]
        there = (images < last)[None, :]
        # Most tiles hold no own pair and no image beyond the last.
        if (image < first_row + BM) & (image + BN > first_row):
            positives += tl.sum(tl.where(own & there, T, 0.0), axis=1)
            T = tl.where(own, -float("inf"), T)
        if image + BN > last:
            T = tl.where(there, T, -float("inf"))
        state = add_scores(state, T, there & (own == 0), tau, WHICH)
    size = tl.full((), N, tl.int64) * P
    at = rows.to(tl.int64) * P + location
    states += part * PLANES * size
    tl.store(states + at, positives, mask=rows < N)
    store_state(states, state, at, size, rows < N, WHICH)


@triton.jit
def score_gradient(
    z: tl.tensor,
    h: tl.tensor,
    lse: tl.tensor,
    dstats: tl.tensor,
    scale: tl.tensor,
    gradient: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    U: tl.tensor,
    C: tl.tensor,
    first_image: tl.tensor,
    WHICH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Write a tile of the gradient (N, C) of the scores of the images from first_image on."""
    rows, columns = tile_of(tl.program_id(0), N, C, BM, BN)
    T = add_product(
        tl.zeros((BM, BN), dtype=tl.float32), z, h, rows, columns, N, C, 0, U,
        U, 1, 1, U, BK, WHOLE, PRECISION,
    )  # fmt: skip
    left, right = halves(T, BM, BN)
    columns = tl.min(columns, axis=0) + tl.arange(0, BN // 2)
    _write_slopes(
        left, rows, columns, lse, dstats, scale, gradient, N, P, C, first_image, WHICH
    )  # fmt: skip
    tl.debug_barrier()
    _write_slopes(
        right, rows, columns + BN // 2, lse, dstats, scale, gradient, N, P, C, first_image, WHICH
    )  # fmt: skip


@triton.jit
def _write_slopes(
    T: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    lse: tl.tensor,
    dstats: tl.tensor,
    scale: tl.tensor,
    gradient: tl.tensor,
    N: tl.tensor,
    P: tl.tensor,
    C: tl.tensor,
    first_image: tl.tensor,
    WHICH: tl.constexpr,
) -> None:
    mask = (rows < N)[:, None] & (columns < C)[None, :]
    own = rows[:, None] == (first_image + columns // P)[None, :]
    at = rows[:, None] * P + (columns % P)[None, :]
    result = slopes(T, own, mask, at, lse, dstats, tl.full((), N, tl.int64) * P, WHICH)
    if scale is not None:
        result *= tl.load(scale)
    gradient += rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(gradient, result.to(gradient.dtype.element_ty), mask=mask)


def critic_stats_fwd(
    z: Tensor, h: Tensor, which: int, tau: float, keep_scores: bool
) -> tuple[Tensor, Tensor]:
    """Reduce T to the positives and the statistics asked for; see _ops.py. Scores are not kept."""
    n, p, u = h.shape
    default = _default(n, p, z.dtype, which)
    parts, span = _parts(n, p, default)
    states = torch.empty((parts, PLANES, n, p), dtype=torch.float32, device=z.device)
    arguments = {
        "z": z, "h": h, "states": states, "tau": tau, "N": n, "P": p, "U": u, "span": span,
        "WHICH": which, "PLANES": PLANES, **_products(z),
    }  # fmt: skip
    launch(
        statistics, lambda tile: (ceil_div(n, tile["BM"]) * p, parts), arguments,
        default, configurations(z.dtype), ("N", "P", "U", "WHICH"),
    )  # fmt: skip
    return finished(states, which), states.new_empty(0)


def critic_stats_bwd(
    dstats: Sequence[Tensor],
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    which: int,
    need_dz: bool,
    need_dh: bool,
) -> tuple[Tensor, Tensor]:
    """Turn gradients of the statistics into dz and dh; see _ops.py. `scores` is empty."""
    n, p, u = h.shape
    dz = torch.empty_like(z) if need_dz else z.new_empty(0)
    dh = torch.empty_like(h) if need_dh else h.new_empty(0)
    if not (need_dz or need_dh):
        return dz, dh
    d = torch.stack(list(dstats))
    scale, inverse = _scales(d, which) if z.dtype == torch.float16 else (None, None)
    images = min(n, max(1, SLAB_BYTES // (n * p * z.itemsize)))
    workspace = z.new_empty(n * images * p)
    sums = torch.empty_like(z, dtype=torch.float32) if need_dz and images < n else dz
    for first in range(0, n, images):
        features = h[first : first + images].view(-1, u)
        gradient = workspace[: n * len(features)].view(n, -1)
        _write_gradient(gradient, z, features, lse, d, scale, p, first, which)
        if need_dz:
            out = dz if first + images >= n else sums
            product(gradient, features, out, scale=inverse, add=sums if first else None)
        if need_dh:
            out = dh[first : first + images].view(-1, u)
            product(gradient.t(), z, out, scale=inverse)
    return dz, dh


def _write_gradient(
    gradient: Tensor,
    z: Tensor,
    features: Tensor,
    lse: Tensor,
    dstats: Tensor,
    scale: Tensor | None,
    p: int,
    first_image: int,
    which: int,
) -> None:
    n, c = gradient.shape
    arguments = {
        "z": z, "h": features, "lse": lse, "dstats": dstats, "scale": scale, "gradient": gradient,
        "N": n, "P": p, "U": z.shape[1], "C": c, "first_image": first_image,
        "WHICH": which, **_products(z),
    }  # fmt: skip
    launch(
        score_gradient, tiles_grid(n, c), arguments,
        _default(n, c // 128, z.dtype, which), configurations(z.dtype),
        ("N", "C", "U", "WHICH"),
    )  # fmt: skip


def _scales(dstats: Tensor, which: int) -> tuple[Tensor, Tensor]:
    """Return a power of two that brings gradients of float16 scores in its range, and 1 over it.

    A score's gradient is at most 3 times the largest of dstats, but for SQUARE, where the score is
    one more factor.
    """
    exponent = torch.frexp(dstats.abs().amax()).exponent.clamp(-100, 100)
    wanted = -2 if which & SQUARE else 13
    one = dstats.new_ones(())
    return torch.ldexp(one, wanted - exponent), torch.ldexp(one, exponent - wanted)


def _products(z: Tensor) -> dict[str, Any]:
    return {"WHOLE": z.shape[1] % WHOLE_STEPS == 0, "PRECISION": dot_precision(z.dtype)}


def configurations(dtype: torch.dtype, precision: str | None = None) -> tuple[triton.Config, ...]:
    """Return every configuration for operands of a dtype, the default ones first."""
    if dtype != torch.float32:
        return HALF_CONFIGURATIONS
    precision = precision or dot_precision(dtype)
    return IEEE_CONFIGURATIONS if precision == "ieee" else TF32_CONFIGURATIONS


def _default(n: int, columns: int, dtype: torch.dtype, which: int) -> triton.Config:
    """Return the small tiles if larger ones, in rows of so many, leave processors idle."""
    large, small = _defaults(configurations(dtype), which)
    return large if ceil_div(n, large.kwargs["BM"]) * columns >= PROCESSORS else small


def _defaults(
    configurations: tuple[triton.Config, ...], which: int
) -> tuple[triton.Config, triton.Config]:
    """Return those for many scores and for few, whose kernels for `which` do not spill."""
    few_registers, one, small = configurations[:3]
    if which not in STATISTICS:
        return small, small
    return few_registers if which in (LSE, SOFTPLUS) else one, small


def _parts(n: int, p: int, default: triton.Config) -> tuple[int, int]:
    """Return into how many parts to split the images, that programs fill a GPU, and their size.

    By the shapes only: results depend on no device.
    """
    programs = ceil_div(n, default.kwargs["BM"]) * p
    wanted = min(ceil_div(2 * PROCESSORS, programs), ceil_div(n, PART_IMAGES))
    span = ceil_div(ceil_div(n, wanted), PART_IMAGES) * PART_IMAGES
    return ceil_div(n, span), span


def programs() -> list[Program]:
    """Return both kernels in every configuration, and for all statistics in the defaults."""
    return [
        _program(kernel, dtype, precision, configuration, which)
        for kernel in (statistics, score_gradient)
        for dtype, precision in KINDS
        for which in (*STATISTICS, sum(STATISTICS))
        for configuration in configurations(dtype, precision)
        if which == LSE or _is_default(dtype, precision, configuration, which)
        # The gradients of these do not depend on T: no product is left.
        if kernel is statistics or which not in (CLAMPED_LSE, SUM)
    ]


def _is_default(
    dtype: torch.dtype, precision: str, configuration: triton.Config, which: int
) -> bool:
    return configuration in _defaults(configurations(dtype, precision), which)


def _program(
    kernel: Any, dtype: torch.dtype, precision: str, configuration: triton.Config, which: int
) -> Program:
    tile, pointer = configuration.kwargs, f"*{TYPE_NAMES[dtype]}"
    constants = {"WHICH": which, "WHOLE": True, "PRECISION": precision, **tile}
    if kernel is statistics:
        constants["PLANES"] = PLANES
    elif dtype != torch.float16:
        constants["scale"] = None
    pointers = {
        "z": pointer, "h": pointer, "states": "*fp32", "lse": "*fp32", "dstats": "*fp32",
        "scale": "*fp32", "gradient": pointer, "tau": "fp32",
    }  # fmt: skip
    names = "-".join(NAMES[statistic] for statistic in asked(which))
    return Program(
        name=f"critic_stats/{kernel.__name__} {names}"
        f" {program_name(dtype, configuration, precision)}",
        kernel=kernel,
        signature=signature(kernel, pointers, constants),
        constants=constants,
        options=options(configuration),
        default=_is_default(dtype, precision, configuration, which),
        matrix=dtype != torch.float32,
        flops=2 * tile["BM"] * tile["BN"] * tile["BK"],
        bytes=tile["BK"] * (tile["BM"] + tile["BN"]) * dtype.itemsize,
    )
