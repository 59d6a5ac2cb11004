"""Memory that Triton's kernels may touch: tensors between guard pages, and beyond 2**31 elements.

The interpreter reads and writes wherever a pointer leads. A page without permission makes a missing
mask, or an offset that has overflowed, a crash: every case runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from oracle import assert_same_bits, plain_l2_step, plain_linf_step
from test_critic_tail import EPS, operands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from wcmi_fast._ops import asked
from wcmi_fast.backends.triton import (
    KERNELS,
    critic_tail,
    keep_best,
    l2_step,
    linf_start,
    linf_step,
)

pytestmark = pytest.mark.skipif(
    triton_interpreter.enable() != "cpu", reason="with a GPU nothing is interpreted"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE = mmap.PAGESIZE
CLIP = (0.0, 1.0)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def exit_code(case: Callable[..., None], *arguments: Any) -> int:
    """Run a case in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(case, *arguments))
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode


def _alone(case: Callable[..., None], *arguments: Any) -> None:
    # A thread pool does not survive the fork.
    torch.set_num_threads(1)
    case(*arguments)


# ---- guard pages --------------------------------------------------------------------------------


def guarded(x: Tensor, end: bool) -> Tensor:
    """Return a contiguous copy of x that ends, or starts, where a page without permission does."""
    if not x.numel():
        return x
    length = -(-x.nbytes // PAGE) * PAGE
    first = _map(length + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    for page in (first, first + PAGE + length):
        assert _libc.mprotect(page, PAGE, 0) == 0
    start = first + PAGE + (length - x.nbytes if end else 0)
    return _tensor(start, x.nbytes, x.dtype).view(x.shape).copy_(x)


def _map(length: int, protection: int) -> int:
    # Never unmapped: the processes are short.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    start = _libc.mmap(None, length, protection, flags, -1, 0)
    assert start != ctypes.c_void_p(-1).value
    return start


def _tensor(start: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=dtype)


class GuardedResults(TorchDispatchMode):
    """Put what an operator allocates between guard pages, too."""

    factories = ("empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like")

    def __init__(self, end: bool) -> None:
        super().__init__()
        self.end = end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        return guarded(result, self.end) if name in self.factories else result


@pytest.fixture(autouse=True, scope="module")
def _first_use() -> None:
    """Import, in 1 s, what every process would else import for itself."""
    with GuardedResults(False):
        torch.empty(0)


def run_guarded(name: str, dtype: torch.dtype, end: bool) -> None:
    def place(x: Any) -> Any:
        if isinstance(x, list):
            return [place(each) for each in x]
        return guarded(x, end) if isinstance(x, Tensor) else x

    for arguments in OPERATORS[name](dtype):
        placed = [place(x) for x in arguments]
        with GuardedResults(end):
            KERNELS[name](*placed)


# ---- arguments of every operator, of odd sizes --------------------------------------------------

WHICH, TAU = 31, 1.5
Arguments = Iterator[tuple[Any, ...]]


def of_step(dtype: torch.dtype) -> Arguments:
    for shape in ((1,), (3, 1027), (1, 2049)):
        yield *(torch.rand(shape).to(dtype) for _ in range(3)), 0.1, 0.05, *CLIP


def of_start(dtype: torch.dtype) -> Arguments:
    for size in (1, 1023, 1025):
        yield torch.zeros(size, dtype=dtype), torch.rand(size).to(dtype), 0.1, 3, *CLIP


def of_keep_best(dtype: torch.dtype) -> Arguments:
    for shape in ((1, 1), (3, 2049), (257, 3)):
        best_x, x = torch.rand(2, *shape).to(dtype).unbind()
        yield best_x, torch.rand(shape[0]), x, torch.rand(shape[0])
        yield best_x, torch.zeros(shape[0]).to(dtype), x, torch.ones(shape[0]).to(dtype)


def of_features(dtype: torch.dtype) -> Arguments:
    for n, p, u in ((2, 1, 1), (5, 3, 7), (67, 2, 33)):
        yield torch.randn(n, u).to(dtype), torch.randn(n, p, u).to(dtype)


def of_critic_stats(dtype: torch.dtype) -> Arguments:
    for z, h in of_features(dtype):
        yield z, h, WHICH, TAU, False


def of_critic_stats_bwd(dtype: torch.dtype) -> Arguments:
    for z, h in of_features(dtype):
        dstats, lse = of_gradients(*h.shape[:2])
        yield dstats, z, h, lse, torch.empty(0), WHICH, True, True


def of_gradients(n: int, p: int) -> tuple[list[Tensor], Tensor]:
    return [torch.randn(n, p) for _ in range(1 + len(asked(WHICH)))], torch.rand(n, p) + 5


def of_scores(dtype: torch.dtype) -> Arguments:
    for n, p in ((2, 1), (5, 3), (67, 3)):
        yield torch.randn(n, n, p).to(dtype), WHICH, TAU


def of_scores_bwd(dtype: torch.dtype) -> Arguments:
    for scores, _, _ in of_scores(dtype):
        dstats, lse = of_gradients(*scores.shape[1:])
        yield dstats, scores, lse, WHICH


def of_dv_value(dtype: torch.dtype) -> Arguments:
    for n, p in ((2, 1), (5, 3), (67, 3)):
        yield torch.randn(n, p), torch.randn(n, p), True


def of_tail(dtype: torch.dtype) -> Arguments:
    for size in ((1, 1, 1), (9, 5, 37), (67, 3, 130)):
        yield *(x.to(dtype) for x in operands(*size)), EPS


def of_tail_bwd(dtype: torch.dtype) -> Arguments:
    for rows, w1, b1, w2, b2, s, _ in of_tail(dtype):
        features, rstd = critic_tail.critic_tail_fwd(rows, w1, b1, w2, b2, s, EPS)
        yield torch.randn(features.shape).to(dtype), features, rstd, rows, w1, b1, w2, s, True


OPERATORS: dict[str, Callable[[torch.dtype], Arguments]] = {
    "linf_step_": of_step,
    "linf_start_": of_start,
    "l2_step_": of_step,
    "keep_best_": of_keep_best,
    "critic_stats_fwd": of_critic_stats,
    "critic_stats_bwd": of_critic_stats_bwd,
    "score_stats_fwd": of_scores,
    "score_stats_bwd": of_scores_bwd,
    "dv_value": of_dv_value,
    "critic_tail_fwd": of_tail,
    "critic_tail_bwd": of_tail_bwd,
}


def test_every_operator_has_a_case() -> None:
    assert OPERATORS.keys() == KERNELS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("end", [False, True], ids=["start", "end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_stays_inside_its_tensors(name: str, dtype: torch.dtype, end: bool) -> None:
    assert exit_code(run_guarded, name, dtype, end) == 0


# ---- the checker --------------------------------------------------------------------------------


@triton_interpreter.interpreted
@triton.jit
def _copy(x, out, first, read, written, N: tl.constexpr):
    at = first + tl.arange(0, N)
    value = tl.load(x + at, mask=(at >= 0) & (at < read))
    tl.store(out + at, value, mask=(at >= 0) & (at < written))


@triton_interpreter.interpreted
@triton.jit
def _copy_unmasked_below(x, out, count, N: tl.constexpr):
    at = tl.arange(0, N) - 1
    tl.store(out + at, tl.load(x + at, mask=at < count), mask=(at >= 0) & (at < count))


def copy(read: int, written: int, end: bool) -> None:
    faulthandler.disable()
    x = guarded(torch.ones(1001), end)
    with GuardedResults(end):
        _copy[(1,)](x, torch.empty_like(x), 0, read, written, N=2048)


def copy_from_below(end: bool) -> None:
    faulthandler.disable()
    x = guarded(torch.ones(1001), end)
    _copy_unmasked_below[(1,)](x, torch.empty_like(x), 1001, N=2048)


def test_a_missing_mask_crashes() -> None:
    crash = -signal.SIGSEGV
    assert exit_code(copy, 1001, 1001, True) == 0
    assert exit_code(copy, 1002, 1001, True) == crash
    assert exit_code(copy, 1001, 1002, True) == crash
    assert exit_code(copy_from_below, True) == 0
    assert exit_code(copy_from_below, False) == crash


# ---- offsets beyond 2**31 -----------------------------------------------------------------------


def sparse(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return zeros of which only what is written takes memory."""
    length = size * dtype.itemsize
    return _tensor(_map(length, mmap.PROT_READ | mmap.PROT_WRITE), length, dtype)


@contextmanager
def program(first: int) -> Iterator[None]:
    """Call the one program of a launch the program `first` of a larger grid."""
    builder = interpreter.interpreter_builder
    builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (x + first, y, z))
    try:
        yield
    finally:
        del builder.set_grid_idx


FAR = 2**31


def step_far() -> None:
    size = FAR + 500
    x, grad, origin = (sparse(size) for _ in range(3))
    tails = [t[FAR:].copy_(torch.randn(500)) for t in (x, grad, origin)]
    wanted = plain_linf_step(*tails, 0.125, 0.25, CLIP)
    with program(FAR // 1024):
        linf_step.sign_step[(1,)](x, grad, origin, size, 0.125, 0.25, *CLIP, BLOCK=1024)
    assert_same_bits(tails[0], wanted)


def start_far() -> None:
    size = FAR + 500
    x, origin = sparse(size), sparse(size)
    with program(FAR // 1024):
        linf_start.random_start[(1,)](x, origin, size, 1.0, 7, -1.0, 1.0, COUNTERS=256)
    assert len(x[FAR:].unique()) > 250


def l2_step_far() -> None:
    rows, size = 2**21 + 1, 1025
    x, grad, origin = (sparse(rows * size) for _ in range(3))
    tails = [t[-size:].copy_(torch.randn(size)).view(1, size) for t in (x, grad, origin)]
    wanted = plain_l2_step(*tails, 0.5, 0.25, CLIP)
    with program(rows - 1):
        l2_step.normalised_step[(1,)](x, grad, origin, size, 0.5, 0.25, *CLIP, BLOCK=2048)
    torch.testing.assert_close(tails[0], wanted)


def keep_best_far() -> None:
    rows, size = 2**20 + 1, 2049
    best_x, x = (sparse(rows * size, torch.int16) for _ in range(2))
    value = torch.ones(rows)
    x[-size:] = 5
    with program(2 * rows - 2):
        keep_best.copy_rows[(2,)](best_x, torch.zeros(rows), x, value, size, BLOCK=2048)
    assert (best_x[-size:] == 5).all()
    assert best_x[-size - 1] == 0


def tail_far() -> None:
    r, u, width = 2**25 + 3, 60, 64
    features, dfeatures = sparse(r * width), sparse(r * width)
    moments, rstd = sparse(2 * r, torch.float32), sparse(r, torch.float32)
    dv = sparse(r * 64)
    row = features.view(r, width)[-1, :u].copy_(torch.randn(u))
    v = row.double()
    moments[r - 1], moments[2 * r - 1] = v.mean(), v.var(correction=0) * u
    numbers = {"R": r, "U": u, "width": width, "ROWS": 8, "COLUMNS": 64}
    with program(r // 8):
        critic_tail.normalise_rows[(1,)](features, moments, rstd, **numbers, eps=0.0, TILE=128)
    wanted = (v - v.mean()) / v.std(correction=0)
    torch.testing.assert_close(row.double(), wanted, rtol=0.01, atol=0.01)
    assert features[-4:].tolist() == [1, 0, 0, 0]
    dfeatures.view(r, width)[-1] = 1
    dfeatures.view(r, width)[-1, 0] = 61
    with program(r // 8):
        critic_tail.rows_backward[(1,)](dfeatures, features, rstd, dv, **numbers)
    assert dv[(r - 1) * u : r * u].abs().min() > 0


@pytest.mark.parametrize("case", [step_far, start_far, l2_step_far, keep_best_far, tail_far])
def test_offsets_beyond_31_bits(case: Callable[[], None]) -> None:
    assert exit_code(case) == 0
