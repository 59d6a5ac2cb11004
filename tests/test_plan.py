"""What fits a budget."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wcmi_fast import PGD
from wcmi_fast.data import Feed
from wcmi_fast.information import CriticConfig
from wcmi_fast.information import plan as module
from wcmi_fast.information.plan import FILL, Cost, Plan, chosen, plan

COST = Cost(train=0.1, test=0.2)


def seconds(found: Plan, batch: int, cost: Cost = COST) -> float:
    train, test = found.train_images // batch, found.test_images // batch
    return found.trials * (found.epochs * train * cost.train + (test + 4) * cost.test)


@settings(max_examples=50)
@given(
    budget=st.floats(1, 1e5),
    batch=st.integers(2, 200),
    train=st.integers(1, 700),
    test=st.integers(1, 120),
    trials=st.integers(1, 6),
)
def test_a_plan_fits_its_budget_and_its_data(
    budget: float, batch: int, train: int, test: int, trials: int
) -> None:
    found = chosen(COST, budget, batch, train, test, trials)
    assert found.seconds == pytest.approx(seconds(found, batch))
    assert found.trials <= trials
    assert found.train_images <= train * batch
    assert found.test_images <= test * batch
    assert found.train_images % batch == found.test_images % batch == 0
    smallest = chosen(COST, 0.0, batch, train, test, trials)
    assert found.seconds <= FILL * budget or found == smallest


def test_more_time_buys_more() -> None:
    small, large = (chosen(COST, budget, 100, 600, 100, 4) for budget in (60, 3000))
    assert large.epochs * large.train_images > 5 * small.epochs * small.train_images
    assert large.trials >= small.trials
    assert large.seconds > 0.5 * FILL * 3000


def test_without_a_limit_everything_is_used() -> None:
    found = chosen(COST, 1e9, 100, 512, 77, 5)
    assert (found.trials, found.train_images, found.test_images) == (5, 51_200, 7_700)
    assert found.epochs == max(module.EPOCHS)


def test_nothing_fits_and_the_smallest_is_planned() -> None:
    found = chosen(COST, 0.1, 100, 600, 100, 4)
    assert (found.trials, found.epochs) == (1, 1)
    assert (found.train_images, found.test_images) == (1000, 500)


def test_a_plan_says_itself() -> None:
    found = Plan(trials=2, epochs=1, train_images=300, test_images=100, seconds=90.0)
    said = "plan: 2 trials of 1 epoch on 300 images, tested on 100; about 1.5 minutes"
    assert str(found) == said
    assert "1 trial of 3 epochs" in str(replace(found, trials=1, epochs=3))


class Counted(nn.Module):
    """Tells the time in calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return x.flatten(1)


def test_costs_are_those_of_both_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(Counted.calls)))
    x = Feed(torch.rand(60, 6), "cpu")
    config = CriticConfig(units=8, batch_size=20)
    attack = PGD(eps=0.1, step_size=0.05, steps=6)

    def cost(training: PGD | None, testing: PGD | None) -> Cost:
        return module._cost(Counted(), x, x, config, training, testing)

    # A critic of clean images trains on representations that are computed once.
    assert cost(None, None) == Cost(train=0, test=1)
    assert cost(replace(attack, steps=3), attack) == Cost(train=3 + 1, test=1 + 6 + 1)


def test_a_plan_is_made_of_measured_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Feed(torch.rand(400, 6), "cpu")
    config = CriticConfig(units=8, batch_size=20)
    monkeypatch.setattr(module, "_cost", lambda *given: COST)
    found = plan(nn.Flatten(), x, x, config, training=None, testing=None, trials=2, minutes=1.0)
    assert found == chosen(COST, 60, 20, 20, 20, 2)
