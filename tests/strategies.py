"""Hypothesis strategies: shapes at and around tile and vector edges, types, scales, layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from oracle import DTYPES, binary
from torch import Tensor

from wcmi_fast._ops import accumulation_dtype

N_EDGES = (2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65)
P_EDGES = (1, 2, 7, 49, 64)
U_EDGES = (1, 7, 64)
LAYOUTS = ("contiguous", "offset", "sliced", "transposed", "expanded")
IMAGE_LAYOUTS = ("channels_last", "contiguous", "offset", "sliced", "transposed")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor of x's shape whose memory looks as `layout` says; x's values but expanded."""
    if layout == "offset":  # one element past what an allocation is aligned to
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return x.contiguous()


def step_operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x near origin, a gradient, and origin, pixels from 0 to 1."""
    origin = torch.rand(shape)
    x, grad = origin + 0.1 * torch.randn(shape), torch.randn(shape)
    return x.to(dtype), grad.to(dtype), origin.to(dtype)


def features(
    n: int, p: int, u: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """z (n, u) and h (n, p, u) of scores of moderate size, with means away from 0."""
    z, h = torch.randn(n, u) + 0.5, torch.randn(n, p, u) - 0.25
    return (z * scale).to(dtype), (h * scale).to(dtype)


@dataclass(frozen=True)
class BoundCase:
    z: Tensor
    h: Tensor
    level: str | None
    tile_rows: int
    tile_bytes: int
    kept_bytes: int

    def __repr__(self) -> str:
        return (
            f"BoundCase(z={tuple(self.z.shape)} strides {self.z.stride()}, h={tuple(self.h.shape)}"
            f" strides {self.h.stride()}, {self.z.dtype}, |z|={self.z.abs().max().item():.3g},"
            f" {self.level}, tile {self.tile_rows} rows {self.tile_bytes} bytes,"
            f" kept {self.kept_bytes})"
        )


@st.composite
def bound_cases(draw: st.DrawFn, scales: tuple[float, ...]) -> BoundCase:
    """z and h whose scores have a standard deviation out of `scales`."""
    # N one below, at and above the edges of tiles of 8 or 16 rows, and of vectors.
    n, p, u = (draw(st.sampled_from(edges)) for edges in (N_EDGES, P_EDGES, U_EDGES))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = (draw(st.sampled_from(scales)) / u**0.5) ** 0.5
    # Means away from 0 so that z is no stand-in for h, nor an image for another.
    z = (torch.randn(n, u, generator=generator) + 0.3).mul(scale).to(dtype)
    h = (torch.randn(n, p, u, generator=generator) - 0.2).mul(scale).to(dtype)
    z, h = (lay_out(t, draw(st.sampled_from(LAYOUTS))) for t in (z, h))
    if p == 1 and draw(st.booleans()):
        h = h[:, 0]
    tile_rows = draw(st.sampled_from((1, 8, 16, 128)))
    # One image a tile, or 8, or all; T recomputed in the backward pass, or kept.
    row_bytes = min(n, tile_rows) * p * accumulation_dtype(dtype).itemsize
    return BoundCase(
        z,
        h,
        level=draw(st.sampled_from(binary().levels())) if binary() else None,
        tile_rows=tile_rows,
        tile_bytes=draw(st.sampled_from((1, 8 * row_bytes, 1 << 20))),
        kept_bytes=draw(st.sampled_from((0, 4 << 20))),
    )


STEP_SIZES = (0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1000)
STEP_BLOCK_SIZES = (16383, 16384, 16385, 32768, 32769, 49151, 65537)
EXTREMES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-8, 6e-8, 1e-40, -1e-40, 1e-310, 6e4, -6e4, 3e38)
INFINITIES = (float("inf"), -float("inf"), float("nan"))


@dataclass(frozen=True)
class StepCase:
    x: Tensor
    grad: Tensor
    origin: Tensor
    eps: float
    step_size: float
    clip: tuple[float, float]

    def __repr__(self) -> str:
        return (
            f"StepCase({self.x.dtype}, {tuple(self.x.shape)}, eps {self.eps},"
            f" step {self.step_size}, clip {self.clip})"
        )


def _with_extremes(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    extremes = torch.tensor((*EXTREMES, *INFINITIES), dtype=torch.float64).to(x.dtype)
    chosen = extremes[torch.randint(len(extremes), x.shape, generator=generator)]
    return torch.where(torch.rand(x.shape, generator=generator) < share, chosen, x)


@st.composite
def step_cases(draw: st.DrawFn) -> StepCase:
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from(STEP_SIZES + STEP_BLOCK_SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.0, 0.3)))
    eps = draw(st.sampled_from((0.0, 1e-8, 8 / 255, 0.3, 2.0)))
    origin = torch.rand(size, generator=generator, dtype=torch.float64)
    x = origin + 2 * eps * (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5)
    grad = torch.randn(size, generator=generator, dtype=torch.float64)
    grad[torch.rand(size, generator=generator) < 0.1] = 0
    x, grad, origin = (_with_extremes(t.to(dtype), share, generator) for t in (x, grad, origin))
    return StepCase(
        x,
        grad,
        origin,
        eps,
        step_size=draw(st.sampled_from((1e-8, 0.01, 0.1, 1 / 3, 7.0, 1e5))),
        clip=draw(st.sampled_from(((0.0, 1.0), (-1.0, 1.0), (0.1, 0.7), (-1e4, 1e4)))),
    )


@dataclass(frozen=True)
class RowsCase:
    """Arguments of l2_step_."""

    x: Tensor
    grad: Tensor
    origin: Tensor
    eps: float
    step_size: float
    clip: tuple[float, float]

    __repr__ = StepCase.__repr__


ROW_COUNTS = (1, 2, 3, 7)
ROW_SIZES = (1, 2, 7, 8, 9, 15, 16, 17, 33, 129, 511, 512, 513, 1000, 1025, 4097)


@st.composite
def rows_cases(draw: st.DrawFn) -> RowsCase:
    dtype = draw(st.sampled_from(DTYPES))
    shape = (draw(st.sampled_from(ROW_COUNTS)), draw(st.sampled_from(ROW_SIZES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    eps = draw(st.sampled_from((0.0, 1e-3, 0.5, 2.0, 100.0)))
    low, high = clip = draw(st.sampled_from(((0.0, 1.0), (-1.0, 1.0), (0.1, 0.7), (-1e4, 1e4))))
    noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    origin = torch.rand(shape, generator=generator, dtype=torch.float64).mul(high - low).add(low)
    # Inside the ball, about its surface, outside.
    x = origin + draw(st.sampled_from((0.0, 0.5, 1.0, 2.0))) * eps * noise[0] / shape[1] ** 0.5
    grad = draw(st.sampled_from((1e-3, 1.0, 1e3))) * noise[1]
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    grad[torch.rand(shape[0], generator=generator) < 0.2] = 0
    x, grad, origin = (t.to(dtype) for t in (x, grad, origin.clamp(*clip)))
    return RowsCase(
        x, grad, origin, eps, step_size=draw(st.sampled_from((1e-3, 0.1, 1 / 3, 7.0))), clip=clip
    )


@dataclass(frozen=True)
class BestCase:
    """Arguments of keep_best_."""

    best_x: Tensor
    best_value: Tensor
    x: Tensor
    value: Tensor

    def __repr__(self) -> str:
        return (
            f"BestCase({self.x.dtype}, {tuple(self.x.shape)}, {self.value.dtype},"
            f" {self.best_value.tolist()} {self.value.tolist()})"
        )


@st.composite
def best_cases(draw: st.DrawFn) -> BestCase:
    dtype, value_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    n = draw(st.sampled_from((0, 1, 2, 3, 17)))
    shape = (n, *draw(st.sampled_from(((), (1,), (7,), (3, 5, 5), (1, 129), (40000,)))))
    values = st.sampled_from((0.0, -0.0, 1.0, 1.5, -2.0, 6e4, *INFINITIES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    best_x, x = torch.randn(2, *shape, generator=generator).to(dtype).unbind()
    if draw(st.booleans()):
        best, new = draw(values), draw(values)
    else:
        best, new = (draw(st.lists(values, min_size=n, max_size=n)) for _ in range(2))
    best_value, value = (torch.tensor(v, dtype=value_dtype) for v in (best, new))
    return BestCase(best_x.clone(), best_value, x.clone(), value)
