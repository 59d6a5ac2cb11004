"""The bounds of wcmi_fast.functional: values, gradients, invariances, one sweep for many."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_on_cpu import assume_supported, every_impl, gpu_turns, order
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    EAGER_IMPLS,
    EXPONENTIAL,
    STATS_NAMES,
    TAU,
    VARIANTS,
    all_stats,
    as_scores,
    bound,
    check_bound,
    check_result,
    error_rule,
    level,
    limits,
    loop_bound,
    plain_bound,
    plain_value_and_grads,
    value_and_grads,
)
from strategies import BoundCase, bound_cases, features
from torch import Tensor

from wcmi_fast import functional

all_variants = pytest.mark.parametrize("variant", VARIANTS)
both_keeps = pytest.mark.parametrize("kept_bytes", [0, 4 << 20])
INF, NAN = float("inf"), float("nan")
# The value and the gradient of these are of one formula, and no state changes them.
PLAIN_GRADIENT = [name for name in VARIANTS if name not in ("smile", "mine")]
MODERATE, LARGE = (0.01, 1.0), (0.01, 1.0, 10.0, 100.0)
# The emulation makes some 100 million multiply-adds a second.
GPU_PRODUCTS = 1 << 22
cases = {name: bound_cases(MODERATE if name in EXPONENTIAL else LARGE) for name in VARIANTS}


def from_scores(T: Tensor) -> tuple[Tensor, Tensor]:
    """z and h whose scores are T (N, N, P)."""
    return torch.eye(len(T), dtype=T.dtype), T.permute(1, 2, 0).contiguous()


# ---- values and gradients -----------------------------------------------------------------------


@all_variants
def test_plain_programs_and_bounds_agree_with_loops(variant: str) -> None:
    # T is not symmetric: its columns in place of its rows would be another infonce.
    T = 2 * torch.randn(5, 5, 3, dtype=torch.float64)
    wanted = pytest.approx(loop_bound(variant, T.tolist()), rel=1e-12)
    assert plain_bound(variant, T).item() == wanted
    for impl in EAGER_IMPLS:
        assert bound(variant, T, impl=impl).item() == wanted
        assert bound(variant, *from_scores(T), impl=impl).item() == wanted


@all_variants
@settings(max_examples=60)
@given(data=st.data())
def test_kernels_follow_the_error_rule(variant: str, data: st.DataObject) -> None:
    case: BoundCase = data.draw(cases[variant])
    with limits(case.tile_bytes, case.kept_bytes, case.tile_rows), level(case.level):
        check_bound(variant, case.z, case.h, impl="cpu")


@all_variants
@gpu_turns
@settings(max_examples=5)
@given(data=st.data())
def test_gpu_back_ends_follow_the_error_rule(
    variant: str, impl: str, turn: int, data: st.DataObject
) -> None:
    case: BoundCase = data.draw(cases[variant])
    assume_supported(impl, case.z.dtype)
    assume(len(case.z) * case.h.numel() <= GPU_PRODUCTS)
    with order(impl, turn):
        check_bound(variant, case.z, case.h, impl=impl)


@all_variants
@settings(max_examples=20)
@given(data=st.data())
def test_reference_follows_the_error_rule(variant: str, data: st.DataObject) -> None:
    case: BoundCase = data.draw(cases[variant])
    check_bound(variant, case.z, case.h, impl="reference")


@all_variants
@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, impl: str, variant: str) -> None:
    z, h = features(33, 5, 7, dtype)
    check_bound(variant, z, h, impl=impl)
    value = bound(variant, z, h, impl=impl)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == ()


@all_variants
@pytest.mark.parametrize("n", [3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_tile_edges(n: int, variant: str) -> None:
    # Tiles of 8 representations by 4 images.
    z, h = features(n, 3, 5)
    with limits(min(n, 8) * 4 * 3 * 4, 0, tile_rows=8):
        check_bound(variant, z, h, impl="cpu")


def test_default_impl_is_the_kernel_and_defaults_are_those_of_the_spec() -> None:
    z, h = features(17, 3, 5)
    wanted = {
        "dv": functional.dv(z, h, diagonal="exclude", impl="cpu"),
        "infonce": functional.infonce(z, h, candidates="location", impl="cpu"),
    }
    for variant in VARIANTS:
        exact = wanted.get(variant, bound(variant, z, h, impl="cpu"))
        assert torch.equal(bound(variant, z, h), exact)


@every_impl
@both_keeps
@pytest.mark.parametrize("variant", PLAIN_GRADIENT)
def test_gradcheck(variant: str, kept_bytes: int, impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(5, 3, 4, torch.float64, 0.5))
    T = as_scores(z, h).detach().requires_grad_()
    with limits(2 * 5 * 3 * 8, kept_bytes):
        assert torch.autograd.gradcheck(lambda a, b: bound(variant, a, b, impl=impl), (z, h))
        assert torch.autograd.gradcheck(lambda t: bound(variant, t, impl=impl), (T,))


@all_variants
@every_impl
@both_keeps
def test_gradient_of_one_side_only(kept_bytes: int, impl: str, variant: str) -> None:
    z, h = features(17, 3, 5)
    with limits(1 << 10, kept_bytes):
        both = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z, h).grads
        of_z = value_and_grads(lambda a: bound(variant, a, h, impl=impl), z).grads
        of_h = value_and_grads(lambda b: bound(variant, z, b, impl=impl), h).grads
    torch.testing.assert_close((*of_z, *of_h), both)


# ---- given scores and statistics ----------------------------------------------------------------


@all_variants
@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 17, 3), (9, 9), (2, 2, 1)])
def test_given_scores(shape: tuple[int, ...], dtype: torch.dtype, impl: str, variant: str) -> None:
    T = (2 * torch.randn(shape)).to(dtype)
    with limits(5 * 17 * 3 * 4, 0):  # half types are converted 5 rows at a time
        check_bound(variant, T, impl=impl)


@all_variants
@every_impl
def test_given_scores_of_any_layout(impl: str, variant: str) -> None:
    T = torch.randn(3, 9, 9).permute(2, 1, 0)
    assert not T.is_contiguous()
    check_bound(variant, T, impl=impl)


@all_variants
@every_impl
@both_keeps
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bound_from_one_sweep(
    dtype: torch.dtype, kept_bytes: int, impl: str, variant: str
) -> None:
    z, h = features(17, 3, 5, dtype)

    def from_stats(*inputs: Tensor) -> Tensor:
        return bound(variant, stats=all_stats(*inputs, impl=impl))

    with limits(5 * 17 * 3 * 4, kept_bytes):
        check_result(value_and_grads(from_stats, z, h), variant, z, h)
        T = as_scores(z, h).to(dtype)
        check_result(value_and_grads(from_stats, T), variant, T)


@all_variants
@every_impl
def test_a_bound_needs_the_statistics_of_its_own_name_only(impl: str, variant: str) -> None:
    z, h = features(9, 3, 5)
    tau = TAU if variant == "smile" else None
    stats = functional.critic_stats(z, h, which=STATS_NAMES[variant], tau=tau, impl=impl)
    torch.testing.assert_close(bound(variant, stats=stats), bound(variant, z, h, impl=impl))


@every_impl
@both_keeps
def test_gradients_of_several_bounds_add_up(kept_bytes: int, impl: str) -> None:
    z, h = features(17, 3, 5, torch.float64)

    def total(a: Tensor, b: Tensor) -> Tensor:
        stats = all_stats(a, b, impl=impl)
        return sum((k + 1) * bound(name, stats=stats) for k, name in enumerate(VARIANTS))

    with limits(5 * 17 * 3 * 8, kept_bytes):
        ours = value_and_grads(total, z, h)
    parts = [plain_value_and_grads(name, z, h) for name in VARIANTS]
    for side in range(2):
        wanted = sum((k + 1) * part.grads[side] for k, part in enumerate(parts))
        torch.testing.assert_close(ours.grads[side], wanted, rtol=1e-10, atol=1e-12)


@every_impl
def test_statistics_are_what_their_names_say(impl: str) -> None:
    z, h = features(9, 3, 5, torch.float64)
    stats = all_stats(z, h, impl=impl)
    T, own = as_scores(z, h), torch.eye(9, dtype=torch.bool)
    negatives = T[~own].view(9, 8, 3)
    wanted = {
        "positives": T[own],
        "lse": negatives.exp().sum(1).log(),
        "softplus": negatives.exp().log1p().sum(1),
        "clamped_lse": negatives.clamp(-TAU, TAU).exp().sum(1).log(),
        "sum": negatives.sum(1),
        "square": ((negatives.abs() + 1) ** 2 / 2).sum(1),
    }
    for name, exact in wanted.items():
        torch.testing.assert_close(getattr(stats, name), exact)
    assert stats.tau == TAU


@every_impl
def test_the_clamped_statistic_has_no_gradient(impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(9, 3, 5))
    stats = all_stats(z, h, impl=impl)
    assert not stats.clamped_lse.requires_grad
    assert stats.lse.requires_grad


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def products(work: Callable[[], object]) -> int:
    """Count the matrix products that torch runs, in operators' kernels, too."""
    with torch.profiler.profile() as profile:
        work()
    return sum(event.name in PRODUCTS for event in profile.events())


@pytest.mark.parametrize("impl", EAGER_IMPLS)
@both_keeps
def test_the_scores_are_computed_once_whatever_the_number_of_bounds(
    kept_bytes: int, impl: str
) -> None:
    z, h = features(17, 3, 5)

    def every_bound(a: Tensor, b: Tensor) -> Tensor:
        stats = all_stats(a, b, impl=impl)
        return sum(bound(name, stats=stats) for name in VARIANTS)

    with limits(1 << 20, kept_bytes):
        assert products(lambda: every_bound(z, h)) == 1
        one = products(lambda: value_and_grads(lambda a, b: bound("dv", a, b, impl=impl), z, h))
        assert products(lambda: value_and_grads(every_bound, z, h)) == one
    # T, dz and dh, and T again where the kernels did not keep it.
    assert one == (4 if impl == "cpu" and kept_bytes == 0 else 3)


# ---- what the bounds are ------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("variant", ["infonce", "infonce_all"])
def test_the_candidates_are_images(variant: str, impl: str) -> None:
    T = torch.tensor([[0.0, 6.0, 5.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    rows = (T.diag() - T.logsumexp(1)).mean().item()
    assert abs((T.diag() - T.logsumexp(0)).mean().item() - rows) > 0.1
    shift = math.log(3) if variant == "infonce" else 0.0
    assert bound(variant, T, impl=impl).item() == pytest.approx(rows + shift, rel=1e-13)
    z, h = from_scores(T[:, :, None])
    assert bound(variant, z, h, impl=impl).item() == pytest.approx(rows + shift, rel=1e-13)


@all_variants
@every_impl
def test_who_is_paired_with_whom_matters(impl: str, variant: str) -> None:
    z, h = features(7, 2, 7, torch.float64)
    value = bound(variant, z, h, impl=impl).item()
    assert abs(bound(variant, z.roll(1, 0), h, impl=impl).item() - value) > 1e-4
    one_image_flipped = torch.cat([h[:1].flip(1), h[1:]])
    if variant in ("dv", "dv_zero", "infonce", "mine", "smile"):  # log-sum-exps of each location
        assert abs(bound(variant, z, one_image_flipped, impl=impl).item() - value) > 1e-4
        # Locations are averaged.
        alone = [bound(variant, z, h[:, p], impl=impl).item() for p in range(2)]
        assert value == pytest.approx(sum(alone) / 2, rel=1e-12)


@all_variants
@every_impl
def test_gradients_tell_z_from_h(impl: str, variant: str) -> None:
    z, h = features(7, 1, 7, torch.float64)
    ours = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z, h)
    wanted = plain_value_and_grads(variant, z, h)
    torch.testing.assert_close(ours.grads, wanted.grads)
    assert (ours.grads[0] - wanted.grads[1][:, 0]).abs().max() > 1e-2


SHIFT_FREE = ("dv", "infonce", "infonce_all", "mine")


@every_impl
@pytest.mark.parametrize("variant", SHIFT_FREE)
@pytest.mark.parametrize("constant", [-1e4, -150.0, 1.0, 100.0, 1e4])
def test_a_constant_added_to_every_score_changes_nothing(
    constant: float, variant: str, impl: str
) -> None:
    z, h = features(33, 3, 7)
    augmented = (
        torch.cat([z, torch.ones(33, 1)], dim=1),
        torch.cat([h, torch.full((33, 3, 1), constant)], dim=2),
    )
    plain = plain_value_and_grads(variant, *augmented)
    exact = plain_value_and_grads(variant, z.double(), h.double())
    ours = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), *augmented)
    error_rule("value", ours.value, plain.value, exact.value, abs(constant) + 10)
    if variant != "mine":  # its past mean is not shifted
        dz, plain_dz = ours.grads[0][:, :-1], plain.grads[0][:, :-1]
        error_rule("dz", dz, plain_dz, exact.grads[0], 1e-2 * abs(constant))
    if abs(constant) < 1e3 or variant != "mine":
        check_bound(variant, *augmented, impl=impl)


@all_variants
@every_impl
def test_permuting_pairs_together_permutes_gradients(impl: str, variant: str) -> None:
    z, h = features(33, 3, 7, torch.float64)
    order = torch.randperm(33)
    with limits(4 * 33 * 3 * 8, 0, tile_rows=8):
        before = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z, h)
        after = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z[order], h[order])
    assert after.value.item() == pytest.approx(before.value.item(), rel=1e-12)
    for ours, wanted in zip(after.grads, before.grads, strict=True):
        torch.testing.assert_close(ours, wanted[order], rtol=1e-10, atol=1e-13)


@every_impl
@pytest.mark.parametrize(
    ("constant", "printed"), [(0.0, "-0.0078"), (-10.0, "-5.2"), (7.0, "-7.2e-06")]
)
def test_constant_critic(constant: float, printed: str, impl: str) -> None:
    z, h = torch.ones(128, 1, dtype=torch.float64), torch.full((128, 2, 1), constant).double()
    for variant in ("dv", "infonce", "mine"):
        assert bound(variant, z, h, impl=impl).item() == pytest.approx(0.0, abs=1e-12)
    # spec.md, "The authors' masking slip": N terms exp(0) beside N(N - 1) terms exp(c).
    zero = functional.dv(z, h, diagonal="zero", impl=impl).item()
    assert zero == pytest.approx(-math.log(1 + math.exp(-constant) / 127), rel=1e-10)
    assert f"{zero:.2g}" == printed


@every_impl
def test_infonce_never_exceeds_log_n(impl: str) -> None:
    T = torch.randn(9, 9, 3) + 1e3 * torch.eye(9)[:, :, None]
    assert bound("infonce", T, impl=impl).item() == pytest.approx(math.log(9), abs=1e-6)
    assert bound("infonce_all", T, impl=impl).item() == pytest.approx(0.0, abs=1e-6)


@every_impl
@pytest.mark.parametrize(("tau", "same"), [(1e3, True), (0.5, False)])
def test_smile_clamps_negatives_only(tau: float, same: bool, impl: str) -> None:
    z, h = features(9, 3, 5, torch.float64)
    dv = functional.dv(z, h, impl=impl).item()
    assert (functional.smile(z, h, tau=tau, impl=impl).item() == pytest.approx(dv)) is same


# ---- large, small and infinite scores -----------------------------------------------------------


@all_variants
@every_impl
@pytest.mark.parametrize("score", [-150.0, 150.0])
@pytest.mark.parametrize("n", [2, 17, 70])
def test_scores_of_150(n: int, score: float, impl: str, variant: str) -> None:
    # Every score, so that whole tiles and rows are far from the diagonal's 0 and from -inf.
    z, h = torch.ones(n, 1), torch.full((n, 2, 1), score)
    plain = plain_value_and_grads(variant, z, h)
    with limits(1, 0, tile_rows=8):
        ours = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z, h)
        if plain.value.isfinite():
            check_result(ours, variant, z, h)
    if variant not in EXPONENTIAL:
        assert all(part.isfinite().all() for part in (ours.value, *ours.grads))
    if not plain.value.isfinite():  # exp(150) is no float32
        assert variant in EXPONENTIAL
        assert ours.value.item() == -INF


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in EXPONENTIAL])
@every_impl
def test_mixed_scores_of_150(impl: str, variant: str) -> None:
    T = torch.where(torch.rand(33, 33, 2) < 0.5, 150.0, -150.0)
    with limits(5 * 8 * 2 * 4, 0, tile_rows=8):
        check_bound(variant, *from_scores(T), impl=impl)
        check_bound(variant, T, impl=impl)


@all_variants
@every_impl
@pytest.mark.parametrize("at", [(3, 20), (20, 3), (8, 9)])
def test_one_dominating_score(at: tuple[int, int], impl: str, variant: str) -> None:
    T = torch.randn(33, 33, 2)
    T[(*at, 1)] = 60.0
    with limits(5 * 8 * 2 * 4, 0, tile_rows=8):
        check_bound(variant, *from_scores(T), impl=impl)
        check_bound(variant, T, impl=impl)


FINITE_AT_MINUS_INFINITY = ("dv", "dv_zero", "infonce", "infonce_all", "nwj", "jsd", "mine")


@every_impl
@pytest.mark.parametrize("variant", [*FINITE_AT_MINUS_INFINITY, "smile", "KL", "GAN", "H2"])
def test_blocks_of_minus_infinity(variant: str, impl: str) -> None:
    # Whole tiles, and representations without a finite negative; positives stay finite.
    T = torch.randn(33, 33, 2)
    T[:16, 16:] = T[20] = T[:, 5] = T[16:24, 8:12] = -INF
    T[range(33), range(33)] = torch.randn(33, 2)
    with limits(4 * 8 * 2 * 4, 0, tile_rows=8):
        check_bound(variant, T, impl=impl)


@every_impl
@pytest.mark.parametrize("variant", ["nwj", "jsd", "smile", "KL", "GAN", "H2"])
def test_a_location_without_a_finite_negative(variant: str, impl: str) -> None:
    T = torch.randn(9, 9, 3)
    T[~torch.eye(9, dtype=torch.bool), 1] = -INF
    check_bound(variant, T, impl=impl)


@every_impl
@pytest.mark.parametrize("diagonal", ["exclude", "zero"])
@pytest.mark.parametrize(("bad", "value"), [(NAN, NAN), (INF, NAN), (-INF, -INF)])
def test_a_feature_that_is_not_finite(bad: float, value: float, diagonal: str, impl: str) -> None:
    """NaN gives NaN. An image's +inf (-inf) scores are its positive, too: inf - inf, or -inf."""
    z, h = torch.rand(19, 1) + 0.1, torch.rand(19, 2, 1)
    h[3, 1] = bad
    got = functional.dv(z, h, diagonal=diagonal, impl=impl)
    torch.testing.assert_close(got, torch.tensor(value), equal_nan=True)


@all_variants
@every_impl
@pytest.mark.parametrize("at", [(3, 7), (7, 3), (4, 4)])
def test_a_nan_is_never_lost(at: tuple[int, int], impl: str, variant: str) -> None:
    T = torch.randn(19, 19, 2)
    T[(*at, 1)] = NAN
    assert bound(variant, T, impl=impl).isnan()
    z, h = from_scores(torch.randn(19, 19, 2))
    z[5, 2] = NAN
    assert bound(variant, z, h, impl=impl).isnan()


# ---- real images --------------------------------------------------------------------------------


def test_real_images(data_dir: Path) -> None:
    images = np.load(data_dir / "fashion_mnist.npz")["x_test"][:48]
    x = torch.from_numpy(images).float()[:, None] / 255
    patches = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)  # (48, 49, 16)
    z = x.flatten(1) @ torch.randn(784, 16) / 28
    for variant in VARIANTS:
        check_bound(variant, z / 4, patches, impl="cpu")
        with limits(1 << 16, 0):
            scale = 0.5 if variant in EXPONENTIAL else 10
            check_bound(variant, scale * z, patches, impl="cpu")
