"""The critic's 1x1 block in Triton: values, gradients, tiles, blocks of rows, configurations."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import triton
import triton_interpreter
from networks import assert_twice_as_good_together
from test_critic_tail import EPS, NAMES, operands, plain
from torch import Tensor
from torch.nn.functional import layer_norm, linear, relu

from wcmi_fast._ops import tail_width
from wcmi_fast.backends.triton import critic_tail as tail

DEVICE = triton_interpreter.enable()
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"odd": (9, 5, 37), "tile": (64, 128, 128), "tiles": (70, 37, 140)}


def ours(tensors: list[Tensor], dfeatures: Tensor) -> list[Tensor]:
    """The features and the gradient of each operand."""
    rows, w1, b1, w2, b2, s = (x.to(DEVICE) for x in tensors)
    units, width = len(w2), tail_width(len(w2))
    features, rstd = tail.critic_tail_fwd(rows, w1, b1, w2, b2, s, EPS)
    # Junk where the features' constants are: no gradient comes from there.
    d = torch.full((len(rows), width), 7.0, dtype=rows.dtype, device=DEVICE)
    d[:, :units] = dfeatures.to(rows)
    drows, *weights = tail.critic_tail_bwd(d, features, rstd, rows, w1, b1, w2, s, True)
    alone = tail.critic_tail_bwd(d, features, rstd, rows, w1, b1, w2, s, False)
    assert torch.equal(alone[0], drows)
    assert [x.numel() for x in alone[1:]] == 5 * [0]
    assert all(x.dtype == rows.dtype for x in (features, drows, *weights))
    return [x.cpu() for x in (features[:, :units], drows, *weights)]


def torch_program(
    rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s: Tensor
) -> Tensor:
    """The block in torch's layers, which take half types."""
    v = linear(relu(linear(rows, w1, b1)), w2, b2) + linear(rows, s)
    return layer_norm(v, (len(w2),), eps=EPS)


def results(
    program: Callable[..., Tensor], tensors: list[Tensor], dfeatures: Tensor
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    features = program(*leaves)
    return [features.detach(), *torch.autograd.grad(features, leaves, dfeatures.to(features))]


def check(
    rows: int,
    inputs: int,
    units: int,
    dtype: torch.dtype,
    offset: float = 0.0,
    draws: int = 2,
) -> None:
    found = []
    for seed in range(draws):
        tensors = operands(rows, inputs, units, seed)
        tensors[4] += offset
        tensors = [x.to(dtype) for x in tensors]
        d = torch.linspace(-1, 1, rows * units).view(rows, units).sin()
        wide = [x.double() for x in tensors]
        found.append(
            (ours(tensors, d), results(torch_program, tensors, d), results(plain, wide, d))
        )
    assert_twice_as_good_together(found, ["features", *NAMES])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size: str, dtype: torch.dtype) -> None:
    check(*SIZES[size], dtype)


def test_a_row_of_one_unit_is_zero() -> None:
    tensors = [x.float() for x in operands(3, 2, 1)]
    features, drows, *weights = ours(tensors, torch.ones(3, 1))
    for result in (features, drows, *weights):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_columns_after_the_features_are_one_and_zeros(dtype: torch.dtype) -> None:
    tensors = [x.to(DEVICE, dtype) for x in operands(5, 3, 20)]
    features, rstd = tail.critic_tail_fwd(*tensors, EPS)
    assert features.shape == (5, 32)
    assert rstd.dtype == torch.float32
    assert (features[:, 20] == 1).all()
    assert (features[:, 21:] == 0).all()


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_a_large_common_offset_costs_no_more_than_in_torch(offset: float) -> None:
    check(12, 4, 300, torch.float32, offset=offset)


def test_statistics_of_half_types_come_from_float32() -> None:
    """Rounded to bf16 this V is its mean: its deviation would be 0, its rstd 316."""
    tensors = [x.to(torch.bfloat16) for x in operands(8, 4, 200)]
    tensors[4] = torch.full_like(tensors[4], 512.0)
    wide = [x.double() for x in tensors]
    rows, w1, b1, w2, b2, s = wide
    v = (rows @ w1.t() + b1).clamp(min=0) @ w2.t() + b2 + rows @ s.t()
    wanted = (v.var(1, correction=0) + EPS).rsqrt()
    _, rstd = tail.critic_tail_fwd(*(x.to(DEVICE) for x in tensors), EPS)
    torch.testing.assert_close(rstd.cpu().double(), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [128, 300])
def test_blocks_of_rows(rows: int, dtype: torch.dtype) -> None:
    with mock.patch.object(tail, "BLOCK_BYTES", 1):
        check(rows, 5, 24, dtype)


def every_configuration() -> list[tuple[torch.dtype, int]]:
    return [(dtype, k) for dtype in DTYPES for k in range(len(tail._configurations(dtype)))]


@pytest.mark.parametrize(("dtype", "k"), every_configuration(), ids=str)
def test_every_configuration(dtype: torch.dtype, k: int) -> None:
    tensors = [x.to(dtype) for x in operands(*SIZES["tiles"])]
    there = [x.to(DEVICE) for x in tensors]
    configuration = tail._configurations(dtype)[k]
    with mock.patch.object(tail, "_default", return_value=configuration):
        features, _ = tail.critic_tail_fwd(*there, EPS)
    exact = plain(*(x.double() for x in tensors))
    draw = ([features[:, :140].cpu()], [torch_program(*tensors)], [exact])
    assert_twice_as_good_together([draw], ["features"])


def test_no_rows() -> None:
    tensors = [x.float().to(DEVICE) for x in operands(0, 3, 20)]
    features, rstd = tail.critic_tail_fwd(*tensors, EPS)
    assert (features.shape, rstd.shape) == ((0, 32), (0,))
    rows, w1, b1, w2, _, s = tensors
    drows, *weights = tail.critic_tail_bwd(features, features, rstd, rows, w1, b1, w2, s, True)
    assert drows.shape == (0, 3)
    assert all((x == 0).all() for x in weights)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(number: float) -> None:
    tensors = [x.float().to(DEVICE) for x in operands(5, 3, 20)]
    tensors[0][2, 1] = number
    features, _ = tail.critic_tail_fwd(*tensors, EPS)
    assert features[:, :20].isnan().any(1).tolist() == [False, False, True, False, False]


def test_every_program_names_what_its_kernel_takes() -> None:
    for program in tail.programs():
        assert list(program.signature) == program.kernel.arg_names
        constants = [name for name, kind in program.signature.items() if kind == "constexpr"]
        assert sorted(constants) == sorted(program.constants)
        assert isinstance(program.options["num_warps"], int)
        assert triton.next_power_of_2(program.bytes) >= program.bytes > 0
