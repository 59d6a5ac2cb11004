"""How much work fits a time: trials, epochs and images of a measurement."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from wcmi_fast.data import Feed
from wcmi_fast.information.critic import Attack, CriticConfig, evaluate_critic, train_critic

# What is tried; a smaller measurement than the smallest of these says nothing.
TRIALS = (4, 3, 2, 1)
EPOCHS = (16, 12, 8, 6, 4, 3, 2, 1)
TRAIN_BATCHES = (600, 400, 200, 100, 50, 25, 10)
TEST_BATCHES = (100, 50, 20, 10, 5)
# Evidence on training batches costs as much as so many test batches (critic.evidence).
EVIDENCE_BATCHES = 4
# The plan fills this part of the time: a laptop is slower when it is warm.
FILL = 0.85


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds per batch, for both terms together.

    Attributes:
        train: one training batch of each critic of a trial.
        test: one test batch of each.
    """

    train: float
    test: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a budget buys.

    Attributes:
        trials: critics trained per term.
        epochs: passes over the training images.
        train_images: number of them.
        test_images: number of them.
        seconds: how long it should take.
    """

    trials: int
    epochs: int
    train_images: int
    test_images: int
    seconds: float

    def __str__(self) -> str:
        """Say the plan in one line."""
        return (
            f"plan: {self.trials} trial{'s' if self.trials > 1 else ''} of {self.epochs} "
            f"epoch{'s' if self.epochs > 1 else ''} on {self.train_images} images, tested on "
            f"{self.test_images}; about {self.seconds / 60:.1f} minutes"
        )


def plan(
    encoder: nn.Module,
    x_train: Feed,
    x_test: Feed,
    config: CriticConfig,
    *,
    training: Attack | None,
    testing: Attack | None,
    trials: int,
    minutes: float,
) -> Plan:
    """Time a few batches, and return the best plan that fits.

    Args:
        encoder, x_train, x_test, config: as for `train_critic` and `evaluate_critic`.
        training, testing: the attacks.
        trials: at most so many.
        minutes: the budget.
    """
    begin = time.monotonic()
    cost = _cost(encoder, x_train, x_test, config, training, testing)
    left = 60 * minutes - (time.monotonic() - begin)
    size = config.batch_size
    return chosen(cost, left, size, len(x_train) // size, len(x_test) // size, trials)


def chosen(
    cost: Cost, seconds: float, batch_size: int, train_batches: int, test_batches: int, trials: int
) -> Plan:
    """Return the best plan that fits so many seconds, or the smallest there is.

    Doubling a critic's steps is worth more than doubling its trials, and that more than doubling
    the test images: a poor critic is wrong, few trials are only uncertain.

    Args:
        cost: seconds per batch.
        seconds: to fit.
        batch_size, train_batches, test_batches: of the data.
        trials: at most so many.
    """
    plans = [
        Plan(
            trials=count,
            epochs=epochs,
            train_images=train * batch_size,
            test_images=test * batch_size,
            seconds=count * (epochs * train * cost.train + (test + EVIDENCE_BATCHES) * cost.test),
        )
        for count, epochs, train, test in itertools.product(
            _up_to(trials, TRIALS),
            EPOCHS,
            _up_to(train_batches, TRAIN_BATCHES),
            _up_to(test_batches, TEST_BATCHES),
        )
    ]
    fitting = [each for each in plans if each.seconds <= FILL * seconds]
    if not fitting:
        return min(plans, key=lambda each: each.seconds)
    return max(fitting, key=_worth)


def _worth(each: Plan) -> float:
    steps = math.log(each.epochs * each.train_images) + 0.3 * math.log(each.train_images)
    return steps + 0.5 * math.log(each.trials) + 0.3 * math.log(each.test_images)


def _up_to(largest: int, values: Sequence[int]) -> list[int]:
    return [largest, *(value for value in values if value < largest)]


def _cost(
    encoder: nn.Module,
    x_train: Feed,
    x_test: Feed,
    config: CriticConfig,
    training: Attack | None,
    testing: Attack | None,
) -> Cost:
    """Time batches of each term after a warm-up."""
    few = replace(config, epochs=3)
    rows = Feed(x_train[: 2 * config.batch_size], x_train.device)
    attacks = [(None, None)] if testing is None else [(None, None), (training, testing)]
    train = test = 0.0
    for attack, tried in attacks:
        clock = _Clock()
        trained = train_critic(encoder, rows, few, attack=attack, seed=0, on_batch=clock.tick)
        train += clock.mean() * (2 if attack is None else 1)  # the first critic, too
        clock = _Clock()
        evaluate_critic(
            encoder, trained.critic, x_test, config, attack=tried, limit=3, on_batch=clock.tick
        )
        test += clock.mean()
    return Cost(train=train, test=test)


class _Clock:
    """Seconds per batch; the first is a warm-up, if there are more."""

    def __init__(self) -> None:
        self.ticks = [time.monotonic()]

    def tick(self) -> None:
        self.ticks.append(time.monotonic())

    def mean(self) -> float:
        ticks = self.ticks[1:] if len(self.ticks) > 2 else self.ticks
        return (ticks[-1] - ticks[0]) / (len(ticks) - 1)
