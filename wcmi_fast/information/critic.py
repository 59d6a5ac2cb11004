"""Critics of a fixed representation: trained, attacked and evaluated (supplement B)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam

from wcmi_fast import reference
from wcmi_fast.data import Feed, batches, fed
from wcmi_fast.functional.bounds import CriticStats
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.information.results import Evidence
from wcmi_fast.models import GlobalCritic, VectorCritic
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.evaluation import represent
from wcmi_fast.training.objective import BOUNDS as OBJECTIVES
from wcmi_fast.training.objective import Bound, Critic, information_loss, new_critic
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded, starts_generator
from wcmi_fast.training.stage import run_epochs

# Bounds whose value estimates nats, as functions of features or statistics.
BOUNDS: dict[str, Callable[..., Tensor]] = {
    name: OBJECTIVES[name] for name in ("dv", "dv_authors", "infonce", "nwj", "smile", "mine")
}


# The scores' spread is that of so many images: a large batch's scores would not fit the memory.
SPREAD_IMAGES = 128


class Attack(Protocol):
    """What looks for the worst images near given ones; `PGD` is one."""

    def attack(
        self,
        loss_fn: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return images near x (N, ...) at which loss_fn, a batch's -bound in nats, is large."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How to train the critics of an estimate (supplement, algorithm 2).

    Args:
        bound: name of the bound, one of `BOUNDS`: "dv"; "dv_authors", dv with the authors' masking
            (spec section 2); "infonce"; "nwj"; "smile", with tau 5; "mine".
        units: size U of the critic's features.
        epochs: passes over the training images; in a measurement of a model, of each trial's first
            critic, and again of each term's critic.
        batch_size: images per batch, in training and in testing; the value depends on it.
        learning_rate: Adam's, lowered along a cosine to 0.
        critic_grad: "full" attacks through both sides of the critic, as algorithm 1 is printed;
            "encoder_only" as the authors' code does, which finds weaker perturbations.
        negatives: other images that each representation is paired with, drawn anew for each batch;
            None pairs it with all N - 1.
    """

    bound: str = "dv"
    units: int = 64
    epochs: int = 4
    batch_size: int = 100
    learning_rate: float = 1e-3
    critic_grad: CriticGrad = "full"
    negatives: int | None = None

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            wanted = f"one of {tuple(BOUNDS)}"
            raise ValueError(f"CriticConfig: bound is {self.bound!r}, wanted {wanted}")
        if self.batch_size < 2:
            raise ValueError(
                f"CriticConfig: batch_size is {self.batch_size}, wanted 2 or more: one image has "
                "no negative pair"
            )
        if self.negatives is not None and not 1 <= self.negatives < self.batch_size:
            raise ValueError(
                f"CriticConfig: negatives is {self.negatives}, wanted None or 1 to "
                f"{self.batch_size - 1}, the other images of a batch"
            )
        if self.critic_grad not in ("full", "encoder_only"):
            raise ValueError(
                f"CriticConfig: critic_grad is {self.critic_grad!r}, wanted 'full' or "
                "'encoder_only'"
            )


class TrainedCritic(NamedTuple):
    """A critic in eval mode, batch norms folded, and how it was found.

    Attributes:
        critic: that of the best training batch.
        curve: mean value of each epoch's batches, in nats.
        best_batch: number of that batch, counted from 0.
    """

    critic: Critic
    curve: tuple[float, ...]
    best_batch: int


class Evaluation(NamedTuple):
    """A critic's values on test batches, in nats, and what its attacks showed (`Evidence`)."""

    values: tuple[float, ...]
    trace: tuple[float, ...]
    zero_gradients: float
    nonfinite_gradients: float
    score_spread: float


def train_critic(
    encoder: nn.Module,
    x: Tensor | Feed,
    config: CriticConfig,
    *,
    attack: Attack | None,
    seed: int,
    start: Critic | None = None,
    stage: str = "critic",
    run: RunFolder | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> TrainedCritic:
    """Train a critic for a fixed encoder by ascent on the bound of its batches.

    The critic of the best batch value is kept, as algorithm 2 says.

    Args:
        encoder: images -> representations (N, D); used in eval mode and not changed.
        x: training images (N, C, H, W), float32 in [0, 1], or vectors (N, D); or a `Feed`.
        config: the settings.
        attack: lowers each batch's value before the step; None for plain information.
        seed: decides weights and order of the data.
        start: critic to begin with, such as the one an encoder was trained with; it is copied.
            None begins with a new one of config.units.
        stage: name under which checkpoints and metrics go; a part of the seed.
        run: folder for a checkpoint after every epoch; an interrupted stage goes on there.
        on_batch: called after every batch.

    Returns:
        The critic, and how it was found.

    Raises:
        ValueError: fewer images than one batch.
        FloatingPointError: no batch had a finite value.

    Source: Zhu et al. 2020, supplement B, algorithm 2.
    """
    fixed, x = folded(encoder), fed(x)
    with seeded(seed, stage, "representations"):  # a stochastic encoder draws
        clean = fed(represent(fixed, x))
    per_epoch = len(x) // config.batch_size
    with seeded(seed, stage, "weights"):
        critic = _trainable(start) if start else _new_critic(clean.shape[1], config.units, x)
        critic = critic.to(x.device)
    best = _Best(critic)
    weights = [p for side in critic.modules().values() for p in side.parameters()]
    optimizer = Adam(weights, lr=config.learning_rate, fused=True)
    ema_state = EMAState()
    curve: dict[int, float] = {}

    def train_batch(indices: Tensor, generator: torch.Generator) -> float:
        images, features = x[indices], clean[indices]
        shifts = negative_shifts(config, len(indices))
        if attack is not None:
            starts = starts_generator(generator, images.device)
            images = attack_information(
                fixed, critic, images, attack, config, shifts=shifts, generator=starts
            )
            features = represent(fixed, images)
        bound = batch_bound(config, shifts, ema_state)
        value = bound(critic.global_(features), critic.local(images))
        optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        return value.item()

    def train_epoch(epoch: int, generator: torch.Generator) -> dict[str, float]:
        values = []
        for batch, indices in enumerate(batches(len(x), config.batch_size, generator)):
            step = epoch * per_epoch + batch
            _set_rate(optimizer, config.learning_rate * _cosine(step / (config.epochs * per_epoch)))
            value = train_batch(indices, generator)
            best.take_(critic, value, step)  # before the step: the value is these weights'
            optimizer.step()
            values.append(value)
            on_batch()
        curve[epoch] = sum(values) / len(values)
        return {"bound_nats": curve[epoch]}

    modules = {**critic.modules(), "best": best}
    run_epochs(run, stage, seed, config.epochs, modules, optimizer, train_epoch)
    if int(best.step) < 0:
        raise FloatingPointError(
            f"train_critic: no batch of stage {stage!r} had a finite value; try a lower "
            "learning_rate, or another bound"
        )
    return TrainedCritic(best.critic(), _whole_curve(run, stage, curve), int(best.step))


def attack_information(
    encoder: nn.Module,
    critic: Critic,
    x: Tensor,
    attack: Attack,
    config: CriticConfig,
    *,
    shifts: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the batch x perturbed so that its bound is low (algorithm 1).

    Args:
        encoder, critic, x, config: as for `evaluate_critic`; the critic's weights are fixed.
        attack: looks for the perturbations.
        shifts: the batch's sampled negatives, see `negative_shifts`.
        generator: source of random starts.
    """
    bound = batch_bound(config, shifts)
    loss_fn = information_loss(encoder, _snapshot(critic), bound, config.critic_grad)
    return attack.attack(loss_fn, x, generator=generator)


@torch.no_grad()
def evaluate_critic(
    encoder: nn.Module,
    critic: Critic,
    x: Tensor | Feed,
    config: CriticConfig,
    *,
    attack: Attack | None,
    seed: int = 0,
    limit: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the bound of equal batches, each attacked if asked.

    Args:
        encoder: images -> representations (N, D); used in eval mode and not changed.
        critic: as `train_critic` returns it.
        x: test images (N, C, H, W), float32 in [0, 1]; an incomplete last batch is left out.
        config: the settings; the bound "mine" is evaluated as dv, whose value it is.
        attack: lowers each batch's value; None for plain information.
        seed: decides random starts and sampled negatives.
        limit: number of batches at most.
        on_batch: called after every batch.

    Raises:
        ValueError: fewer images than one batch.
    """
    fixed, critic, x = folded(encoder), _snapshot(critic), fed(x)
    values: list[float] = []
    traces: list[list[float]] = []
    gradients: list[Tensor] = []
    spreads: list[float] = []
    with seeded(seed, "evaluation") as generator:
        for indices in list(batches(len(x), config.batch_size))[:limit]:
            images = x[indices]
            bound = batch_bound(config, negative_shifts(config, len(indices)))
            if attack is not None:
                seen: list[Tensor] = []
                loss_fn = information_loss(fixed, critic, bound, config.critic_grad)
                starts = starts_generator(generator, images.device)
                watched = _watched(loss_fn, seen, gradients)
                images = attack.attack(watched, images, generator=starts)
                traces.append([-float(value) for value in seen])
            z, h = critic.global_(fixed(images)), critic.local(images)
            values.append(float(bound(z, h)))
            spreads.append(_spread(z[:SPREAD_IMAGES], h[:SPREAD_IMAGES]))
            on_batch()
    zero, nonfinite = _shares(gradients)
    return Evaluation(tuple(values), _mean_trace(traces, values), zero, nonfinite, min(spreads))


def evidence(
    encoder: nn.Module,
    trained: TrainedCritic,
    x_train: Tensor | Feed,
    tested: Evaluation,
    config: CriticConfig,
    *,
    attack: Attack | None,
    limit: int = 4,
) -> Evidence:
    """Return what a trained critic and its test showed, with its value on training batches.

    Args:
        encoder, config, attack: as for `evaluate_critic`.
        trained: the critic, and how it was found.
        x_train: the images it was trained on.
        tested: its evaluation on test images.
        limit: number of training batches to look at.
    """
    on_train = evaluate_critic(encoder, trained.critic, x_train, config, attack=attack, limit=limit)
    return Evidence(
        train_value=sum(on_train.values) / len(on_train.values),
        test_value=sum(tested.values) / len(tested.values),
        curve=trained.curve,
        trace=tested.trace,
        zero_gradients=tested.zero_gradients,
        nonfinite_gradients=tested.nonfinite_gradients,
        score_spread=tested.score_spread,
        best_batch=trained.best_batch,
    )


def negative_shifts(config: CriticConfig, n: int) -> list[int] | None:
    """Draw which negatives a batch of n images uses, from torch's generator; None uses all.

    An attack's steps and the step that follows share them. See `sampled_stats`.
    """
    if config.negatives is None or config.negatives >= n - 1:
        return None
    drawn: list[int] = (torch.randperm(n - 1)[: config.negatives] + 1).tolist()
    return drawn


def batch_bound(
    config: CriticConfig, shifts: Sequence[int] | None, ema_state: EMAState | None = None
) -> Bound:
    """Return the bound (z (N, U), h (N, P, U)) -> nats of one batch.

    Args:
        config: the settings.
        shifts: the batch's sampled negatives, or None for all.
        ema_state: the state of the bound "mine"; None evaluates dv, whose value it is.
    """
    name = "dv" if config.bound == "mine" and ema_state is None else config.bound
    function = BOUNDS[name]
    if name == "mine":
        function = partial(function, ema_state=ema_state)
    if shifts is None:
        return function
    return lambda z, h: function(stats=sampled_stats(z, h, shifts))


def sampled_stats(z: Tensor, h: Tensor, shifts: Sequence[int]) -> CriticStats:
    """Return the statistics of T of a batch from some negative pairs, scaled to all of them.

    Representation i is paired with the images i + s (mod N) for each shift s, so that every image
    occurs equally often. Sums over the negatives are multiplied by (N - 1) / len(shifts).

    Args:
        z: (N, U) floating point.
        h: (N, P, U) of the same dtype.
        shifts: different integers, 1 to N - 1.

    Equivalent torch program::

        T = torch.stack([(z[:, None] * h.roll(-s, 0)).sum(2) for s in shifts])
        lse = T.logsumexp(0) + math.log((N - 1) / len(shifts))

    Source: supplement B, algorithm 2 (size of the negative sample).
    """
    z = z[:, None]
    negatives = torch.stack([(z * h.roll(-shift, 0)).sum(2) for shift in shifts])
    share = (len(h) - 1) / len(shifts)
    return CriticStats(
        positives=(z * h).sum(2),
        lse=negatives.logsumexp(0) + math.log(share),
        softplus=nn.functional.softplus(negatives).sum(0) * share,
        clamped_lse=negatives.detach().clamp(-5.0, 5.0).logsumexp(0) + math.log(share),
        tau=5.0,
    )


class _Best(nn.Module):
    """The critic of the best batch so far; a module, so that checkpoints hold it."""

    value: Tensor
    step: Tensor

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.global_, self.local = copy.deepcopy(critic.global_), copy.deepcopy(critic.local)
        self.register_buffer("value", torch.tensor(-math.inf, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(-1))

    @torch.no_grad()
    def take_(self, critic: Critic, value: float, step: int) -> None:
        """Copy a critic if its value is the best."""
        if not value > float(self.value) or not math.isfinite(value):
            return
        self.value.fill_(value)
        self.step.fill_(step)
        for kept, side in ((self.global_, critic.global_), (self.local, critic.local)):
            for old, new in zip(
                kept.state_dict().values(), side.state_dict().values(), strict=True
            ):
                old.copy_(new)

    def critic(self) -> Critic:
        """Return it for evaluation."""
        return _snapshot(Critic(self.global_, self.local))


def _spread(z: Tensor, h: Tensor) -> float:
    """Return the standard deviation of the scores of pairs, see `Evidence.score_spread`."""
    T = reference.scores(z, h)
    own = T.mean(0, keepdim=True) + T.mean(1, keepdim=True) - T.mean((0, 1), keepdim=True)
    return float((T - own).square().mean().sqrt())


def _watched(
    loss_fn: Callable[[Tensor], Tensor], seen: list[Tensor], gradients: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return loss_fn, with its values and (zero, nonfinite, 1) per gradient recorded."""

    def record(gradient: Tensor) -> None:
        bad = ~gradient.isfinite()
        zero = (gradient.flatten(1) == 0).all(1).double().mean()
        gradients.append(torch.stack([zero, bad.double().mean()]))

    def watched(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(record)
        loss = loss_fn(x)
        seen.append(loss.detach())
        return loss

    return watched


def _shares(gradients: Sequence[Tensor]) -> tuple[float, float]:
    if not gradients:
        return 0.0, 0.0
    zero, nonfinite = torch.stack(list(gradients)).mean(0).tolist()
    return zero, nonfinite


def _mean_trace(traces: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Average the paths of the attacks, each ended by the value of its result.

    Of attacks that took different numbers of steps only both ends can be averaged.
    """
    if not all(traces) or not traces:
        return ()
    whole = [[*trace, value] for trace, value in zip(traces, values, strict=True)]
    if len({len(path) for path in whole}) > 1:
        whole = [[path[0], path[-1]] for path in whole]
    return tuple(sum(column) / len(column) for column in zip(*whole, strict=True))


def _whole_curve(run: RunFolder | None, stage: str, curve: dict[int, float]) -> tuple[float, ...]:
    """Return the curve, with epochs of an earlier session from the run's log."""
    logged = [] if run is None else [r for r in run.metrics() if r["stage"] == stage]
    earlier = {int(record["epoch"]) - 1: float(record["bound_nats"]) for record in logged}
    found = earlier | curve
    return tuple(found[epoch] for epoch in sorted(found))


def _new_critic(dim: int, units: int, x: Feed) -> Critic:
    """Build an untrained critic whose scores have a standard deviation of about 1.

    Products of two layer norms have one of sqrt(U), which puts dv far below 0 at first; most of a
    short training then goes into coming back.
    """
    if len(x.shape) == 4:
        critic = new_critic(dim, units, (x.shape[1], x.shape[2], x.shape[3]))
    else:
        critic = Critic(GlobalCritic(dim, units=units), VectorCritic(x.shape[1], units=units))
    with torch.no_grad():
        critic.global_.get_parameter("block.norm.weight").div_(math.sqrt(units))
    return critic


def _set_rate(optimizer: Adam, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _trainable(critic: Critic) -> Critic:
    sides = [copy.deepcopy(side).train().requires_grad_(True) for side in critic.modules().values()]
    return Critic(*sides)


def _snapshot(critic: Critic) -> Critic:
    return Critic(folded(critic.global_), folded(critic.local))
