"""dv and its operators: values, gradients, invariances, types, transforms, memory, bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracle import (
    DTYPES,
    EAGER_IMPLS,
    binary,
    check_dv,
    error_rule,
    level,
    limits,
    loop_dv,
    plain_dv,
    value_and_grads,
)
from strategies import DvCase, dv_cases
from torch import Tensor

from wcmi_fast import functional
from wcmi_fast.backends import cpu

DIAGONALS = ("exclude", "zero")
both_impls = pytest.mark.parametrize("impl", EAGER_IMPLS)
both_diagonals = pytest.mark.parametrize("diagonal", DIAGONALS)
INF, NAN = float("inf"), float("nan")


def features(
    n: int, p: int, u: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    z, h = torch.randn(n, u) + 0.5, torch.randn(n, p, u) - 0.25
    return (z * scale).to(dtype), (h * scale).to(dtype)


def from_scores(T: Tensor) -> tuple[Tensor, Tensor]:
    """z and h whose scores are T (N, N)."""
    return torch.eye(T.shape[0], dtype=T.dtype), T.t().contiguous()


# ---- values and gradients -----------------------------------------------------------------------


@both_diagonals
def test_plain_program_agrees_with_loops(diagonal: str) -> None:
    z, h = features(5, 3, 4, torch.float64)
    wanted = loop_dv(z.tolist(), h.tolist(), diagonal)
    assert plain_dv(z, h, diagonal).item() == pytest.approx(wanted, rel=1e-13)


@settings(max_examples=150)
@given(case=dv_cases())
def test_cpu_follows_the_error_rule(case: DvCase) -> None:
    with limits(case.tile_bytes, case.kept_bytes), level(case.level):
        check_dv(case.z, case.h, case.diagonal, "cpu")


@settings(max_examples=40)
@given(case=dv_cases())
def test_reference_follows_the_error_rule(case: DvCase) -> None:
    check_dv(case.z, case.h, case.diagonal, "reference")


@both_impls
@both_diagonals
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_diagonal(dtype: torch.dtype, diagonal: str, impl: str) -> None:
    check_dv(*features(33, 5, 7, dtype), diagonal, impl)


def test_default_impl_is_the_kernel_and_default_diagonal_excludes() -> None:
    z, h = features(17, 3, 5)
    torch.testing.assert_close(
        functional.dv(z, h), functional.dv(z, h, diagonal="exclude", impl="cpu"), rtol=0, atol=0
    )


@both_impls
@both_diagonals
@pytest.mark.parametrize("kept_bytes", [0, 4 << 20])
def test_gradcheck(diagonal: str, impl: str, kept_bytes: int) -> None:
    z, h = features(5, 3, 4, torch.float64)
    with limits(2 * 5 * 3 * 8, kept_bytes):
        assert torch.autograd.gradcheck(
            lambda a, b: functional.dv(a, b, diagonal=diagonal, impl=impl),
            (z.requires_grad_(), h.requires_grad_()),
        )


@both_impls
@pytest.mark.parametrize("kept_bytes", [0, 4 << 20])
@pytest.mark.parametrize("only", ["z", "h"])
def test_gradient_of_one_side_only(only: str, kept_bytes: int, impl: str) -> None:
    z, h = features(17, 3, 5)
    wanted = value_and_grads(lambda a, b: plain_dv(a, b, "exclude"), z.double(), h.double())
    leaf = (z if only == "z" else h).requires_grad_()
    with limits(1 << 10, kept_bytes):
        functional.dv(z, h, impl=impl).backward()
    exact = wanted.dz if only == "z" else wanted.dh
    torch.testing.assert_close(leaf.grad, exact.float(), rtol=1e-4, atol=1e-7)
    assert (h if only == "z" else z).grad is None


@both_impls
def test_gradient_goes_through_the_callers_graph(impl: str) -> None:
    images, encoder = torch.randn(9, 6), torch.randn(6, 4, requires_grad=True)

    def loss(bound: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        z = torch.tanh(images @ encoder)
        return -3 * bound(z, z[:, None].expand(9, 2, 4) ** 2)

    (ours,) = torch.autograd.grad(loss(lambda a, b: functional.dv(a, b, impl=impl)), encoder)
    (wanted,) = torch.autograd.grad(loss(lambda a, b: plain_dv(a, b, "exclude")), encoder)
    torch.testing.assert_close(ours, wanted)


def test_backward_twice_over_a_retained_graph_gives_the_same() -> None:
    z, h = features(17, 3, 5)
    z.requires_grad_()
    value = functional.dv(z, h, impl="cpu")
    first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_inputs_are_left_as_they_were() -> None:
    z, h = features(17, 3, 5)
    before = z.clone(), h.clone()
    value_and_grads(lambda a, b: functional.dv(a, b, impl="cpu"), z, h)
    assert torch.equal(z, before[0])
    assert torch.equal(h, before[1])


@both_impls
def test_a_feature_changed_before_backward_is_an_error(impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(5, 2, 3))
    value = functional.dv(z, h, impl=impl)
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- what the bound is --------------------------------------------------------------------------


@both_impls
@both_diagonals
def test_known_scores(diagonal: str, impl: str) -> None:
    # Positives 1 and 4, negatives 2 and 3: by hand.
    T = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    extra = 2.0 if diagonal == "zero" else 0.0
    wanted = 2.5 - math.log((math.exp(2) + math.exp(3) + extra) / 2)
    value = functional.dv(*from_scores(T), diagonal=diagonal, impl=impl)
    assert value.item() == pytest.approx(wanted, rel=1e-13)


@both_impls
def test_who_is_paired_with_whom_matters(impl: str) -> None:
    z, h = features(7, 2, 3, torch.float64)
    value = functional.dv(z, h, impl=impl).item()
    assert abs(functional.dv(z.roll(1, 0), h, impl=impl).item() - value) > 1e-3
    one_image_flipped = torch.cat([h[:1].flip(1), h[1:]])
    assert abs(functional.dv(z, one_image_flipped, impl=impl).item() - value) > 1e-3
    # Locations are averaged: each alone is the bound at P = 1, where z and h may change places.
    alone = [functional.dv(h[:, p], z, impl=impl).item() for p in range(2)]
    assert value == pytest.approx(sum(alone) / 2, rel=1e-12)


@both_impls
def test_gradients_tell_z_from_h(impl: str) -> None:
    z, h = features(7, 1, 7, torch.float64)
    ours = value_and_grads(lambda a, b: functional.dv(a, b, impl=impl), z, h)
    wanted = value_and_grads(lambda a, b: plain_dv(a, b, "exclude"), z, h)
    torch.testing.assert_close(ours.dz, wanted.dz)
    assert (ours.dz - wanted.dh[:, 0]).abs().max() > 1e-2


@both_impls
@pytest.mark.parametrize("constant", [-150.0, 1.0, 100.0, 1e4])
def test_a_constant_added_to_every_score_changes_nothing(impl: str, constant: float) -> None:
    z, h = features(33, 3, 7)
    augmented = (
        torch.cat([z, torch.ones(33, 1)], dim=1),
        torch.cat([h, torch.full((33, 3, 1), constant)], dim=2),
    )
    plain = [value_and_grads(lambda a, b: plain_dv(a, b, "exclude"), *augmented)]
    exact = value_and_grads(lambda a, b: plain_dv(a, b, "exclude"), z.double(), h.double())
    ours = value_and_grads(lambda a, b: functional.dv(a, b, impl=impl), *augmented)
    error_rule("value", ours.value, plain[0].value, exact.value, abs(constant))
    error_rule("dz", ours.dz[:, :-1], plain[0].dz[:, :-1], exact.dz, 1e-2 * abs(constant))
    check_dv(*augmented, "exclude", impl)


@both_impls
@both_diagonals
def test_permuting_pairs_together_changes_nothing(diagonal: str, impl: str) -> None:
    z, h = features(33, 3, 7, torch.float64)
    order = torch.randperm(33)
    with limits(4 * 33 * 3 * 8, 0):
        before = functional.dv(z, h, diagonal=diagonal, impl=impl).item()
        after = functional.dv(z[order], h[order], diagonal=diagonal, impl=impl).item()
    assert after == pytest.approx(before, rel=1e-12)


@both_impls
@pytest.mark.parametrize(
    ("constant", "printed"), [(0.0, "-0.0078"), (-10.0, "-5.2"), (7.0, "-7.2e-06")]
)
def test_constant_critic(constant: float, printed: str, impl: str) -> None:
    z, h = torch.ones(128, 1, dtype=torch.float64), torch.full((128, 2, 1), constant).double()
    assert functional.dv(z, h, impl=impl).item() == pytest.approx(0.0, abs=1e-12)
    # spec.md, "The authors' masking slip": N terms exp(0) beside N(N - 1) terms exp(c).
    zero = functional.dv(z, h, diagonal="zero", impl=impl).item()
    assert zero == pytest.approx(-math.log(1 + math.exp(-constant) / 127), rel=1e-10)
    assert f"{zero:.2g}" == printed


@both_impls
@both_diagonals
@pytest.mark.parametrize("score", [-150.0, 150.0])
@pytest.mark.parametrize("n", [2, 17, 70])
def test_scores_of_150_stay_finite(n: int, score: float, diagonal: str, impl: str) -> None:
    # Every score, so that whole tiles and rows are far from the diagonal's 0 and from -inf.
    z, h = torch.ones(n, 1), torch.full((n, 2, 1), score)
    with limits(1, 0):
        got = value_and_grads(lambda a, b: functional.dv(a, b, diagonal=diagonal, impl=impl), z, h)
    assert all(part.isfinite().all() for part in got)
    slip = math.log1p(math.exp(-score) / (n - 1)) if diagonal == "zero" else 0.0
    assert got.value.item() == pytest.approx(-slip, abs=1e-4)
    check_dv(z, h, diagonal, impl)


@both_impls
def test_mixed_scores_of_150(impl: str) -> None:
    T = torch.where(torch.rand(33, 33) < 0.5, 150.0, -150.0)
    check_dv(*from_scores(T), "exclude", impl)
    check_dv(*from_scores(T), "zero", impl)


# ---- scores that are not finite -----------------------------------------------------------------


@both_impls
@both_diagonals
@pytest.mark.parametrize(("bad", "value"), [(NAN, NAN), (INF, NAN), (-INF, -INF)])
def test_a_feature_that_is_not_finite(bad: float, value: float, diagonal: str, impl: str) -> None:
    """NaN gives NaN. An image's +inf (-inf) scores are its positive, too: inf - inf, or -inf."""
    z, h = torch.rand(19, 1) + 0.1, torch.rand(19, 2, 1)
    h[3, 1] = bad
    got = functional.dv(z, h, diagonal=diagonal, impl=impl)
    torch.testing.assert_close(got, torch.tensor(value), equal_nan=True)
    torch.testing.assert_close(got, plain_dv(z, h, diagonal), equal_nan=True)


def reduce_tile(T: Tensor, diagonal: str, threads: int) -> tuple[Tensor, ...]:
    """Run the binary's kernels on T (N, N, P) as one tile, with unequal incoming gradients."""
    n, p = T.shape[1:]
    code, zero = cpu.DTYPES[T.dtype], diagonal == "zero"
    tile = T.permute(1, 2, 0).reshape(n * p, n).contiguous().clone()
    positives, row_max, row_sum = torch.full((3, n, p), NAN, dtype=T.dtype).unbind()
    lse = torch.full((p,), NAN, dtype=T.dtype)
    binary().critic_stats_fwd(
        code, tile.data_ptr(), 0, n, n, p,
        positives.data_ptr(), row_max.data_ptr(), row_sum.data_ptr(), threads,
    )  # fmt: skip
    binary().critic_stats_lse(
        code, row_max.data_ptr(), row_sum.data_ptr(), n, p, zero, lse.data_ptr()
    )
    dpositives = torch.linspace(1, 2, n * p, dtype=T.dtype).view(n, p)
    dlse, grad = torch.linspace(-1, -2, p, dtype=T.dtype), torch.full_like(tile, NAN)
    binary().critic_stats_bwd(
        code, tile.data_ptr(), 0, n, n, p,
        lse.data_ptr(), dpositives.data_ptr(), dlse.data_ptr(), grad.data_ptr(), threads,
    )  # fmt: skip
    return positives, row_max, row_sum, lse, grad.view(n, p, n).permute(2, 0, 1)


def plain_tile(T: Tensor, diagonal: str) -> tuple[Tensor, Tensor, Tensor]:
    """Positives, log-sum-exp and gradient of `reduce_tile`, by torch in T's dtype."""
    n, p = T.shape[1:]
    T = T.clone().requires_grad_()
    positives = T.diagonal().t()
    same = torch.eye(n, dtype=torch.bool)[:, :, None]
    lse = T.masked_fill(same, 0.0 if diagonal == "zero" else -INF).logsumexp((0, 1))
    loss = (positives * torch.linspace(1, 2, n * p, dtype=T.dtype).view(n, p)).sum()
    loss = loss + (lse * torch.linspace(-1, -2, p, dtype=T.dtype)).sum()
    return positives.detach(), lse.detach(), torch.autograd.grad(loss, T)[0]


@both_diagonals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (18, 2), (4, 4)])
def test_kernels_on_a_score_that_is_not_finite(
    at: tuple[int, int], bad: float, dtype: torch.dtype, diagonal: str
) -> None:
    T = torch.randn(19, 19, 2, dtype=dtype)
    T[(*at, 1)] = bad
    wanted = plain_tile(T, diagonal)
    for name in binary().levels():
        with level(name):
            positives, _, _, lse, grad = reduce_tile(T, diagonal, 1)
        torch.testing.assert_close(positives, wanted[0], equal_nan=True)
        torch.testing.assert_close(lse, wanted[1], equal_nan=True)
        torch.testing.assert_close(grad[..., 0], wanted[2][..., 0])
        if at[0] == at[1] or bad == -INF:
            torch.testing.assert_close(grad[..., 1], wanted[2][..., 1])
        else:  # a NaN or +inf among the negatives: the gradient shows it, too
            assert grad[at][1].isnan()


@both_diagonals
@pytest.mark.parametrize("n", [2, 15, 70])
def test_rows_and_tiles_that_are_all_minus_infinity(n: int, diagonal: str) -> None:
    T = torch.randn(n, n, 3)
    T[:, : n // 2] = -INF  # whole rows of the tile
    T[:, :, 2] = -INF  # and a whole location
    wanted_lse = plain_tile(T, diagonal)[1]
    for name in binary().levels():
        with level(name):
            _, _, _, lse, grad = reduce_tile(T, diagonal, 1)
        torch.testing.assert_close(lse, wanted_lse)
        off_diagonal = grad[~torch.eye(n, dtype=torch.bool)]
        assert not off_diagonal.isnan().any()
        assert (off_diagonal[:, 2] == 0).all()


@both_diagonals
@pytest.mark.parametrize("others", [-INF, INF])
def test_a_nan_is_not_lost_beside_infinities(others: float, diagonal: str) -> None:
    # The row's maximum skips the NaN, and a row of maximum -inf adds nothing to the sum.
    T = torch.randn(19, 19, 2)
    T[:, 4] = others
    T[9, 4, 1] = NAN
    for name in binary().levels():
        with level(name):
            lse = reduce_tile(T, diagonal, 1)[3]
        torch.testing.assert_close(lse, plain_tile(T, diagonal)[1], equal_nan=True)
        assert lse[1].isnan()
        assert not lse[0].isnan()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800003, 0x7FFFFFFF])
def test_a_nan_of_any_payload_stays_one(bits: int) -> None:
    # exp adds to a float's bits: a NaN's could become those of a number.
    T = torch.randn(19, 19, 2)
    T.view(torch.int32)[9, 4, 1] = bits
    for name in binary().levels():
        with level(name):
            _, _, _, lse, grad = reduce_tile(T, "exclude", 1)
        assert lse.isnan().tolist() == [False, True]
        assert grad[9, 4, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponential_to_two_units_in_the_last_place(dtype: torch.dtype) -> None:
    # With lse = 0 and dlse = 1 the gradient is exp(T): the error rule alone would allow more.
    lowest = math.log(torch.finfo(dtype).tiny)
    T = torch.linspace(lowest + 1e-3, 0, 128 * 128, dtype=torch.float64).to(dtype).view(128, 128)
    grad, zeros, ones = torch.empty_like(T), torch.zeros(128, 1).to(dtype), torch.ones(1).to(dtype)
    for name in binary().levels():
        with level(name):
            binary().critic_stats_bwd(
                cpu.DTYPES[dtype], T.data_ptr(), 0, 128, 128, 1,
                zeros.data_ptr(), zeros.data_ptr(), ones.data_ptr(), grad.data_ptr(), 1,
            )  # fmt: skip
        exact = T.double().exp()
        error = ((grad.double() - exact) / exact).fill_diagonal_(0).abs().max().item()
        assert error <= 2 * torch.finfo(dtype).eps


# ---- threads, memory ----------------------------------------------------------------------------


@both_diagonals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_scores_give_the_same_bits_for_any_thread_count(
    dtype: torch.dtype, diagonal: str
) -> None:
    T = 10 * torch.randn(97, 97, 3, dtype=dtype)  # 28,227 scores; threads are used from 16,385 on
    for name in binary().levels():
        with level(name):
            one = reduce_tile(T, diagonal, 1)
            for threads in (2, 3):
                for ours, wanted in zip(reduce_tile(T, diagonal, threads), one, strict=True):
                    assert torch.equal(ours, wanted)
        for ours, wanted in zip((one[0], *one[3:]), plain_tile(T, diagonal), strict=True):
            torch.testing.assert_close(ours, wanted)


def peak_mib(work: Callable[[], object]) -> float:
    """Return by how much resident memory rose at most during `work` (Linux)."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", text).group(1))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


def test_scores_are_never_stored_beyond_a_few_mib() -> None:
    z, h = features(1024, 16, 16)  # T is 64 MiB, h 1 MiB
    value_and_grads(functional.dv, *features(64, 16, 16))  # starts the libraries' threads and pools
    assert peak_mib(lambda: value_and_grads(functional.dv, z, h)) < 16
    assert peak_mib(lambda: plain_dv(z, h, "exclude")) > 64


# ---- autograd's and torch's modes ---------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@both_impls
def test_without_gradients(impl: str, mode: Callable[[], torch.no_grad]) -> None:
    z, h = features(17, 3, 5)
    wanted = functional.dv(z, h, impl=impl)
    with mode():
        value = functional.dv(z.requires_grad_(), h, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), wanted, rtol=0, atol=1e-6)


@both_impls
def test_autocast_changes_nothing(impl: str) -> None:
    z, h = features(33, 3, 64)
    wanted = value_and_grads(lambda a, b: functional.dv(a, b, impl=impl), z, h)
    with torch.autocast("cpu", torch.bfloat16):
        value = functional.dv(z.requires_grad_(), h.requires_grad_(), impl=impl)
    assert torch.equal(value, wanted.value)
    for ours, exact in zip(torch.autograd.grad(value, (z, h)), wanted[1:], strict=True):
        assert torch.equal(ours, exact)


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    z, h = features(33, 3, 64)
    wanted = value_and_grads(lambda a, b: functional.dv(a, b, impl="cpu"), z, h)
    with torch.autocast("cpu", torch.bfloat16), limits(1 << 12, 0):
        got = value_and_grads(lambda a, b: functional.dv(a, b, impl="cpu"), z, h)
    for ours, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_second_derivative_is_an_error_and_the_reference_has_one() -> None:
    z, h = (t.double() for t in features(5, 2, 3))
    z.requires_grad_()
    # A gradient penalty: before the check it added nothing, without a word.
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='reference' has"):
        torch.autograd.grad(functional.dv(z, h, impl="cpu"), z, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda a: functional.dv(a, h, impl="reference"), z)


def test_meta_tensors_take_the_reference() -> None:
    value = functional.dv(torch.empty(4, 3, device="meta"), torch.empty(4, 2, 3, device="meta"))
    assert value.device.type == "meta"
    assert value.shape == ()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(backend: str, impl: str) -> None:
    z, h = features(17, 3, 5)
    compiled = torch.compile(
        lambda a, b: 2 * functional.dv(a.tanh(), b, impl=impl), fullgraph=True, backend=backend
    )
    ours = value_and_grads(compiled, z, h)
    wanted = value_and_grads(lambda a, b: 2 * plain_dv(a.tanh(), b, "exclude"), z, h)
    for got, exact in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, exact)


@both_impls
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_as_one_graph(impl: str) -> None:
    check_compiled("aot_eager", impl)


@both_impls
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor(impl: str) -> None:
    check_compiled("inductor", impl)


# ---- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_forward(keep: bool, dtype: torch.dtype) -> None:
    """opcheck compares real outputs with the fake's shapes, strides and dtypes, among others."""
    z, h = features(5, 2, 3, dtype)
    torch.library.opcheck(torch.ops.wcmi_fast.critic_stats_fwd.default, (z, h, True, keep))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needed: tuple[bool, bool], keep: bool, dtype: torch.dtype) -> None:
    z, h = features(5, 2, 3, dtype)
    positives, lse, scores = torch.ops.wcmi_fast.critic_stats_fwd(z, h, False, keep)
    arguments = (torch.rand_like(positives), torch.rand_like(lse), z, h, lse, scores, *needed)
    torch.library.opcheck(torch.ops.wcmi_fast.critic_stats_bwd.default, arguments)


def test_an_operator_without_autograd_is_an_error() -> None:
    # torch only warns, and gives no gradient: pyproject.toml makes the warning an error.
    library = torch.library.Library("wcmi_fast_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x.detach() * 2, "CPU")
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
        torch.ops.wcmi_fast_tests.twice(x).sum().backward()
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.ops.wcmi_fast.critic_stats_fwd(x[:, None], x[:, None, None], False, False)


# ---- real images --------------------------------------------------------------------------------


def test_real_images(data_dir: Path) -> None:
    images = np.load(data_dir / "fashion_mnist.npz")["x_test"][:48]
    x = torch.from_numpy(images).float()[:, None] / 255
    patches = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)  # (48, 49, 16)
    z = x.flatten(1) @ torch.randn(784, 16) / 28
    for diagonal in DIAGONALS:
        check_dv(z, patches, diagonal, "cpu")
        with limits(1 << 16, 0):
            check_dv(10 * z, patches, diagonal, "cpu")


# ---- bad input ----------------------------------------------------------------------------------

BAD_INPUTS = [
    ((5, 3), (6, 2, 3), ValueError, r"dv: h has N = 6, wanted z's, N = 5"),
    ((5, 3), (6, 3), ValueError, r"dv: h has N = 6, wanted z's, N = 5"),
    ((5, 3), (5, 2, 4), ValueError, r"dv: h has U = 4, wanted z's, U = 3"),
    ((5, 3), (5, 4), ValueError, r"dv: h has U = 4, wanted z's, U = 3"),
    ((1, 3), (1, 2, 3), ValueError, r"dv: z has N = 1, wanted N >= 2.*no negative pair"),
    ((0, 3), (0, 2, 3), ValueError, r"dv: z has N = 0, wanted N >= 2"),
    ((5, 3), (5, 0, 3), ValueError, r"dv: h has shape \(5, 0, 3\), wanted no empty dimension"),
    ((5, 0), (5, 2, 0), ValueError, r"dv: h has shape \(5, 2, 0\), wanted no empty dimension"),
    ((5,), (5, 2, 3), ValueError, r"dv: z has shape \(5,\), wanted \(N, U\)"),
    ((5, 2, 3), (5, 2, 3), ValueError, r"dv: z has shape \(5, 2, 3\), wanted \(N, U\)"),
    ((5, 3), (5,), ValueError, r"dv: h has shape \(5,\), wanted \(N, P, U\) or \(N, U\)"),
    ((5, 3), (5, 2, 2, 3), ValueError, r"dv: h has shape \(5, 2, 2, 3\), wanted \(N, P, U\)"),
]


@pytest.mark.parametrize(("z_shape", "h_shape", "error", "message"), BAD_INPUTS)
@both_impls
def test_bad_shapes(
    impl: str,
    z_shape: tuple[int, ...],
    h_shape: tuple[int, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        functional.dv(torch.zeros(z_shape), torch.zeros(h_shape), impl=impl)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_bad_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"dv: z has dtype {dtype}, wanted a float dtype"):
        functional.dv(torch.zeros(5, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype))
    with pytest.raises(TypeError, match=f"dv: h has dtype {dtype}, wanted z's, torch.float32"):
        functional.dv(torch.zeros(5, 3), torch.zeros(5, 3, dtype=dtype))


def test_dtypes_that_differ() -> None:
    z, h = features(5, 2, 3)
    with pytest.raises(TypeError, match=r"h has dtype torch.float64, wanted z's, torch.float32"):
        functional.dv(z, h.double())


def test_devices_that_differ() -> None:
    z, h = features(5, 2, 3)
    with pytest.raises(ValueError, match="dv: h is on meta, wanted z's device, cpu"):
        functional.dv(z, h.to("meta"))


def test_unknown_diagonal() -> None:
    with pytest.raises(ValueError, match=r"dv: diagonal is 'keep', wanted one of .*exclude.*zero"):
        functional.dv(*features(5, 2, 3), diagonal="keep")
