"""The GPU back ends on a GPU: values, bits, streams, waiting, devices, sizes, choice and errors.

Each check takes the place where it runs. Here that is a GPU; tests/test_gpu_check.py runs the same
functions with the emulated and the interpreted back end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from networks import assert_twice_as_good_together
from oracle import (
    TAU,
    VARIANTS,
    Result,
    all_stats,
    assert_same_bits,
    bound,
    check_result,
    error_rule,
    plain_keep_best,
    plain_l2_step,
    plain_linf_start,
    plain_linf_step,
    plain_scores,
    plain_uniform,
    value_and_grads,
)
from strategies import EXTREMES, IMAGE_LAYOUTS, INFINITIES, features, lay_out, step_operands
from synchronisation import waiting_forbidden
from torch import Tensor
from torch.nn.functional import layer_norm

from wcmi_fast import PGD, functional
from wcmi_fast._ops import LSE, SUM, accumulation_dtype
from wcmi_fast.backends import registry
from wcmi_fast.backends.backend import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

IMPLS = ("cuda", "triton")
DEVICE = "cuda:0"
NARROW = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
CLIP = (0.0, 1.0)
GIB = 1 << 30


class Place(NamedTuple):
    """Where a check runs: a back end, and the device of its tensors."""

    impl: str
    device: str

    def put(self, *tensors: Tensor) -> list[Tensor]:
        return [x.to(self.device, copy=True) for x in tensors]

    @property
    def is_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


# ---- bounds -------------------------------------------------------------------------------------

# Triton compiles a kernel anew where a size is 1 or a multiple of 16.
ODD_SHAPES = [(3, 2, 5), (17, 7, 33), (66, 3, 41)]
SHAPES = [*ODD_SHAPES, (2, 1, 1), (32, 16, 64)]


def check_bound_at(place: Place, variant: str, *inputs: Tensor) -> None:
    """Apply the error rule to a bound's value and gradients; the oracle runs on the CPU."""
    found = value_and_grads(lambda *x: bound(variant, *x, impl=place.impl), *place.put(*inputs))
    ours = Result(found.value.cpu(), tuple(grad.cpu() for grad in found.grads))
    check_result(ours, variant, *inputs)


def check_every_bound(place: Place, dtype: torch.dtype) -> None:
    for variant in VARIANTS:
        check_bound_at(place, variant, *features(17, 3, 33, dtype, 0.4))


def check_odd_sizes(place: Place, dtype: torch.dtype) -> None:
    for n, p, u in SHAPES if dtype == torch.float32 else ODD_SHAPES:
        for variant in ("dv", "infonce_all"):
            check_bound_at(place, variant, *features(n, p, u, dtype, u**-0.25))


def check_layouts_of_features(place: Place, dtype: torch.dtype) -> None:
    for layout in ("offset", "sliced", "transposed"):
        z, h = features(17, 3, 33, dtype, 0.4)
        z, h = (lay_out(x, layout) for x in place.put(z, h))
        found = value_and_grads(lambda *x: bound("dv", *x, impl=place.impl), z, h)
        ours = Result(found.value.cpu(), tuple(grad.cpu() for grad in found.grads))
        check_result(ours, "dv", z.cpu(), h.cpu())


def check_large_scores(place: Place, dtype: torch.dtype) -> None:
    for variant in ("dv", "infonce", "jsd", "smile"):
        check_bound_at(place, variant, *features(17, 3, 33, dtype, 20.0))


def check_given_scores(place: Place, dtype: torch.dtype) -> None:
    for n, p in ((3, 2), (17, 7), (5, 65)):
        for variant in ("dv", "dv_zero", "jsd", "smile", "X2", "W1"):
            check_bound_at(place, variant, (2 * torch.randn(n, n, p)).to(dtype))


def check_minus_infinity(place: Place, dtype: torch.dtype) -> None:
    """Representations and whole tiles without a finite negative; positives stay finite."""
    T = torch.randn(33, 33, 2)
    T[:16, 16:] = T[20] = T[:, 5] = -INF
    T[range(33), range(33)] = torch.randn(33, 2)
    for variant in ("dv", "infonce", "infonce_all"):
        check_bound_at(place, variant, T.to(dtype))


def statistics(*inputs: Tensor, impl: str) -> list[Tensor]:
    """Every statistic of (z, h) or (scores,), on the CPU."""
    found = all_stats(*inputs, impl=impl)
    fields = (found.positives, found.lse, found.softplus, found.clamped_lse, found.sum)
    return [x.cpu() for x in (*fields, found.square)]


def check_not_finite(place: Place, dtype: torch.dtype) -> None:
    """A NaN spreads, also past infinities; -inf and +inf are those of the oracle."""
    for bad in ([NAN], [INF], [-INF], [NAN, INF], [-INF, INF]):
        T, (z, h) = torch.randn(9, 9, 3).to(dtype), features(9, 3, 5, dtype)
        z, h = z.abs() + 0.1, h.abs() + 0.1
        for k, number in enumerate(bad):
            T[1, 4 + k, 0] = T[2, 2, k] = h[6 + k, 1, 0] = number
        z[1, 0] = bad[0]
        for inputs in ((T,), (z, h)):
            ours = statistics(*place.put(*inputs), impl=place.impl)
            wanted = statistics(*inputs, impl="reference")
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_dv_value(place: Place, dtype: torch.dtype) -> None:
    """In double inside: as exact as its arguments."""
    dtype = accumulation_dtype(dtype)
    rtol = 4 * torch.finfo(dtype).eps
    for n, p, shift in ((2, 1, 0.0), (17, 5, -150.0), (33, 65, 1e4), (700, 3, 0.0)):
        positives, lse = (torch.randn(2, n, p) + shift).to(dtype)
        wide = lse.double()
        for zero in (False, True):
            value, dlse = torch.ops.wcmi_fast.dv_value(*place.put(positives, lse), zero, place.impl)
            joint = wide.logsumexp(0)
            joint = torch.logaddexp(joint, joint.new_tensor(math.log(n))) if zero else joint
            wanted = (positives.double() - joint).mean() + math.log(n * (n - 1))
            atol = 4 * torch.finfo(dtype).eps * (abs(shift) + 1)
            torch.testing.assert_close(value.cpu().double(), wanted, rtol=rtol, atol=atol)
            slopes = -(wide - joint).exp() / p
            torch.testing.assert_close(dlse.cpu().double(), slopes, rtol=1e-4, atol=1e-30)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_tf32(place: Place) -> None:
    """Operands have 11 bits: each product errs by at most 2^-9 of itself."""
    z, h = features(66, 3, 41)
    with matmul_precision("high"):
        positives, lse = statistics(*place.put(z, h), impl=place.impl)[:2]
    exact = statistics(z.double(), h.double(), impl="reference")
    allowed = plain_scores(z.abs(), h.abs()).max() * 2**-9
    assert (positives - exact[0]).abs().max() <= allowed
    assert (lse - exact[1]).abs().max() <= allowed


# ---- the critic's block -------------------------------------------------------------------------


def tail_operands(rows: int, inputs: int, units: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, inputs), (units, inputs), (units,), (units, units), (units,), (units, inputs)]
    scales = [1.0, inputs**-0.5, 0.5, units**-0.5, 0.5, inputs**-0.5]
    pairs = zip(shapes, scales, strict=True)
    return [torch.randn(shape, generator=generator).double() * scale for shape, scale in pairs]


def plain_tail(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor) -> Tensor:
    hidden = (rows @ w1.t() + b1).clamp(min=0)
    return layer_norm(hidden @ w2.t() + b2 + rows @ s.t(), (len(w2),))


def tail_results(program: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = program(*leaves)[:, : len(tensors[2])]
    weights = torch.linspace(-1, 1, found.numel()).sin().view(found.shape).to(found)
    return [found.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(found, leaves, weights))]


def check_critic_tail(place: Place, dtype: torch.dtype) -> None:
    for rows, inputs, units in ((17, 5, 33), (70, 37, 130)):
        draws = []
        for seed in range(3):
            tensors = [x.to(dtype) for x in tail_operands(rows, inputs, units, seed)]
            ours = tail_results(
                lambda *x: functional.critic_tail(*x, impl=place.impl), place.put(*tensors)
            )
            same = tail_results(plain_tail, tensors)
            draws.append((ours, same, tail_results(plain_tail, [x.double() for x in tensors])))
        assert_twice_as_good_together(draws, ["features", "rows", "w1", "b1", "w2", "b2", "s"])


# ---- the attack's updates -----------------------------------------------------------------------

STEP = {"eps": 0.1, "step_size": 0.05}


def with_extremes(x: Tensor) -> Tensor:
    extremes = torch.tensor((*EXTREMES, *INFINITIES), dtype=torch.float64).to(x.dtype)
    chosen = extremes[torch.randint(len(extremes), x.shape)]
    return torch.where(torch.rand(x.shape) < 0.2, chosen, x)


def check_linf_step(place: Place, dtype: torch.dtype) -> None:
    for size in (0, 1, 7, 8, 129, 4099):
        operands = [with_extremes(x) for x in step_operands(size, dtype=dtype)]
        x, grad, origin = place.put(*operands)
        functional.linf_step_(x, grad, origin, **STEP, clip=CLIP, impl=place.impl)
        assert_same_bits(x.cpu(), plain_linf_step(*operands, 0.1, 0.05, CLIP))
        assert_same_bits(grad.cpu(), operands[1])
        assert_same_bits(origin.cpu(), operands[2])


def check_linf_start(place: Place, dtype: torch.dtype) -> None:
    for size in (1, 5, 1023, 4099):
        for seed in (0, 1, 2**32, 2**63 - 1):
            origin = torch.rand(size).to(dtype)
            there = origin.to(place.device)
            x = torch.full_like(there, NAN)
            functional.linf_start_(x, there, eps=0.3, seed=seed, clip=CLIP, impl=place.impl)
            assert_same_bits(x.cpu(), plain_linf_start(origin, 0.3, seed, CLIP))


def check_philox_numbers(place: Place, dtype: torch.dtype) -> None:
    """The numbers themselves, and the same as the CPU's."""
    origin, everything = torch.zeros(4099, dtype=dtype), (-INF, INF)
    there = origin.to(place.device)
    x = torch.empty_like(there)
    functional.linf_start_(x, there, eps=1.0, seed=12345, clip=everything, impl=place.impl)
    assert_same_bits(x.cpu(), plain_uniform(4099, 12345).to(accumulation_dtype(dtype)).to(dtype))
    on_cpu = torch.empty_like(origin)
    functional.linf_start_(on_cpu, origin, eps=1.0, seed=12345, clip=everything)
    assert_same_bits(x.cpu(), on_cpu)


def check_l2_step(place: Place, dtype: torch.dtype) -> None:
    for rows, size in ((1, 1), (3, 17), (2, 2049), (5, 40), (2, 5000)):
        operands = step_operands(rows, size, dtype=dtype)
        operands[1][0] = 0
        x, grad, origin = place.put(*operands)
        functional.l2_step_(x, grad, origin, eps=0.5, step_size=0.3, clip=CLIP, impl=place.impl)
        plain = plain_l2_step(*operands, 0.5, 0.3, CLIP)
        exact = plain_l2_step(*(t.double() for t in operands), 0.5, 0.3, CLIP)
        error_rule("l2_step_", x.cpu(), plain, exact, 2.0)


def check_l2_step_of_nan(place: Place, dtype: torch.dtype) -> None:
    """A row with a NaN gradient stays; an infinite gradient is a unit vector."""
    x, grad, origin = place.put(*step_operands(3, 2049, dtype=dtype))
    before = x.clone()
    grad[1, 7], grad[1, 8], grad[2, 5] = NAN, INF, -INF
    functional.l2_step_(x, grad, origin, eps=500.0, step_size=0.25, clip=(-9, 9), impl=place.impl)
    assert_same_bits(x[1], before[1])
    moved = (x[2].double() - before[2].double()).cpu()
    assert moved[5].item() == pytest.approx(-0.25, abs=0.02)
    moved[5] = 0
    assert (moved == 0).all()


def check_keep_best(place: Place, dtype: torch.dtype) -> None:
    for shape in ((1, 1), (3, 7), (17, 129), (5, 40_000)):
        best_x, x = torch.randn(2, *shape).to(dtype)
        best, value = torch.randn(2, shape[0]).to(dtype)
        best[::3], value[::4], value[1:2] = NAN, NAN, INF
        wanted_x, wanted_value = plain_keep_best(best_x, best, x, value)
        best_x, best, x, value = place.put(best_x, best, x, value)
        functional.keep_best_(best_x, best, x, value, impl=place.impl)
        assert_same_bits(best_x.cpu(), wanted_x)
        assert_same_bits(best.cpu(), wanted_value)


def check_layouts_of_images(place: Place, dtype: torch.dtype) -> None:
    for of_x in IMAGE_LAYOUTS:
        for of_rest in ("contiguous", "channels_last", "sliced"):
            operands = step_operands(3, 4, 5, 6, dtype=dtype)
            x, grad, origin = place.put(*operands)
            x, grad, origin = lay_out(x, of_x), lay_out(grad, of_rest), lay_out(origin, of_rest)
            strides = x.stride()
            functional.linf_step_(x, grad, origin, **STEP, impl=place.impl)
            assert_same_bits(x.cpu(), plain_linf_step(*operands, 0.1, 0.05, CLIP))
            functional.linf_start_(x, origin, eps=0.1, seed=3, impl=place.impl)
            assert_same_bits(x.cpu(), plain_linf_start(operands[2], 0.1, 3, CLIP))
            assert x.stride() == strides


CHECKS: dict[str, Callable[[Place, torch.dtype], None]] = {
    "every_bound": check_every_bound,
    "odd_sizes": check_odd_sizes,
    "layouts_of_features": check_layouts_of_features,
    "large_scores": check_large_scores,
    "given_scores": check_given_scores,
    "minus_infinity": check_minus_infinity,
    "not_finite": check_not_finite,
    "dv_value": check_dv_value,
    "critic_tail": check_critic_tail,
    "linf_step_": check_linf_step,
    "linf_start_": check_linf_start,
    "philox_numbers": check_philox_numbers,
    "l2_step_": check_l2_step,
    "l2_step_of_nan": check_l2_step_of_nan,
    "keep_best_": check_keep_best,
    "layouts_of_images": check_layouts_of_images,
}


# ---- how operators run --------------------------------------------------------------------------


class Operation(NamedTuple):
    """An operator: its operands, made on the CPU, and a call that leaves them as they are."""

    operands: Callable[[torch.dtype], Sequence[Tensor]]
    call: Callable[..., Sequence[Tensor]]


def _with_gradients(stats: functional.CriticStats, *leaves: Tensor) -> list[Tensor]:
    values = [stats.positives, stats.lse, stats.softplus, stats.sum, stats.square]
    return [*values, *torch.autograd.grad(values, leaves, [x.detach() for x in values])]


def _critic_stats(impl: str, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return _with_gradients(all_stats(*leaves, impl=impl), *leaves)


def _dv(impl: str, z: Tensor, h: Tensor) -> Sequence[Tensor]:
    found = value_and_grads(lambda *x: functional.dv(*x, impl=impl), z, h)
    return [found.value, *found.grads]


def _critic_tail(impl: str, *inputs: Tensor) -> Sequence[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = functional.critic_tail(*leaves, impl=impl)
    return [found, *torch.autograd.grad(found, leaves, found.detach())]


def _changed(step: Callable[..., Any], x: Tensor, *rest: Tensor, **options: Any) -> list[Tensor]:
    x = x.clone()
    step(x, *rest, **options)
    return [x]


def _keep_best(impl: str, best_x: Tensor, best: Tensor, x: Tensor, value: Tensor) -> list[Tensor]:
    best_x, best = best_x.clone(), best.clone()
    functional.keep_best_(best_x, best, x, value, impl=impl)
    return [best_x, best]


OPERATIONS = {
    "critic_stats": Operation(lambda dtype: features(18, 3, 41, dtype, 0.4), _critic_stats),
    "score_stats": Operation(lambda dtype: [torch.randn(17, 17, 7).to(dtype)], _critic_stats),
    "dv_value": Operation(lambda dtype: features(17, 7, 33, dtype, 0.4), _dv),
    "critic_tail": Operation(
        lambda dtype: [x.to(dtype) for x in tail_operands(19, 37, 33)], _critic_tail
    ),
    "linf_step_": Operation(
        lambda dtype: step_operands(5, 999, dtype=dtype),
        lambda impl, *x: _changed(functional.linf_step_, *x, **STEP, impl=impl),
    ),
    "linf_start_": Operation(
        lambda dtype: step_operands(5, 999, dtype=dtype)[1:],
        lambda impl, *x: _changed(functional.linf_start_, *x, eps=0.1, seed=7, impl=impl),
    ),
    "l2_step_": Operation(
        lambda dtype: step_operands(5, 999, dtype=dtype),
        lambda impl, *x: _changed(functional.l2_step_, *x, **STEP, impl=impl),
    ),
    "keep_best_": Operation(
        lambda dtype: [torch.randn(shape).to(dtype) for shape in ((5, 99), 5, (5, 99), 5)],
        _keep_best,
    ),
}


def assert_all_same_bits(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_bits(ours.detach().cpu(), theirs.detach().cpu())


def check_determinism(operator: str, place: Place, dtype: torch.dtype) -> None:
    operation = OPERATIONS[operator]
    operands = place.put(*operation.operands(dtype))
    wanted = operation.call(place.impl, *operands)
    for _ in range(3):
        assert_all_same_bits(operation.call(place.impl, *operands), wanted)


@contextmanager
def late_side_stream(place: Place) -> Iterator[None]:
    """Run on a stream that has tens of milliseconds to do before; on a CPU just run."""
    if not place.is_gpu:
        yield
        return
    side, current = torch.cuda.Stream(place.device), torch.cuda.current_stream(place.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        yield
    current.wait_stream(side)


def check_stream(operator: str, place: Place, dtype: torch.dtype) -> None:
    """Operands that a side stream writes late are read after that, not before."""
    operation = OPERATIONS[operator]
    operands = place.put(*operation.operands(dtype))
    wanted = operation.call(place.impl, *operands)
    late = [torch.full_like(x, NAN) for x in operands]
    with late_side_stream(place):
        for x, there in zip(late, operands, strict=True):
            x.copy_(there)
        found = operation.call(place.impl, *late)
    assert_all_same_bits(found, wanted)


@contextmanager
def no_waiting(place: Place) -> Iterator[None]:
    """Raise where the host waits for the device; on a CPU, where it would wait for a GPU."""
    if not place.is_gpu:
        with waiting_forbidden():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_no_waiting(operator: str, place: Place, dtype: torch.dtype) -> None:
    operation = OPERATIONS[operator]
    operands = place.put(*operation.operands(dtype))
    wanted = operation.call(place.impl, *operands)
    with no_waiting(place):
        found = operation.call(place.impl, *operands)
    assert_all_same_bits(found, wanted)


def check_other_device(operator: str, place: Place, other: str) -> None:
    """Tensors of a device that is not the current one; the current one stays."""
    operation = OPERATIONS[operator]
    operands = operation.operands(torch.float32)
    wanted = operation.call(place.impl, *place.put(*operands))
    before = torch.cuda.current_device() if place.is_gpu else None
    found = operation.call(place.impl, *(x.to(other) for x in operands))
    assert all(x.device == torch.device(other) for x in found)
    assert (torch.cuda.current_device() if place.is_gpu else None) == before
    assert_all_same_bits(found, wanted)


# ---- sizes --------------------------------------------------------------------------------------


def windows(count: int) -> list[slice]:
    """The first, middle and last elements, from multiples of 4 on."""
    starts = (0, count // 2 // 4 * 4, (count - 64) // 4 * 4)
    return [slice(start, min(start + 68, count)) for start in starts]


def check_many_elements(place: Place, count: int) -> None:
    """Updates of `count` elements of float16."""
    x, grad, origin = (
        torch.empty(count, dtype=torch.float16, device=place.device).uniform_() for _ in range(3)
    )
    grad -= 0.5
    before = [[t[part].cpu().clone() for t in (x, grad, origin)] for part in windows(count)]
    functional.linf_step_(x, grad, origin, **STEP, impl=place.impl)
    for part, operands in zip(windows(count), before, strict=True):
        assert_same_bits(x[part].cpu(), plain_linf_step(*operands, 0.1, 0.05, CLIP))
    functional.linf_start_(x, origin.zero_(), eps=1.0, seed=9, clip=(-2, 2), impl=place.impl)
    for part in windows(count):
        numbers = plain_uniform(part.stop - part.start, 9, first=part.start)
        assert_same_bits(x[part].cpu(), numbers.half())
    best, value = torch.zeros(1, device=place.device), torch.ones(1, device=place.device)
    functional.keep_best_(grad[None], best, x[None], value, impl=place.impl)
    for part in windows(count):
        assert_same_bits(grad[part], x[part])
    wanted = x[windows(count)[-1]].cpu().clone()
    functional.l2_step_(
        x[None], grad.zero_()[None], origin[None], eps=1e9, step_size=0.1, clip=(-0.5, 0.5),
        impl=place.impl,
    )  # fmt: skip
    assert_same_bits(x[windows(count)[-1]].cpu(), wanted.clamp(-0.5, 0.5))


def check_many_features(place: Place, n: int, p: int, u: int) -> None:
    """The last locations of h (n, p, u) are as they are alone."""
    which, ops = LSE | SUM, torch.ops.wcmi_fast
    z = torch.randn(n, u, dtype=torch.float16, device=place.device)
    h = torch.empty(n, p, u, dtype=torch.float16, device=place.device).normal_()

    def run(part: Tensor) -> tuple[Tensor, Tensor]:
        stats, scores = ops.critic_stats_fwd(z, part, which, TAU, False, place.impl)
        d = list(torch.ones_like(stats))
        _, dh = ops.critic_stats_bwd(d, z, part, stats[1], scores, which, False, True, place.impl)
        return stats[:, :, -2:].cpu(), dh[:, -2:].float().cpu()

    torch.testing.assert_close(run(h), run(h[:, -2:].contiguous()), rtol=1e-2, atol=1e-2)


# ---- the whole, the choice, errors --------------------------------------------------------------


def check_attack_as_a_graph(device: str) -> None:
    """Captured and replayed, also on other images, as the plain loop makes them."""
    weight = torch.randn(48, 5, device=device)

    def loss_fn(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).square().sum(1)

    for keep in ("last", "best"):
        plain = PGD(eps=0.1, step_size=0.03, steps=10, keep=keep)
        graph = PGD(eps=0.1, step_size=0.03, steps=10, keep=keep, cuda_graph=True)
        for _ in range(3):
            x = torch.rand(4, 3, 4, 4, device=device)
            assert_same_bits(graph.attack(loss_fn, x), plain.attack(loss_fn, x))


def check_compiled(place: Place) -> None:
    z, h = place.put(*features(17, 7, 33, scale=0.4))
    function = torch.compile(
        lambda *x: functional.dv(*x, impl=place.impl) + 1, fullgraph=True, backend="aot_eager"
    )
    found = value_and_grads(function, z, h)
    wanted = value_and_grads(lambda *x: functional.dv(*x, impl=place.impl) + 1, z, h)
    assert_all_same_bits([found.value, *found.grads], [wanted.value, *wanted.grads])


def check_autotuned(place: Place) -> None:
    """With WCMI_FAST_AUTOTUNE=1 every configuration is run, and the fastest one is right."""
    check_bound_at(place, "dv", *features(130, 3, 72, torch.bfloat16, 0.3))


def check_dispatch() -> None:
    """impl=None follows the table, and goes on where a back end cannot."""

    def chosen(operator: str, dtype: torch.dtype = torch.float32, **sizes: int) -> str:
        case = Case("cuda", torch.device("cuda", 0), dtype, **sizes)
        return registry.choose("check_dispatch", operator, case, None)

    limit = int(registry.TABLE["cuda"]["critic_stats"][0].products)
    assert chosen("critic_stats", units=64, products=limit) == "cuda"
    assert chosen("critic_stats", units=64, products=limit + 1) == "triton"
    assert chosen("critic_stats", units=2048, products=limit) == "triton"
    assert chosen("critic_stats", torch.float64, units=64, products=limit + 1) == "cuda"
    assert chosen("critic_stats", torch.float64, units=2048, products=limit) == "reference"
    assert chosen("critic_tail", units=64, products=limit) == "triton"
    assert chosen("critic_tail", torch.float64, units=64, products=limit) == "reference"
    for operator in ("dv_value", "score_stats", "linf_step_", "l2_step_", "keep_best_"):
        assert chosen(operator) == "cuda"


def check_errors(place: Place) -> None:
    x, other = torch.rand(4, 3, device=place.device), "cpu" if place.is_gpu else "meta"
    where, away = x.device, torch.empty(4, 3, device=other)
    with pytest.raises(ValueError, match=f"linf_step_: grad is on {other}, wanted x's, {where}"):
        functional.linf_step_(x, away, x, **STEP, impl=place.impl)
    with pytest.raises(ValueError, match=f"dv: h is on {other}, wanted z's device, {where}"):
        functional.dv(x, away, impl=place.impl)
    with pytest.raises(ValueError, match=f"keep_best_: value is on {other}, wanted"):
        functional.keep_best_(x, x[:, 0].clone(), x.clone(), away[:, 0], impl=place.impl)
    wrong = "cpu" if place.is_gpu else "cuda"
    with pytest.raises(RuntimeError, match=f"impl='{wrong}' cannot be honoured"):
        functional.dv(x, x.clone(), impl=wrong)
    if place.impl.startswith("triton"):
        wide, sentence = x.double(), "its kernels take float32, bfloat16 and float16"
    else:
        wide, sentence = x.repeat(1, 1000), "its kernel takes U up to"
    with pytest.raises(RuntimeError, match=f"cannot be honoured: {sentence}"):
        functional.dv(wide, wide.clone(), impl=place.impl)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """The GPU, with the back end that the test is for."""
    return gpu(request.param)


def gpu(impl: str) -> Place:
    if missing := registry.BACKENDS[impl].missing:
        pytest.skip(missing)
    return Place(impl, DEVICE)


def skip_if_unsupported(impl: str, operator: str, dtype: torch.dtype) -> None:
    known = registry.BACKENDS[impl]
    if operator in OPERATIONS and operator not in known.operators:
        pytest.skip(f"{impl} has no kernel for {operator}")
    if dtype == torch.float64 and impl.startswith("triton"):
        pytest.skip(f"{impl} has no kernels for float64")


def skip_if_memory_lacks(needed: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")


every_place = pytest.mark.parametrize("place", IMPLS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
every_operator = pytest.mark.parametrize("operator", OPERATIONS)


@every_place
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_values(name: str, dtype: torch.dtype, place: Place) -> None:
    skip_if_unsupported(place.impl, name, dtype)
    CHECKS[name](place, dtype)


@every_place
@every_dtype
@every_operator
def test_two_runs_give_the_same_bits(operator: str, dtype: torch.dtype, place: Place) -> None:
    skip_if_unsupported(place.impl, operator, dtype)
    check_determinism(operator, place, dtype)


@every_place
@every_operator
def test_the_current_stream_is_used(operator: str, place: Place) -> None:
    skip_if_unsupported(place.impl, operator, torch.float32)
    check_stream(operator, place, torch.float32)


@every_place
@every_operator
def test_the_host_does_not_wait(operator: str, place: Place) -> None:
    for dtype in NARROW:
        skip_if_unsupported(place.impl, operator, dtype)
        check_no_waiting(operator, place, dtype)


@every_place
@every_operator
def test_the_tensors_device_is_used(operator: str, place: Place) -> None:
    skip_if_unsupported(place.impl, operator, torch.float32)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check_other_device(operator, place, "cuda:1")


@every_place
def test_more_than_2_to_the_31_elements(place: Place) -> None:
    skip_if_memory_lacks(24 * GIB)
    check_many_elements(place, 2**31 + 11)


@every_place
def test_more_than_2_to_the_31_features(place: Place) -> None:
    skip_if_memory_lacks(24 * GIB)
    check_many_features(place, 16, 2**21 + 8, 64)


@every_place
def test_tf32(place: Place) -> None:
    check_tf32(place)


def test_an_attack_as_a_graph() -> None:
    check_attack_as_a_graph(DEVICE)


@every_place
def test_compiles_as_one_graph(place: Place) -> None:
    check_compiled(place)


def test_autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WCMI_FAST_AUTOTUNE", "1")
    check_autotuned(gpu("triton"))


def test_dispatch() -> None:
    for impl in IMPLS:
        gpu(impl)
    check_dispatch()


@every_place
def test_errors_are_one_sentence(place: Place) -> None:
    check_errors(place)
