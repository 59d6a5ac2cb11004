"""The projected sign step, in cache and out of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import Against, Case, Program, both_threads, compiled, measure, normal
from torch import Tensor

from wcmi_fast import functional, reference

EPS, STEP, CLIP = 8 / 255, 1 / 255, (0.0, 1.0)


def eager(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    """The step as PGD is mostly written; a NaN gradient spreads."""
    return torch.clamp(x + STEP * grad.sign(), origin - EPS, origin + EPS).clamp(*CLIP)


def operands(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Return images, a gradient, and the images' origin."""
    origin = normal(*shape).sigmoid_().to(dtype)
    return [origin.clone(), normal(*shape, seed=1, dtype=dtype), origin]


def ours(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    return functional.linf_step_(x, grad, origin, eps=EPS, step_size=STEP, clip=CLIP)


def check(x: Tensor, grad: Tensor, origin: Tensor) -> None:
    plain = reference.linf_step_(x.clone(), grad, origin, eps=EPS, step_size=STEP, clip=CLIP)
    assert torch.equal(ours(x.clone(), grad, origin), plain)


def step_case(tensors: list[Tensor], programs: dict[str, Program | None], **more: Any) -> Case:
    found = {name: program for name, program in programs.items() if program is not None}
    return Case(
        op="linf_step",
        sizes={"elements": tensors[0].numel(), "dtype": str(tensors[0].dtype).split(".")[1]},
        variants={name: partial(program, *tensors) for name, program in found.items()},
        check=partial(check, *tensors),
        traffic=4.0 * tensors[0].nbytes,
        **more,
    )


@both_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_a_batch(benchmark: Any, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    tensors = operands(128, 3, 32, 32, dtype=dtype)
    programs = {"ours": ours, "eager": eager, "compiled": compiled(eager, *tensors)}
    target = 5.0 if threads == 1 and dtype == torch.float32 else None
    ratios = {"eager / ours": Against("eager", "higher", target)}
    if programs["compiled"] is not None:
        ratios["compiled / ours"] = Against("compiled", "higher")
    measure(benchmark, step_case(tensors, programs, ratios=ratios, rounds=25), threads)


@both_threads
def bench_memory(benchmark: Any, threads: int) -> None:
    """2**26 elements; the triad's three arrays are read or written as often as ours are.

    Ours reads three and writes one of them; a triad reads two, and writes one whose lines are read
    first. So 80 % of its bandwidth is 1.25 of its time.
    """
    tensors = operands(1 << 26, dtype=torch.float32)
    scratch = torch.empty(1 << 26)

    def triad(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
        return torch.add(grad, origin, alpha=0.5, out=scratch)

    ratios = {
        "ours / triad": Against("triad", target=1.25),
        "eager / ours": Against("eager", "higher"),
    }
    programs: dict[str, Program | None] = {"ours": ours, "triad": triad, "eager": eager}
    measure(benchmark, step_case(tensors, programs, ratios=ratios), threads)
