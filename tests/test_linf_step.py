"""linf_step_: the bits of torch's formula at every level, size, layout and extreme; bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_on_cpu import assume_supported, every_impl, gpu_turns, order
from hypothesis import given, settings
from oracle import DTYPES, assert_same_bits, binary, level, plain_linf_step
from strategies import IMAGE_LAYOUTS, STEP_BLOCK_SIZES, StepCase, lay_out, step_cases, step_operands
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
    """Compare one step, in place on `x` itself, with the formula; grad and origin must stay."""
    wanted = plain_linf_step(x, grad, origin, eps, step_size, clip)
    grad_before, origin_before = grad.clone(), origin.clone()
    got = functional.linf_step_(x, grad, origin, eps=eps, step_size=step_size, clip=clip, impl=impl)
    assert got is x
    assert_same_bits(x, wanted)
    assert_same_bits(grad, grad_before)
    assert_same_bits(origin, origin_before)


# ---- bits ---------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(case=step_cases())
def test_bits_of_torch_at_every_level(case: StepCase) -> None:
    arguments = (case.grad, case.origin, case.eps, case.step_size, case.clip)
    for name in binary().levels():
        with level(name):
            check_step(case.x.clone(), *arguments)
    check_step(case.x.clone(), *arguments, impl="reference")


@gpu_turns
@settings(max_examples=20)
@given(case=step_cases())
def test_bits_of_torch_on_gpu_back_ends(case: StepCase, impl: str, turn: int) -> None:
    assume_supported(impl, case.x.dtype)
    with order(impl, turn):
        check_step(case.x, case.grad, case.origin, case.eps, case.step_size, case.clip, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", STEP_BLOCK_SIZES)
def test_thread_count_changes_no_bit(size: int, dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(size, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_step(x.clone(), grad, origin, 8 / 255, 0.01)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [CLIP, (-INF, INF)])
@pytest.mark.parametrize(
    ("eps", "step_size"), [(0.3, 0.1), (8 / 255, 0.01), (1e4, 1e-3), (2.0, 1.0)]
)
def test_every_half_precision_pixel(
    eps: float, step_size: float, clip: tuple[float, float], dtype: torch.dtype
) -> None:
    """All 65,536 bit patterns as x, then as origin, then as gradient: ties, subnormals, NaNs."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rest = torch.rand(2, every.numel()).to(dtype)
    rest[0] -= 0.5
    for name in binary().levels():
        with level(name):
            check_step(every.clone(), rest[0], every, eps, step_size, clip)
            check_step(every.clone(), rest[0], rest[1], eps, step_size, clip)
            check_step(rest[1].clone(), rest[0], every, eps, step_size, clip)
            check_step(rest[1].clone(), every, rest[1], eps, step_size, clip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_fused_multiply_add(dtype: torch.dtype) -> None:
    # step and x whose sum with an exact product would round elsewhere.
    x = torch.rand(4099, dtype=torch.float64).to(dtype)
    grad = torch.randn(4099).to(dtype)
    for name in binary().levels():
        with level(name):
            for step_size in (1 / 3, 0.1, math.pi / 100, 2 / 255):
                check_step(x.clone(), grad, x, 1 / 3, step_size)


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype: torch.dtype, impl: str) -> None:
    """Binary fractions, exact in every dtype."""
    origin = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5, 0.5]).to(dtype)
    x = torch.tensor([0.5, 0.5, 0.5, 0.625, 0.0, 1.0, 0.5, 0.5, 0.75]).to(dtype)
    grad = torch.tensor([2.0, -1e-3, 0.0, 1.0, -1.0, 1.0, INF, -INF, NAN]).to(dtype)
    functional.linf_step_(x, grad, origin, eps=0.1875, step_size=0.125, impl=impl)
    assert x.tolist() == [0.625, 0.375, 0.5, 0.6875, 0.0, 1.0, 0.625, 0.375, 0.75]


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_gradient_leaves_the_pixel_even_outside_ball_and_clip(
    dtype: torch.dtype, impl: str
) -> None:
    x, _, origin = step_operands(67, dtype=dtype)
    x[::2] += 3
    before = x.clone()
    functional.linf_step_(x, torch.full_like(x, NAN), origin, eps=0.01, step_size=0.1, impl=impl)
    assert_same_bits(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
def test_small_balls(eps: float, dtype: torch.dtype) -> None:
    x, grad, origin = step_operands(129, dtype=dtype)
    check_step(x, grad, origin, eps, 0.25)
    # Within eps of origin up to the rounding of the face; eps = 0 is origin itself.
    assert ((x.double() - origin.double()).abs() <= eps + torch.finfo(dtype).eps / 2).all()
    if eps == 0:
        assert_same_bits(x, origin)


def test_steps_beyond_the_range_of_half_precision() -> None:
    # 1e5 is inf in float16; inf times a sign of 0 would be NaN.
    x, grad, origin = step_operands(67, dtype=torch.float16)
    grad[::3] = 0
    check_step(x, grad, origin, 0.1, 1e5)
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_ends_of_clip_and_ball(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0, 0.25, 0.75]).to(dtype)
    around = torch.stack([ends, torch.nextafter(ends, ends + 9), torch.nextafter(ends, ends - 9)])
    x, origin, grad = torch.cartesian_prod(
        around.flatten(), ends, torch.tensor([1.0, -1.0, 0.0]).to(dtype)
    ).unbind(1)
    for name in binary().levels():
        with level(name):
            check_step(x.clone(), grad.contiguous(), origin.contiguous(), 0.25, 0.25)


# ---- layouts ------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("of_x", IMAGE_LAYOUTS)
@pytest.mark.parametrize("of_grad", IMAGE_LAYOUTS)
@pytest.mark.parametrize("of_origin", ["channels_last", "contiguous", "sliced"])
def test_memory_layouts(of_x: str, of_grad: str, of_origin: str, impl: str) -> None:
    x, grad, origin = step_operands(3, 4, 5, 6)
    x, grad, origin = lay_out(x, of_x), lay_out(grad, of_grad), lay_out(origin, of_origin)
    strides = x.stride()
    check_step(x, grad, origin, 0.1, 0.05, impl=impl)
    assert x.stride() == strides


def test_a_slice_is_stepped_and_its_surroundings_are_not() -> None:
    whole = torch.rand(4, 3, 8, 8)
    before = whole.clone()
    part = whole[1:3, :, 2:5, ::2]
    grad = torch.randn(part.shape)
    check_step(part, grad, before[1:3, :, 2:5, ::2], 0.1, 0.05)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:3, :, 2:5, ::2] = False
    assert torch.equal(whole[outside], before[outside])
    assert not torch.equal(part, before[1:3, :, 2:5, ::2])


def test_expanded_gradient_and_origin() -> None:
    x, grad, origin = step_operands(4, 3, 5, 5)
    check_step(x, grad[:1].expand_as(x), origin[:, :1].expand_as(x), 0.1, 0.05)


@every_impl
def test_expanded_x_is_an_error(impl: str) -> None:
    x, grad, origin = step_operands(4, 5)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        functional.linf_step_(x[:1].expand(4, 5), grad, origin, eps=0.1, step_size=0.1, impl=impl)


def test_x_may_be_its_own_origin_or_gradient() -> None:
    x, grad, _ = step_operands(40000)
    wanted = plain_linf_step(x, grad, x, 0.1, 0.05, CLIP)
    assert_same_bits(functional.linf_step_(x, grad, x, eps=0.1, step_size=0.05), wanted)
    wanted = plain_linf_step(x, x, x, 0.1, 0.05, CLIP)
    assert_same_bits(functional.linf_step_(x, x, x, eps=0.1, step_size=0.05), wanted)


@every_impl
@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 8, 8), (2, 0), (1,), (1, 1, 1, 1)])
def test_empty_and_scalar_tensors(shape: tuple[int, ...], impl: str) -> None:
    x, grad, origin = torch.full(shape, 0.5), torch.full(shape, -3.0), torch.full(shape, 0.5)
    functional.linf_step_(x, grad, origin, eps=0.25, step_size=0.125, impl=impl)
    assert torch.equal(x, torch.full(shape, 0.375))


# ---- autograd's and torch's modes ---------------------------------------------------------------


@every_impl
def test_autograd_sees_that_x_has_changed(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    weight = torch.ones(7, requires_grad=True)
    loss = (x * weight).sum()
    functional.linf_step_(x, grad, origin, eps=0.1, step_size=0.1, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_impl
def test_the_step_has_no_gradient(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    wanted = plain_linf_step(x, grad, origin, 0.1, 0.05, CLIP)
    functional.linf_step_(
        x, grad.requires_grad_(), origin.requires_grad_(), eps=0.1, step_size=0.05, impl=impl
    )
    assert not x.requires_grad
    assert_same_bits(x, wanted)


@every_impl
def test_a_leaf_under_no_grad(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    wanted = plain_linf_step(x, grad, origin, 0.1, 0.05, CLIP)
    x.requires_grad_()
    with torch.no_grad():
        functional.linf_step_(x, grad, origin, eps=0.1, step_size=0.05, impl=impl)
    assert x.requires_grad
    assert_same_bits(x.detach(), wanted)


@every_impl
def test_inference_mode(impl: str) -> None:
    with torch.inference_mode():
        check_step(*step_operands(5, 7), 0.1, 0.05, impl=impl)


@every_impl
def test_autocast_changes_nothing(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    wanted = plain_linf_step(x, grad, origin, 0.1, 0.05, CLIP)
    with torch.autocast("cpu", torch.bfloat16):
        functional.linf_step_(x, grad, origin, eps=0.1, step_size=0.05, impl=impl)
    assert_same_bits(x, wanted)


def check_compiled(backend: str, impl: str) -> None:
    def two_steps(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
        for _ in range(2):
            functional.linf_step_(x, grad, origin, eps=0.1, step_size=0.07, impl=impl)
        return x + 1

    x, grad, origin = step_operands(5, 7)
    wanted = plain_linf_step(x, grad, origin, 0.1, 0.07, CLIP)
    wanted = plain_linf_step(wanted, grad, origin, 0.1, 0.07, CLIP)
    torch._dynamo.reset()
    result = torch.compile(two_steps, fullgraph=True, backend=backend)(x, grad, origin)
    torch._dynamo.reset()
    assert_same_bits(x, wanted)
    assert_same_bits(result, wanted + 1)


@every_impl
def test_compiles_as_one_graph(impl: str) -> None:
    check_compiled("aot_eager", impl)


@every_impl
@pytest.mark.slow
def test_compiles_with_inductor(impl: str) -> None:
    check_compiled("inductor", impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x, grad, origin = (lay_out(t, layout) for t in step_operands(5, 7, dtype=dtype))
    torch.library.opcheck(
        torch.ops.wcmi_fast.linf_step_.default, (x, grad, origin, 0.1, 0.05, 0.0, 1.0, "cpu")
    )


# ---- real images --------------------------------------------------------------------------------


def test_real_images(data_dir: Path) -> None:
    images = np.load(data_dir / "fashion_mnist.npz")["x_test"][:64]
    origin = torch.from_numpy(images).float()[:, None] / 255
    x = origin.clone()
    for _ in range(10):
        check_step(x, torch.randn_like(x), origin, 0.1, 0.02)
    assert (x - origin).abs().max() <= 0.1 + 1e-7
    assert x.min() == 0
    assert x.max() == 1


# ---- bad input ----------------------------------------------------------------------------------

BAD_NUMBERS = [
    ({"eps": -0.1}, "linf_step_: eps is -0.1, wanted a finite number >= 0"),
    ({"eps": NAN}, "linf_step_: eps is nan, wanted a finite number >= 0"),
    ({"eps": INF}, "linf_step_: eps is inf, wanted a finite number >= 0"),
    ({"step_size": 0.0}, "linf_step_: step_size is 0.0, wanted a finite number > 0"),
    ({"step_size": -1}, "linf_step_: step_size is -1, wanted a finite number > 0"),
    ({"step_size": NAN}, "linf_step_: step_size is nan, wanted a finite number > 0"),
    ({"step_size": INF}, "linf_step_: step_size is inf, wanted a finite number > 0"),
    ({"clip": (1.0, 0.0)}, r"linf_step_: clip is \(1.0, 0.0\), wanted \(low, high\)"),
    ({"clip": (0.5, 0.5)}, r"linf_step_: clip is \(0.5, 0.5\), wanted \(low, high\)"),
    ({"clip": (NAN, 1.0)}, r"linf_step_: clip is \(nan, 1.0\), wanted \(low, high\)"),
    ({"clip": (0.0, NAN)}, r"linf_step_: clip is \(0.0, nan\), wanted \(low, high\)"),
]


@every_impl
@pytest.mark.parametrize(("bad", "message"), BAD_NUMBERS)
def test_bad_numbers_leave_x_as_it_was(bad: dict[str, float], message: str, impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    before = x.clone()
    with pytest.raises(ValueError, match=message):
        functional.linf_step_(
            x, grad, origin, **{"eps": 0.1, "step_size": 0.1, "impl": impl, **bad}
        )
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["grad", "origin"])
def test_tensors_that_disagree(name: str) -> None:
    x = torch.zeros(5, 7)
    fine = {"grad": torch.zeros(5, 7), "origin": torch.zeros(5, 7), "eps": 0.1, "step_size": 0.1}
    # Sizes that would broadcast are no exception.
    with pytest.raises(ValueError, match=rf"{name} has shape \(1, 7\), wanted x's, \(5, 7\)"):
        functional.linf_step_(x, **{**fine, name: torch.zeros(1, 7)})
    with pytest.raises(
        TypeError, match=f"{name} has dtype torch.float64, wanted x's, torch.float32"
    ):
        functional.linf_step_(x, **{**fine, name: torch.zeros(5, 7).double()})
    with pytest.raises(ValueError, match=f"{name} is on meta, wanted x's, cpu"):
        functional.linf_step_(x, **{**fine, name: torch.zeros(5, 7, device="meta")})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_tensors(dtype: torch.dtype) -> None:
    x = torch.zeros(5, dtype=dtype)
    with pytest.raises(TypeError, match=f"linf_step_: x has dtype {dtype}, wanted a float dtype"):
        functional.linf_step_(x, x, x, eps=0.1, step_size=0.1)


@every_impl
def test_an_x_that_requires_grad(impl: str) -> None:
    x, grad, origin = step_operands(5, 7)
    with pytest.raises(ValueError, match=r"x requires grad, wanted x.detach\(\)"):
        functional.linf_step_(x.requires_grad_(), grad, origin, eps=0.1, step_size=0.1, impl=impl)
