"""torchattacks' and foolbox' PGD (l-infinity) beside ours: same model, steps, size and start."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peer_case import Case, Values, peer_runs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast.attacks import PGD

PROGRAMS = {"torchattacks": "PGD", "foolbox": "LinfPGD.run"}
EPS, STEP_SIZE, STEPS = 8 / 255, 0.005, 10
# A model and its images: one that bends, and two of no cost of their own.
CASES = (
    ("convnet", (16, 3, 32, 32)),
    ("linear", (128, 3, 32, 32)),
    ("linear", (1, 1, 8, 8)),
)
# Theirs rounds the difference x_adv - x, and x plus it; ours neither.
ROUNDINGS_PER_STEP = 2

NOTES = f"""\
{STEPS} steps of {STEP_SIZE}, eps = 8/255, from the clean images, in eval mode with frozen weights
(foolbox would fill the weights' gradients too). Every iterate is compared in float64; in float32
the first, as later ones may differ by the sign of a gradient that is zero but for rounding. The
peers project by x + clamp(x_adv - x, -eps, eps), which rounds twice more than ours,
clamp(x_adv, x - eps, x + eps): iterates within {ROUNDINGS_PER_STEP} roundings a step are the same.

Times are per step, a call's fixed cost spread over its steps; the overhead is the time beyond the
gradients alone. `LinfPGD.run` leaves out that foolbox' `__call__` evaluates the result once."""

Attack = Callable[[], Tensor]


def model(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """Return a model of 10 classes in eval mode with frozen weights; the same at every call."""
    _, channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"linear": _linear, "convnet": _convnet}[kind](channels, height, width)
    return nn.Sequential(*layers).to(dtype).eval().requires_grad_(False)


def _linear(channels: int, height: int, width: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(channels * height * width, 10)]


def _convnet(channels: int, height: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        # 32 channels at a quarter of the height and of the width.
        nn.Linear(32 * (height // 4) * (width // 4), 10),
    ]


def images(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1] and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, shape[:1], generator=generator)


def ours(net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
    """Return our attack, ready to run."""
    pgd = PGD(eps=EPS, step_size=STEP_SIZE, steps=steps)
    return lambda: pgd.attack(
        lambda v: cross_entropy(net(v), labels, reduction="sum"), x, modules=[net]
    )


def theirs(peer: str, net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
    """Return a peer's attack, ready to run."""
    library: Any = importlib.import_module(peer)
    if peer == "torchattacks":
        pgd = library.PGD(net, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=False)
        return lambda: pgd(x, labels)
    run = library.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=False).run
    bounded = library.PyTorchModel(net, bounds=(0, 1), device=x.device)
    criterion = library.criteria.Misclassification(labels)
    return lambda: run(bounded, x, criterion, epsilon=EPS)


def gradients(net: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Callable[[], None]:
    """Return the gradients of an attack's steps, without the steps."""

    def run() -> None:
        for _ in range(steps):
            point = x.detach().requires_grad_()
            torch.autograd.grad(cross_entropy(net(point), labels, reduction="sum"), point)

    return run


def check(peer: str, kind: str, shape: tuple[int, ...]) -> Values:
    """Compare the iterates 1 to STEPS in float64, the first in float32; errors in roundings."""
    errors = []
    for dtype, last in ((torch.float64, STEPS), (torch.float32, 1)):
        net, (x, labels) = model(kind, shape, dtype), images(shape, dtype)
        for steps in range(1, last + 1):
            wanted = ours(net, x, labels, steps)()
            with peer_runs():
                found = theirs(peer, net, x, labels, steps)()
            # Below 2 a rounding is at most eps / 2.
            rounding = torch.finfo(dtype).eps / 2
            errors.append((found - wanted).abs().max().double() / (rounding * steps))
    return Values(f"iterates 1 to {STEPS}", float(torch.stack(errors).max()), ROUNDINGS_PER_STEP)


def cases(peer: str) -> Iterator[Case]:
    """Yield every comparison with one peer, which must be importable."""
    for kind, shape in CASES:
        yield case(peer, kind, shape)


def case(peer: str, kind: str, shape: tuple[int, ...]) -> Case:
    """Return the comparison of the attack on one model."""
    net, (x, labels) = model(kind, shape, torch.float32), images(shape, torch.float32)
    with peer_runs():
        attack = theirs(peer, net, x, labels, STEPS)
    return Case(
        peer=peer,
        program=PROGRAMS[peer],
        name=kind,
        size="x".join(map(str, shape)),
        definition="same",
        check=partial(check, peer, kind, shape),
        programs={
            "ours": ours(net, x, labels, STEPS),
            "theirs": attack,
            "gradient": gradients(net, x, labels, STEPS),
        },
        steps=STEPS,
    )
