"""linf_start_: Philox's published numbers, the same bits at every level, and bad input."""

from __future__ import annotations

import pytest
import torch
from gpu_on_cpu import assume_supported, every_impl, gpu_turns, order
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    assert_same_bits,
    binary,
    level,
    plain_linf_start,
    plain_uniform,
)
from strategies import IMAGE_LAYOUTS, STEP_BLOCK_SIZES, STEP_SIZES, lay_out
from torch import Tensor

from wcmi_fast import functional, philox

INF, NAN = float("inf"), float("nan")
CLIP = (0.0, 1.0)
LAST_SEED = 2**63 - 1


def check_start(
    x: Tensor,
    origin: Tensor,
    eps: float,
    seed: int,
    clip: tuple[float, float] = CLIP,
    impl: str = "cpu",
) -> None:
    """Compare one start, written to `x` itself, with the formula; origin must stay."""
    wanted = plain_linf_start(origin, eps, seed, clip)
    before = origin.clone()
    got = functional.linf_start_(x, origin, eps=eps, seed=seed, clip=clip, impl=impl)
    assert got is x
    assert_same_bits(x, wanted)
    assert_same_bits(origin, before)


def centres(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An x that holds nothing yet, and an origin."""
    return torch.full(shape, NAN, dtype=dtype), torch.rand(shape, dtype=torch.float64).to(dtype)


# ---- random numbers -----------------------------------------------------------------------------

# Philox4x32-10 in kat_vectors of Random123: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"),
]
RESULTS = [
    "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "d16cfe09 94fdcceb 5001e420 24126ea1",
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("given", "result"), [*zip(KNOWN_ANSWERS, RESULTS, strict=True)])
def test_known_answers(given: tuple[str, str], result: str) -> None:
    counter, key = given
    key0, key1 = words(key)
    found = philox.philox4x32(torch.tensor(words(counter)), (key0, key1))
    assert found.tolist() == words(result)


@every_impl
def test_the_first_numbers_are_those_of_the_known_answer(impl: str) -> None:
    start = functional.linf_start_(
        torch.empty(4), torch.zeros(4), eps=1.0, seed=0, clip=(-1.0, 1.0), impl=impl
    )
    assert start.tolist() == [(word >> 8) / 2**23 - 1 for word in words(RESULTS[0])]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, LAST_SEED])
def test_the_oracle_agrees_with_another_philox(seed: int) -> None:
    for count in (0, 1, 3, 4, 5, 1003):
        found = philox.uniform(count, seed, torch.device("cpu"))
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), plain_uniform(count, seed))


def test_counters_beyond_32_bits() -> None:
    counters = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    found = philox.philox4x32(counters, (0, 0))
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_numbers_are_uniform_and_seeds_independent() -> None:
    origin = torch.zeros(200_000)
    starts = [
        functional.linf_start_(
            torch.empty_like(origin), origin, eps=1.0, seed=seed, clip=(-1.0, 1.0)
        )
        for seed in (0, 1, 2**32)
    ]
    for start in starts:
        assert -1 <= start.min() < -0.9999
        assert 0.9999 < start.max() < 1
        counts = start.histc(20, -1, 1)
        assert ((counts - 10_000).abs() < 5 * (10_000 * 0.95) ** 0.5).all()
    # 5 standard deviations of a sample correlation; neighbours, and the same element of two seeds.
    bound = 5 / 200_000**0.5
    pairs = [(starts[0], starts[1]), (starts[0], starts[2]), (starts[0][1:], starts[0][:-1])]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < bound


# ---- bits ---------------------------------------------------------------------------------------


starts = given(
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from((*STEP_SIZES, 255, 256, 257, 513, *STEP_BLOCK_SIZES)),
    eps=st.sampled_from((0.0, 1e-8, 8 / 255, 0.3, 2.0, 1e5, 3e38)),
    seed=st.integers(0, LAST_SEED),
    clip=st.sampled_from((CLIP, (-1.0, 1.0), (0.1, 0.7), (-1e4, 1e4), (-INF, INF))),
)


@settings(max_examples=100)
@starts
def test_bits_of_the_formula_at_every_level(
    dtype: torch.dtype, size: int, eps: float, seed: int, clip: tuple[float, float]
) -> None:
    x, origin = centres(size, dtype=dtype)
    origin[::7] = 0.0
    origin[3::50] = NAN
    for name in binary().levels():
        with level(name):
            check_start(x.clone(), origin, eps, seed, clip)
    check_start(x, origin, eps, seed, clip, impl="reference")


@gpu_turns
@settings(max_examples=15)
@starts
def test_bits_of_the_formula_on_gpu_back_ends(
    dtype: torch.dtype,
    size: int,
    eps: float,
    seed: int,
    clip: tuple[float, float],
    impl: str,
    turn: int,
) -> None:
    assume_supported(impl, dtype)
    x, origin = centres(size, dtype=dtype)
    origin[3::50] = NAN
    with order(impl, turn):
        check_start(x, origin, eps, seed, clip, impl=impl)


@every_impl
@settings(max_examples=50)
@given(
    dtype=st.sampled_from(DTYPES),
    eps=st.floats(0, 2),
    seed=st.integers(0, LAST_SEED),
    clip=st.sampled_from((CLIP, (0.1, 0.7))),
)
def test_in_the_ball_and_in_clip(
    dtype: torch.dtype, eps: float, seed: int, clip: tuple[float, float], impl: str
) -> None:
    x, origin = centres(1000, dtype=dtype)
    low, high = torch.tensor(clip, dtype=dtype).tolist()
    origin.clamp_(low, high)
    functional.linf_start_(x, origin, eps=eps, seed=seed, clip=clip, impl=impl)
    largest = 1 + torch.finfo(dtype).eps  # half a unit in the last place of values up to 1
    assert (x.double() - origin.double()).abs().max() <= eps + largest * torch.finfo(dtype).eps / 2
    assert low <= x.min()
    assert x.max() <= high


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", STEP_BLOCK_SIZES)
def test_thread_count_changes_no_bit(size: int, dtype: torch.dtype) -> None:
    x, origin = centres(size, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_start(x.clone(), origin, 8 / 255, 5)
    finally:
        torch.set_num_threads(before)


@every_impl
def test_every_dtype_has_the_same_numbers(impl: str) -> None:
    numbers = plain_uniform(1001, 9)
    for dtype in DTYPES:
        x, origin = torch.empty(1001, dtype=dtype), torch.zeros(1001, dtype=dtype)
        functional.linf_start_(x, origin, eps=1.0, seed=9, clip=(-1.0, 1.0), impl=impl)
        assert torch.equal(x, numbers.to(dtype))


@every_impl
def test_eps_zero_is_the_origin(impl: str) -> None:
    x, origin = centres(67)
    functional.linf_start_(x, origin, eps=0.0, seed=0, impl=impl)
    assert torch.equal(x, origin)


# ---- layouts ------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("of_x", IMAGE_LAYOUTS)
@pytest.mark.parametrize("of_origin", IMAGE_LAYOUTS)
def test_memory_layouts(of_x: str, of_origin: str, impl: str) -> None:
    x, origin = centres(3, 4, 5, 6)
    x, origin = lay_out(x, of_x), lay_out(origin, of_origin)
    strides = x.stride()
    check_start(x, origin, 0.1, 3, impl=impl)
    assert x.stride() == strides


def test_a_slice_is_written_and_its_surroundings_are_not() -> None:
    whole = torch.zeros(4, 3, 8, 8)
    check_start(whole[1:3, :, 2:5, ::2], torch.ones(2, 3, 3, 4), 0.1, 3)
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:3, :, 2:5, ::2] = False
    assert (whole[outside] == 0).all()
    assert (whole[~outside] > 0).all()


def test_expanded_origin() -> None:
    x, origin = centres(4, 3, 5, 5)
    check_start(x, origin[:1].expand_as(x), 0.1, 3)


@every_impl
def test_expanded_x_is_an_error(impl: str) -> None:
    x, origin = centres(4, 5)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        functional.linf_start_(x[:1].expand(4, 5), origin, eps=0.1, seed=0, impl=impl)


@every_impl
@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 8, 8), (2, 0), (1,), (1, 1, 1, 1)])
def test_empty_and_scalar_tensors(shape: tuple[int, ...], impl: str) -> None:
    x, origin = torch.full(shape, NAN), torch.full(shape, 0.5)
    check_start(x, origin, 0.25, 3, impl=impl)


# ---- autograd's and torch's modes ---------------------------------------------------------------


@every_impl
def test_autograd_sees_that_x_has_changed(impl: str) -> None:
    x, origin = centres(5, 7)
    loss = (x * torch.ones(7, requires_grad=True)).sum()
    functional.linf_start_(x, origin, eps=0.1, seed=0, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_impl
def test_the_start_has_no_gradient(impl: str) -> None:
    x, origin = centres(5, 7)
    functional.linf_start_(x, origin.requires_grad_(), eps=0.1, seed=0, impl=impl)
    assert not x.requires_grad
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        functional.linf_start_(leaf, origin, eps=0.1, seed=0, impl=impl)
    assert leaf.requires_grad
    assert torch.equal(leaf, x)


@every_impl
def test_inference_mode(impl: str) -> None:
    with torch.inference_mode():
        check_start(*centres(5, 7), 0.1, 3, impl=impl)


@every_impl
def test_compiles_as_one_graph(impl: str) -> None:
    def start(x: Tensor, origin: Tensor) -> Tensor:
        return functional.linf_start_(x, origin, eps=0.1, seed=3, impl=impl) + 1

    x, origin = centres(5, 7)
    torch._dynamo.reset()
    result = torch.compile(start, fullgraph=True, backend="aot_eager")(x, origin)
    torch._dynamo.reset()
    wanted = plain_linf_start(origin, 0.1, 3, CLIP)
    assert_same_bits(x, wanted)
    assert_same_bits(result, wanted + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x, origin = torch.zeros(5, 7, dtype=dtype), torch.rand(5, 7).to(dtype)
    x, origin = lay_out(x, layout), lay_out(origin, layout)
    torch.library.opcheck(
        torch.ops.wcmi_fast.linf_start_.default, (x, origin, 0.1, 5, 0.0, 1.0, "cpu")
    )


# ---- bad input ----------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"eps": -0.1}, ValueError, "eps is -0.1, wanted a finite number >= 0"),
    ({"eps": NAN}, ValueError, "eps is nan, wanted a finite number >= 0"),
    ({"eps": INF}, ValueError, "eps is inf, wanted a finite number >= 0"),
    ({"eps": 1e39}, ValueError, r"eps is 1e\+39, wanted at most 3.4.*38 for torch.float32"),
    ({"seed": -1}, ValueError, r"seed is -1, wanted one from 0 to 2\*\*63 - 1"),
    ({"seed": 2**63}, ValueError, r"seed is 9223372036854775808, wanted one from 0 to"),
    ({"seed": 1.0}, TypeError, "seed is 1.0, wanted an integer"),
    ({"seed": True}, TypeError, "seed is True, wanted an integer"),
    ({"clip": (1.0, 0.0)}, ValueError, r"clip is \(1.0, 0.0\), wanted \(low, high\)"),
    ({"clip": (NAN, 1.0)}, ValueError, r"clip is \(nan, 1.0\), wanted \(low, high\)"),
    ({"impl": "fastest"}, ValueError, "impl is 'fastest', wanted None or one of"),
    ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot be honoured"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_leave_x_as_it_was(
    bad: dict[str, object], error: type[Exception], message: str
) -> None:
    x, origin = torch.zeros(5, 7), torch.rand(5, 7)
    with pytest.raises(error, match="linf_start_: " + message):
        functional.linf_start_(x, origin, **{"eps": 0.1, "seed": 0, **bad})
    assert (x == 0).all()


BAD_TENSORS = [
    (torch.zeros(1, 7), ValueError, r"origin has shape \(1, 7\), wanted x's, \(5, 7\)"),
    (torch.zeros(5, 7).double(), TypeError, "origin has dtype torch.float64, wanted x's"),
    (torch.zeros(5, 7, device="meta"), ValueError, "origin is on meta, wanted x's, cpu"),
]


@pytest.mark.parametrize(("origin", "error", "message"), BAD_TENSORS)
def test_tensors_that_disagree(origin: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="linf_start_: " + message):
        functional.linf_start_(torch.zeros(5, 7), origin, eps=0.1, seed=0)


@every_impl
def test_an_x_that_is_no_place_for_the_start(impl: str) -> None:
    x, origin = torch.zeros(5), torch.rand(5)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64, wanted a float"):
        functional.linf_start_(x.long(), origin.long(), eps=0.1, seed=0, impl=impl)
    with pytest.raises(ValueError, match=r"linf_start_: x requires grad, wanted x.detach\(\)"):
        functional.linf_start_(x.requires_grad_(), origin, eps=0.1, seed=0, impl=impl)


@every_impl
def test_shared_memory_is_refused(impl: str) -> None:
    whole = torch.rand(12)
    message = r"linf_start_: x shares memory with origin, wanted tensors apart, as origin.clone\(\)"
    for x, origin in ((whole, whole), (whole[1:9], whole[:8]), (whole[:8], whole[1:9])):
        with pytest.raises(ValueError, match=message):
            functional.linf_start_(x, origin, eps=0.1, seed=0, impl=impl)
    check_start(whole[:6], whole[6:], 0.1, 3, impl=impl)
    check_start(whole[::2], whole[1::2], 0.1, 3, impl=impl)


def test_a_back_end_that_is_asked_for_makes_no_parts() -> None:
    x = torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="first is 3 with impl='cpu', wanted impl None or 'ref"):
        functional.linf_start_(torch.empty_like(x), x, eps=0.1, seed=0, first=3, impl="cpu")
