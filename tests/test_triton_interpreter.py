"""The patched interpreter: bf16 as hardware computes it, and what the traffic counter counts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from torch import Tensor
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(
    triton_interpreter.enable() != "cpu", reason="with a GPU nothing is interpreted"
)


@triton_interpreter.interpreted
@triton.jit
def _arithmetic(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + N + at, a - b)
    tl.store(out + 2 * N + at, a * b)
    tl.store(out + 3 * N + at, tl.where(a < b, a, b))
    tl.store(out + 4 * N + at, tl.maximum(a, b))
    tl.store(out + 5 * N + at, -a)
    tl.store(out + 6 * N + at, tl.fma(a, b, a))


@triton_interpreter.interpreted
@triton.jit
def _cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton_interpreter.interpreted
@triton.jit
def _reductions(x, out, N: tl.constexpr):
    row = tl.load(x + tl.arange(0, N))
    tl.store(out, tl.sum(row, 0))
    tl.store(out + 1, tl.max(row, 0))
    tl.store(out + 2, row.sum(0))


@triton_interpreter.interpreted
@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton_interpreter.interpreted
@triton.jit
def _masked_copy(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n - 1)


@triton_interpreter.interpreted
@triton.jit
def _where(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, at, mask=(at < 5) & (tl.load(x) > tl.load(x + 1)))


EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(ours: Tensor, wanted: Tensor) -> Tensor:
    return (ours == wanted) | (ours.isnan() & wanted.isnan())


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, N=x.numel())
    return out


def test_bf16_widens_exactly() -> None:
    assert same(cast(EVERY_BF16, torch.float32), EVERY_BF16.float()).all()


def test_narrowing_rounds_to_nearest_even() -> None:
    """Every bf16 number, and what lies a quarter, a half and three quarters to the next."""
    bits = EVERY_BF16.float().view(torch.int32)[:, None] + torch.tensor([0, 0x4000, 0x8000, 0xC000])
    x = bits.view(torch.float32).flatten()
    assert same(cast(x, torch.bfloat16), x.to(torch.bfloat16)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_casts_to_and_from_other_types(dtype: torch.dtype) -> None:
    x = (torch.randn(1024) * 300).to(dtype)
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    x = (torch.randn(1024) * 300).to(torch.bfloat16)
    assert torch.equal(cast(x, dtype), x.to(dtype))


def test_arithmetic_on_bf16() -> None:
    x, y = torch.randn(2, 512).to(torch.bfloat16).unbind()
    x[0], y[1] = torch.nan, torch.inf
    out = torch.empty(7, 512, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, N=512)
    wide = x.double(), y.double()
    fused = (wide[0] * wide[1] + wide[0]).to(torch.bfloat16)
    wanted = [x + y, x - y, x * y, torch.where(x < y, x, y), torch.fmax(x, y), -x, fused]
    assert same(out, torch.stack(wanted)).all()


def test_reductions_of_bf16() -> None:
    x = torch.randint(-8, 9, (64,)).to(torch.bfloat16)
    out = torch.empty(3, dtype=torch.bfloat16)
    _reductions[(1,)](x, out, N=64)
    assert out.tolist() == [x.sum().item(), x.max().item(), x.sum().item()]


def test_matrix_products_of_bf16() -> None:
    a, b = torch.randn(2, 32, 32).to(torch.bfloat16).unbind()
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_a_scalar_s_comparison_meets_a_block() -> None:
    for x, wanted in (([1.0, 0.5], [0, 1, 2, 3, 4, -1, -1, -1]), ([0.5, 0.5], 8 * [-1])):
        out = torch.full((8,), -1)
        try:
            _where[(1,)](torch.tensor(x), out, N=8)
        except InterpreterError as error:
            raise AssertionError from error
        assert out.tolist() == wanted


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_counter_counts_unmasked_lanes(dtype: torch.dtype, size: int) -> None:
    x = torch.zeros(64, dtype=dtype)
    with triton_interpreter.counting() as traffic:
        _masked_copy[(3,)](x, torch.empty_like(x), 40, N=64)
    assert (traffic.read, traffic.written) == (3 * 40 * size, 3 * 39 * size)
    _masked_copy[(1,)](x, torch.empty_like(x), 40, N=64)
    assert traffic.read == 3 * 40 * size


# Without the patch each of these tests must fail.
UNPATCHED = """
import triton_interpreter
triton_interpreter._patch = lambda: None
import test_triton_interpreter as tests
for name in tests.OF_THE_PATCH:
    try:
        getattr(tests, name)()
    except AssertionError:
        print(name)
"""
OF_THE_PATCH = [
    "test_narrowing_rounds_to_nearest_even",
    "test_arithmetic_on_bf16",
    "test_reductions_of_bf16",
    "test_matrix_products_of_bf16",
    "test_a_scalar_s_comparison_meets_a_block",
]


def test_the_interpreter_alone_is_wrong(request: pytest.FixtureRequest) -> None:
    found = subprocess.run(
        [sys.executable, "-c", UNPATCHED],
        cwd=request.path.parent,
        env={"PYTHONPATH": str(request.path.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == OF_THE_PATCH
