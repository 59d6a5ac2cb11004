"""The random start of an attack, from a counter-based generator."""

from __future__ import annotations

from typing import Any

import torch
from cases import Against, Case, both_threads, measure, normal
from torch import Tensor

from wcmi_fast import functional, reference

EPS, CLIP = 8 / 255, (0.0, 1.0)


def eager(x: Tensor, origin: Tensor) -> Tensor:
    """The start as PGD is mostly written, with torch's sequential generator."""
    return (origin + torch.empty_like(x).uniform_(-EPS, EPS)).clamp_(*CLIP)


@both_threads
def bench_a_batch(benchmark: Any, threads: int) -> None:
    origin = normal(128, 3, 32, 32).sigmoid_()
    x = torch.empty_like(origin)

    def ours() -> Tensor:
        return functional.linf_start_(x, origin, eps=EPS, seed=7, clip=CLIP)

    def check() -> None:
        wanted = reference.linf_start_(x.clone(), origin, eps=EPS, seed=7, clip=CLIP)
        assert torch.equal(ours(), wanted)

    case = Case(
        op="linf_start",
        sizes={"elements": x.numel()},
        variants={"ours": ours, "eager": lambda: eager(x, origin)},
        check=check,
        ratios={"eager / ours": Against("eager", "higher")},
        traffic=2.0 * x.nbytes,
        rounds=25,
    )
    measure(benchmark, case, threads)
