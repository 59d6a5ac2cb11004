"""The bounds from features: the statistics of T in one sweep, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import authors
import pytest
import torch
from cases import (
    Against,
    Case,
    Program,
    both_threads,
    check_twice,
    compiled,
    gradients,
    measure,
    normal,
)
from torch import Tensor

from wcmi_fast import functional, reference

SIZES = [(64, 1, 64), (128, 49, 512), (128, 64, 2048), (512, 1, 2048), (1024, 49, 64)]
PAPER = (128, 64, 2048)


def operands(n: int, p: int, u: int) -> tuple[Tensor, Tensor]:
    """Return z (N, U) and h (N, P, U) whose scores are of order one."""
    return normal(n, u) * u**-0.25, normal(n, p, u, seed=1) * u**-0.25


def eager(name: str, z: Tensor, h: Tensor) -> Tensor:
    value: Tensor = getattr(reference, name)(reference.scores(z, h))
    return value


def exact(name: str, z: Tensor, h: Tensor, leaves: int) -> list[Tensor]:
    """Return value and gradients in float64, a location at a time: every bound is their mean."""
    z, h = z.detach().double(), h.detach().double()
    found = []
    for p in range(h.shape[1]):
        point = [z.requires_grad_(), h[:, p : p + 1].clone().requires_grad_()][:leaves]
        other = [h[:, p : p + 1]] if leaves == 1 else []
        program = partial(_with, partial(eager, name), other)
        found.append(gradients(program, *point))
    value, dz = (torch.stack([f[k] for f in found]).mean(0) for k in (0, 1))
    dh = [torch.cat([f[2] for f in found], dim=1) / h.shape[1]] if leaves == 2 else []
    return [value, dz, *dh]


def _with(program: Program, others: list[Tensor], *points: Tensor) -> Tensor:
    return program(*points, *others)


def floor(z: Tensor, h: Tensor, leaves: int, *, recomputed: bool) -> Callable[[], None]:
    """Return the bare products: T forward, one per gradient, and T once more where recomputed."""
    n, p, u = h.shape
    rows, T, grad = h.view(n * p, u), torch.empty(n, n * p), normal(n, n * p, seed=2)

    def products() -> None:
        torch.mm(z, rows.t(), out=T)
        if recomputed:
            torch.mm(z, rows.t(), out=T)
        torch.mm(grad, rows)
        if leaves == 2:
            torch.mm(grad.t(), z)

    return products


def authors_form(z: Tensor, h: Tensor, leaves: int) -> Callable[[], object]:
    """Return the authors' program on the same numbers in their layout (N, U, P)."""
    m = z.detach().clone().requires_grad_()
    l = h.detach().transpose(1, 2).contiguous().requires_grad_(leaves == 2)  # noqa: E741
    points = [m, l][:leaves]
    return lambda: torch.autograd.grad(authors.dv(authors.scores(m, l)), points)


def forward_backward(
    name: str, size: tuple[int, int, int], leaves: int, floor_target: float | None, **more: Any
) -> Case:
    """Return a bound's value and gradients, to z alone (1 leaf) or to z and h (2)."""
    n, p, u = size
    z, h = operands(*size)
    z.requires_grad_()
    h.requires_grad_(leaves == 2)
    points = [z, h][:leaves]
    ours, plain = getattr(functional, name), partial(eager, name)
    recomputed = n * n * p * 4 > functional.bounds.KEPT_SCORES_BYTES
    products = 1 + leaves + recomputed

    def check() -> None:
        others = [h][: 2 - leaves]
        found = gradients(partial(_with, ours, others), *points)
        same = gradients(partial(_with, plain, others), *points)
        check_twice(found, same, exact(name, z, h, leaves))

    fits = n * n * p < 2**27
    eagerly = {"eager": lambda: torch.autograd.grad(plain(z, h), points)} if fits else {}
    return Case(
        op="critic_stats",
        sizes={"bound": name, "to": "z" if leaves == 1 else "z, h", "N": n, "P": p, "U": u},
        variants={
            "ours": lambda: torch.autograd.grad(ours(z, h), points),
            **eagerly,
            **more.pop("variants", {}),
            "floor": floor(z.detach(), h.detach(), leaves, recomputed=recomputed),
        },
        check=check,
        ratios={
            "ours / floor": Against("floor", target=floor_target),
            **({"eager / ours": Against("eager", "higher")} if fits else {}),
            **more.pop("ratios", {}),
        },
        flop=2.0 * products * n * n * p * u,
        **more,
    )


@both_threads
@pytest.mark.parametrize("size", SIZES)
def bench_dv_to_z(benchmark: Any, size: tuple[int, int, int], threads: int) -> None:
    z, h = operands(*size)
    z.requires_grad_()
    torch.set_num_threads(threads)
    program = compiled(partial(eager, "dv"), z, h)
    fast = {} if program is None else {"compiled": lambda: torch.autograd.grad(program(z, h), z)}
    paper = size == PAPER
    case = forward_backward(
        "dv", size, 1, 1.25 if paper else None,
        variants={"authors": authors_form(z, h, 1), **fast},
        ratios={
            "authors / ours": Against("authors", "higher", 3.0 if paper else None),
            **({"compiled / ours": Against("compiled", "higher")} if fast else {}),
        },
        memory=("ours", "eager", "authors"),
    )  # fmt: skip
    measure(benchmark, case, threads)


@both_threads
@pytest.mark.parametrize("size", [PAPER, (1024, 49, 64)])
def bench_dv_to_z_and_h(benchmark: Any, size: tuple[int, int, int], threads: int) -> None:
    z, h = operands(*size)
    case = forward_backward(
        "dv", size, 2, 1.3 if size == PAPER else None,
        variants={"authors": authors_form(z, h, 2)},
        ratios={"authors / ours": Against("authors", "higher")},
        memory=("ours", "eager", "authors"),
    )  # fmt: skip
    measure(benchmark, case, threads)


@both_threads
@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("name", ["infonce", "nwj", "jsd"])
def bench_other_bounds(benchmark: Any, name: str, leaves: int, threads: int) -> None:
    measure(benchmark, forward_backward(name, PAPER, leaves, 1.4), threads)


@both_threads
@pytest.mark.parametrize("names", [("dv", "infonce", "nwj"), ("dv", "jsd", "smile")])
def bench_three_bounds(benchmark: Any, names: tuple[str, ...], threads: int) -> None:
    n, p, u = PAPER
    z, h = operands(*PAPER)
    tau = {"tau": 2.0} if "smile" in names else {}

    def separate(a: Tensor, b: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"smile": tau}
        T = reference.scores(a, b)
        return [getattr(reference, name)(T, **options.get(name, {})) for name in names]

    def together() -> list[Tensor]:
        stats = functional.critic_stats(z, h, which=names, **tau)  # type: ignore[arg-type]
        options: dict[str, Any] = {"smile": tau}
        return [getattr(functional, k)(stats=stats, **options.get(k, {})) for k in names]

    case = Case(
        op="critic_stats",
        sizes={"bounds": ", ".join(names), "N": n, "P": p, "U": u},
        variants={
            "ours": together,
            "one bound": lambda: functional.dv(z, h),
            "eager": lambda: separate(z, h),
        },
        check=lambda: check_twice(together(), separate(z, h), separate(z.double(), h.double())),
        ratios={
            "ours / one bound": Against("one bound", target=1.15),
            "eager / ours": Against("eager", "higher"),
        },
        flop=2.0 * n * n * p * u,
    )
    measure(benchmark, case, threads)


@both_threads
def bench_scores_that_do_not_fit(benchmark: Any, threads: int) -> None:
    """T alone would be 1 GiB; the gradients that are returned are 65 MiB."""
    n, p, u = 2048, 64, 128
    results = 4 * (n * u + n * p * u)
    case = forward_backward(
        "dv", (n, p, u), 2, 1.4, memory=("ours",), peak_target=(64 << 20) + results, rounds=5
    )  # fmt: skip
    measure(benchmark, case, threads)


@both_threads
@pytest.mark.parametrize("n", [64, 256, 1024])
def bench_against_n(benchmark: Any, n: int, threads: int) -> None:
    """The same at smaller N, where plain torch can store T."""
    case = forward_backward(
        "dv", (n, 64, 128), 2, None, memory=("ours", "eager"), rounds=5 if n == 1024 else 9
    )  # fmt: skip
    measure(benchmark, case, threads)


@both_threads
def bench_growth(benchmark: Any, threads: int) -> None:
    """N = 4096 once, and smaller N so often that as many pairs are compared."""
    p, u, counts = 64, 128, (512, 2048, 4096)
    variants = {}
    for n in counts:
        z, h = (x.requires_grad_() for x in operands(n, p, u))
        repeats = (counts[-1] // n) ** 2
        variants[f"{repeats} x N={n}"] = _repeated(z, h, repeats)
    first, *_, last = variants

    def check() -> None:
        for n in counts[:1]:
            z, h = (x.requires_grad_() for x in operands(n, p, u))
            found, same = gradients(functional.dv, z, h), gradients(partial(eager, "dv"), z, h)
            check_twice(found, same, exact("dv", z, h, 2))

    case = Case(
        op="critic_stats",
        sizes={"bound": "dv", "to": "z, h", "growth to N": 4096, "P": p, "U": u},
        variants={"ours": variants.pop(last), **variants},
        check=check,
        ratios={
            f"N=4096 / {name}": Against(name, target=1.15 if name == first else None)
            for name in variants
        },
        flop=2.0 * 4 * 4096**2 * p * u,
        rounds=3,
    )
    measure(benchmark, case, threads)


def _repeated(z: Tensor, h: Tensor, repeats: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(repeats):
            torch.autograd.grad(functional.dv(z, h), (z, h))

    return calls


@both_threads
def bench_tiny(benchmark: Any, threads: int) -> None:
    n, p, u = 4, 1, 8
    z, h = (x.requires_grad_() for x in operands(n, p, u))
    own = ~torch.eye(n, dtype=torch.bool)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        """The program in dv's docstring."""
        T = torch.einsum("iu,jpu->ijp", a, b)
        joint = T[own].logsumexp(0)
        return (T.diagonal().t().mean(0) - joint + math.log(n * (n - 1))).mean()

    def check() -> None:
        found, same = gradients(functional.dv, z, h), gradients(plain, z, h)
        check_twice(found, same, exact("dv", z, h, 2))

    case = Case(
        op="critic_stats",
        sizes={"bound": "dv", "to": "z, h", "N": n, "P": p, "U": u},
        variants={
            "ours": lambda: torch.autograd.grad(functional.dv(z, h), (z, h)),
            "docstring": lambda: torch.autograd.grad(plain(z, h), (z, h)),
            "eager": lambda: torch.autograd.grad(eager("dv", z, h), (z, h)),
        },
        check=check,
        ratios={
            "ours / docstring": Against("docstring", target=1.0),
            "ours / eager": Against("eager", target=1.0),
        },
        rounds=25,
    )
    measure(benchmark, case, threads)
