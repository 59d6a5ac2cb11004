"""Keeping the best iterate of each image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Against, Case, both_threads, measure, normal
from torch import Tensor

from wcmi_fast import functional, reference


def eager(best_x: Tensor, best: Tensor, x: Tensor, value: Tensor) -> None:
    """The update as it is mostly written."""
    better = value > best
    best_x.copy_(torch.where(better[:, None, None, None], x, best_x))
    torch.maximum(best, value, out=best)


@both_threads
@pytest.mark.parametrize("better", ["none", "half", "all"])
def bench_a_batch(benchmark: Any, better: str, threads: int) -> None:
    x, kept = normal(128, 3, 32, 32), normal(128, 3, 32, 32, seed=1)
    start, value = torch.zeros(128), torch.full((128,), -1.0)
    value[: {"none": 0, "half": 64, "all": 128}[better]] = 1.0
    best_x, best = kept.clone(), start.clone()

    def ours() -> None:
        best.copy_(start)
        functional.keep_best_(best_x, best, x, value)

    def plain() -> None:
        best.copy_(start)
        eager(best_x, best, x, value)

    def check() -> None:
        found, wanted = [(kept.clone(), start.clone()) for _ in range(2)]
        functional.keep_best_(*found, x, value)
        reference.keep_best_(*wanted, x, value)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    case = Case(
        op="keep_best",
        sizes={"N": 128, "image": "3x32x32", "better": better},
        variants={"ours": ours, "eager": plain},
        check=check,
        ratios={"eager / ours": Against("eager", "higher")},
        rounds=25,
    )
    measure(benchmark, case, threads)
