"""The normalised gradient step in the l2 ball."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import Against, Case, both_threads, check_twice, compiled, measure, normal
from timing import Call
from torch import Tensor

from wcmi_fast import functional, reference

EPS, STEP, CLIP = 0.5, 0.1, (0.0, 1.0)


def eager(x: Tensor, grad: Tensor, origin: Tensor) -> Tensor:
    """The step as PGD is mostly written; a NaN gradient spreads, a huge one overflows."""
    n, shape = len(x), (-1, *[1] * (x.dim() - 1))
    norm = torch.linalg.vector_norm(grad.reshape(n, -1), dim=1).clamp(min=1e-12)
    delta = x + STEP * grad / norm.view(shape) - origin
    size = torch.linalg.vector_norm(delta.reshape(n, -1), dim=1)
    delta = delta * (EPS / size.clamp(min=EPS)).view(shape)
    moved: Tensor = origin + delta
    return moved.clamp(*CLIP)


@both_threads
@pytest.mark.parametrize("shape", [(128, 1, 28, 28), (128, 3, 32, 32), (16, 3, 224, 224)])
def bench_a_batch(benchmark: Any, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    origin, grad = normal(*shape).sigmoid_(), normal(*shape, seed=1)
    x = origin.clone()
    step = partial(functional.l2_step_, eps=EPS, step_size=STEP, clip=CLIP)
    program = compiled(eager, x, grad, origin)

    def check() -> None:
        wide = [t.double() for t in (x, grad, origin)]
        exact = reference.l2_step_(*wide, eps=EPS, step_size=STEP, clip=CLIP)
        check_twice([step(x.clone(), grad, origin)], [eager(x, grad, origin)], [exact])

    variants: dict[str, Call] = {
        "ours": partial(step, x, grad, origin),
        "eager": partial(eager, x, grad, origin),
    }
    ratios = {"eager / ours": Against("eager", "higher")}
    if program is not None:
        variants["compiled"] = partial(program, x, grad, origin)
        ratios["compiled / ours"] = Against("compiled", "higher")
    case = Case(
        op="l2_step",
        sizes={"N": shape[0], "image": "x".join(map(str, shape[1:]))},
        variants=variants,
        check=check,
        ratios=ratios,
        traffic=4.0 * x.nbytes,
        rounds=25,
    )
    measure(benchmark, case, threads)
