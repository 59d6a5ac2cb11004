"""Triton's statistics of scores and matrix products, in the interpreter or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import triton_interpreter
from oracle import TAU, assert_same_bits, error_rule
from strategies import features
from torch import Tensor

from wcmi_fast import reference
from wcmi_fast._ops import LSE, SOFTPLUS, SQUARE, STATISTICS, SUM, asked
from wcmi_fast.backends.triton import critic_stats, dv_value, product, score_stats, statistics
from wcmi_fast.backends.triton.launch import KINDS

DEVICE = triton_interpreter.enable()
INF, NAN = float("inf"), float("nan")
ALL = sum(STATISTICS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# numpy says so where hardware's maximum of NaNs is one.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_which = pytest.mark.parametrize("which", [0, *STATISTICS, LSE | SOFTPLUS, ALL])


def forward(z: Tensor, h: Tensor, which: int = ALL) -> Tensor:
    stats, scores = critic_stats.critic_stats_fwd(z.to(DEVICE), h.to(DEVICE), which, TAU, False)
    assert stats.dtype == torch.float32
    assert stats.shape == (1 + len(asked(which)), *h.shape[:2])
    assert scores.numel() == 0
    return stats.cpu()


def backward(
    d: Tensor, z: Tensor, h: Tensor, lse: Tensor, which: int = ALL, need: tuple[bool, bool] = (1, 1)
) -> tuple[Tensor, Tensor]:
    dstats = [x.to(DEVICE) for x in d]
    z, h, lse = (x.to(DEVICE) for x in (z, h, lse))
    dz, dh = critic_stats.critic_stats_bwd(dstats, z, h, lse, z.new_empty(0), which, *need)
    assert dz.dtype == dh.dtype == z.dtype
    return dz.cpu(), dh.cpu()


def lse_of(stats: Tensor, which: int) -> Tensor:
    return stats[1 if which & LSE else 0]


def plain_forward(z: Tensor, h: Tensor, which: int = ALL) -> Tensor:
    return torch.stack(reference.score_stats(reference.scores(z, h), which, TAU))


def plain_backward(d: Tensor, z: Tensor, h: Tensor, which: int = ALL) -> tuple[Tensor, ...]:
    z, h = (x.clone().requires_grad_() for x in (z, h))
    return torch.autograd.grad(plain_forward(z, h, which), (z, h), d.to(lse_dtype(z)))


def lse_dtype(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def incoming(which: int, n: int, p: int, scale: float = 1.0) -> Tensor:
    return scale * torch.linspace(-1, 2, (1 + len(asked(which))) * n * p).view(-1, n, p)


def magnitudes(z: Tensor, h: Tensor, which: int) -> list[float]:
    """The largest quantity that goes into the positives and into each statistic."""
    n = len(z)
    score = reference.scores(z.double().abs(), h.double().abs()).max().item()
    sizes = {SOFTPLUS: n * (score + 1), SUM: n * score, SQUARE: n * (score + 1) ** 2}
    return [
        score,
        *(sizes.get(statistic, score + 2 * math.log(n) + 1) for statistic in asked(which)),
    ]


def score_gradient(d: Tensor, z: Tensor, h: Tensor, which: int) -> Tensor:
    T = reference.scores(z.double(), h.double()).requires_grad_()
    stats = torch.stack(reference.score_stats(T, which, TAU))
    return torch.autograd.grad(stats, T, d.double())[0]


def check_forward(z: Tensor, h: Tensor, which: int = ALL) -> Tensor:
    ours, plain = forward(z, h, which), plain_forward(z, h, which)
    exact = plain_forward(z.double(), h.double(), which)
    for k, magnitude in enumerate(magnitudes(z, h, which)):
        error_rule(f"plane {k}", ours[k], plain[k], exact[k], magnitude)
    return ours


def check_backward(d: Tensor, z: Tensor, h: Tensor, lse: Tensor, which: int = ALL) -> None:
    ours, plain = backward(d, z, h, lse, which), plain_backward(d, z, h, which)
    exact = plain_backward(d, z.double(), h.double(), which)
    G = score_gradient(d, z, h, which).abs()
    score = reference.scores(z.double().abs(), h.double().abs()).max().item()
    weight = 1 + score * torch.finfo(torch.float32).eps / torch.finfo(z.dtype).eps
    sizes = (
        weight * G.sum((1, 2)).max().item() * h.abs().max().item(),
        weight * G.sum(0).max().item() * z.abs().max().item(),
    )
    for k, magnitude in enumerate(sizes):
        error_rule(f"gradient {k}", ours[k], plain[k], exact[k], magnitude)


def check(z: Tensor, h: Tensor, which: int = ALL, scale: float = 1.0) -> None:
    stats = check_forward(z, h, which)
    check_backward(incoming(which, *h.shape[:2], scale), z, h, lse_of(stats, which), which)


# ---- critic_stats: values and gradients ---------------------------------------------------------


@every_dtype
@every_which
def test_every_statistic(which: int, dtype: torch.dtype) -> None:
    check(*features(37, 3, 20, dtype), which)


@every_dtype
@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (3, 2, 1), (16, 1, 16), (33, 7, 5), (64, 2, 128), (70, 1, 256), (5, 20, 3)]
)
def test_shapes_at_the_edges_of_tiles(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*features(*shape, dtype, scale=1 / shape[2] ** 0.25))


def configurations_of(module: Any) -> list[Any]:
    return [
        pytest.param(dtype, configuration, id=f"{precision} {configuration}")
        for dtype, precision in KINDS[:3]  # float16's are those of bfloat16
        for configuration in module.configurations(dtype, precision)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "configuration"), configurations_of(critic_stats))
def test_every_configuration(dtype: torch.dtype, configuration: Any) -> None:
    with mock.patch.object(critic_stats, "_default", return_value=configuration):
        check(*features(132, 2, 40, dtype, scale=0.4))


def test_there_are_enough_configurations() -> None:
    for module in (critic_stats, product):
        for kind in KINDS:
            assert len(set(map(str, module.configurations(*kind)))) >= 6
    assert len(set(map(str, score_stats.CONFIGURATIONS))) >= 6


@contextmanager
def limits(**values: int) -> Iterator[None]:
    with mock.patch.multiple(critic_stats, **values):
        yield


@pytest.mark.parametrize("part_images", [16, 48, 128])
@pytest.mark.parametrize("n", [129, 96])
def test_images_in_parts(n: int, part_images: int) -> None:
    z, h = features(n, 1, 17, torch.float32)
    with limits(PART_IMAGES=part_images):
        parts, span = critic_stats._parts(n, 1, critic_stats.configurations(torch.float32)[2])
        assert parts == -(-n // span) > (n > part_images)
        assert parts * span >= n > (parts - 1) * span
        check_forward(z, h)
    with limits(PROCESSORS=1):
        check_forward(z, h)


@every_dtype
@pytest.mark.parametrize("images", [7, 16, 39])
def test_slabs_of_images(images: int, dtype: torch.dtype) -> None:
    z, h = features(40, 3, 17, dtype)
    with limits(SLAB_BYTES=images * 40 * 3 * dtype.itemsize):
        check(z, h)


@pytest.mark.parametrize("slab_bytes", [1, 1 << 20])
def test_only_what_is_needed(slab_bytes: int) -> None:
    z, h = features(17, 3, 5)
    d, lse = incoming(LSE, 17, 3), forward(z, h, LSE)[1]
    with limits(SLAB_BYTES=slab_bytes):
        both = backward(d, z, h, lse, LSE)
        for need in ((True, False), (False, True), (False, False)):
            found = backward(d, z, h, lse, LSE, need)
            for ours, wanted, needed in zip(found, both, need, strict=True):
                assert_same_bits(ours, wanted if needed else wanted.new_empty(0))


def test_expanded_gradients() -> None:
    z, h = features(17, 3, 5)
    lse = forward(z, h)[1]
    d = [torch.tensor(0.3 * k).expand(17, 3) for k in range(6)]
    wanted = backward(torch.stack(d), z, h, lse)
    for ours, exact in zip(backward(d, z, h, lse), wanted, strict=True):
        assert_same_bits(ours, exact)


@every_dtype
def test_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    z, h = features(150, 2, 17, dtype)
    d, one = incoming(ALL, 150, 2), forward(z, h)
    assert_same_bits(forward(z, h), one)
    with limits(SLAB_BYTES=1 << 16):
        grads = backward(d, z, h, one[1])
        for again, first in zip(backward(d, z, h, one[1]), grads, strict=True):
            assert_same_bits(again, first)


# ---- critic_stats: large, small, infinite -------------------------------------------------------


@pytest.mark.parametrize("constant", [-1e4, -150.0, 150.0, 1e4])
@pytest.mark.parametrize("part_images", [16, 128])
def test_large_offsets(part_images: int, constant: float) -> None:
    z, h = features(70, 2, 7)
    z, h = torch.cat([z, torch.ones(70, 1)], 1), torch.cat([h, torch.full((70, 2, 1), constant)], 2)
    with limits(PART_IMAGES=part_images):
        check(z, h, LSE | SOFTPLUS | SUM)


@pytest.mark.parametrize("part_images", [32, 128])
def test_maxima_that_rise_and_fall_from_tile_to_tile(part_images: int) -> None:
    steps = torch.tensor([0.0, 80.0, -90.0, -1e4, 1e4]).repeat_interleave(32)
    for order in (steps, steps.flip(0), steps.sort().values):
        z, h = features(160, 1, 3)
        z[:, 0], h[:, 0, 0] = 1.0, order
        with limits(PART_IMAGES=part_images):
            check_forward(z, h)


# 300 times the gradient of T, which is beyond float16's range, is not.
@pytest.mark.parametrize(("scale", "h_scale"), [(1e-8, 300), (1e-6, 300), (1e3, 1e-3)])
@pytest.mark.parametrize("which", [LSE, ALL])
def test_gradients_of_float16_beyond_its_range(which: int, scale: float, h_scale: float) -> None:
    z, h = features(40, 3, 17, torch.float16, scale=0.1)
    z[:, 0], h[:, :, 0] = 0, h_scale * (h[:, :, 0] > 0)
    d, lse = incoming(which, 40, 3, scale), lse_of(forward(z, h, which), which)
    check_backward(d, z, h, lse, which)
    exact = plain_backward(d, z.double(), h.double(), which)[0]
    error = (backward(d, z, h, lse, which)[0] - exact).abs().max()
    assert error < 2e-3 * exact.abs().max() + 2**-24


def test_gradients_of_float16_that_are_zero_or_not_finite() -> None:
    z, h = features(17, 3, 5, torch.float16)
    lse = forward(z, h)[1]
    assert all((x == 0).all() for x in backward(incoming(ALL, 17, 3, 0.0), z, h, lse))
    for bad in (NAN, INF):
        d = torch.zeros(2, 17, 3)
        d[0, 4, 1] = bad
        assert not backward(d, z, h, lse, LSE)[0][4].isfinite().any()


def product_scores(z: Tensor, h: Tensor) -> Tensor:
    """T for one unit; a product with a matrix library's padding may make inf * 0 of infinities."""
    return z[:, None] * h[None, :, :, 0]


def assert_like_torch(T: Tensor, stats: Tensor) -> None:
    wanted = torch.stack(reference.score_stats(T, ALL, TAU))
    torch.testing.assert_close(stats, wanted, equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 33, 69])
@pytest.mark.parametrize("part_images", [16, 128])
def test_an_image_that_is_not_finite(part_images: int, at: int, bad: float) -> None:
    z, h = torch.rand(70, 1) + 0.1, torch.randn(70, 2, 1)
    h[at, 1] = bad
    with limits(PART_IMAGES=part_images):
        assert_like_torch(product_scores(z, h), forward(z, h))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part_images", [16, 128])
def test_a_row_that_is_not_finite(part_images: int, bad: float) -> None:
    z, h = torch.rand(70, 1) + 0.1, torch.rand(70, 2, 1) + 0.1
    z[65] = bad
    with limits(PART_IMAGES=part_images):
        assert_like_torch(product_scores(z, h), forward(z, h))


@pytest.mark.parametrize("others", [INF, -INF])
@pytest.mark.parametrize("place", [0, 40, 69])
@pytest.mark.parametrize("part_images", [16, 128])
def test_a_nan_is_not_lost_beside_infinities(part_images: int, place: int, others: float) -> None:
    z, h = torch.rand(70, 1) + 0.1, torch.full((70, 1, 1), others)
    h[place] = NAN
    with limits(PART_IMAGES=part_images):
        stats = forward(z, h)
    assert_like_torch(product_scores(z, h), stats)
    rows = torch.arange(70) != place
    assert stats[1:, rows].isnan().all()
    assert (stats[1, place] == others).all()


@pytest.mark.parametrize("first", [INF, -INF])
def test_infinities_in_one_tile_and_numbers_in_the_next(first: float) -> None:
    for where in (slice(0, 64), slice(64, 150), slice(0, 150, 2)):
        z, h = torch.rand(150, 1) + 0.1, torch.randn(150, 1, 1)
        h[where] = first
        assert_like_torch(product_scores(z, h), forward(z, h))


def test_own_pairs_take_no_part_in_maxima() -> None:
    z, h = torch.eye(40), 1e4 * torch.eye(40)[:, None]
    stats = forward(z, h)
    torch.testing.assert_close(stats[0], torch.full((40, 1), 1e4))
    torch.testing.assert_close(stats[1], torch.full((40, 1), math.log(39)))


# ---- score_stats --------------------------------------------------------------------------------


def scores_backward(d: Tensor, T: Tensor, lse: Tensor, which: int = ALL) -> Tensor:
    dstats = [x.to(DEVICE) for x in d]
    return score_stats.score_stats_bwd(dstats, T.to(DEVICE), lse.to(DEVICE), which).cpu()


def check_scores(T: Tensor, which: int = ALL) -> None:
    n, _, p = T.shape
    d, wide = incoming(which, n, p), T.double().requires_grad_()
    leaf = T.clone().requires_grad_()
    ours = score_stats.score_stats_fwd(T.to(DEVICE), which, TAU).cpu()
    plain = torch.stack(reference.score_stats(leaf.float(), which, TAU))
    exact = torch.stack(reference.score_stats(wide, which, TAU))
    size = T.abs().max().item()
    error_rule("statistics", ours, plain, exact, n * (size + 1) ** 2)
    dT = scores_backward(d, T, lse_of(ours, which), which)
    (plain_dT,), (exact_dT,) = (
        torch.autograd.grad(x, y, d.to(x.dtype)) for x, y in ((plain, leaf), (exact, wide))
    )
    error_rule("gradient", dT, plain_dT, exact_dT, 10 + 4 * size)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 1), (9, 3), (17, 5), (33, 40), (20, 70)])
def test_given_scores(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, p = shape
    check_scores((2 * torch.randn(n, n, p)).to(dtype))


@every_which
def test_every_statistic_of_given_scores(which: int) -> None:
    check_scores(2 * torch.randn(17, 17, 3), which)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", score_stats.CONFIGURATIONS, ids=str)
def test_every_configuration_of_given_scores(configuration: Any) -> None:
    with mock.patch.object(score_stats, "_default", return_value=configuration):
        check_scores(2 * torch.randn(18, 18, 5))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (18, 2), (4, 4)])
def test_a_given_score_that_is_not_finite(at: tuple[int, int], bad: float) -> None:
    T, d = torch.randn(19, 19, 2), incoming(ALL, 19, 2)
    T[(*at, 1)] = bad
    stats = score_stats.score_stats_fwd(T.to(DEVICE), ALL, TAU).cpu()
    assert_like_torch(T, stats)
    leaf = T.clone().requires_grad_()
    wanted = torch.autograd.grad(torch.stack(reference.score_stats(leaf, ALL, TAU)), leaf, d)[0]
    ours = scores_backward(d, T, stats[1])
    if at[0] == at[1]:
        wanted[(*at, 1)] = d[0, at[0], 1]  # torch multiplies what it has masked by 0
    torch.testing.assert_close(ours, wanted, equal_nan=True)


def test_rows_and_tiles_that_are_all_minus_infinity() -> None:
    T, which = torch.randn(70, 70, 3), LSE | SOFTPLUS
    T[:35] = T[:, 40] = T[:, :, 2] = -INF
    stats = score_stats.score_stats_fwd(T.to(DEVICE), ALL, TAU).cpu()
    assert_like_torch(T, stats)
    dT = scores_backward(incoming(which, 70, 3), T, stats[1], which)
    own = torch.eye(70, dtype=torch.bool)
    assert not dT.isnan().any()
    assert (dT[~own][T[~own] == -INF] == 0).all()


def test_softplus_to_a_few_units_in_the_last_place() -> None:
    for low, high in ((-80.0, 90.0), (-1.0, 1.0), (-1e-3, 1e-3)):
        T = torch.zeros(2, 2, 512)
        T[0, 1], T[1, 0] = torch.linspace(low, high, 2 * 512, dtype=torch.float64).view(2, -1)
        ours = score_stats.score_stats_fwd(T.to(DEVICE), SOFTPLUS, TAU)[1].cpu()
        x = torch.stack([T[0, 1], T[1, 0]]).double()
        exact = x.clamp_min(0) + (-x.abs()).exp().log1p()
        assert ((ours - exact) / exact).abs().max() < 4 * torch.finfo(torch.float32).eps


# ---- dv_value -----------------------------------------------------------------------------------


def plain_dv_value(positives: Tensor, lse: Tensor, zero_diagonal: bool) -> Tensor:
    n = len(lse)
    joint = lse.logsumexp(0)
    if zero_diagonal:
        joint = torch.logaddexp(joint, joint.new_tensor(math.log(n)))
    return (positives.mean(0) - joint).mean() + math.log(n * (n - 1))


def run_dv_value(positives: Tensor, lse: Tensor, zero_diagonal: bool) -> tuple[Tensor, Tensor]:
    positives, lse = positives.to(DEVICE), lse.to(DEVICE)
    value, dlse = dv_value.dv_value(positives, lse, zero_diagonal)
    assert value.shape == ()
    return value.cpu(), dlse.cpu()


both_diagonals = pytest.mark.parametrize("zero_diagonal", [False, True])


@both_diagonals
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 1), (17, 3), (300, 5)])
def test_dv_value(shape: tuple[int, int], offset: float, zero_diagonal: bool) -> None:
    positives, lse = torch.randn(shape), 3 * torch.randn(shape) + offset
    value, dlse = run_dv_value(positives, lse, zero_diagonal)
    wide = lse.double().requires_grad_()
    exact = plain_dv_value(positives.double(), wide, zero_diagonal)
    (wanted,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(value, exact.detach().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(dlse, wanted.float(), rtol=2e-7, atol=1e-38)


def test_dv_value_of_many_locations() -> None:
    positives, lse = torch.randn(2, 1100), torch.randn(2, 1100)
    value, _ = run_dv_value(positives, lse, False)
    exact = plain_dv_value(positives.double(), lse.double(), False)
    torch.testing.assert_close(value, exact.float(), rtol=2e-7, atol=0)


@both_diagonals
def test_dv_value_of_rows_without_a_finite_score(zero_diagonal: bool) -> None:
    positives, lse = torch.randn(20, 3), torch.randn(20, 3)
    lse[4] = -INF
    value, dlse = run_dv_value(positives, lse, zero_diagonal)
    torch.testing.assert_close(value, plain_dv_value(positives, lse, zero_diagonal))
    assert (dlse[4] == 0).all()
    lse[:, 1] = -INF
    value, dlse = run_dv_value(positives, lse, zero_diagonal)
    assert value.isfinite() if zero_diagonal else value == INF
    assert (dlse[:, 1] == 0).all()


@both_diagonals
@pytest.mark.parametrize(("bad", "wanted"), [(NAN, NAN), (INF, -INF)])
def test_dv_value_that_is_not_finite(bad: float, wanted: float, zero_diagonal: bool) -> None:
    positives, lse = torch.randn(300, 3), torch.randn(300, 3)
    lse[270, 1] = bad
    value, dlse = run_dv_value(positives, lse, zero_diagonal)
    torch.testing.assert_close(value, torch.tensor(wanted), equal_nan=True)
    assert dlse[:, [0, 2]].isfinite().all()


# ---- products -----------------------------------------------------------------------------------


def multiply(*operands: Tensor, out: Tensor, **epilogue: Any) -> Tensor:
    def moved(x: Any) -> Any:
        return (
            tuple(map(moved, x))
            if isinstance(x, tuple)
            else x.to(DEVICE)
            if isinstance(x, Tensor)
            else x
        )

    options = {name: moved(x) for name, x in epilogue.items()}
    return product.product(*map(moved, operands), moved(out), **options).cpu()


def check_product(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    size = exact.abs().max().item()
    plain = exact.to(dtype)
    error_rule("product", ours, plain, exact, 4 * size)


@every_dtype
@pytest.mark.parametrize("k", [1, 50, 128, 3000])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
def test_product_of_any_strides(transposed: tuple[bool, bool], k: int, dtype: torch.dtype) -> None:
    a, b = (torch.randn(70, k) / k**0.5).to(dtype), torch.randn(k, 33).to(dtype)
    exact = a.double() @ b.double()
    a, b = (x.t().contiguous().t() if t else x for x, t in zip((a, b), transposed, strict=True))
    check_product(multiply(a, b, out=torch.full((70, 33), NAN)), exact, torch.float32)
    out = torch.full((33, 70), NAN, dtype=dtype).t()
    check_product(multiply(a, b, out=out), exact, dtype)


@every_dtype
@pytest.mark.parametrize("k", [(20, 70), (2500, 3000)])
def test_product_and_what_follows_it(k: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = torch.randn(40, k[0]).to(dtype), torch.randn(k[0], 20).to(dtype)
    a2, b2 = torch.randn(40, k[1]).to(dtype), torch.randn(k[1], 20).to(dtype)
    add, bias, scale = torch.randn(20, 40).t(), torch.randn(20).to(dtype), torch.tensor(0.5)
    relu_mask = torch.randn(40, 20).to(dtype)
    products = a.double() @ b.double() + a2.double() @ b2.double()
    exact = 0.5 * products + add + bias.double()
    epilogue = {"second": (a2, b2), "scale": scale, "add": add, "bias": bias}
    out = torch.full((40, 20), NAN)
    check_product(multiply(a, b, out=out, **epilogue), exact, torch.float32)
    check_product(multiply(a, b, out=out, relu=True, **epilogue), exact.relu(), torch.float32)
    masked = exact.where(relu_mask > 0, 0.0)
    check_product(multiply(a, b, out=out, relu_mask=relu_mask, **epilogue), masked, torch.float32)


def test_product_is_split_along_a_long_sum_only() -> None:
    assert product._parts(40, 20, 3000, torch.bfloat16) > 1
    assert product._parts(40, 20, 1000, torch.bfloat16) == 1
    assert product._parts(4096, 4096, 1 << 20, torch.bfloat16) == 1
    with mock.patch.object(product, "SPLIT_BYTES", 4 * 40 * 20):
        assert product._parts(40, 20, 3000, torch.bfloat16) == 1


def test_product_adds_to_its_output() -> None:
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    sums = torch.ones(20, 40).to(DEVICE)
    ours = product.product(a.to(DEVICE), b.to(DEVICE), sums, add=sums)
    assert ours is sums
    torch.testing.assert_close(ours.cpu(), 1 + a @ b)


def test_rectifier_keeps_nan() -> None:
    a, b, mask = torch.ones(3, 2), torch.ones(2, 4), torch.ones(3, 4)
    a[1, 1] = NAN
    for options in ({"relu": True}, {"relu_mask": mask}):
        ours = multiply(a, b, out=torch.empty(3, 4), **options)
        assert ours.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "configuration"), configurations_of(product))
def test_every_configuration_of_products(dtype: torch.dtype, configuration: Any) -> None:
    a, b = torch.randn(300, 70).to(dtype), torch.randn(70, 270).to(dtype)
    with mock.patch.object(product, "default_configuration", return_value=configuration):
        ours = multiply(a, b, out=torch.full((300, 270), NAN))
    check_product(ours, a.double() @ b.double(), torch.float32)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (130, 70), (1100, 70), (70, 1100)])
def test_programs_cover_every_tile_once(m: int, n: int) -> None:
    ours = multiply(torch.ones(m, 1), torch.ones(1, n), out=torch.full((m, n), NAN))
    assert (ours == 1).all()


# ---- programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [critic_stats, score_stats, dv_value, product, statistics])
def test_programs(module: Any) -> None:
    programs = module.programs()
    names = sorted(program.name for program in programs)
    assert all(a != b for a, b in pairwise(names))
    for program in programs:
        assert list(program.signature) == program.kernel.arg_names
        constants = [name for name, kind in program.signature.items() if kind == "constexpr"]
        assert sorted(constants) == sorted(program.constants)
    assert any(program.default for program in programs)
