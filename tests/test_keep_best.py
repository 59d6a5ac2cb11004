"""keep_best_: which rows are kept, NaN, one value for the batch, layouts, threads; bad input."""

from __future__ import annotations

import pytest
import torch
from gpu_on_cpu import assume_supported, every_impl, gpu_turns, order
from hypothesis import given, settings
from oracle import DTYPES, assert_same_bits, binary, level, plain_keep_best
from strategies import IMAGE_LAYOUTS, BestCase, best_cases, lay_out
from torch import Tensor

from wcmi_fast import functional

INF, NAN = float("inf"), float("nan")


def check_keep(
    best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor, impl: str = "cpu"
) -> None:
    """Compare with the loop over rows, in place on the best; x and value must stay."""
    wanted_x, wanted_value = plain_keep_best(best_x, best_value, x, value)
    x_before, value_before = x.clone(), value.clone()
    assert functional.keep_best_(best_x, best_value, x, value, impl=impl) is None
    assert_same_bits(best_x, wanted_x)
    assert_same_bits(best_value, wanted_value)
    assert_same_bits(x, x_before)
    assert_same_bits(value, value_before)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two batches with values of which about every second is better."""
    best_x, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return best_x, torch.randn(shape[0]), x, torch.randn(shape[0])


# ---- what is kept -------------------------------------------------------------------------------


@settings(max_examples=200)
@given(case=best_cases())
def test_rows_of_the_loop_at_every_level(case: BestCase) -> None:
    for name in binary().levels():
        with level(name):
            check_keep(case.best_x.clone(), case.best_value.clone(), case.x, case.value)
    check_keep(case.best_x, case.best_value, case.x, case.value, impl="reference")


@gpu_turns
@settings(max_examples=20)
@given(case=best_cases())
def test_rows_of_the_loop_on_gpu_back_ends(case: BestCase, impl: str, turn: int) -> None:
    assume_supported(impl, case.x.dtype)
    assume_supported(impl, case.value.dtype)
    with order(impl, turn):
        check_keep(case.best_x, case.best_value, case.x, case.value, impl=impl)


@every_impl
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype: torch.dtype, value_dtype: torch.dtype, impl: str) -> None:
    #        better, worse, equal, NaN, over NaN, NaN over NaN, -inf over NaN, inf, -inf twice
    value = torch.tensor([2.0, 1.0, 1.5, NAN, -7.0, NAN, -INF, INF, -INF]).to(value_dtype)
    best_value = torch.tensor([1.5, 1.5, 1.5, 1.5, NAN, NAN, NAN, 6e4, -INF]).to(value_dtype)
    best_x, x = torch.zeros(9, 3, dtype=dtype), torch.ones(9, 3, dtype=dtype)
    functional.keep_best_(best_x, best_value, x, value, impl=impl)
    assert best_x[:, 0].tolist() == [1, 0, 0, 0, 1, 0, 1, 1, 0]
    assert (best_x == best_x[:, :1]).all()
    wanted = torch.tensor([2.0, 1.5, 1.5, 1.5, -7.0, NAN, -INF, INF, -INF]).to(value_dtype)
    assert_same_bits(best_value, wanted)


@every_impl
@pytest.mark.parametrize(("value", "kept"), [(2.0, True), (1.0, False), (NAN, False)])
def test_one_value_for_the_batch(value: float, kept: bool, impl: str) -> None:
    best_x, best_value = torch.zeros(4, 3, 5), torch.tensor(1.5)
    functional.keep_best_(best_x, best_value, torch.ones(4, 3, 5), torch.tensor(value), impl=impl)
    assert torch.equal(best_x, torch.full((4, 3, 5), float(kept)))
    assert best_value.item() == (value if kept else 1.5)


def test_rows_keep_every_bit() -> None:
    """A row is copied, not computed: NaN payloads and the signs of zeros stay."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        best_x, x = torch.zeros(1, patterns.numel(), dtype=dtype), patterns.view(dtype)[None]
        functional.keep_best_(best_x, torch.zeros(1), x, torch.ones(1))
        assert torch.equal(best_x.view(torch.int16)[0], patterns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 200_001), (3, 70_001), (40_000, 3), (65, 1024)])
def test_thread_count_changes_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    best_x, best_value, x, value = batch(*shape, dtype=dtype)
    value[0] = best_value[0] + 1
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_keep(best_x.clone(), best_value.clone(), x, value)
            check_keep(best_x.clone(), best_value[0].clone(), x, value[0])
    finally:
        torch.set_num_threads(before)


# ---- layouts ------------------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("of_best", IMAGE_LAYOUTS)
@pytest.mark.parametrize("of_x", IMAGE_LAYOUTS)
def test_memory_layouts(of_best: str, of_x: str, impl: str) -> None:
    best_x, best_value, x, value = batch(6, 4, 5, 3)
    best_x, x = lay_out(best_x, of_best), lay_out(x, of_x)
    best_value, value = lay_out(best_value, "sliced"), lay_out(value, "sliced")
    strides = best_x.stride()
    check_keep(best_x, best_value, x, value, impl=impl)
    assert best_x.stride() == strides


def test_a_slice_is_written_and_its_surroundings_are_not() -> None:
    whole, values = torch.zeros(4, 3, 8, 8), torch.zeros(8)
    part, part_values = whole[1:3, :, 2:5, ::2], values[1:5:2]
    check_keep(part, part_values, torch.ones(2, 3, 3, 4), torch.ones(2))
    assert whole.sum() == part.sum() == part.numel()
    assert values.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_expanded_x_and_value() -> None:
    best_x, best_value, x, _ = batch(4, 3, 5)
    check_keep(best_x, best_value, x[:1].expand_as(x), torch.tensor(0.1).expand(4))


@every_impl
def test_an_expanded_best_is_an_error(impl: str) -> None:
    best_x, best_value, x, value = batch(4, 5)
    message = "more than one element of the written-to tensor"
    with pytest.raises(RuntimeError, match=message):
        functional.keep_best_(best_x[:1].expand(4, 5), best_value, x, value, impl=impl)
    with pytest.raises(RuntimeError, match=message):
        functional.keep_best_(best_x, best_value[:1].expand(4), x, value, impl=impl)


@every_impl
@pytest.mark.parametrize("shape", [(0,), (0, 3, 8, 8), (2, 0), (1,), (5,), (1, 1, 1, 1)])
def test_empty_tensors_and_rows_of_one(shape: tuple[int, ...], impl: str) -> None:
    best_x, best_value = torch.zeros(shape), torch.zeros(shape[0])
    check_keep(best_x, best_value, torch.ones(shape), torch.ones(shape[0]), impl=impl)
    assert (best_value == 1).all()


@every_impl
def test_scalar_images(impl: str) -> None:
    best_x, best_value = torch.tensor(0.0), torch.tensor(0.0)
    check_keep(best_x, best_value, torch.tensor(1.0), torch.tensor(2.0), impl=impl)
    assert (best_x.item(), best_value.item()) == (1.0, 2.0)


# ---- autograd's and torch's modes ---------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("which", [0, 1])
def test_autograd_sees_that_the_best_has_changed(which: int, impl: str) -> None:
    arguments = batch(5, 7)
    loss = (arguments[which] * torch.ones((), requires_grad=True)).sum()
    functional.keep_best_(*arguments, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_impl
def test_the_copy_has_no_gradient(impl: str) -> None:
    best_x, best_value, x, value = batch(5, 7)
    x, value = x.requires_grad_(), value.requires_grad_()
    functional.keep_best_(best_x, best_value, x, value, impl=impl)
    assert not best_x.requires_grad
    assert not best_value.requires_grad


@every_impl
def test_inference_mode(impl: str) -> None:
    with torch.inference_mode():
        check_keep(*batch(5, 7), impl=impl)


@every_impl
def test_compiles_as_one_graph(impl: str) -> None:
    def keep(best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> Tensor:
        functional.keep_best_(best_x, best_value, x, value, impl=impl)
        return best_x + 1

    best_x, best_value, x, value = batch(5, 7)
    wanted_x, wanted_value = plain_keep_best(best_x, best_value, x, value)
    torch._dynamo.reset()
    compiled = torch.compile(keep, fullgraph=True, backend="aot_eager")
    result = compiled(best_x, best_value, x, value)
    torch._dynamo.reset()
    assert_same_bits(best_x, wanted_x)
    assert_same_bits(best_value, wanted_value)
    assert_same_bits(result, wanted_x + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("per_batch", [False, True])
def test_opcheck(per_batch: bool, layout: str, dtype: torch.dtype) -> None:
    best_x, best_value, x, value = batch(5, 7, dtype=dtype)
    if per_batch:
        best_value, value = best_value[0].clone(), value[0].clone()
    best_x, x = lay_out(best_x, layout), lay_out(x, layout)
    arguments = (best_x, best_value, x, value, "cpu")
    torch.library.opcheck(torch.ops.wcmi_fast.keep_best_.default, arguments)


# ---- bad input ----------------------------------------------------------------------------------

INTEGERS = torch.zeros(5, dtype=torch.int64)
BAD_TENSORS = [
    ({"x": torch.zeros(1, 7)}, ValueError, r"x has shape \(1, 7\), wanted best_x's, \(5, 7\)"),
    ({"x": torch.zeros(5, 7).half()}, TypeError, "x has dtype torch.float16, wanted best_x's"),
    ({"x": torch.zeros(5, 7, device="meta")}, ValueError, "x is on meta, wanted best_x's, cpu"),
    ({"best_x": INTEGERS, "x": INTEGERS}, TypeError, "best_x has dtype torch.int64, wanted a fl"),
    (
        {"best_value": torch.zeros(7)},
        ValueError,
        r"best_value has shape \(7,\), wanted \(\) or \(5,\), one for the batch or one per row",
    ),
    ({"best_value": torch.zeros(5, 1)}, ValueError, r"best_value has shape \(5, 1\), wanted \("),
    ({"best_value": INTEGERS}, TypeError, "best_value has dtype torch.int64, wanted a float dty"),
    (
        {"best_value": torch.zeros(5, device="meta")},
        ValueError,
        "best_value is on meta, wanted best_x's, cpu",
    ),
    ({"value": torch.zeros(())}, ValueError, r"value has shape \(\), wanted best_value's, \(5,"),
    ({"value": torch.zeros(5).double()}, TypeError, "value has dtype torch.float64, wanted best_"),
    ({"value": torch.zeros(5, device="meta")}, ValueError, "value is on meta, wanted best_value'"),
    (
        {"best_x": torch.zeros(5, 7, requires_grad=True)},
        ValueError,
        r"best_x requires grad, wanted best_x.detach\(\)",
    ),
    (
        {"best_value": torch.zeros(5, requires_grad=True)},
        ValueError,
        r"best_value requires grad, wanted best_value.detach\(\)",
    ),
    ({"impl": "fastest"}, ValueError, "impl is 'fastest', wanted None or one of"),
    ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot be honoured"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_TENSORS)
def test_bad_arguments(bad: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("best_x", "best_value", "x", "value")
    fine = dict(zip(names, batch(5, 7), strict=True))
    before = {name: fine[name].clone() for name in names}
    with pytest.raises(error, match="keep_best_: " + message):
        functional.keep_best_(**{**fine, **bad})
    assert all(torch.equal(fine[name], before[name]) for name in names)


@every_impl
def test_shared_memory_is_refused(impl: str) -> None:
    whole, values = torch.rand(6, 4), torch.rand(6)
    wanted = "keep_best_: {0} shares memory with {1}, wanted tensors apart, as {1}.clone"
    cases = [
        ((whole[:2], values[:2], whole[1:3], values[2:4]), ("best_x", "x")),
        ((whole[:2], values[:2], whole[:2], values[2:4]), ("best_x", "x")),
        ((whole[:2], values[:2], whole[2:4], values[1:3]), ("best_value", "value")),
        ((whole[:2], whole[0, :2], whole[2:4], values[:2]), ("best_value", "best_x")),
        ((whole[:4], values[:4], whole[4:5].expand(4, 4), whole[1]), ("best_x", "value")),
    ]
    for arguments, names in cases:
        with pytest.raises(ValueError, match=wanted.format(*names)):
            functional.keep_best_(*arguments, impl=impl)
    check_keep(whole[:2], values[:2], whole[2:4], values[2:4], impl=impl)
    check_keep(whole[:, ::2], values, whole[:, 1::2], values.flip(0), impl=impl)
