"""The bounds from scores that are given, as for a critic that is not a dot product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Against, Case, both_threads, check_twice, gradients, measure, normal
from torch import Tensor

from wcmi_fast import functional, reference


@both_threads
@pytest.mark.parametrize("name", ["dv", "infonce", "jsd"])
@pytest.mark.parametrize(("n", "p"), [(512, 1), (128, 49), (1024, 4)])
def bench_forward_backward(benchmark: Any, name: str, n: int, p: int, threads: int) -> None:
    T = normal(n, n, p).requires_grad_()
    bound = getattr(functional, name)

    def ours(scores: Tensor) -> Tensor:
        value: Tensor = bound(scores=scores)
        return value

    def plain(scores: Tensor) -> Tensor:
        value: Tensor = getattr(reference, name)(scores)
        return value

    def check() -> None:
        wide = T.detach().double().requires_grad_()
        check_twice(gradients(ours, T), gradients(plain, T), gradients(plain, wide))

    case = Case(
        op="score_stats",
        sizes={"bound": name, "N": n, "P": p},
        variants={
            "ours": lambda: torch.autograd.grad(ours(T), T),
            "eager": lambda: torch.autograd.grad(plain(T), T),
        },
        check=check,
        ratios={"eager / ours": Against("eager", "higher")},
        traffic=3.0 * T.nbytes,
        memory=("ours", "eager"),
    )
    measure(benchmark, case, threads)
