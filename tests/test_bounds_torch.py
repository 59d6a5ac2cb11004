"""The bounds in torch's company: graphs, second derivatives, modes, torch.compile, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_on_cpu import every_impl
from oracle import (
    STATS_NAMES,
    TAU,
    VARIANTS,
    all_stats,
    as_scores,
    bound,
    limits,
    plain_bound,
    plain_value_and_grads,
    value_and_grads,
)
from strategies import features
from torch import Tensor

from wcmi_fast import functional

all_variants = pytest.mark.parametrize("variant", VARIANTS)
both_keeps = pytest.mark.parametrize("kept_bytes", [0, 4 << 20])
# mine's gradient has a running mean in it that is held fixed, so that finite differences of the
# gradient are not its derivative: test_ema.py has mine's second derivative.
TWICE = [name for name in VARIANTS if name != "mine"]


def every_bound(*inputs: Tensor, **options: object) -> Tensor:
    """The weighted sum of all variants, each by a call of its own."""
    values = [bound(variant, *inputs, **options) for variant in VARIANTS]
    return sum((k + 1) * value for k, value in enumerate(values))


def every_bound_from_stats(z: Tensor, h: Tensor, **options: object) -> Tensor:
    stats = all_stats(z, h, **options)
    values = [bound(variant, stats=stats) for variant in VARIANTS]
    return sum((k + 1) * value for k, value in enumerate(values))


# ---- graphs -------------------------------------------------------------------------------------


@all_variants
@every_impl
def test_gradient_goes_through_the_callers_graph(impl: str, variant: str) -> None:
    images, encoder = torch.randn(9, 6), torch.randn(6, 4, requires_grad=True)

    def loss(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        z = torch.tanh(images @ encoder)
        return -3 * function(z, z[:, None].expand(9, 2, 4) ** 2)

    (ours,) = torch.autograd.grad(loss(lambda a, b: bound(variant, a, b, impl=impl)), encoder)
    plain = loss(lambda a, b: plain_bound(variant, as_scores(a, b), carrier=True))
    (wanted,) = torch.autograd.grad(plain, encoder)
    torch.testing.assert_close(ours, wanted)


@all_variants
@both_keeps
def test_backward_twice_over_a_retained_graph_gives_the_same(kept_bytes: int, variant: str) -> None:
    z, h = features(17, 3, 5)
    z.requires_grad_()
    with limits(1 << 10, kept_bytes):
        value = bound(variant, z, h, impl="cpu")
        first, second = (torch.autograd.grad(value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_impl
def test_inputs_are_left_as_they_were(impl: str) -> None:
    z, h = features(17, 3, 5)
    T = as_scores(z, h)
    before = z.clone(), h.clone(), T.clone()
    value_and_grads(lambda a, b: every_bound(a, b, impl=impl), z, h)
    value_and_grads(lambda t: every_bound(t, impl=impl), T)
    for ours, wanted in zip((z, h, T), before, strict=True):
        assert torch.equal(ours, wanted)


@every_impl
@all_variants
def test_an_input_changed_before_backward_is_an_error(variant: str, impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(5, 2, 3))
    value = bound(variant, z, h, impl=impl)
    with torch.no_grad():
        z.add_(1)
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- second derivatives -------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("variant", TWICE)
def test_gradgradcheck(variant: str, impl: str) -> None:
    z, h = (t.requires_grad_() for t in features(4, 2, 3, torch.float64, 0.5))
    T = as_scores(z, h).detach().requires_grad_()

    def of_features(a: Tensor, b: Tensor) -> Tensor:
        return bound(variant, a, b, impl=impl)

    assert torch.autograd.gradgradcheck(of_features, (z, h))
    assert torch.autograd.gradgradcheck(lambda a: of_features(a, h.detach()), (z,))
    assert torch.autograd.gradgradcheck(lambda t: bound(variant, t, impl=impl), (T,))


@every_impl
def test_gradgradcheck_of_masked_bounds_from_one_sweep(impl: str) -> None:
    mask = torch.tensor([True, True, False, True, True])
    z, h = (t.requires_grad_() for t in features(5, 2, 3, torch.float64, 0.5))
    names = {STATS_NAMES[variant] for variant in TWICE}

    def total(a: Tensor, b: Tensor) -> Tensor:
        stats = functional.critic_stats(a, b, which=names, tau=TAU, mask=mask, impl=impl)
        return sum((k + 1) * bound(variant, stats=stats) for k, variant in enumerate(TWICE))

    assert torch.autograd.gradgradcheck(total, (z, h))


@every_impl
@pytest.mark.parametrize("variant", TWICE)
def test_derivatives_where_h_depends_on_z(variant: str, impl: str) -> None:
    # gradgradcheck alone would compare the gradient of create_graph=True with itself.
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def derivatives(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        value = function(z, torch.stack([z.tanh(), z**2], 1))
        (first,) = torch.autograd.grad(value, z, create_graph=True)
        return first, torch.autograd.grad((first**2).sum(), z)[0]

    ours = derivatives(lambda a, b: bound(variant, a, b, impl=impl))
    plain = derivatives(lambda a, b: plain_bound(variant, as_scores(a, b), carrier=True))
    torch.testing.assert_close(ours, plain)


@all_variants
@every_impl
def test_create_graph_does_not_change_the_gradient(impl: str, variant: str) -> None:
    z, h = (t.requires_grad_() for t in features(9, 3, 5, torch.float64))
    T = as_scores(z, h).detach()
    T[2] = T[:, 1] = T[4:6, 4:6] = -torch.inf
    T.diagonal().copy_(torch.randn(3, 9))
    if variant in ("RKL", "W1", "X2"):  # infinite at -inf
        T = T.clamp(-3, 3)
    T.requires_grad_()
    for inputs in ((z, h), (T,)):
        value = bound(variant, *inputs, impl=impl)
        once = torch.autograd.grad(value, inputs, retain_graph=True)
        assert all(grad.isfinite().all() for grad in once)
        torch.testing.assert_close(torch.autograd.grad(value, inputs, create_graph=True), once)


@every_impl
@both_keeps
def test_a_gradient_penalty_in_float32_follows_float64(kept_bytes: int, impl: str) -> None:
    z, h = features(9, 3, 5)

    def penalty(*inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        with limits(1 << 10, kept_bytes):
            value = functional.dv(*inputs, impl=impl)
            grads = torch.autograd.grad(value, inputs, create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in grads), inputs)

    for ours, wanted in zip(penalty(z, h), penalty(z.double(), h.double()), strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


# ---- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@all_variants
@every_impl
def test_without_gradients(impl: str, variant: str, mode: Callable[[], torch.no_grad]) -> None:
    z, h = features(17, 3, 5)
    wanted = bound(variant, z, h, impl=impl)
    with mode():
        value = bound(variant, z.requires_grad_(), h, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value.clone(), wanted)


@every_impl
def test_inputs_without_gradients_give_a_value_without_a_graph(impl: str) -> None:
    for variant in VARIANTS:
        assert not bound(variant, *features(5, 2, 3), impl=impl).requires_grad


@all_variants
@every_impl
def test_autocast_changes_nothing(impl: str, variant: str) -> None:
    z, h = features(33, 3, 64, scale=0.3)
    wanted = value_and_grads(lambda a, b: bound(variant, a, b, impl=impl), z, h)
    with torch.autocast("cpu", torch.bfloat16):
        value = bound(variant, z.requires_grad_(), h.requires_grad_(), impl=impl)
    assert torch.equal(value, wanted.value)
    for ours, exact in zip(torch.autograd.grad(value, (z, h)), wanted.grads, strict=True):
        assert torch.equal(ours, exact)


@all_variants
@both_keeps
def test_autocast_around_the_backward_pass_changes_nothing(kept_bytes: int, variant: str) -> None:
    z, h = features(33, 3, 64, scale=0.3)
    wanted = plain_value_and_grads(variant, z, h)
    with torch.autocast("cpu", torch.bfloat16), limits(1 << 12, kept_bytes):
        got = value_and_grads(lambda a, b: bound(variant, a, b, impl="cpu"), z, h)
    torch.testing.assert_close(got, wanted)


@all_variants
def test_meta_tensors_take_the_reference(variant: str) -> None:
    z, h = (x.to("meta") for x in features(4, 2, 3))
    for inputs in ((z, h), (torch.empty(4, 4, 2, device="meta"),)):
        value = bound(variant, *inputs)
        assert value.device.type == "meta"
        assert value.shape == ()
        assert value.dtype == torch.float32


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(program: Callable[..., Tensor], backend: str, *inputs: Tensor) -> None:
    compiled = torch.compile(program, fullgraph=True, backend=backend)
    ours = value_and_grads(compiled, *inputs)
    torch.testing.assert_close(ours, value_and_grads(program, *inputs))


def compiled_programs(impl: str) -> Iterator[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    z, h = features(9, 3, 5)
    yield lambda a, b: every_bound(a.tanh(), b, impl=impl), (z, h)
    yield lambda t: every_bound(t.tanh(), impl=impl), (as_scores(z, h),)
    yield lambda a, b: every_bound_from_stats(a.tanh(), b, impl=impl), (z, h)


@every_impl
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_as_one_graph(impl: str) -> None:
    for program, inputs in compiled_programs(impl):
        check_compiled(program, "aot_eager", *inputs)


@every_impl
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor(impl: str) -> None:
    for program, inputs in compiled_programs(impl):
        check_compiled(program, "inductor", *inputs)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_mine_updates_its_state() -> None:
    z, h = features(9, 3, 5)
    eager, state = functional.EMAState(0.5), functional.EMAState(0.5)
    compiled = torch.compile(
        lambda a, b: functional.mine(a, b, ema_state=state), fullgraph=True, backend="aot_eager"
    )
    for sign in (1, -1, 1):
        ours = value_and_grads(compiled, z, sign * h)
        wanted = value_and_grads(lambda a, b: functional.mine(a, b, ema_state=eager), z, sign * h)
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(state.log_mean, eager.log_mean)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_mask_breaks_the_graph_and_gives_the_same() -> None:
    z, h = features(9, 3, 5)
    mask = torch.arange(9) < 6
    compiled = torch.compile(lambda a, b, m: functional.dv(a, b, mask=m), backend="aot_eager")
    torch.testing.assert_close(compiled(z, h, mask), functional.dv(z[:6], h[:6]))


# ---- threads ------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@all_variants
def test_thread_count_changes_no_bit_of_given_scores(
    threads: Callable[[int], None], variant: str
) -> None:
    T, results = torch.randn(97, 97, 3), []
    for count in (1, 2, 3):
        threads(count)
        results.append(value_and_grads(lambda t: bound(variant, t, impl="cpu"), T))
    for result in results[1:]:
        assert torch.equal(result.value, results[0].value)
        assert torch.equal(result.grads[0], results[0].grads[0])


@all_variants
@both_keeps
def test_thread_count_changes_features_bounds_by_rounding_only(
    threads: Callable[[int], None], kept_bytes: int, variant: str
) -> None:
    z, h = features(97, 3, 5, scale=0.5)
    wanted = plain_value_and_grads(variant, z, h)
    for count in (1, 2):
        threads(count)
        with limits(1 << 17, kept_bytes):
            ours = value_and_grads(lambda a, b: bound(variant, a, b, impl="cpu"), z, h)
        torch.testing.assert_close(ours, wanted)
