"""l2_step_: error rule, ball and box, gradients of every size, levels and threads; bad input."""

from __future__ import annotations

import pytest
import torch
from gpu_on_cpu import assume_supported, every_impl, gpu_turns, order
from hypothesis import given, settings
from oracle import (
    DTYPES,
    assert_same_bits,
    binary,
    error_rule,
    level,
    plain_l2_step,
)
from strategies import IMAGE_LAYOUTS, RowsCase, lay_out, rows_cases, step_operands
from torch import Tensor

from wcmi_fast import functional

INF, NAN = float("inf"), float("nan")
CLIP = (0.0, 1.0)


def check_step(
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    clip: tuple[float, float] = CLIP,
    impl: str = "cpu",
) -> None:
    """Apply the error rule to one step, in place on `x` itself; grad and origin must stay."""
    plain = plain_l2_step(x, grad, origin, eps, step_size, clip)
    oracle = plain_l2_step(x.double(), grad.double(), origin.double(), eps, step_size, clip)
    magnitude = max(t.abs().max().item() for t in (x, origin, oracle)) + step_size
    grad_before, origin_before = grad.clone(), origin.clone()
    got = functional.l2_step_(x, grad, origin, eps=eps, step_size=step_size, clip=clip, impl=impl)
    assert got is x
    error_rule("x", x, plain, oracle, magnitude)
    assert_same_bits(grad, grad_before)
    assert_same_bits(origin, origin_before)


# ---- values -------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(case=rows_cases())
def test_error_rule_ball_and_box(case: RowsCase) -> None:
    arguments = (case.grad, case.origin, case.eps, case.step_size, case.clip)
    results = []
    for name in binary().levels():
        with level(name):
            results.append(case.x.clone())
            check_step(results[-1], *arguments)
            assert_same_bits(results[-1], results[0])
    results.append(case.x.clone())
    check_step(results[-1], *arguments, impl="reference")
    low, high = torch.tensor(case.clip, dtype=case.x.dtype).tolist()
    size, unit = case.x.shape[1], torch.finfo(case.x.dtype).eps
    for x in (results[0], results[-1]):
        assert low <= x.min()
        assert x.max() <= high
        distance = (x.double() - case.origin.double()).norm(dim=1).max().item()
        assert distance <= case.eps + size**0.5 * unit * (x.abs().max().item() + case.eps)


@gpu_turns
@settings(max_examples=15)
@given(case=rows_cases())
def test_error_rule_on_gpu_back_ends(case: RowsCase, impl: str, turn: int) -> None:
    assume_supported(impl, case.x.dtype)
    with order(impl, turn):
        check_step(case.x, case.grad, case.origin, case.eps, case.step_size, case.clip, impl)


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype: torch.dtype, impl: str) -> None:
    """Binary fractions, exact in every dtype, with |(3, 4)| = 5."""
    origin = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]).to(dtype)
    grad = torch.tensor([[3.0, 4.0], [-0.75, 1.0], [0.0, 2.0], [-3.0, 4.0], [0.0, 0.0]]).to(dtype)
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.625], [0.0, 1.0], [0.75, 0.5]]).to(dtype)
    functional.l2_step_(x, grad, origin, eps=0.15625, step_size=0.15625, impl=impl)
    # A step within the ball, another, one that is cut to the ball, to the box, and only the cut.
    assert x.tolist() == [
        [0.59375, 0.625],
        [0.40625, 0.625],
        [0.5, 0.65625],
        [0.0, 1.0],
        [0.65625, 0.5],
    ]


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_gradient_moves_nothing_inside_the_ball(dtype: torch.dtype, impl: str) -> None:
    x, grad, origin = step_operands(3, 517, dtype=dtype)
    x = x.clamp(*CLIP)
    before, grad[1] = x.clone(), 0
    functional.l2_step_(x, grad, origin, eps=100.0, step_size=1.0, impl=impl)
    assert_same_bits(x[1], before[1])
    assert (x[[0, 2]] != before[[0, 2]]).any(1).all()
    # Outside it is projected as any other row.
    functional.l2_step_(x, torch.zeros_like(x), origin, eps=0.25, step_size=1.0, impl=impl)
    distances = (x.double() - origin.double()).norm(dim=1)
    assert (distances - 0.25).abs().max() < 23 * torch.finfo(dtype).eps


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_the_gradient_leaves_its_row_even_outside_ball_and_clip(
    dtype: torch.dtype, impl: str
) -> None:
    x, grad, origin = step_operands(3, 517, dtype=dtype)
    x[1, ::2] += 3
    grad[1, 516], grad[1, 3] = NAN, INF
    wanted, before = x.clone(), x[1].clone()
    check_step(wanted[::2], grad[::2], origin[::2], 0.1, 0.05, impl=impl)
    functional.l2_step_(x, grad, origin, eps=0.1, step_size=0.05, impl=impl)
    assert_same_bits(x[1], before)
    assert_same_bits(x[::2], wanted[::2])


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4, 9, 600])
def test_infinite_gradients_outweigh_the_rest(size: int, dtype: torch.dtype, impl: str) -> None:
    x, grad, origin = step_operands(2, size, dtype=dtype)
    limit = torch.zeros_like(grad)
    for row, column, sign in ((0, 0, 1), (0, size - 1, -1), (1, 2, -1)):
        grad[row, column], limit[row, column] = sign * INF, sign
    wanted = functional.l2_step_(x.clone(), limit, origin, eps=0.3, step_size=0.25, impl=impl)
    functional.l2_step_(x, grad, origin, eps=0.3, step_size=0.25, impl=impl)
    assert_same_bits(x, wanted)


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["x", "origin"])
def test_a_nan_in_x_or_origin_makes_its_row_nan(place: str, dtype: torch.dtype, impl: str) -> None:
    tensors = dict(zip(("x", "grad", "origin"), step_operands(3, 17, dtype=dtype), strict=True))
    tensors[place][1, 16] = NAN
    x = functional.l2_step_(**tensors, eps=0.1, step_size=0.05, impl=impl)
    assert x.isnan().all(1).tolist() == [False, True, False]
    assert x[::2].isfinite().all()


@every_impl
def test_an_infinite_x_is_put_on_the_ball(impl: str) -> None:
    x, origin = torch.full((1, 4), 0.5), torch.full((1, 4), 0.5)
    x[0, 2] = -INF
    functional.l2_step_(x, torch.zeros(1, 4), origin, eps=0.25, step_size=1.0, impl=impl)
    assert x.tolist() == [[0.5, 0.5, 0.25, 0.5]]


@every_impl
@pytest.mark.parametrize("size", [1, 7, 100, 3000])
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float32, (-126, -70, 70, 124)),
        (torch.float64, (-1018, -700, -540, -340, 340, 540, 700, 1020)),
        (torch.bfloat16, (-126, -70, 70, 124)),
        (torch.float16, (-8, 12)),
    ],
    ids=str,
)
def test_the_size_of_a_gradient_does_not_matter(
    size: int, dtype: torch.dtype, exponents: tuple[int, ...], impl: str
) -> None:
    """Squares of these overflow, or are zeros or subnormal; powers of two keep all bits."""
    x, grad, origin = step_operands(2, size, dtype=dtype)
    grad = grad.sign() * (1 + torch.rand(grad.shape)).to(dtype)
    wanted = functional.l2_step_(x.clone(), grad, origin, eps=0.3, step_size=0.25, impl=impl)
    assert (wanted != x.clamp(*CLIP)).any(1).all()
    for exponent in exponents:
        scaled = torch.ldexp(grad, torch.tensor(exponent)).to(dtype)
        assert scaled.isfinite().all()
        found = functional.l2_step_(x.clone(), scaled, origin, eps=0.3, step_size=0.25, impl=impl)
        assert_same_bits(found, wanted)


@every_impl
def test_subnormal_gradients(impl: str) -> None:
    for dtype, smallest in ((torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)):
        x, grad = torch.full((1, 2), 0.5, dtype=dtype), torch.zeros(1, 2, dtype=dtype)
        grad[0, 0], grad[0, 1] = 3 * smallest, -4 * smallest
        functional.l2_step_(x, grad, x.clone(), eps=1.0, step_size=0.3125, impl=impl)
        wanted = torch.tensor([[0.6875, 0.25]], dtype=dtype)
        assert (x - wanted).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_whose_squares_leave_the_range(dtype: torch.dtype) -> None:
    origin = torch.zeros(1, 2, dtype=dtype)
    for eps, step in ((1e-30, 1e-180), (1e-190, 1e-180), (1e190, 1e200)):
        x, grad = origin.clone(), torch.tensor([[3.0, -4.0]], dtype=dtype)
        if dtype == torch.float64:
            functional.l2_step_(x, grad, origin, eps=eps, step_size=step, clip=(-INF, INF))
            wanted = min(eps, step) * torch.tensor([[0.6, -0.8]], dtype=dtype)
            assert torch.allclose(x, wanted, rtol=1e-14, atol=0)
        else:  # in the narrower types these are 0 and infinity
            functional.l2_step_(x, grad, origin, eps=eps, step_size=step)
            assert x.tolist() == ([[1.0, 0.0]] if eps > 1 else [[0.0, 0.0]])


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_zero_is_the_origin(dtype: torch.dtype, impl: str) -> None:
    x, grad, origin = step_operands(3, 129, dtype=dtype)
    functional.l2_step_(x, grad, origin, eps=0.0, step_size=0.25, impl=impl)
    assert torch.equal(x, origin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 40000), (33, 511), (5, 3, 64, 65), (20000, 1)])
def test_threads_and_levels_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(*shape, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name in binary().levels():
                with level(name):
                    results.append(x.clone())
                    functional.l2_step_(results[-1], grad, origin, eps=0.5, step_size=0.3)
    finally:
        torch.set_num_threads(before)
    check_step(x, grad, origin, 0.5, 0.3)
    for result in results:
        assert_same_bits(result, x)


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, grad, origin = step_operands(9, 700)
    alone = x.clone()
    functional.l2_step_(x, grad, origin, eps=0.5, step_size=0.3)
    for n in range(9):
        row = slice(n, n + 1)
        functional.l2_step_(alone[row], grad[row], origin[row], eps=0.5, step_size=0.3)
    assert_same_bits(alone, x)


# ---- layouts ------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("of_x", IMAGE_LAYOUTS)
@pytest.mark.parametrize("of_grad", IMAGE_LAYOUTS)
def test_memory_layouts(of_x: str, of_grad: str, impl: str) -> None:
    x, grad, origin = step_operands(3, 4, 5, 6)
    of_origin = IMAGE_LAYOUTS[IMAGE_LAYOUTS.index(of_x) - 1]
    x, grad, origin = lay_out(x, of_x), lay_out(grad, of_grad), lay_out(origin, of_origin)
    strides = x.stride()
    check_step(x, grad, origin, 0.5, 0.3, impl=impl)
    assert x.stride() == strides


def test_a_slice_is_stepped_and_its_surroundings_are_not() -> None:
    whole = torch.rand(4, 3, 8, 8)
    before = whole.clone()
    part = whole[1:3, :, 2:5, ::2]
    check_step(part, torch.randn(part.shape), before[1:3, :, 2:5, ::2], 0.5, 0.3)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:3, :, 2:5, ::2] = False
    assert torch.equal(whole[outside], before[outside])
    assert not torch.equal(part, before[1:3, :, 2:5, ::2])


def test_expanded_gradient_and_origin() -> None:
    x, grad, origin = step_operands(4, 3, 5, 5)
    check_step(x, grad[:1].expand_as(x), origin[:, :1].expand_as(x), 0.5, 0.3)


@every_impl
def test_expanded_x_is_an_error(impl: str) -> None:
    x, grad, origin = step_operands(4, 5)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        functional.l2_step_(x[:1].expand(4, 5), grad, origin, eps=0.1, step_size=0.1, impl=impl)


@every_impl
@pytest.mark.parametrize("shape", [(0,), (0, 3, 8, 8), (2, 0), (1,), (5,), (1, 1, 1, 1)])
def test_empty_tensors_and_rows_of_one(shape: tuple[int, ...], impl: str) -> None:
    x, grad, origin = torch.full(shape, 0.5), torch.full(shape, -3.0), torch.full(shape, 0.5)
    functional.l2_step_(x, grad, origin, eps=0.25, step_size=0.125, impl=impl)
    assert torch.equal(x, torch.full(shape, 0.375))


# ---- autograd's and torch's modes ---------------------------------------------------------------


@every_impl
def test_autograd_sees_that_x_has_changed(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    loss = (x * torch.ones(7, requires_grad=True)).sum()
    functional.l2_step_(x, grad, origin, eps=0.1, step_size=0.1, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_impl
def test_the_step_has_no_gradient(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    leaf = x.clone().requires_grad_()
    grad, origin = grad.requires_grad_(), origin.requires_grad_()
    functional.l2_step_(x, grad, origin, eps=0.5, step_size=0.3, impl=impl)
    assert not x.requires_grad
    with torch.no_grad():
        functional.l2_step_(leaf, grad, origin, eps=0.5, step_size=0.3, impl=impl)
    assert leaf.requires_grad
    assert torch.equal(leaf, x)


@every_impl
def test_inference_mode(impl: str) -> None:
    with torch.inference_mode():
        check_step(*step_operands(5, 7), 0.5, 0.3, impl=impl)


@every_impl
def test_autocast_changes_nothing(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    wanted = functional.l2_step_(x.clone(), grad, origin, eps=0.5, step_size=0.3, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        functional.l2_step_(x, grad, origin, eps=0.5, step_size=0.3, impl=impl)
    assert_same_bits(x, wanted)


@every_impl
def test_compiles_as_one_graph(impl: str) -> None:
    def two_steps(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
        for _ in range(2):
            functional.l2_step_(x, grad, origin, eps=0.5, step_size=0.3, impl=impl)
        return x + 1

    x, grad, origin = step_operands(5, 7)
    wanted = x.clone()
    two_steps(wanted, grad, origin)
    torch._dynamo.reset()
    result = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(x, grad, origin)
    torch._dynamo.reset()
    assert_same_bits(x, wanted)
    assert_same_bits(result, wanted + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x, grad, origin = (lay_out(t, layout) for t in step_operands(5, 7, dtype=dtype))
    torch.library.opcheck(
        torch.ops.wcmi_fast.l2_step_.default, (x, grad, origin, 0.5, 0.3, 0.0, 1.0, "cpu")
    )


# ---- bad input ----------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"eps": -0.1}, ValueError, "eps is -0.1, wanted a finite number >= 0"),
    ({"eps": NAN}, ValueError, "eps is nan, wanted a finite number >= 0"),
    ({"eps": INF}, ValueError, "eps is inf, wanted a finite number >= 0"),
    ({"step_size": 0.0}, ValueError, "step_size is 0.0, wanted a finite number > 0"),
    ({"step_size": NAN}, ValueError, "step_size is nan, wanted a finite number > 0"),
    ({"step_size": INF}, ValueError, "step_size is inf, wanted a finite number > 0"),
    ({"clip": (1.0, 0.0)}, ValueError, r"clip is \(1.0, 0.0\), wanted \(low, high\)"),
    ({"clip": (NAN, 1.0)}, ValueError, r"clip is \(nan, 1.0\), wanted \(low, high\)"),
    ({"impl": "fastest"}, ValueError, "impl is 'fastest', wanted None or one of"),
    ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot be honoured"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_leave_x_as_it_was(
    bad: dict[str, object], error: type[Exception], message: str
) -> None:
    x, grad, origin = step_operands(5, 7)
    before = x.clone()
    with pytest.raises(error, match="l2_step_: " + message):
        functional.l2_step_(x, grad, origin, **{"eps": 0.1, "step_size": 0.1, **bad})
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["grad", "origin"])
def test_tensors_that_disagree(name: str) -> None:
    x = torch.zeros(5, 7)
    fine = {"grad": torch.zeros(5, 7), "origin": torch.zeros(5, 7), "eps": 0.1, "step_size": 0.1}
    bad = [
        (torch.zeros(1, 7), ValueError, r"has shape \(1, 7\), wanted x's, \(5, 7\)"),
        (torch.zeros(5, 7).double(), TypeError, "has dtype torch.float64, wanted x's, torch.fl"),
        (torch.zeros(5, 7, device="meta"), ValueError, "is on meta, wanted x's, cpu"),
    ]
    for tensor, error, message in bad:
        with pytest.raises(error, match=f"l2_step_: {name} {message}"):
            functional.l2_step_(x, **{**fine, name: tensor})


@every_impl
def test_an_x_that_cannot_be_stepped(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    numbers = {"eps": 0.1, "step_size": 0.1, "impl": impl}
    scalar, whole = torch.tensor(0.5), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"l2_step_: x has shape \(\), wanted \(N, ...\)"):
        functional.l2_step_(scalar, scalar.clone(), scalar.clone(), **numbers)
    with pytest.raises(TypeError, match=r"l2_step_: x has dtype torch.int64, wanted a float"):
        functional.l2_step_(whole, whole.clone(), whole.clone(), **numbers)
    with pytest.raises(ValueError, match=r"l2_step_: x requires grad, wanted x.detach\(\)"):
        functional.l2_step_(x.requires_grad_(), grad, origin, **numbers)


@every_impl
@pytest.mark.parametrize("name", ["grad", "origin"])
def test_shared_memory_is_refused(name: str, impl: str) -> None:
    whole, other = torch.rand(3, 4), torch.rand(2, 4)
    numbers = {"eps": 0.1, "step_size": 0.1, "impl": impl}
    message = f"l2_step_: x shares memory with {name}, wanted tensors apart, as {name}.clone"
    for x, shared in ((whole[:2], whole[:2]), (whole[1:], whole[:2]), (whole[:2], whole[1:])):
        with pytest.raises(ValueError, match=message):
            functional.l2_step_(x, **{"grad": other, "origin": other, name: shared}, **numbers)
    check_step(whole[:1], whole[1:2], whole[2:], 0.5, 0.3, impl=impl)
    check_step(whole[:, ::2], other.new_ones(3, 2), whole[:, 1::2], 0.5, 0.3, impl=impl)
