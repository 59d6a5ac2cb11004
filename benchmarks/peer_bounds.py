"""torch-mist's estimators beside our bounds, on the same dot-product critic."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peer_case import Case, Values, peer_runs
from torch import Tensor
from torch.nn.functional import softplus

from wcmi_fast import functional, reference

PEER = "torch-mist"
# N, U: small, many images, and the paper's U. torch-mist takes one vector per image: P = 1.
SIZES = ((128, 128), (1024, 256), (128, 2048))
TAU = 1.0
# Errors are counted in roundings; up to ROUNDINGS a value is the same.
ROUNDINGS = 4

NOTES = f"""\
torch-mist has one vector per image, so P = 1. It draws one negative per image unless told
otherwise; `neg_samples=-1` takes all j != i, `0` (InfoNCE's default) all j. smile has tau = {TAU}.

- *one product*: a subclass of its `SeparableCritic` that computes all pairs by one `torch.mm`.
- *as shipped*: `SeparableCritic()`, which expands both sides to (N, N, U) first.
- *general critic*: a `Critic` that is not separable; the N - 1 others are gathered.

It has no class named after Donsker and Varadhan: `MINE.mutual_information` is that bound, its loss
is not. `JS` returns a loss: jsd is 2 log 2 - loss. With `neg_samples=-1` and a separable critic its
loss, which gives `SMILE` its gradient too, **keeps the N positive pairs among the negatives** (only
`approx_log_partition` removes the diagonal); with a general critic it does not. `SMILE` gives the
value and the gradient by two methods; the time is that of the loss, ours is of both."""

Program = Callable[[Tensor, Tensor], Tensor]


class Result(NamedTuple):
    value: Tensor
    dz: Tensor
    dh: Tensor


class Definition(NamedTuple):
    """A bound as a formula of T (N, N, 1): its value, and what its gradient is that of."""

    value: Callable[[Tensor], Tensor]
    carrier: Callable[[Tensor], Tensor]


class Theirs(NamedTuple):
    written: str
    value: Program
    carrier: Program


def jsd_with_own_pairs(T: Tensor) -> Tensor:
    """Return jsd with the positive pairs among the negatives too."""
    positive = softplus(-reference.positive_scores(T)).mean()
    return 2 * math.log(2) - positive - softplus(T).mean()


_smile = partial(reference.smile, tau=TAU)
OURS: dict[str, Program] = {
    "dv": functional.dv,
    "nwj": functional.nwj,
    "infonce": functional.infonce,
    "jsd": functional.jsd,
    "smile": partial(functional.smile, tau=TAU),
}
OUR_DEFINITIONS = {
    "dv": Definition(reference.dv, reference.dv),
    "nwj": Definition(reference.nwj, reference.nwj),
    "infonce": Definition(reference.infonce, reference.infonce),
    "jsd": Definition(reference.jsd, reference.jsd),
    "smile": Definition(_smile, reference.jsd),
}
# Where theirs are others: the definition, and how the table words it.
WITH_OWN_PAIRS = {
    "jsd": (
        Definition(jsd_with_own_pairs, jsd_with_own_pairs),
        "own pairs also among the negatives",
    ),
    "smile": (
        Definition(_smile, jsd_with_own_pairs),
        "value same; gradient with own pairs also among the negatives",
    ),
}
FORMS = {"product": "one product", "shipped": "as shipped", "general": "general critic"}


def features(n: int, u: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return z, h (N, U), leaves, whose scores are about 2 higher on the diagonal than off it."""
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, n, u, generator=generator, dtype=torch.float64) / u**0.25
    h = noise + z * (2 / u**0.5)
    return z.to(dtype).requires_grad_(), h.to(dtype).requires_grad_()


def critic(form: str) -> Any:
    """Return torch-mist's dot-product critic in one of FORMS."""
    critics = importlib.import_module("torch_mist.critic")

    class OneProduct(critics.SeparableCritic):  # type: ignore[name-defined]
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            # x is (1, N, U) and y (N, 1, U) where all pairs are wanted.
            return y[:, 0] @ x[0].t() if x.dim() == 3 else (x * y).sum(-1)

    class General(critics.Critic):  # type: ignore[name-defined]
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum(-1)

    return {"product": OneProduct, "shipped": critics.SeparableCritic, "general": General}[form]()


def estimators(form: str) -> dict[str, Theirs]:
    """Return torch-mist's estimators on a new critic, by the names of our bounds."""
    mist = importlib.import_module("torch_mist.estimators.discriminative")
    dv = mist.MINE(critic(form), neg_samples=-1).mutual_information
    nwj = mist.NWJ(critic(form), neg_samples=-1).mutual_information
    infonce = mist.InfoNCE(critic(form), neg_samples=0).mutual_information
    js = mist.JS(critic(form), neg_samples=-1)
    smile = mist.SMILE(critic(form), neg_samples=-1, tau=TAU)
    jsd = partial(_from_loss, js)
    return {
        "dv": Theirs("MINE.mutual_information", dv, dv),
        "nwj": Theirs("NWJ.mutual_information", nwj, nwj),
        "infonce": Theirs("InfoNCE.mutual_information", infonce, infonce),
        "jsd": Theirs("2 log 2 - JS.loss", jsd, jsd),
        "smile": Theirs(
            "SMILE.mutual_information, .loss", smile.mutual_information, partial(_from_loss, smile)
        ),
    }


def _from_loss(estimator: Any, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = estimator.loss(x, y)
    return 2 * math.log(2) - loss


def result(value: Program, carrier: Program, z: Tensor, h: Tensor) -> Result:
    """Return a bound's value, and the gradients of z and h."""
    return Result(value(z, h).detach(), *torch.autograd.grad(carrier(z, h), (z, h)))


def defined(definition: Definition, z: Tensor, h: Tensor) -> Result:
    """Return what a definition gives."""
    return result(
        lambda a, b: definition.value(reference.scores(a, b[:, None])),
        lambda a, b: definition.carrier(reference.scores(a, b[:, None])),
        z,
        h,
    )


def roundings(got: Result, exact: Result, z: Tensor, h: Tensor) -> float:
    """Return the largest error of got, in roundings of its dtype; NaN if anything is NaN.

    A value's unit is the rounding of a score's largest sum of |products|. A gradient consists of
    weights exp(T - ...), whose relative errors are the scores' absolute ones.
    """
    score = 1 + (z.detach().double().abs() @ h.detach().double().abs().t()).max()
    unit = torch.finfo(got.value.dtype).eps * score
    gradients = [
        (a - b).abs().max() / b.abs().max() for a, b in zip(got[1:], exact[1:], strict=True)
    ]
    return float(torch.stack([(got.value - exact.value).abs(), *gradients]).max() / unit)


def check(name: str, form: str, n: int, u: int, theirs_definition: Definition) -> Values:
    """Compare ours with our definition and theirs with theirs, in float64 and float32."""
    errors, found = [], ""
    for dtype in (torch.float32, torch.float64):
        z, h = features(n, u, dtype)
        z64, h64 = (t.detach().double().requires_grad_() for t in (z, h))
        ours = result(OURS[name], OURS[name], z, h)
        errors.append(roundings(ours, defined(OUR_DEFINITIONS[name], z64, h64), z, h))
        with peer_runs():
            _, value, carrier = estimators(form)[name]
            theirs = result(value, carrier, z, h)
        errors.append(roundings(theirs, defined(theirs_definition, z64, h64), z, h))
        found = f"{ours.value:.6f} / {theirs.value:.6f}"
    return Values(found, float(torch.tensor(errors).max()), ROUNDINGS)


def cases() -> Iterator[Case]:
    """Yield every comparison with torch-mist, which must be importable."""
    for n, u in SIZES:
        for name in OURS:
            yield case(name, "product", n, u)
    small = SIZES[0]
    for name in OURS:
        yield case(name, "shipped", *small)
    for name in WITH_OWN_PAIRS:
        yield case(name, "general", *small)


def case(name: str, form: str, n: int, u: int) -> Case:
    """Return the comparison of one bound."""
    definition, words = OUR_DEFINITIONS[name], "same"
    if form != "general":
        definition, words = WITH_OWN_PAIRS.get(name, (definition, words))
    with peer_runs():
        theirs = estimators(form)[name]
    return Case(
        peer=PEER,
        program=f"{theirs.written}, {FORMS[form]}",
        name=name,
        size=f"N={n} U={u}",
        definition=words,
        check=partial(check, name, form, n, u, definition),
        programs={
            "ours": _gradients(OURS[name], n, u),
            "theirs": _gradients(theirs.carrier, n, u),
        },
    )


def _gradients(program: Program, n: int, u: int) -> Callable[[], object]:
    # torch-mist keeps the scores of its last arguments: two batches in turn, as in training, make
    # it compute.
    batches = itertools.cycle([features(n, u, torch.float32, seed) for seed in (1, 2)])

    def forward_backward() -> object:
        z, h = next(batches)
        return torch.autograd.grad(program(z, h), (z, h))

    return forward_backward
