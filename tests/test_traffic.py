"""How many bytes the forward pass of critic_stats moves, in the interpreter and emulated."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import triton_interpreter
from cuda_emulation import build, control
from torch import Tensor

from wcmi_fast._ops import LSE, SOFTPLUS

triton_interpreter.enable()
from wcmi_fast.backends.triton import critic_stats  # noqa: E402

N, P, U = 1024, 64, 2048


def counted_forward(z: Tensor, h: Tensor) -> triton_interpreter.Traffic:
    """What the programs of the first location move: those of every other one do the same."""

    def launch_first(kernel: Any, grid: Any, arguments: Any, *others: Any) -> None:
        def programs(tile: dict[str, Any]) -> tuple[int, ...]:
            first, *rest = grid(tile)
            return (first // P, *rest)

        critic_stats_launch(kernel, programs, arguments, *others)

    critic_stats_launch = critic_stats.launch
    with (
        mock.patch.object(critic_stats, "launch", launch_first),
        # The states of other locations are not there to be merged.
        mock.patch.object(critic_stats, "finished", lambda states, which: states),
        triton_interpreter.counting() as traffic,
    ):
        critic_stats.critic_stats_fwd(z, h, LSE, 1.0, False)
    return traffic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_forward_pass_moves_little_more_than_its_tiling_must(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        torch.set_float32_matmul_precision("high")
    try:
        tile = critic_stats._default(N, P, dtype, LSE).kwargs
        z, h = torch.randn(N, U).to(dtype), torch.randn(N, P, U).to(dtype)
        traffic = counted_forward(z, h)
    finally:
        torch.set_float32_matmul_precision("highest")
    tiles = (N // tile["BM"]) * (N // tile["BN"]) * P
    features = tiles * (tile["BM"] + tile["BN"]) * U * dtype.itemsize
    least = features + 2 * N * P * 4  # positives and log-sum-exps
    moved = P * (traffic.read + traffic.written)
    assert features <= P * traffic.read
    assert moved <= 1.2 * least
    # T, in the narrower of both types, would be so many bytes.
    assert P * traffic.written <= 0.05 * N * N * P * dtype.itemsize


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.parametrize("which", [LSE, SOFTPLUS])
def test_the_emulated_forward_pass_moves_what_its_tiling_must(which: int) -> None:
    """Of csrc/cuda/critic_stats.cu: blocks of 16 rows and 8 locations, 8 images at a step."""
    module, (n, p, u) = build.load("count"), (32, 16, 64)
    z, h, stats = torch.randn(n, u), torch.randn(n, p, u), torch.empty(2, n, p)

    def forward() -> None:
        addresses = (z.data_ptr(), h.data_ptr())
        module.critic_stats_fwd(0, *addresses, n, p, u, which, 1.0, stats.data_ptr(), 0, 0)

    def traffic(tensor: Tensor) -> control.Traffic:
        return control.traffic(module, tensor.data_ptr(), tensor.nbytes, forward)

    blocks, steps = (n // 16) * (p // 8), n // 8
    assert traffic(z) == (blocks * steps * 16 * u * 4, 0)
    assert traffic(h) == (blocks * steps * 64 * u * 4, 0)
    # Every statistic is written once, and T nowhere: there is no other memory to write to.
    assert traffic(stats) == (0, stats.nbytes)
