"""The kernels and operators of critic_stats: tiles, edges, not-finite scores, threads, memory."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import (
    DTYPES,
    TAU,
    assert_same_bits,
    binary,
    error_rule,
    level,
    limits,
    plain_scores,
    value_and_grads,
)
from strategies import features
from torch import Tensor

from wcmi_fast import functional
from wcmi_fast._ops import CLAMPED_LSE, LSE, SOFTPLUS, SQUARE, STATISTICS, SUM
from wcmi_fast.backends import cpu

INF, NAN = float("inf"), float("nan")
CANARY = 12345.0
ALL = sum(STATISTICS)
NAMES = {LSE: "lse", SOFTPLUS: "softplus", CLAMPED_LSE: "clamped_lse", SUM: "sum", SQUARE: "square"}
both_wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_level = pytest.mark.parametrize("simd", binary().levels() if binary() else [])


# ---- the kernels on given tiles -----------------------------------------------------------------

Tile = tuple[int, int, int, int]


def split(n: int, rows: int, images: int) -> list[Tile]:
    """Tiles of so many rows and images, in the order of backends/cpu.py."""
    return [
        (row, min(rows, n - row), image, min(images, n - image))
        for image in range(0, n, images)
        for row in range(0, n, rows)
    ]


def splits(n: int) -> Iterator[list[Tile]]:
    """One tile; one image or one row at a time; tiles with short ones at the ends."""
    yield from (split(n, n, n), split(n, n, 1), split(n, 1, n), split(n, 2, 3))


def guarded(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaNs of this shape, each row followed by canaries that `assert_guarded` looks at."""
    count, size = shape[0], math.prod(shape[1:])
    memory = torch.full((count, size + 16), NAN, dtype=dtype)
    memory[:, size:] = CANARY
    return memory


def assert_guarded(memory: Tensor) -> None:
    assert (memory[:, -16:] == CANARY).all(), "a kernel wrote beyond its array"


def workspace(p: int, threads: int, dtype: torch.dtype) -> Tensor:
    return guarded(1, threads * binary().critic_stats_workspace(p), dtype=dtype)


def kernels(dtype: torch.dtype) -> Any:
    return binary().critic_stats_f64 if dtype == torch.float64 else binary().critic_stats_f32


def addresses(memory: Tensor, which: int) -> list[int]:
    """CriticStatsArrays of kernels.h: positives, row_max and the statistics asked for."""
    wanted = [True, True, *(bool(which & statistic) for statistic in STATISTICS)]
    return [row.data_ptr() * asked for row, asked in zip(memory, wanted, strict=True)]


def followed_by_nan(part: Tensor) -> Tensor:
    """The tile's scores in memory of their own, behind which lie NaNs that must not be read."""
    memory = torch.full((part.numel() + 64,), NAN, dtype=part.dtype)
    memory[: part.numel()] = part.flatten()
    return memory


def reduce_tiles(
    T: Tensor, tiles: list[Tile] | None = None, which: int = ALL, threads: int = 1
) -> dict[str, Tensor]:
    """Run fwd over the tiles of T (N, N, P), then finish."""
    n, _, p = T.shape
    memory, scratch = guarded(7, n, p, dtype=T.dtype), workspace(p, threads, T.dtype)
    arrays = addresses(memory, which)
    for row, rows, image, images in tiles or split(n, n, n):
        part = followed_by_nan(T[row : row + rows, image : image + images])
        kernels(T.dtype).fwd(
            part.data_ptr(), (row, rows, image, images, p), arrays, TAU, scratch.data_ptr(), threads
        )
    kernels(T.dtype).finish(arrays, n * p, TAU, threads)
    assert_guarded(memory)
    assert_guarded(scratch)
    found = memory[:, : n * p].view(7, n, p).clone()
    names = {0: "positives", **{cpu.PLACES[s]: NAMES[s] for s in STATISTICS if which & s}}
    return {name: found[place] for place, name in names.items()}


def gradient(
    T: Tensor,
    lse: Tensor,
    d: Tensor,
    tiles: list[Tile] | None = None,
    which: int = ALL,
    threads: int = 1,
) -> Tensor:
    """Run bwd over the tiles of T, for gradients d (7, N, P) in the order of CriticStatsArrays."""
    n, _, p = T.shape
    scratch, dT = workspace(p, threads, T.dtype), torch.full_like(T, NAN)
    arrays, lse = addresses(d, which), lse.contiguous()
    for row, rows, image, images in tiles or split(n, n, n):
        part = followed_by_nan(T[row : row + rows, image : image + images])
        memory = guarded(1, rows, images, p, dtype=T.dtype)
        kernels(T.dtype).bwd(
            part.data_ptr(), (row, rows, image, images, p), lse.data_ptr(), arrays,
            memory.data_ptr(), scratch.data_ptr(), threads,
        )  # fmt: skip
        assert_guarded(memory)
        size = rows * images * p
        dT[row : row + rows, image : image + images] = memory[0, :size].view(rows, images, p)
    assert_guarded(scratch)
    return dT


def incoming(n: int, p: int, dtype: torch.dtype) -> Tensor:
    """Gradients of the statistics, all different, in the order of CriticStatsArrays."""
    return torch.linspace(-1, 2, 7 * n * p, dtype=dtype).view(7, n, p)


def negatives_of(T: Tensor) -> Tensor:
    return T[~torch.eye(len(T), dtype=torch.bool)].view(len(T), len(T) - 1, -1)


def clamped(T: Tensor) -> Tensor:
    return T.clamp(-TAU, TAU)


class Statistic(NamedTuple):
    """Over negatives (N, N - 1, P), per row; its slope at T; what its error is relative to."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    magnitude: Callable[[Tensor], Tensor]


def softplus(x: Tensor) -> Tensor:
    return x.clamp_min(0) + (-x.abs()).exp().log1p()


def half_square(x: Tensor) -> Tensor:
    return (x.abs() + 1) ** 2 / 2


PLAIN = {
    "lse": Statistic(
        lambda x: x.logsumexp(1), lambda T, lse: (T - lse[:, None]).exp(), lambda x: x.abs() + 5
    ),
    "softplus": Statistic(
        lambda x: softplus(x).sum(1), lambda T, _: T.sigmoid(), lambda x: softplus(x).sum(1)
    ),
    "clamped_lse": Statistic(
        lambda x: clamped(x).logsumexp(1), lambda T, _: 0 * clamped(T), lambda x: clamped(x) + 5
    ),
    "sum": Statistic(lambda x: x.sum(1), lambda T, _: torch.ones_like(T), lambda x: x.abs().sum(1)),
    "square": Statistic(
        lambda x: half_square(x).sum(1), lambda T, _: T + T.sign(), lambda x: half_square(x).sum(1)
    ),
}


def plain_gradient(T: Tensor, d: Tensor, which: int = ALL) -> Tensor:
    """Gradient of T for gradients d (7, N, P) of its statistics."""
    lse, dT = negatives_of(T).logsumexp(1), torch.zeros_like(T)
    for statistic in STATISTICS:
        if which & statistic and statistic != CLAMPED_LSE:
            dT += d[cpu.PLACES[statistic], :, None] * PLAIN[NAMES[statistic]].slope(T, lse)
    own = torch.arange(len(T))
    dT[own, own] = d[0]
    return dT


def check_statistics(T: Tensor, tiles: list[Tile]) -> None:
    """Apply the error rule to every statistic and to the gradient of their weighted sum."""
    wide, found = T.double(), reduce_tiles(T, tiles)
    assert torch.equal(found["positives"], T.diagonal().t())
    for name, statistic in PLAIN.items():
        exact, negatives = statistic.value(negatives_of(wide)), negatives_of(wide)
        magnitude = statistic.magnitude(negatives).max().item()
        error_rule(name, found[name], statistic.value(negatives_of(T)), exact, magnitude)
    d = incoming(len(T), T.shape[2], T.dtype)
    ours = gradient(T, found["lse"], d, tiles)
    exact = plain_gradient(wide, d.double())
    error_rule("gradient", ours, plain_gradient(T, d), exact, 10 + 4 * wide.abs().max().item())


@every_level
@both_wide
@pytest.mark.parametrize("p", [1, 2, 3, 7, 8, 15, 16, 17, 33, 49, 64])
def test_every_statistic_at_the_edges_of_vectors_and_tiles(
    p: int, dtype: torch.dtype, simd: str
) -> None:
    with level(simd):
        for n in (2, 3, 4, 5, 9, 17):
            T = 3 * torch.randn(n, n, p, dtype=dtype)
            T[T.abs() < 0.3] = 0  # where |T| has a corner, torch's slope is 0
            for tiles in splits(n):
                check_statistics(T, tiles)


@every_level
@both_wide
def test_maxima_that_rise_and_fall_from_tile_to_tile(dtype: torch.dtype, simd: str) -> None:
    steps = torch.tensor([0.0, 40.0, -60.0, 80.0, 1.0, -90.0, 30.0, 30.0, 0.0], dtype=dtype)
    for scores in (steps, steps.flip(0), steps.sort().values, -steps):
        T = torch.randn(9, 9, 3, dtype=dtype) + scores[:, None]
        with level(simd):
            for tiles in splits(9):
                check_statistics(T, tiles)


@every_level
@both_wide
@pytest.mark.parametrize("statistic", STATISTICS, ids=NAMES.values())
def test_a_statistic_alone_is_the_one_among_all(
    statistic: int, dtype: torch.dtype, simd: str
) -> None:
    T, d = 3 * torch.randn(9, 9, 5, dtype=dtype), incoming(9, 5, dtype)
    with level(simd):
        every, alone = reduce_tiles(T), reduce_tiles(T, which=statistic)
        assert alone.keys() == {"positives", NAMES[statistic]}
        for name, values in alone.items():
            assert_same_bits(values, every[name])
        ours = gradient(T, every["lse"], d, which=statistic)
    torch.testing.assert_close(ours, plain_gradient(T, d, which=statistic))


@every_level
@both_wide
def test_no_statistic_but_the_positives(dtype: torch.dtype, simd: str) -> None:
    T, d = torch.randn(9, 9, 5, dtype=dtype), incoming(9, 5, dtype)
    with level(simd):
        assert_same_bits(reduce_tiles(T, which=0)["positives"], T.diagonal().t())
        assert_same_bits(gradient(T, T[0], d, which=0), plain_gradient(T, d, which=0))


# ---- accuracy, score by score -------------------------------------------------------------------


def ulps(ours: Tensor, exact: Tensor) -> float:
    """The largest relative error in units of the last place."""
    error = (ours.double() - exact).abs() / exact.abs()
    return error.max().item() / torch.finfo(ours.dtype).eps


def ladder(low: float, high: float, dtype: torch.dtype) -> Tensor:
    """T (2, 2, 8192): each negative score, from low to high, is a row's only one."""
    T = torch.zeros(2, 2, 8192, dtype=dtype)
    T[0, 1], T[1, 0] = torch.linspace(low, high, 2 * 8192, dtype=torch.float64).view(2, -1)
    return T


@every_level
@both_wide
def test_exponential_to_two_units_in_the_last_place(dtype: torch.dtype, simd: str) -> None:
    # With lse = 0 and its gradient 1 that of T is exp(T): the error rule alone would allow more.
    T = ladder(math.log(torch.finfo(dtype).tiny) + 1e-3, 0, dtype)
    with level(simd):
        ours = gradient(T, torch.zeros_like(T[0]), torch.ones(7, *T.shape[1:]).to(dtype), which=LSE)
    assert ulps(negatives_of(ours), negatives_of(T.double().exp())) <= 2


@every_level
@both_wide
def test_softplus_and_sigmoid_to_a_few_units_in_the_last_place(
    dtype: torch.dtype, simd: str
) -> None:
    ones = torch.ones(7, 2, 8192, dtype=dtype)
    for low, high in ((-80.0, 90.0), (-1.0, 1.0), (-1e-3, 1e-3)):
        T = ladder(low, high, dtype)
        with level(simd):
            value = reduce_tiles(T, which=SOFTPLUS)["softplus"]
            slope = gradient(T, T[0], ones, which=SOFTPLUS)
        exact = softplus(negatives_of(T.double())).squeeze(1)
        assert ulps(value, exact) <= 4
        assert ulps(negatives_of(slope), negatives_of(T.double().sigmoid())) <= 4


@every_level
@both_wide
def test_the_log_sum_exp_of_one_score_is_the_score(dtype: torch.dtype, simd: str) -> None:
    T = ladder(-1e4, 1e4, dtype)
    with level(simd):
        found = reduce_tiles(T)
    assert_same_bits(found["lse"], negatives_of(T).squeeze(1))
    assert_same_bits(found["sum"], negatives_of(T).squeeze(1))
    assert_same_bits(found["clamped_lse"], clamped(negatives_of(T).squeeze(1)))
    assert ulps(found["square"], half_square(negatives_of(T.double())).squeeze(1)) <= 2


# ---- scores that are not finite -----------------------------------------------------------------


def assert_like_torch(T: Tensor, found: dict[str, Tensor]) -> None:
    for name, statistic in PLAIN.items():
        wanted = statistic.value(negatives_of(T))
        torch.testing.assert_close(found[name], wanted, equal_nan=True, msg=lambda m, n=name: n + m)


@every_level
@both_wide
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (18, 2), (4, 4)])
def test_a_score_that_is_not_finite(
    at: tuple[int, int], bad: float, dtype: torch.dtype, simd: str
) -> None:
    T, d = torch.randn(19, 19, 2, dtype=dtype), incoming(19, 2, dtype)
    T[(*at, 1)] = bad
    for tiles in splits(19):
        with level(simd):
            found = reduce_tiles(T, tiles)
            dT = gradient(T, found["lse"], d, tiles)
        assert_like_torch(T, found)
        torch.testing.assert_close(found["positives"], T.diagonal().t(), equal_nan=True)
        torch.testing.assert_close(dT, plain_gradient(T, d), equal_nan=True)


@every_level
@pytest.mark.parametrize("n", [2, 15, 70])
def test_rows_and_tiles_that_are_all_minus_infinity(n: int, simd: str) -> None:
    T, d = torch.randn(n, n, 3), incoming(n, 3, torch.float32)
    T[: n // 2] = -INF  # all images of some representations
    T[:, n // 3] = -INF  # an image
    T[:, :, 2] = -INF  # and a whole location
    for tiles in splits(n):
        with level(simd):
            found = reduce_tiles(T, tiles)
            dT = gradient(T, found["lse"], d, tiles, which=LSE | SOFTPLUS)
        assert_like_torch(T, found)
        negatives = negatives_of(dT)
        assert not negatives.isnan().any()
        assert (negatives[negatives_of(T) == -INF] == 0).all()


@every_level
@both_wide
@pytest.mark.parametrize("others", [-INF, INF])
@pytest.mark.parametrize("place", [0, 9, 18])
def test_a_nan_is_not_lost_beside_infinities(
    place: int, others: float, dtype: torch.dtype, simd: str
) -> None:
    # The row's maximum skips the NaN, and an infinite maximum makes every other term 0.
    T = torch.randn(19, 19, 2, dtype=dtype)
    T[4] = others
    T[4, place, 1] = NAN
    for tiles in splits(19):
        with level(simd):
            found = reduce_tiles(T, tiles)
        assert_like_torch(T, found)
        for name in PLAIN:
            assert found[name][4].isnan().tolist() == [False, True]


@every_level
@both_wide
@pytest.mark.parametrize("first", [INF, -INF])
def test_infinities_in_one_tile_and_numbers_in_the_next(
    first: float, dtype: torch.dtype, simd: str
) -> None:
    for where in (slice(0, 5), slice(9, 19), slice(0, 19, 2)):
        T = torch.randn(19, 19, 2, dtype=dtype)
        T[:, where] = first
        for tiles in splits(19):
            with level(simd):
                assert_like_torch(T, reduce_tiles(T, tiles))


@every_level
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800003, 0x7FFFFFFF])
def test_a_nan_of_any_payload_stays_one(bits: int, simd: str) -> None:
    # exp adds to a float's bits: a NaN's could become those of a number.
    T, d = torch.randn(19, 19, 2), incoming(19, 2, torch.float32)
    T.view(torch.int32)[9, 4, 1] = bits
    with level(simd):
        found = reduce_tiles(T)
        dT = gradient(T, found["lse"], d)
    for name in PLAIN:
        assert found[name].isnan().nonzero().tolist() == [[9, 1]]
    assert dT[9, 4, 1].isnan()


# ---- tiles of the back end ----------------------------------------------------------------------


@pytest.mark.parametrize("tile_bytes", [1, 300, 1 << 12, 1 << 20])
@pytest.mark.parametrize("tile_rows", [1, 8, 128])
def test_tiles_cover_the_scores_once(tile_rows: int, tile_bytes: int) -> None:
    for n, p in product((2, 7, 8, 9, 16, 17, 130), (1, 3, 64)):
        with limits(tile_bytes, 0, tile_rows):
            tiles = cpu._tiles(n, p, 4)
        seen = torch.zeros(n, n, dtype=torch.int64)
        for row, rows, image, images in tiles:
            assert 1 <= rows <= tile_rows
            assert images == 1 or rows * images * p * 4 <= tile_bytes
            seen[row : row + rows, image : image + images] += 1
        assert (seen == 1).all()
        # The kernels begin a row's sums at image 0; features are read once, at row 0.
        assert [tile[2] for tile in tiles] == sorted(tile[2] for tile in tiles)
        assert tiles[0] == max(tiles, key=lambda tile: (tile[1], tile[3], -tile[0], -tile[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_kept_when_asked(dtype: torch.dtype) -> None:
    z, h = features(9, 3, 5, dtype)
    operator = torch.ops.wcmi_fast.critic_stats_fwd
    kept, scores = operator(z, h, ALL, TAU, True, "cpu")
    recomputed, none = operator(z, h, ALL, TAU, False, "cpu")
    torch.testing.assert_close(scores, plain_scores(z, h))
    assert none.numel() == 0
    torch.testing.assert_close(kept, recomputed)


# ---- threads, memory ----------------------------------------------------------------------------


@every_level
@both_wide
def test_same_scores_give_the_same_bits_for_any_thread_count(dtype: torch.dtype, simd: str) -> None:
    # 28,227 scores in one tile; threads are used from 16,385 on.
    T, d = 10 * torch.randn(97, 97, 3, dtype=dtype), incoming(97, 3, dtype)
    with level(simd):
        one = reduce_tiles(T)
        dT = gradient(T, one["lse"], d)
        for threads in (2, 3):
            for name, values in reduce_tiles(T, threads=threads).items():
                assert_same_bits(values, one[name])
            assert_same_bits(gradient(T, one["lse"], d, threads=threads), dT)
    check_statistics(T, split(97, 97, 97))


@both_wide
def test_many_statistics_are_finished_by_many_threads(dtype: torch.dtype) -> None:
    T = torch.randn(3, 3, 6000, dtype=dtype)  # 18,000 of each statistic
    one = reduce_tiles(T)
    for name, values in reduce_tiles(T, threads=2).items():
        assert_same_bits(values, one[name])
    check_statistics(T, split(3, 3, 3))


def peak_mib(work: Callable[[], object]) -> float:
    """Return by how much resident memory rose at most during `work` (Linux)."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1))

    # What earlier tests freed would be used again, and no rise be seen.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


@pytest.mark.parametrize("function", [functional.dv, functional.jsd, functional.nwj])
def test_scores_are_never_stored_beyond_a_few_mib(function: Callable[..., Tensor]) -> None:
    z, h = features(1024, 16, 16)  # T is 64 MiB, h 1 MiB
    value_and_grads(function, *features(64, 16, 16))  # starts the libraries' threads and pools
    assert peak_mib(lambda: value_and_grads(function, z, h)) < 16
    assert peak_mib(lambda: plain_scores(z, h).exp()) > 64


# ---- the operators ------------------------------------------------------------------------------

OPS = torch.ops.wcmi_fast
some_statistics = pytest.mark.parametrize("which", [0, LSE, SOFTPLUS | SQUARE, ALL])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@some_statistics
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_critic_stats_forward(keep: bool, which: int, dtype: torch.dtype) -> None:
    """opcheck compares real outputs with the fake's shapes, strides and dtypes, among others."""
    z, h = features(5, 2, 3, dtype)
    torch.library.opcheck(OPS.critic_stats_fwd.default, (z, h, which, TAU, keep, "cpu"))


@every_dtype
@some_statistics
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_opcheck_critic_stats_backward(
    needed: tuple[bool, bool], keep: bool, which: int, dtype: torch.dtype
) -> None:
    z, h = features(5, 2, 3, dtype)
    stats, scores = OPS.critic_stats_fwd(z, h, which, TAU, keep, "cpu")
    dstats = [torch.rand_like(statistic) for statistic in stats]
    lse = stats[1 if which & LSE else 0]
    torch.library.opcheck(
        OPS.critic_stats_bwd.default, (dstats, z, h, lse, scores, which, *needed, "cpu")
    )


@every_dtype
@some_statistics
def test_opcheck_score_stats(which: int, dtype: torch.dtype) -> None:
    T = torch.randn(5, 5, 2).to(dtype)
    torch.library.opcheck(OPS.score_stats_fwd.default, (T, which, TAU, "cpu"))
    stats = OPS.score_stats_fwd(T, which, TAU, "cpu")
    dstats = [torch.rand_like(statistic) for statistic in stats]
    lse = stats[1 if which & LSE else 0]
    torch.library.opcheck(OPS.score_stats_bwd.default, (dstats, T, lse, which, "cpu"))


def test_an_operator_without_autograd_is_an_error() -> None:
    # torch only warns, and gives no gradient: pyproject.toml makes the warning an error.
    library = torch.library.Library("wcmi_fast_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x.detach() * 2, "CPU")
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
        torch.ops.wcmi_fast_tests.twice(x).sum().backward()
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        OPS.critic_stats_fwd(x[:, None], x[:, None, None], LSE, TAU, False, "cpu")
