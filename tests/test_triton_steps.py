"""The attack's updates in Triton: bits, error rule, extremes, layouts and sizes of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    assert_same_bits,
    error_rule,
    plain_keep_best,
    plain_l2_step,
    plain_linf_start,
    plain_linf_step,
)
from strategies import (
    IMAGE_LAYOUTS,
    STEP_SIZES,
    BestCase,
    RowsCase,
    StepCase,
    best_cases,
    lay_out,
    rows_cases,
    step_cases,
    step_operands,
)
from torch import Tensor

from wcmi_fast import philox
from wcmi_fast.backends.triton import linf_start
from wcmi_fast.backends.triton.keep_best import keep_best_
from wcmi_fast.backends.triton.l2_step import l2_step_
from wcmi_fast.backends.triton.linf_start import linf_start_
from wcmi_fast.backends.triton.linf_step import linf_step_

DEVICE = triton_interpreter.enable()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# What enable() has exchanged.
uniform = linf_start.uniform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")
CLIP = (0.0, 1.0)


def run(function: Callable[..., None], *arguments: Any) -> None:
    """Call an operator on the device, as if on these tensors."""
    there = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    function(*there)
    for x, y in zip(arguments, there, strict=True):
        if x is not y:
            x.copy_(y)


def narrower(case: StepCase | RowsCase | BestCase) -> bool:
    return case.x.dtype != torch.float64


# ---- linf_step_ ---------------------------------------------------------------------------------


def check_linf_step(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    clip: tuple[float, float] = CLIP,
) -> None:
    wanted = plain_linf_step(x, grad, origin, eps, step_size, clip)
    grad_before, origin_before = grad.clone(), origin.clone()
    run(linf_step_, x, grad, origin, eps, step_size, *clip)
    assert_same_bits(x, wanted)
    assert_same_bits(grad, grad_before)
    assert_same_bits(origin, origin_before)


@settings(max_examples=60)
@given(case=step_cases().filter(narrower))
def test_linf_step_has_the_bits_of_torch(case: StepCase) -> None:
    check_linf_step(case.x, case.grad, case.origin, case.eps, case.step_size, case.clip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("eps", "step_size", "clip"), [(8 / 255, 0.01, CLIP), (1e4, 1e-3, (-INF, INF))]
)
def test_linf_step_of_every_half_precision_pixel(
    eps: float, step_size: float, clip: tuple[float, float], dtype: torch.dtype
) -> None:
    """All 65,536 bit patterns as x, then as origin, then as gradient: ties, subnormals, NaNs."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rest = torch.rand(2, every.numel()).to(dtype)
    rest[0] -= 0.5
    check_linf_step(every.clone(), rest[0], rest[1], eps, step_size, clip)
    check_linf_step(rest[1].clone(), rest[0], every, eps, step_size, clip)
    check_linf_step(rest[1].clone(), every, rest[1], eps, step_size, clip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_step_beside_a_nan(dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(67, dtype=dtype)
    x[::2] += 3
    before = x.clone()
    run(linf_step_, x, torch.full_like(x, NAN), origin, 0.01, 0.1, *CLIP)
    assert_same_bits(x, before)
    origin[5], x[7] = NAN, NAN
    check_linf_step(x, grad, origin, 0.01, 0.1)
    assert x.isnan().nonzero().flatten().tolist() == [5, 7]


def test_linf_step_beyond_the_range_of_half_precision() -> None:
    # 1e5 is inf in float16; inf times a sign of 0 would be NaN.
    x, grad, origin = step_operands(67, dtype=torch.float16)
    grad[::3] = 0
    check_linf_step(x, grad, origin, 0.1, 1e5)
    assert x.isfinite().all()


def test_linf_step_in_place_of_its_origin_and_gradient() -> None:
    x, grad, _ = (t.to(DEVICE) for t in step_operands(3000))
    wanted = plain_linf_step(x, grad, x, 0.1, 0.05, CLIP)
    linf_step_(x, grad, x, 0.1, 0.05, *CLIP)
    assert_same_bits(x, wanted)


# ---- linf_start_ --------------------------------------------------------------------------------


def check_linf_start(
    x: Tensor, origin: Tensor, eps: float, seed: int, clip: tuple[float, float] = CLIP
) -> None:
    wanted = plain_linf_start(origin, eps, seed, clip)
    run(linf_start_, x, origin, eps, seed, *clip)
    assert_same_bits(x, wanted)


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from((*STEP_SIZES, 1023, 1024, 1025, 4099)),
    eps=st.sampled_from((0.0, 1e-8, 8 / 255, 0.3, 2.0, 1e5, 3e38)),
    seed=st.integers(0, 2**63 - 1) | st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**32)),
    clip=st.sampled_from((CLIP, (-1.0, 1.0), (0.1, 0.7), (-1e4, 1e4), (-INF, INF))),
)
def test_linf_start_has_the_bits_of_the_formula(
    dtype: torch.dtype, size: int, eps: float, seed: int, clip: tuple[float, float]
) -> None:
    origin = torch.rand(size).to(dtype)
    origin[::7], origin[3::50] = 0.0, NAN
    check_linf_start(torch.full_like(origin, NAN), origin, eps, seed, clip)


@triton.jit
def _numbers(first, out, seed, N: tl.constexpr):
    counters = tl.load(first) + tl.arange(0, N)
    tl.store(out + tl.arange(0, 4 * N), uniform(counters, tl.full((), seed, tl.int64)))


@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**32 - 8, 2**40])
def test_counters_are_those_of_the_oracle_beyond_32_bits(first: int) -> None:
    seed, counters = 0x123456789ABCDEF, torch.arange(first, first + 16)
    words = [counters & philox.MASK, counters >> 32, 0 * counters, 0 * counters]
    found = philox.philox4x32(torch.stack(words, 1), (seed & philox.MASK, seed >> 32))
    out = torch.empty(64, device=DEVICE)
    kernel = _numbers if DEVICE == "cuda" else triton_interpreter.interpreted(_numbers)
    kernel[(1,)](torch.tensor(first, device=DEVICE), out, seed, N=16)
    assert torch.equal(out.cpu(), (found.flatten() >> 8).float() * 2.0**-23 - 1)


# ---- l2_step_ -----------------------------------------------------------------------------------


def check_l2_step(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    clip: tuple[float, float] = CLIP,
) -> None:
    plain = plain_l2_step(x, grad, origin, eps, step_size, clip)
    oracle = plain_l2_step(x.double(), grad.double(), origin.double(), eps, step_size, clip)
    magnitude = max(t.abs().max().item() for t in (x, origin, oracle)) + step_size
    grad_before, origin_before = grad.clone(), origin.clone()
    run(l2_step_, x, grad, origin, eps, step_size, *clip)
    error_rule("x", x, plain, oracle, magnitude)
    assert_same_bits(grad, grad_before)
    assert_same_bits(origin, origin_before)


@settings(max_examples=30)
@given(case=rows_cases().filter(narrower))
def test_l2_step_follows_the_error_rule(case: RowsCase) -> None:
    check_l2_step(case.x, case.grad, case.origin, case.eps, case.step_size, case.clip)
    low, high = torch.tensor(case.clip, dtype=case.x.dtype).tolist()
    assert low <= case.x.min()
    assert case.x.max() <= high


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_step_by_hand(dtype: torch.dtype) -> None:
    """Binary fractions, exact in every dtype, with |(3, 4)| = 5."""
    origin = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]).to(dtype)
    grad = torch.tensor([[3.0, 4.0], [-0.75, 1.0], [0.0, 2.0], [-3.0, 4.0], [0.0, 0.0]]).to(dtype)
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.625], [0.0, 1.0], [0.75, 0.5]]).to(dtype)
    run(l2_step_, x, grad, origin, 0.15625, 0.15625, *CLIP)
    assert x.tolist() == [
        [0.59375, 0.625],
        [0.40625, 0.625],
        [0.5, 0.65625],
        [0.0, 1.0],
        [0.65625, 0.5],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [9, 2047, 2049])
def test_l2_step_of_nan_and_infinite_gradients(size: int, dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(3, size, dtype=dtype)
    x[1, ::2] += 3
    grad[1, size - 1], grad[1, 3] = NAN, INF
    grad[2, 0], grad[2, size - 1] = INF, -INF
    before, limit = x.clone(), torch.zeros_like(grad[2:])
    limit[0, 0], limit[0, size - 1] = 1, -1
    wanted = x[2:].clone()
    run(l2_step_, wanted, limit, origin[2:], 0.3, 0.25, *CLIP)
    run(l2_step_, x, grad, origin, 0.3, 0.25, *CLIP)
    assert_same_bits(x[1], before[1])
    assert_same_bits(x[2:], wanted)
    check_l2_step(before[:1], grad[:1], origin[:1], 0.3, 0.25)
    assert_same_bits(x[:1], before[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 2])
def test_l2_step_makes_a_row_with_a_nan_in_x_or_origin_nan(place: int, dtype: torch.dtype) -> None:
    tensors = step_operands(3, 17, dtype=dtype)
    tensors[place][1, 16] = NAN
    run(l2_step_, *tensors, 0.1, 0.05, *CLIP)
    assert tensors[0].isnan().all(1).tolist() == [False, True, False]


def test_l2_step_puts_an_infinite_x_on_the_ball() -> None:
    x, origin = torch.full((1, 4), 0.5), torch.full((1, 4), 0.5)
    x[0, 2] = -INF
    run(l2_step_, x, torch.zeros(1, 4), origin, 0.25, 1.0, *CLIP)
    assert x.tolist() == [[0.5, 0.5, 0.25, 0.5]]


@pytest.mark.parametrize("size", [1, 100, 3000])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-126, -70, 70, 124)),
        (torch.bfloat16, (-126, -70, 70, 124)),
        (torch.float16, (-8, 12)),
    ],
    ids=str,
)
def test_the_size_of_a_gradient_does_not_matter_to_l2_step(
    size: int, dtype: torch.dtype, exponents: tuple[int, ...]
) -> None:
    """Squares of these overflow, or are zeros or subnormal; powers of two keep all bits."""
    x, grad, origin = step_operands(2, size, dtype=dtype)
    grad = grad.sign() * (1 + torch.rand(grad.shape)).to(dtype)
    wanted = x.clone()
    run(l2_step_, wanted, grad, origin, 0.3, 0.25, *CLIP)
    assert (wanted != x.clamp(*CLIP)).any(1).all()
    for exponent in exponents:
        scaled, found = torch.ldexp(grad, torch.tensor(exponent)).to(dtype), x.clone()
        run(l2_step_, found, scaled, origin, 0.3, 0.25, *CLIP)
        assert_same_bits(found, wanted)


def test_l2_step_of_subnormal_gradients() -> None:
    x, grad = torch.full((1, 2), 0.5), torch.tensor([[3.0, -4.0]]) * 2.0**-149
    run(l2_step_, x, grad, x.clone(), 1.0, 0.3125, *CLIP)
    assert (x - torch.tensor([[0.6875, 0.25]])).abs().max() <= 2 * torch.finfo(torch.float32).eps


def test_l2_step_whose_offset_has_squares_out_of_range() -> None:
    for eps, wanted in ((1e-30, 6e-31), (1.0, 6e-26)):
        x, grad = torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])
        run(l2_step_, x, grad, torch.zeros(1, 2), eps, 1e-25, -INF, INF)
        torch.testing.assert_close(x, torch.tensor([[wanted, -wanted / 0.75]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2_step_of_eps_zero_is_the_origin(dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(3, 129, dtype=dtype)
    run(l2_step_, x, grad, origin, 0.0, 0.25, *CLIP)
    assert torch.equal(x, origin)


# ---- keep_best_ ---------------------------------------------------------------------------------


def check_keep_best(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> None:
    wanted_x, wanted_value = plain_keep_best(best_x, best_value, x, value)
    x_before, value_before = x.clone(), value.clone()
    run(keep_best_, best_x, best_value, x, value)
    assert_same_bits(best_x, wanted_x)
    assert_same_bits(best_value, wanted_value)
    assert_same_bits(x, x_before)
    assert_same_bits(value, value_before)


@settings(max_examples=60)
@given(case=best_cases())
def test_keep_best_keeps_the_rows_of_the_loop(case: BestCase) -> None:
    check_keep_best(case.best_x, case.best_value, case.x, case.value)


@pytest.mark.parametrize(("value", "kept"), [(2.0, True), (1.0, False), (NAN, False)])
def test_keep_best_of_one_value_for_the_batch(value: float, kept: bool) -> None:
    best_x, best_value = torch.zeros(4, 3, 500), torch.tensor(1.5)
    run(keep_best_, best_x, best_value, torch.ones(4, 3, 500), torch.tensor(value))
    assert torch.equal(best_x, torch.full((4, 3, 500), float(kept)))
    assert best_value.item() == (value if kept else 1.5)


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_keep_best_of_many_rows(rows: int) -> None:
    check_keep_best(*(torch.randn(shape) for shape in ((rows, 1), rows, (rows, 1), rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keep_best_keeps_every_bit(dtype: torch.dtype) -> None:
    """A row is copied, not computed: NaN payloads and the signs of zeros stay."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    best_x = torch.zeros(1, patterns.numel(), dtype=dtype)
    run(keep_best_, best_x, torch.zeros(1), patterns.view(dtype)[None], torch.ones(1))
    assert torch.equal(best_x.view(torch.int16)[0], patterns)


# ---- layouts, autograd --------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "linf_step_": lambda x, grad, origin: check_linf_step(x, grad, origin, 0.1, 0.05),
    "linf_start_": lambda x, grad, origin: check_linf_start(x, origin, 0.1, 3),
    "l2_step_": lambda x, grad, origin: check_l2_step(x, grad, origin, 0.5, 0.3),
    "keep_best_": lambda x, grad, origin: check_keep_best(
        x, torch.zeros(3), grad, origin[:, 0, 0, 0]
    ),
}


@pytest.mark.parametrize("of_x", IMAGE_LAYOUTS)
@pytest.mark.parametrize("operator", CHECKS)
def test_memory_layouts(operator: str, of_x: str) -> None:
    of_rest = IMAGE_LAYOUTS[IMAGE_LAYOUTS.index(of_x) - 1]
    x, grad, origin = step_operands(3, 4, 5, 6)
    x, grad, origin = lay_out(x, of_x), lay_out(grad, of_rest), lay_out(origin, of_rest)
    strides = x.stride()
    CHECKS[operator](x, grad, origin)
    assert x.stride() == strides


@pytest.mark.parametrize("shape", [(0,), (0, 3, 8, 8), (2, 0), (1,), (5,), (1, 1, 1, 1)])
def test_empty_tensors_and_rows_of_one(shape: tuple[int, ...]) -> None:
    for step in (linf_step_, l2_step_):
        x, grad, origin = torch.full(shape, 0.5), torch.full(shape, -3.0), torch.full(shape, 0.5)
        run(step, x, grad, origin, 0.25, 0.125, *CLIP)
        assert torch.equal(x, torch.full(shape, 0.375))
    check_linf_start(torch.full(shape, NAN), torch.full(shape, 0.5), 0.25, 3)
    best_x, best_value = torch.zeros(shape), torch.zeros(shape[0])
    check_keep_best(best_x, best_value, torch.ones(shape), torch.ones(shape[0]))
    assert (best_value == 1).all()


@pytest.mark.parametrize("operator", CHECKS)
def test_autograd_sees_that_x_has_changed(operator: str) -> None:
    x, grad, origin = step_operands(3, 4, 5, 6)
    loss = (x * torch.ones(6, requires_grad=True)).sum()
    CHECKS[operator](x, grad, origin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
