"""Oracles in the tests' own words, and the rule that compares with them.

Nothing here calls wcmi_fast's formulas: `plain_dv` is the bound as spec.md writes it, in another
formulation than wcmi_fast.reference, and `loop_dv` is the same in Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import mul
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from wcmi_fast import functional
from wcmi_fast._ops import accumulation_dtype
from wcmi_fast.backends import cpu
from wcmi_fast.functional import bounds

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EAGER_IMPLS = ("reference", "cpu")


def error_rule(name: str, ours: Tensor, plain: Tensor, oracle: Tensor, magnitude: float) -> None:
    """Check |ours - oracle| <= 2 |plain - oracle| + tiny in max norm; oracle is float64.

    `plain` is the plain torch program in ours' dtype. By luck it may hit the oracle exactly (N = 2,
    U = 1), where any other order of summation cannot follow: tiny allows 4 roundings, in the dtype
    of the output, of the largest quantity that goes into it, `magnitude` (2 were seen in 3,000
    random cases). In float64 the oracle is the plain program itself and has errors of its own: 32
    roundings (9 were seen).
    """
    assert ours.dtype == plain.dtype
    assert ours.shape == oracle.shape
    roundings = 32 if ours.dtype == torch.float64 else 4
    tiny = roundings * torch.finfo(ours.dtype).eps * magnitude
    error = (ours.double() - oracle).abs().max().item()
    allowed = 2 * (plain.double() - oracle).abs().max().item() + tiny
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def plain_dv(z: Tensor, h: Tensor, diagonal: str) -> Tensor:
    """DV by picking the off-diagonal entries instead of masking; half types in float32."""
    z, h = (t if t.dtype == torch.float64 else t.float() for t in (z, h))
    h = h if h.dim() == 3 else h[:, None]
    n, p, u = h.shape
    T = (z @ h.reshape(n * p, u).t()).reshape(n, n, p)
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    negatives = T[~own]
    if diagonal == "zero":
        negatives = torch.cat([negatives, negatives.new_zeros(n, p)])
    lse = negatives.logsumexp(0)
    return (T[own].mean(0) - (lse - math.log(n * (n - 1)))).mean()


def loop_dv(z: list[list[float]], h: list[list[list[float]]], diagonal: str) -> float:
    """DV of spec.md section 2 in loops over Python floats; for moderate scores."""
    n, locations = len(z), len(h[0])
    total = 0.0
    for p in range(locations):
        T = [[math.fsum(map(mul, z[i], h[j][p])) for j in range(n)] for i in range(n)]
        exps = [math.exp(T[i][j]) for i in range(n) for j in range(n) if i != j]
        exps += [1.0] * n if diagonal == "zero" else []
        positive = math.fsum(T[i][i] for i in range(n)) / n
        total += positive - (math.log(math.fsum(exps)) - math.log(n * (n - 1)))
    return total / locations


class DvResult(NamedTuple):
    value: Tensor
    dz: Tensor
    dh: Tensor


def value_and_grads(bound: Callable[[Tensor, Tensor], Tensor], z: Tensor, h: Tensor) -> DvResult:
    z, h = z.detach().requires_grad_(), h.detach().requires_grad_()
    value = bound(z, h)
    return DvResult(value.detach(), *torch.autograd.grad(value, (z, h)))


def check_dv(z: Tensor, h: Tensor, diagonal: str, impl: str) -> None:
    """Apply the error rule to dv's value and both gradients."""
    ours = value_and_grads(lambda a, b: functional.dv(a, b, diagonal=diagonal, impl=impl), z, h)
    plain = value_and_grads(lambda a, b: plain_dv(a, b, diagonal), z, h)
    oracle = value_and_grads(lambda a, b: plain_dv(a, b, diagonal), z.double(), h.double())
    # Every score's terms: the value is a difference of such sums.
    n = z.shape[0]
    h3 = h.double().reshape(n, -1, z.shape[1])
    score = torch.einsum("iu,jpu->ijp", z.double().abs(), h3.abs()).max().item()
    error_rule("value", ours.value, plain.value, oracle.value, score + math.log(n * n))
    # A gradient is a positive pair's term minus weights exp(T - lse) times features. The relative
    # error of a weight is the absolute error of a score, which has the accumulation dtype.
    wide_eps = torch.finfo(accumulation_dtype(z.dtype)).eps
    weight = 1 + score * wide_eps / torch.finfo(z.dtype).eps
    for name, other, share in (("dz", h, n), ("dh", z, n * h3.shape[1])):
        got, torch_s, exact = (getattr(result, name) for result in (ours, plain, oracle))
        term = exact.abs().max().item() + other.double().abs().max().item() / share
        error_rule(name, got, torch_s, exact, weight * term)


@contextmanager
def limits(tile_bytes: int, kept_bytes: int, tile_rows: int = 128) -> Iterator[None]:
    """Make tiles and the scores kept for the backward pass as small as a test wants them."""
    with (
        mock.patch.object(cpu, "TILE_BYTES", tile_bytes),
        mock.patch.object(cpu, "TILE_ROWS", tile_rows),
        mock.patch.object(bounds, "KEPT_SCORES_BYTES", kept_bytes),
    ):
        yield


def binary():
    """The CPU binary; None where it is missing."""
    return cpu._binary


@contextmanager
def level(name: str) -> Iterator[None]:
    """Run the CPU kernels at one instruction set."""
    before = binary().level()
    binary().set_level(name)
    try:
        yield
    finally:
        binary().set_level(before)


def plain_linf_step(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step: float, clip: tuple[float, float]
) -> Tensor:
    """The update of the issue in torch's words; a NaN gradient leaves its pixel."""
    moved = torch.clamp(x + step * torch.sign(grad), origin - eps, origin + eps)
    return torch.where(torch.isnan(grad), x, torch.clamp(moved, *clip))


def plain_uniform(count: int, seed: int) -> Tensor:
    """Philox4x32-10 as Salmon et al. 2011 write it, and 24 bits of each word in [-1, 1)."""
    index = np.arange(-(-count // 4), dtype=np.uint64)
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    left0, right0, left1, right1 = index & low, index >> word, 0 * index, 0 * index
    for r in range(10):
        key0, key1 = (seed + r * 0x9E3779B9) & 0xFFFFFFFF, ((seed >> 32) + r * 0xBB67AE85) % 2**32
        p0, p1 = np.uint64(0xD2511F53) * left0, np.uint64(0xCD9E8D57) * left1
        left0, right0 = (p1 >> word) ^ right0 ^ np.uint64(key0), p1 & low
        left1, right1 = (p0 >> word) ^ right1 ^ np.uint64(key1), p0 & low
    words = np.stack([left0, right0, left1, right1], axis=1).ravel()[:count]
    return torch.from_numpy((words >> np.uint64(8)).astype(np.float64) / 2**23 - 1)


def plain_linf_start(origin: Tensor, eps: float, seed: int, clip: tuple[float, float]) -> Tensor:
    """A uniform point of the ball in torch's words; half types in float32, rounded once."""
    centre = origin if origin.dtype == torch.float64 else origin.float()
    noise = plain_uniform(origin.numel(), seed).to(centre.dtype).reshape(origin.shape)
    return torch.clamp(centre + eps * noise, *clip).to(origin.dtype)


def plain_l2_step(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step: float, clip: tuple[float, float]
) -> Tensor:
    """The usual program of l2 PGD, row by row; half types in float32, rounded once."""
    rows = []
    for row, g, centre in zip(x, grad, origin, strict=True):
        if row.dtype != torch.float64:
            row, g, centre = row.float(), g.float(), centre.float()
        moved = row + step * g / g.norm() if g.any() else row
        offset = moved - centre
        if offset.norm() > eps:
            moved = centre + offset * (eps / offset.norm())
        rows.append(moved.clamp(*clip))
    return torch.stack(rows).to(x.dtype)


def plain_keep_best(
    best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """One row after the other, compared as Python numbers."""
    best_x, best_value = best_x.clone(), best_value.clone()
    pairs = zip(value.reshape(-1).tolist(), best_value.reshape(-1).tolist(), strict=True)
    for n, (new, best) in enumerate(pairs):
        if new > best or (math.isnan(best) and not math.isnan(new)):
            at = n if value.dim() else ...
            best_x[at], best_value[at] = x[at], value[at]
    return best_x, best_value


BIT_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(ours: Tensor, wanted: Tensor) -> None:
    """Same bits, but for the sign of a zero and a NaN's payload, on which torch's lanes differ."""
    assert ours.dtype == wanted.dtype
    assert ours.shape == wanted.shape
    kind = BIT_TYPES[ours.dtype.itemsize]
    same = ours.contiguous().view(kind) == wanted.contiguous().view(kind)
    same |= (ours == 0) & (wanted == 0)
    same |= ours.isnan() & wanted.isnan()
    assert same.all(), f"{(~same).sum()} differ: {ours[~same][:4]} for {wanted[~same][:4]}"
