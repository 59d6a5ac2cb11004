"""The critic's 1x1 block from location features (N, C, H, W) on: training, and attack mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import authors
import pytest
import torch
from cases import Against, Case, both_threads, check_twice, measure, normal
from timing import Call
from torch import Tensor, nn

from wcmi_fast.models import DotCritic, dot_critic

N, CHANNELS, SIDE, DIM = 128, 128, 8, 64
UNITS = [256, 2048]

# Among 16 million hidden units some are within rounding of the ReLU's kink, and on either side of
# it by luck: each changes one location's gradient by some percent, and all gradients by 3e-4.
KINKS = 2e-3


def critics(units: int) -> tuple[DotCritic, Any]:
    """Return our critic and the authors' with the same weights, without their convolutions."""
    torch.manual_seed(0)
    ours = DotCritic(DIM, (3, 4 * SIDE, 4 * SIDE), units=units)
    ours.local.convolutions = nn.Sequential()
    ours.local.input_shape = (CHANNELS, SIDE, SIDE)
    plain = authors.PlainDotCritic(DIM, 3, units, (64, CHANNELS))
    plain.local.layers = nn.Sequential()
    authors.copied(plain, ours)
    return ours, plain


def operands() -> tuple[Tensor, Tensor]:
    """Return representations (N, D) and location features (N, C, H, W)."""
    return normal(N, DIM), normal(N, CHANNELS, SIDE, SIDE, seed=1).relu_()


def flop(units: int, passes: int) -> float:
    """Count the products of the block on all rows; backward there are two for each forward."""
    return 2.0 * passes * N * SIDE**2 * (units * units + 2 * CHANNELS * units)


def products(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Return the bare products of pairs."""

    def floor() -> None:
        for a, b in pairs:
            torch.mm(a, b)

    return floor


def training_floor(units: int) -> Callable[[], None]:
    """Return the products of the block, forward and backward."""
    rows, hidden, dv = normal(N * SIDE**2, CHANNELS), *normal(2, N * SIDE**2, units, seed=1)
    w1, w2 = normal(units, CHANNELS), normal(units, units)
    forward = [(rows, w1.t()), (hidden, w2.t()), (rows, w1.t())]
    to_rows = [(dv, w2), (hidden, w1), (dv, w1)]
    to_weights = [(dv.t(), hidden), (dv.t(), rows), (hidden.t(), rows)]
    return products(forward + to_rows + to_weights)


def attack_floor(units: int, backward: bool) -> Callable[[], None]:
    """Return the products of a view with a factor: hidden layer, norm and scores; and back."""
    rows, w1, z = (
        normal(N * SIDE**2, CHANNELS),
        normal(units, CHANNELS),
        normal(N, units + CHANNELS),
    )
    y, dT = normal(len(rows), units + CHANNELS), normal(len(rows), N)
    block = dot_critic.FACTOR_BLOCK
    parts = [(y[:, k:], normal(block, y.shape[1] - k)) for k in range(0, units, block)]
    forward = [(rows, w1.t()), (z, y.t()), *((some, r.t()) for some, r in parts)]
    q, hidden = normal(len(rows), block), y[:, :units]
    back = [(dT, z), (hidden, w1), *((q, r) for _, r in parts)] if backward else []
    return products(forward + back)


def grads(features: Tensor, leaves: list[Tensor], d: Tensor) -> list[Tensor]:
    return [features.detach(), *torch.autograd.grad(features, leaves, d)]


@both_threads
@pytest.mark.parametrize("units", UNITS)
def bench_training(benchmark: Any, units: int, threads: int) -> None:
    """The block alone, forward and backward to its input and all of its weights.

    The affine part of the layer norm is on the other side of ours; in the plain module it comes
    last, after the weights that both have.
    """
    ours, whole = critics(units)
    plain = whole.local.train()
    exact = copy.deepcopy(plain).double()
    x = operands()[1].requires_grad_()
    weights = list(ours.train().local.block.parameters())[:-2]
    dmaps = normal(N, units, SIDE, SIDE, seed=2)
    drows = torch.cat([_rows(dmaps), torch.zeros(N, SIDE**2, 16)], dim=2)

    def run_ours() -> list[Tensor]:
        return grads(ours.x_side(x), [x, *weights], drows)

    def run_plain(module: nn.Module = plain, v: Tensor = x, d: Tensor = dmaps) -> list[Tensor]:
        return grads(module(v), [v, *module.parameters()], d)

    def check() -> None:
        features, *found = run_ours()
        v = x.detach().double().requires_grad_()
        same, wanted = run_plain(), run_plain(exact, v, dmaps.double())
        flat = [part.reshape(of.shape) for part, of in zip(found, wanted[1:-2], strict=True)]
        check_twice([features[..., :units], *flat], _comparable(same), _comparable(wanted), KINKS)

    paper = units == UNITS[-1]
    case = Case(
        op="critic_tail",
        sizes={"mode": "training, forward + backward", "N": N, "P": SIDE**2, "U": units},
        variants={"ours": run_ours, "module": run_plain, "floor": training_floor(units)},
        check=check,
        ratios={
            "module / ours": Against("module", "higher", 1.5 if paper else None),
            "module / floor": Against("module", "higher", ours="floor"),
        },
        flop=flop(units, 3),
        memory=("ours", "module"),
        peak_share=0.5 if paper else None,
        rounds=7,
    )
    measure(benchmark, case, threads)


def _rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def _comparable(results: list[Tensor]) -> list[Tensor]:
    """Return the plain module's results in our order and layout, without the affine part."""
    return [_rows(results[0]), *results[1:-2]]


@both_threads
@pytest.mark.parametrize("units", [256, dot_critic.TRIANGULAR_UNITS, 2048])
def bench_attack_forward(benchmark: Any, units: int, threads: int) -> None:
    """To scores, without gradients; making the view is not part of it, as of no attack step."""
    ours, plain = (module.eval() for module in critics(units))
    views = {flag: ours.frozen(triangular=flag) for flag in (False, True)}
    view = ours.frozen()
    exact, (g, x) = copy.deepcopy(plain).double(), operands()

    def without_gradients(scores: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return scores(g, x)

    def check() -> None:
        same, wanted = without_gradients(plain), exact(g.double(), x.double()).detach()
        for scores in (view.scores, *(v.scores for v in views.values()), ours.scores):
            check_twice([without_gradients(scores)], [same], [wanted])

    programs = {
        "ours": view.scores,
        "ours, no factor": views[False].scores,
        "ours, factor": views[True].scores,
        "ours, not frozen": ours.scores,
        "module": plain,
    }
    calls: dict[str, Call] = {
        name: partial(without_gradients, scores) for name, scores in programs.items()
    }
    case = Case(
        op="critic_tail",
        sizes={"mode": "attack, forward", "N": N, "P": SIDE**2, "U": units},
        variants={**calls, "floor": attack_floor(units, backward=False)},
        check=check,
        ratios={
            "module / ours": Against("module", "higher", 2.0 if units == UNITS[-1] else None),
            "module / floor": Against("module", "higher", ours="floor"),
        },
        flop=flop(units, 1),
        memory=("ours", "module"),
    )
    measure(benchmark, case, threads)


@both_threads
@pytest.mark.parametrize("units", UNITS)
def bench_attack_backward(benchmark: Any, units: int, threads: int) -> None:
    """To scores and back to the block's input, as critic_grad="full" needs it."""
    ours, plain = (module.eval().requires_grad_(False) for module in critics(units))
    view, exact = ours.frozen(), copy.deepcopy(plain).double()
    g, x = operands()
    x.requires_grad_()
    dT = normal(N, N, SIDE**2, seed=2)

    def run(scores: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return grads(scores(g, x), [x], dT)

    def check() -> None:
        v = x.detach().double().requires_grad_()
        wanted = grads(exact(g.double(), v), [v], dT.double())
        check_twice(run(view.scores), run(plain), wanted, tiny=KINKS)

    case = Case(
        op="critic_tail",
        sizes={"mode": "attack, forward + backward", "N": N, "P": SIDE**2, "U": units},
        variants={
            "ours": partial(run, view.scores),
            "module": partial(run, plain),
            "floor": attack_floor(units, backward=True),
        },
        check=check,
        ratios={
            "module / ours": Against("module", "higher", 1.7 if units == UNITS[-1] else None),
            "module / floor": Against("module", "higher", ours="floor"),
        },
        flop=flop(units, 2),
        memory=("ours", "module"),
    )
    measure(benchmark, case, threads)


@both_threads
@pytest.mark.parametrize("units", [dot_critic.TRIANGULAR_UNITS, 2048])
def bench_freezing(benchmark: Any, units: int, threads: int) -> None:
    """What making a view costs, once per attack, and asking whether it is stale, once per call."""
    ours = critics(units)[0].eval()
    view, g = ours.frozen(), operands()[0]
    x = operands()[1]

    def check() -> None:
        torch.testing.assert_close(view.scores(g, x), ours.scores(g, x), rtol=1e-3, atol=1e-3)

    case = Case(
        op="critic_tail",
        sizes={"mode": "freezing", "U": units},
        variants={
            "ours": ours.frozen,
            "no factor": lambda: ours.frozen(triangular=False),
            "stale check": view._check_fresh,
            "one step's scores": lambda: view.scores(g, x),
        },
        check=check,
        ratios={"view / one step's scores": Against("one step's scores")},
    )
    with torch.no_grad():
        measure(benchmark, case, threads)
