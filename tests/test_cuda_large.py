"""CUDA kernels on tensors of more than 2^31 elements: their last blocks, in memory that is never
touched elsewhere and therefore not there."""

from __future__ import annotations

import mmap

import pytest
import torch
from cuda_emulation import build, control
from gpu_on_cpu import binary
from oracle import plain_linf_step, plain_uniform
from torch import Tensor

from wcmi_fast._ops import LSE, SUM
from wcmi_fast.backends.binary import DTYPES

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

PLACE = (0, 0)  # device and stream
BLOCKS, THREADS = 4096, 256
MAP_NORESERVE = 0x4000  # Linux's; Python 3.11 has no name for it


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages exist once they are written to."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def block_of(element: int, per_thread: int) -> int:
    """The block that has an element, when every thread has so many neighbouring ones."""
    return element // per_thread // THREADS % BLOCKS


@pytest.mark.parametrize("count", [2**31 + 11, 2**32 + 11])
def test_linf_step_beyond_2_to_the_31(count: int) -> None:
    x, grad, origin = (sparse(count, dtype=torch.float16) for _ in range(3))
    end = slice(count - 19, None)
    for t in (x, grad, origin):
        t[end] = torch.randn(19)
    wanted = plain_linf_step(x[end], grad[end], origin[end], 0.5, 0.25, (-1.0, 1.0))
    addresses = (x.data_ptr(), grad.data_ptr(), origin.data_ptr())
    last_pack, last = block_of(count - count % 8 - 1, 8), block_of(count % 8 - 1, 1)
    for block in {last_pack, last_pack - 1, last}:
        with control.only_blocks(binary(), block, 1):
            before = x[end].clone()
            binary().linf_step(3, *addresses, count, 0.5, 0.25, -1.0, 1.0, *PLACE)
        changed = x[end] != before
        assert torch.equal(x[end][changed], wanted[changed])
    moved = (x[end] == wanted) | (x[end] == before)
    assert torch.equal(x[-1], wanted[-1])
    assert moved.all()


@pytest.mark.parametrize("count", [2**31 + 9, 2**34 + 9])
def test_linf_start_counts_beyond_2_to_the_32(count: int) -> None:
    """From element 2^34 on the counter has an upper word."""
    x, origin = (sparse(count, dtype=torch.float16) for _ in range(2))
    with control.only_blocks(binary(), block_of(count - 1, 8), 1):
        addresses = (x.data_ptr(), origin.data_ptr())
        binary().linf_start(3, *addresses, count, 1.0, 5, -1.0, 1.0, *PLACE)
    first = (count - 1) // 8 * 8
    numbers = plain_uniform(8, 5, first=first)[: count - first]
    assert torch.equal(x[first:], numbers.half())


def test_keep_best_rows_beyond_2_to_the_31() -> None:
    size = 2**31 + 9  # no whole 16 bytes: the kernel counts in elements
    best_x, x = (sparse(2, size, dtype=torch.float16) for _ in range(2))
    x[1, -8:] = torch.arange(8.0)
    best_value, value = torch.zeros(2), torch.ones(2)
    addresses = (best_x.data_ptr(), best_value.data_ptr(), x.data_ptr(), value.data_ptr())
    # Rows are the grid's second dimension: the block is of the second one.
    with control.only_blocks(binary(), BLOCKS + block_of(size - 1, 1), 1):
        binary().keep_best(DTYPES[torch.float32], *addresses, 2, 2 * size, *PLACE)
    assert torch.equal(best_x[1, -8:], x[1, -8:])


def test_score_stats_of_more_than_2_to_the_31_scores() -> None:
    n, p = 35_000, 2
    scores, stats = sparse(n, n, p, dtype=torch.float16), sparse(2, n, p, dtype=torch.float32)
    scores[-1, :9] = 1.0
    scores[-1, -1] = 3.0
    with control.only_blocks(binary(), (n - 1) % BLOCKS, 1):
        binary().score_stats_fwd(3, scores.data_ptr(), n, p, SUM, 1.0, stats.data_ptr(), *PLACE)
    assert stats[:, -1].tolist() == [[3.0, 3.0], [9.0, 9.0]]
    d, dscores = torch.full((2, n, p), 0.5), sparse(n, n, p, dtype=torch.float16)
    d[0] = 2.0
    with control.only_blocks(binary(), (n - 1) % BLOCKS, 1):
        addresses = (d.data_ptr(), scores.data_ptr(), stats.data_ptr())
        binary().score_stats_bwd(3, *addresses, n, p, SUM, dscores.data_ptr(), *PLACE)
    assert dscores[-1, -3:].tolist() == [[0.5, 0.5], [0.5, 0.5], [2.0, 2.0]]


def test_critic_stats_of_more_than_2_to_the_31_features() -> None:
    n, p, u = 2, 2**22 + 8, 256
    z, h = torch.ones(n, u, dtype=torch.float16), sparse(n, p, u, dtype=torch.float16)
    stats = sparse(2, n, p, dtype=torch.float32)
    h[0, -1], h[1, -1] = 1 / 128, 1 / 256
    with control.only_blocks(binary(), -1, 1):
        addresses = (z.data_ptr(), h.data_ptr())
        binary().critic_stats_fwd(3, *addresses, n, p, u, LSE, 1.0, stats.data_ptr(), *PLACE)
    assert stats[:, :, -1].tolist() == [[2.0, 1.0], [1.0, 2.0]]
    d, dh = torch.zeros(2, n, p), sparse(n, p, u, dtype=torch.float16)
    d[0, 1, -1], d[1, 0, -1] = 2.0, 0.5
    with control.only_blocks(binary(), -1, 1):
        addresses = (d.data_ptr(), z.data_ptr(), h.data_ptr(), stats[1].data_ptr())
        binary().critic_stats_bwd(3, *addresses, n, p, u, LSE, 0, dh.data_ptr(), 0, *PLACE)
    # The last column's own pair, and its score with the other representation.
    assert (dh[1, -1] == 2.0 + 0.5).all()
