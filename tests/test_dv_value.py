"""dv_value: the bound from positives and log-sum-exps, in double inside, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_on_cpu import SEEDS, emulated, every_kernel, order
from oracle import binary, level, plain_dv, plain_dv_zero
from torch import Tensor

INF, NAN = float("inf"), float("nan")
both_wide = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_level = pytest.mark.parametrize("simd", binary().levels() if binary() else [])
PLAIN_DV = {"exclude": plain_dv, "zero": plain_dv_zero}
both_diagonals = pytest.mark.parametrize("diagonal", PLAIN_DV)


def dv_value(
    positives: Tensor, lse: Tensor, diagonal: str, impl: str = "cpu"
) -> tuple[Tensor, Tensor]:
    return torch.ops.wcmi_fast.dv_value(positives, lse, diagonal == "zero", impl)


@every_level
@both_diagonals
@both_wide
@pytest.mark.parametrize("shift", [-150.0, 0.0, 150.0, 1e4])
def test_dv_value_of_positives_and_log_sum_exps(
    shift: float, dtype: torch.dtype, diagonal: str, simd: str
) -> None:
    T = torch.randn(17, 17, 5, dtype=dtype) + shift
    positives, negatives = (
        T.diagonal().t().contiguous(),
        T[~torch.eye(17, dtype=torch.bool)].view(17, 16, 5),
    )
    lse = negatives.logsumexp(1)
    with level(simd):
        value, dlse = dv_value(positives, lse, diagonal)
    check_dv_value(value, dlse, positives, lse, diagonal, shift)
    plain = PLAIN_DV[diagonal](positives, negatives)
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-4 if shift < 1e3 else 1e-2)


def check_dv_value(
    value: Tensor, dlse: Tensor, positives: Tensor, lse: Tensor, diagonal: str, shift: float
) -> None:
    n, p = lse.shape
    # In double inside: as exact as its arguments.
    wide = lse.double()
    joint = wide.logsumexp(0)
    if diagonal == "zero":
        joint = torch.logaddexp(joint, torch.tensor(math.log(n), dtype=torch.float64))
    wanted = (positives.double() - joint).mean() + math.log(n * (n - 1))
    rounding = 16 * torch.finfo(torch.float64).eps * (abs(shift) + 1)
    rtol = 2 * torch.finfo(lse.dtype).eps
    torch.testing.assert_close(value, wanted.to(lse.dtype), rtol=rtol, atol=rounding)
    exact = -(wide - joint).exp() / p
    torch.testing.assert_close(dlse, exact.to(lse.dtype), rtol=1e-6, atol=1e-30)


@both_diagonals
@pytest.mark.parametrize("turn", SEEDS)
@pytest.mark.parametrize(("n", "p"), [(2, 1), (17, 5), (33, 300), (700, 1)])
@pytest.mark.parametrize("shift", [-150.0, 0.0, 1e4])
@both_wide
@pytest.mark.parametrize("impl", [emulated])
def test_dv_value_emulated(
    impl: str, dtype: torch.dtype, shift: float, n: int, p: int, turn: int, diagonal: str
) -> None:
    positives, lse = (torch.randn(2, n, p, dtype=dtype) + shift).unbind()
    with order(impl, turn):
        value, dlse = dv_value(positives, lse, diagonal, impl)
    check_dv_value(value, dlse, positives, lse, diagonal, shift)


@both_diagonals
@every_kernel
@pytest.mark.parametrize(("bad", "value"), [(NAN, NAN), (-INF, None), (INF, -INF)])
def test_dv_value_where_a_log_sum_exp_is_not_finite(
    bad: float, value: float | None, impl: str, diagonal: str
) -> None:
    positives, lse = torch.randn(2, 9, 3).unbind()
    lse[4, 1] = bad
    got, dlse = dv_value(positives, lse, diagonal, impl)
    if value is not None:
        torch.testing.assert_close(got, torch.tensor(value), equal_nan=True)
    else:  # a representation without a finite negative adds nothing
        joint = lse if diagonal == "exclude" else torch.cat([lse, torch.zeros(9, 3)])
        wanted = positives.mean() - joint.logsumexp(0).mean() + math.log(72)
        torch.testing.assert_close(got, wanted)
        assert dlse[4, 1] == 0
    assert dlse[:, 0].isfinite().all()


@both_diagonals
@every_kernel
def test_dv_value_where_every_negative_is_minus_infinity(impl: str, diagonal: str) -> None:
    positives, lse = torch.zeros(9, 3), torch.full((9, 3), -INF)
    value, dlse = dv_value(positives, lse, diagonal, impl)
    # Of "zero" the 9 scores of the diagonal are left.
    wanted = INF if diagonal == "exclude" else math.log(8)
    assert value.item() == pytest.approx(wanted)
    assert (dlse == 0).all()


@both_wide
@both_diagonals
def test_opcheck_dv_value(diagonal: str, dtype: torch.dtype) -> None:
    positives, lse = torch.randn(2, 5, 3, dtype=dtype).unbind()
    torch.library.opcheck(
        torch.ops.wcmi_fast.dv_value.default, (positives, lse, diagonal == "zero", "cpu")
    )
