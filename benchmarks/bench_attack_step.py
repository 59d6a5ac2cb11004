"""Steps of a whole attack on the encoder (encoder_only): CIFAR shapes, U = 2048, batch 128."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import authors
import pytest
import torch
from bench_critic_tail import attack_floor, products
from cases import Against, Case, both_threads, check_twice, measure, normal
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.models import BaselineH, DotCritic
from wcmi_fast.models.folding import folded

N, UNITS, SHAPE, DIM = 128, 2048, (3, 32, 32), 64
EPS, STEP = 8 / 255, 2 / 255
STEPS = 3

Gradient = Callable[[Tensor, Tensor], Tensor]


def networks() -> tuple[nn.Module, DotCritic, nn.Module]:
    """Return an encoder, our critic, and the authors' with the same weights, in eval mode."""
    torch.manual_seed(0)
    encoder, critic = BaselineH(SHAPE, dim=DIM).eval(), DotCritic(DIM, SHAPE, units=UNITS).eval()
    plain = authors.copied(authors.PlainDotCritic(DIM, 3, UNITS, (64, 128)), critic).eval()
    for module in (encoder, critic, plain):
        module.requires_grad_(False)
    return encoder, critic, plain


def authors_gradient(encoder: nn.Module, critic: nn.Module) -> Gradient:
    """Return the gradient of the negative bound; images reach the critic without history."""
    plain = cast(Any, critic)

    def gradient(x: Tensor, _: Tensor) -> Tensor:
        point = x.detach().requires_grad_()
        with torch.no_grad():
            l = plain.local(x)  # noqa: E741
        T = authors.scores(plain.global_(encoder(point)), l)
        return torch.autograd.grad(-authors.dv(T), point)[0]

    return gradient


def attack(
    x: Tensor, features: Callable[[Tensor], Tensor], gradient: Gradient, every: int
) -> Tensor:
    """Make STEPS steps from x; the images' side of the critic is computed every `every` steps."""
    x_adv, h = x.clone(), x
    for k in range(STEPS):
        if k % every == 0:
            with torch.no_grad():
                h = features(x_adv)
        grad = gradient(x_adv, h)
        functional.linf_step_(x_adv, grad, x, eps=EPS, step_size=STEP)
    return x_adv


def steps_floor(every: int) -> Callable[[nn.Module, Tensor], None]:
    """Return what the steps cannot do without: the encoder, and bare products of the critic.

    Of the critic that is the block with its factor and the scores where the x side is computed, and
    in each step the scores' other product and the z side's four with U x U weights, two of them
    backward.
    """
    view = attack_floor(UNITS, backward=False)
    z, grad = normal(N, UNITS), normal(N, N * 64)
    weights, h = normal(UNITS, UNITS), normal(N * 64, UNITS)
    per_step = products([*4 * [(z, weights)], (grad, h)])

    def floor(encoder: nn.Module, x: Tensor) -> None:
        for k in range(STEPS):
            point = x.clone().requires_grad_()
            torch.autograd.grad(encoder(point).sum(), point)
            view() if k % every == 0 else torch.mm(z, h.t())
            per_step()

    return floor


@both_threads
@pytest.mark.parametrize("every", [1, 3])
def bench_steps(benchmark: Any, every: int, threads: int) -> None:
    """Three steps; the x side computed at each (exact), or at the first only."""
    encoder, critic, plain = networks()
    x = normal(N, *SHAPE).sigmoid_()
    fast, view = folded(encoder), critic.frozen()

    def gradient(v: Tensor, h: Tensor) -> Tensor:
        point = v.detach().requires_grad_()
        value = functional.dv(view.z_side(fast(point)), h, diagonal="zero")
        return torch.autograd.grad(-value, point)[0]

    def none(v: Tensor) -> Tensor:
        return v

    def authors_steps() -> Tensor:
        return attack(x, none, authors_gradient(encoder, plain), STEPS)

    def check() -> None:
        ours = gradient(x, view.x_side(x)).double()
        doubles = copy.deepcopy(encoder).double(), copy.deepcopy(plain).double()
        exact = authors_gradient(*doubles)(x.double(), x)
        same = authors_gradient(encoder, plain)(x, x).double()
        # ReLUs have kinks, so that equally good gradients differ by more than rounding.
        check_twice([ours], [same], [exact], tiny=2e-3)

    case = Case(
        op="attack_step",
        sizes={"steps": STEPS, "x side every": every, "N": N, "P": 64, "U": UNITS},
        variants={
            "ours": lambda: attack(x, view.x_side, gradient, every),
            "authors": authors_steps,
            "floor": partial(steps_floor(every), fast, x),
        },
        check=check,
        ratios={
            "authors / ours": Against("authors", "higher", 2.0 if every == 1 else 4.0),
            "authors / floor": Against("authors", "higher", ours="floor"),
        },
        memory=("ours", "authors"),
        rounds=5,
    )
    measure(benchmark, case, threads)
