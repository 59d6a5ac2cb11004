"""Critics of two samples: trained in folds, averaged, and tested in one sweep over the scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.functional.bounds import CriticStats
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.information.towers import features, groups, new_tower

# Which training each bound's critic comes from. The optimum of dv, of infonce and of their mean is
# the log of the density ratio, plus a constant for dv and a function of z for infonce; the constant
# is fixed on the training rows. mine is another gradient for dv's value.
TRAININGS = {"dv": "joint", "infonce": "joint", "nwj": "joint", "smile": "joint", "mine": "mine"}
FOLDS = 5
CHECK_EVERY = 25
TAU = 5.0
# Rows of one sweep: T of so many has 25 million scores, which are never stored.
SWEEP_ROWS = 5000

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to train the critics of two samples.

    Args:
        units: number of features of each side.
        width: of the hidden layers.
        members: critics whose scores are averaged, each validated on another fifth of the training
            rows; None is 3 for vectors and 1 where a side is images.
        steps: updates of each; the weights of the best validation value are kept.
        batch_size: pairs per update.
        learning_rate: AdamW's, lowered along a cosine to 0; linear parts have three times as much.
        weight_decay: AdamW's.
        averaging: decay of the running average of the weights, which is what is validated.
        normal_scores: replace each coordinate of vectors by the normal quantile of its rank among
            the training rows, which tames heavy tails. It adds no information, and loses only what
            tells values between two neighbours of training apart. Otherwise coordinates are divided
            by their standard deviation.
    """

    units: int = 32
    width: int = 128
    members: int | None = None
    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    averaging: float = 0.99
    normal_scores: bool = True

    def __post_init__(self) -> None:
        for name in ("units", "width", "members", "steps", "batch_size"):
            value = getattr(self, name)
            least = 2 if name == "batch_size" else 1
            if name == "members" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"SampleConfig: {name} is {value!r}, wanted an integer, {least} or more"
                )
        if self.members is not None and self.members > FOLDS:
            raise ValueError(f"SampleConfig: members is {self.members}, wanted {FOLDS} or fewer")
        for name, most in (("learning_rate", math.inf), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(
                    f"SampleConfig: {name} is {getattr(self, name)}, wanted a finite number >= 0"
                )
        if not 0 <= self.averaging < 1:
            raise ValueError(
                f"SampleConfig: averaging is {self.averaging}, wanted a number in [0, 1)"
            )


class Member(NamedTuple):
    """One trained critic.

    Attributes:
        towers: those of x and z, of the best validation value, in eval mode.
        fitted, checked: the rows that it was trained on, and validated on.
        curve: validation values of its objective, in nats, every `CHECK_EVERY` steps.
        best_step: whose weights were kept.
        shift: subtracted from its scores, so that mean exp(T) = 1 over pairs i != j of fitted rows.
    """

    towers: nn.ModuleList
    fitted: Pair
    checked: Pair
    curve: tuple[float, ...]
    best_step: int
    shift: float = 0.0

    def sides(self, x: Tensor, z: Tensor) -> Pair:
        """Return z's side (N, U) and x's (N, 1, U) of its scores."""
        return _shifted(*_sides(self.towers, x, z), self.shift)


class Critic(NamedTuple):
    """The mean of members' scores, which is the dot product of all their features.

    Attributes:
        members: the critics.
        shift: as a member's, over all training rows.
    """

    members: tuple[Member, ...]
    shift: float = 0.0

    @property
    def useful(self) -> bool:
        """Whether most members are better than a constant, which has 0 nats, where validated."""
        return median(max(member.curve) for member in self.members) > 0

    def sides(self, x: Tensor, z: Tensor) -> Pair:
        """Return z's side (N, U) and x's (N, 1, U) of its scores."""
        parts = [member.sides(x, z) for member in self.members]
        left, right = (torch.cat(side, -1) for side in zip(*parts, strict=True))
        return _shifted(left, right, self.shift, 1 / len(parts))


def train(
    rows: Pair,
    training: str,
    config: SampleConfig,
    generator: torch.Generator,
    advance: Callable[[float], None],
) -> Critic:
    """Train the members and average them.

    Args:
        rows: training rows of x and z, on the device to train on.
        training: one of `TRAININGS`' values.
        config: the settings; members is a number.
        generator: decides the folds and the order of the rows; torch's own decides the weights.
        advance: told the steps done.

    Raises:
        FloatingPointError: a member had no finite validation value.
    """
    folds = torch.randperm(len(rows[0]), generator=generator).to(rows[0].device).tensor_split(FOLDS)
    members = []
    for number in range(config.members or 1):
        fitted = torch.cat([fold for k, fold in enumerate(folds) if k != number])
        parts = [(rows[0][part], rows[1][part]) for part in (fitted, folds[number])]
        members.append(_member(parts[0], parts[1], training, config, generator, advance))
    critic = Critic(tuple(members))
    return critic._replace(shift=_shift(critic, rows))


def _member(
    fitted: Pair,
    checked: Pair,
    training: str,
    config: SampleConfig,
    generator: torch.Generator,
    advance: Callable[[float], None],
) -> Member:
    x, z = fitted
    towers = nn.ModuleList(
        new_tower(tuple(side.shape[1:]), config.units, config.width) for side in fitted
    ).to(x.device)
    averaged = copy.deepcopy(towers).eval().requires_grad_(False)
    best, best_value, best_step = averaged, -math.inf, -1
    optimizer = torch.optim.AdamW(
        groups(towers, config.learning_rate), weight_decay=config.weight_decay, fused=True
    )
    objective, judge = _objective(training), _joint if training == "joint" else _dv
    order, size, curve = torch.empty(0, dtype=torch.long), min(config.batch_size, len(x)), []
    for step in range(config.steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        indices, order = order[:size].to(x.device), order[size:]
        _set_rates(optimizer, 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        optimizer.zero_grad(set_to_none=True)
        (-objective(_stats(*_sides(towers, x[indices], z[indices]), smile=False))).backward()
        optimizer.step()
        _average_(averaged, towers, min(config.averaging, (1 + step) / (10 + step)))
        advance(1)
        if (step + 1) % CHECK_EVERY and step + 1 < config.steps:
            continue
        with torch.no_grad():
            value = float(judge(_stats(*_sides(averaged, *checked), smile=False)))
        curve.append(value)
        if math.isfinite(value) and value > best_value:
            best, best_value, best_step = copy.deepcopy(averaged), value, step
    if best_step < 0:
        raise FloatingPointError(
            "sample_information: no validation value was finite; try a lower learning_rate"
        )
    member = Member(best, fitted, checked, tuple(curve), best_step)
    return member._replace(shift=_shift(member, fitted))


@torch.no_grad()
def contributions(critic: Critic | Member, x: Tensor, z: Tensor, bounds: Sequence[str]) -> Tensor:
    """Return what each row adds to each bound (len(bounds), N), in nats; the means are the bounds.

    A bound is a mean over rows plus a function of mean exp(T) over pairs. Of that function the rows
    have their first-order share: how much the row of T, and the column, exceed the mean. So equal
    parts of the rows have values that vary as the bound of that many rows does, and the bound is
    that of all rows at once, without the bias of small batches. For infonce, which takes the log in
    each row of T, the columns' shares are left out; a perfect critic has none.

    Args:
        critic: its scores.
        x, z: rows.
        bounds: names out of `TRAININGS`.
    """
    left, right = critic.sides(x, z)
    rows, columns = _stats(left, right), _stats(right[:, 0], left[:, None])
    return torch.stack([_contribution(name, rows, columns) for name in bounds])


def value(critic: Critic | Member, pair: Pair, bound: str) -> float:
    """Return a bound of the first rows, in nats."""
    x, z = (side[:SWEEP_ROWS] for side in pair)
    return float(contributions(critic, x, z, (bound,)).mean())


@torch.no_grad()
def spread(critic: Critic, pair: Pair, rows: int = 128) -> float:
    """Return the standard deviation of the scores of the first rows."""
    left, right = critic.sides(*(side[:rows] for side in pair))
    return float((left @ right[:, 0].T).std())


def _contribution(name: str, rows: CriticStats, columns: CriticStats) -> Tensor:
    positives = rows.positives[:, 0].double()
    if name == "infonce":
        lse = _lse(rows)
        return positives - torch.logaddexp(positives, lse) + math.log(len(lse))
    row, column = _lse(rows, name), _lse(columns, name)
    log_mean = _log_mean_exp(row)
    # Both have mean 1: a row of T against all, and a column.
    shares = [(each - log_mean).exp() / (len(row) - 1) for each in (row, column)]
    excess = shares[0] + shares[1] - 2
    if name == "nwj":
        return positives + 1 - log_mean.exp() * (1 + excess)
    return positives - log_mean - excess


def _objective(training: str) -> Callable[[CriticStats], Tensor]:
    if training == "joint":
        return _joint
    state = EMAState()
    return lambda stats: functional.mine(stats=stats, ema_state=state)


def _joint(stats: CriticStats) -> Tensor:
    return (functional.dv(stats=stats) + functional.infonce(stats=stats)) / 2


def _dv(stats: CriticStats) -> Tensor:
    return functional.dv(stats=stats)


@torch.no_grad()
def _shift(critic: Critic | Member, rows: Pair) -> float:
    """Return the log of the mean of exp(T) over pairs i != j."""
    stats = _stats(*critic.sides(*(side[:SWEEP_ROWS] for side in rows)), smile=False)
    return float(_log_mean_exp(_lse(stats)))


def _shifted(left: Tensor, right: Tensor, shift: float, factor: float = 1.0) -> Pair:
    """Return features of factor T - shift."""
    one = torch.ones_like(left[:, :1])
    return torch.cat([left * factor, one * -shift], 1), torch.cat([right, one[:, None]], 2)


def _sides(towers: nn.ModuleList, x: Tensor, z: Tensor) -> Pair:
    return features(towers[0](x), towers[1](z))


def _stats(left: Tensor, right: Tensor, *, smile: bool = True) -> CriticStats:
    if smile:
        return functional.critic_stats(left, right, which=("dv", "smile"), tau=TAU)
    return functional.critic_stats(left, right, which=("dv",))


def _lse(stats: CriticStats, name: str = "dv") -> Tensor:
    found: Tensor = stats.clamped_lse if name == "smile" else stats.lse  # type: ignore[assignment]
    return found[:, 0].double()


def _log_mean_exp(lse: Tensor) -> Tensor:
    n = len(lse)
    return lse.logsumexp(0) - math.log(n * (n - 1))


def _set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["first_rate"] * factor


@torch.no_grad()
def _average_(averaged: nn.Module, trained: nn.Module, decay: float) -> None:
    old, new = list(averaged.state_dict().values()), list(trained.state_dict().values())
    floats = [k for k, tensor in enumerate(old) if tensor.is_floating_point()]
    torch._foreach_lerp_([old[k] for k in floats], [new[k] for k in floats], 1 - decay)
