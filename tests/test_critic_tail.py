"""The critic's 1x1 block as an operator: values, gradients, block edges, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_twice_as_good_together
from oracle import assert_same_bits, binary, level
from torch import Tensor
from torch.nn.functional import layer_norm

from wcmi_fast.backends import cpu
from wcmi_fast.functional import critic_tail

NAMES = ("rows", "w1", "b1", "w2", "b2", "s")
EPS = 1e-5


def operands(rows: int, inputs: int, units: int, seed: int = 0) -> list[Tensor]:
    """Operands in float64 whose features are of order one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, inputs), (units, inputs), (units,), (units, units), (units,), (units, inputs)]
    scales = [1.0, inputs**-0.5, 0.5, units**-0.5, 0.5, inputs**-0.5]
    pairs = zip(shapes, scales, strict=True)
    return [torch.randn(s, generator=generator, dtype=torch.float64) * k for s, k in pairs]


def plain(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor) -> Tensor:
    """The block in the spec's words, features only."""
    v = (rows @ w1.t() + b1).clamp(min=0) @ w2.t() + b2 + rows @ s.t()
    return layer_norm(v, (len(w2),), eps=EPS)


def results(
    program: Callable[..., Tensor], tensors: list[Tensor], units: int, dtype: torch.dtype
) -> list[Tensor]:
    """The features and the gradient of each operand."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    features = program(*leaves)[:, :units]
    weights = torch.linspace(-1, 1, features.numel(), dtype=dtype).view_as(features).sin()
    return [features.detach(), *torch.autograd.grad((features * weights).sum(), leaves)]


def check(rows: int, inputs: int, units: int, dtype: torch.dtype, offset: float = 0.0) -> None:
    draws = []
    for seed in range(6):
        tensors = operands(rows, inputs, units, seed)
        tensors[4] += offset
        ours = results(lambda *x: critic_tail(*x, eps=EPS, impl="cpu"), tensors, units, dtype)
        same = results(plain, tensors, units, dtype)
        draws.append((ours, same, results(plain, tensors, units, torch.float64)))
    assert_twice_as_good_together(draws, ["features", *NAMES])


@settings(max_examples=25)
@given(
    st.integers(1, 20), st.integers(1, 9), st.integers(4, 70), st.integers(1, 8),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_values_and_gradients(
    rows: int, inputs: int, units: int, block: int, dtype: torch.dtype
) -> None:
    with mock.patch.object(cpu, "TAIL_ROWS", block):
        check(rows, inputs, units, dtype)


@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33])
def test_rows_around_the_edge_of_a_block(rows: int) -> None:
    with mock.patch.object(cpu, "TAIL_ROWS", 16):
        check(rows, 5, 24, torch.float32)


@pytest.mark.parametrize("name", binary().levels() if binary() else [])
@pytest.mark.parametrize("units", [5, 15, 16, 17, 31, 33, 63, 64, 65, 257])
def test_every_instruction_set(name: str, units: int) -> None:
    with level(name):
        check(9, 6, units, torch.float32)
        check(9, 6, units, torch.float64)


def test_the_columns_after_the_features_are_one_and_zeros() -> None:
    for impl in ("reference", "cpu"):
        features = critic_tail(*operands(5, 3, 20), impl=impl)
        assert features.shape == (5, 32)
        assert (features[:, 20] == 1).all()
        assert (features[:, 21:] == 0).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = [x.float() for x in operands(700, 8, 64)]
    kernels, dfeatures = binary().critic_tail_f32, torch.rand(700, 80)
    found = []
    for threads in (1, 2):
        features = torch.cat([plain(*tensors), torch.ones(700, 16)], 1)
        rstd, dv = torch.empty(700), torch.empty(700, 64)
        kernels.fwd(
                features.data_ptr(), 80, 700, 64, tensors[4].data_ptr(), EPS, rstd.data_ptr(),
                threads,
            )  # fmt: skip
        kernels.bwd(
                dfeatures.data_ptr(), features.data_ptr(), 80, 700, 64, rstd.data_ptr(),
                dv.data_ptr(), threads,
            )  # fmt: skip
        found.append((features, rstd, dv))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_large_common_offset_costs_no_more_than_in_torch() -> None:
    check(12, 4, 100, torch.float32, offset=1e3)


def test_first_and_second_derivatives_agree_with_differences() -> None:
    leaves = [x.requires_grad_() for x in operands(3, 2, 4)]

    def function(*x: Tensor) -> Tensor:
        return critic_tail(*x, eps=0.1, impl="cpu")[:, :4]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """On a CPU by the reference; Triton's kernels are in test_triton_tail.py."""
    halves = [x.to(dtype) for x in operands(6, 3, 8)]
    wanted = critic_tail(*(x.float() for x in halves), impl="reference").to(dtype)
    assert_same_bits(critic_tail(*halves), wanted)


def test_opcheck() -> None:
    rows, w1, b1, w2, b2, s = operands(5, 3, 4)
    forward = torch.ops.wcmi_fast.critic_tail_fwd.default
    torch.library.opcheck(forward, (rows, w1, b1, w2, b2, s, EPS, "cpu"))
    features, rstd = forward(rows, w1, b1, w2, b2, s, EPS, "cpu")
    backward = torch.ops.wcmi_fast.critic_tail_bwd.default
    for weights in (True, False):
        arguments = (features, features, rstd, rows, w1, b1, w2, s, weights, "cpu")
        torch.library.opcheck(backward, arguments)


def test_compile_without_graph_breaks() -> None:
    tensors = [x.float().requires_grad_() for x in operands(6, 3, 8)]
    compiled = torch.compile(critic_tail, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), critic_tail(*tensors))
    got = torch.autograd.grad(compiled(*tensors).sin().sum(), tensors)
    wanted = torch.autograd.grad(critic_tail(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(got, wanted)


def test_autocast_changes_no_bit() -> None:
    tensors = [x.float() for x in operands(6, 3, 8)]
    for impl in ("reference", "cpu"):
        with torch.autocast("cpu"):
            inside = critic_tail(*tensors, impl=impl)
        assert torch.equal(inside, critic_tail(*tensors, impl=impl))


def test_inputs_of_any_strides() -> None:
    tensors = [x.float() for x in operands(6, 3, 8)]
    strided = [x.t().contiguous().t() if x.dim() == 2 else x.repeat(2)[::1][:8] for x in tensors]
    assert torch.equal(critic_tail(*strided, impl="cpu"), critic_tail(*tensors, impl="cpu"))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows of three dimensions": (
        {"rows": torch.zeros(2, 3, 4)}, ValueError, "rows has shape (2, 3, 4), wanted (R, C)",
    ),
    "integers": (
        {"rows": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "rows has dtype torch.int64",
    ),
    "w1": ({"w1": torch.zeros(4, 5)}, ValueError, "w1 has shape (4, 5), wanted (4, 3)"),
    "w2": ({"w2": torch.zeros(4, 5)}, ValueError, "w2 has shape (4, 5), wanted (4, 4)"),
    "b2": ({"b2": torch.zeros(5)}, ValueError, "b2 has shape (5,), wanted (4,)"),
    "s": ({"s": torch.zeros(3, 4)}, ValueError, "s has shape (3, 4), wanted (4, 3)"),
    "dtypes": (
        {"w2": torch.zeros(4, 4).double()}, TypeError,
        "w2 has dtype torch.float64, wanted rows', torch.float32",
    ),
    "devices": ({"s": torch.zeros(4, 3, device="meta")}, ValueError, "s is on meta, wanted rows'"),
    "impl": ({"impl": "fast"}, ValueError, "impl is 'fast'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case: str) -> None:
    changed, kind, sentence = BAD[case]
    good = dict(zip(NAMES, (x.float() for x in operands(2, 3, 4)), strict=True))
    with pytest.raises(kind) as caught:
        critic_tail(**{**good, **changed})
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("critic_tail: ")
