"""What a measurement makes of its arguments, before anything is trained."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import SMALL, images, linear
from torch import Tensor, nn

from wcmi_fast import PGD
from wcmi_fast.information import job as module
from wcmi_fast.information.job import Job, attack_of, digest_of, read, settings_of
from wcmi_fast.information.plan import Plan

PAIR = (images(40, 0), images(60, 1))
IMAGE = (0.0, 1.0)


def job(**changes: Any) -> Job:
    given: dict[str, Any] = {"model": linear(), "data": PAIR, "critic": SMALL, "eps": 0.2}
    return Job(owner="f", **(given | changes))


def brightness(x: Tensor) -> list[float]:
    return sorted(x.flatten(1).mean(1).tolist())


def test_training_and_test_images_are_those_given() -> None:
    found = read(job())
    assert brightness(found.x_train[:]) == pytest.approx(brightness(PAIR[0]))
    assert brightness(found.x_test[:]) == pytest.approx(brightness(PAIR[1]))
    assert not torch.equal(found.x_test[:], PAIR[1])


def test_the_seed_decides_who_is_tested() -> None:
    one, same, other = (read(job(data=PAIR[0], seed=seed)).found for seed in (0, 0, 1))
    assert torch.equal(one.x_test, same.x_test)
    assert brightness(one.x_test) != brightness(other.x_test)
    orders = [read(job(seed=seed)).found for seed in (0, 1)]
    assert not torch.equal(orders[0].x_train, orders[1].x_train)
    assert not torch.equal(orders[0].x_test, orders[1].x_test)


def test_so_many_images_are_drawn_unless_said_otherwise() -> None:
    x = torch.zeros(10_050, 4, dtype=torch.uint8)
    found = read(job(model=nn.Linear(4, 3), data=(x, x)))
    assert (len(found.x_train), len(found.x_test)) == (10_000, 2_000)
    found = read(job(model=nn.Linear(4, 3), data=(x, x), train_images=None, test_images=70))
    assert (len(found.x_train), len(found.x_test)) == (10_050, 70)


def test_step_sizes_follow_madrys_rule_and_fewer_steps_reach_as_far() -> None:
    found = read(job(eps=0.2, steps=4, training_steps=2))
    assert found.testing == PGD(eps=0.2, step_size=2.5 * 0.2 / 4, steps=4, clip=IMAGE)
    assert found.training == PGD(eps=0.2, step_size=2.5 * 0.2 / 2, steps=2, clip=IMAGE)
    given = job(eps=0.2, steps=4, step_size=0.05)
    assert attack_of(given, 4, IMAGE) == PGD(eps=0.2, step_size=0.05, steps=4, clip=IMAGE)
    assert attack_of(given, 1, IMAGE) == PGD(eps=0.2, step_size=0.2, steps=1, clip=IMAGE)
    assert attack_of(job(eps=0.0), 3, IMAGE) == PGD(eps=0.0, step_size=1.0, steps=3, clip=IMAGE)
    assert attack_of(job(eps=None), 3, IMAGE) is None


def test_an_attack_of_ones_own_needs_no_step_size() -> None:
    class Darkening:
        def attack(self, loss_fn: Any, x: Tensor, *, generator: Any = None) -> Tensor:
            return torch.zeros_like(x)

    own = Darkening()
    found = read(job(attack=own, step_size=0.0))
    assert found.training is found.testing is own
    assert settings_of(found)["attack"] == "Darkening"


@pytest.mark.parametrize(
    ("x", "clip"),
    [
        (torch.rand(40, 1, 8, 8), IMAGE),
        (torch.rand(40, 64), (-math.inf, math.inf)),
        (torch.ones(40, 64).byte(), IMAGE),
    ],
)
def test_only_vectors_of_floats_may_go_anywhere(x: Tensor, clip: tuple[float, float]) -> None:
    found = read(job(model=linear(), data=(x, x)))
    assert isinstance(found.testing, PGD)
    assert isinstance(found.training, PGD)
    assert found.testing.clip == found.training.clip == clip


def test_a_plan_is_asked_for_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def plan(*given: Any, **options: Any) -> Plan:
        asked.append((given, options))
        # The folder is claimed by what was given, which does not depend on the machine's speed.
        assert json.loads((folder / "settings.json").read_text())["trials"] == 5
        return Plan(trials=2, epochs=7, train_images=20, test_images=40, seconds=150.0)

    monkeypatch.setattr(module, "plan", plan)
    said: list[str] = []
    folder = tmp_path / "one"
    options = {"trials": 5, "steps": 4, "training_steps": 2, "say": said.append}
    given = job(budget=3.0, folder=folder, **options)
    found = read(given)
    ((encoder, x_train, x_test, critic), options) = asked.pop()
    assert encoder is found.encoder
    assert (len(x_train), len(x_test), critic) == (40, 60, SMALL)
    assert options["minutes"] == 3.0
    assert options["trials"] == 5
    assert (options["training"].steps, options["testing"].steps) == (2, 4)
    assert found.trials == 2
    assert found.critic == replace(SMALL, epochs=7)
    assert torch.equal(found.x_train[:], x_train[:20])
    assert torch.equal(found.x_test[:], x_test[:40])
    assert torch.equal(found.found.x_train, x_train[:20])
    assert "more than the budget" not in said[0]
    read(given)
    assert not asked
    assert said[1].endswith("(as begun)")
    folder = tmp_path / "two"
    read(replace(given, budget=2.0, folder=folder))
    assert "more than the budget" in said[2]


def test_a_digest_is_of_all_values() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)
    known = digest_of([a, b])
    assert digest_of([a.T.contiguous().T, None, b.clone()]) == known
    assert len({known, digest_of([a, b + 1]), digest_of([a + 1, b]), digest_of([b, a])}) == 4


def test_settings_tell_models_data_and_devices_apart() -> None:
    model = linear()
    with torch.no_grad():
        model[1].bias += 1  # type: ignore[index, operator]
    known = settings_of(read(job()))
    assert (known["train_images"], known["test_images"]) == (40, 60)

    def others(**changes: Any) -> set[str]:
        found = settings_of(read(job(**changes)))
        return {name for name in known if found[name] != known[name]}

    assert others() == set()
    assert others(model=model) == {"model_sha256"}
    assert others(data=(PAIR[0], 1 - PAIR[1])) == {"data_sha256"}
    assert others(data=(1 - PAIR[0], PAIR[1])) == {"data_sha256"}
    assert others(device="cpu:0") == {"device"}
    assert others(trials=3) == {"trials"}
    assert others(training_steps=5) == {"training_steps", "training_step_size"}
    assert others(train_images=20) == {"train_images", "data_sha256"}


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"trials": True}, ValueError, "trials is True, wanted an integer, 1 or more"),
        ({"training_steps": 0}, ValueError, "training_steps is 0, wanted an integer, 1 or more"),
        ({"train_images": 0}, ValueError, "train_images is 0, wanted an integer, 1 or more"),
        ({"test_images": -1}, ValueError, "test_images is -1, wanted an integer, 1 or more"),
        ({"classes": 0}, ValueError, "classes is 0, wanted an integer, 1 or more"),
        ({"seed": True}, TypeError, "seed is True, wanted an integer"),
        ({"eps": True}, TypeError, "eps is True, wanted a number"),
        ({"budget": "1"}, TypeError, "budget is '1', wanted a number"),
        ({"budget": math.inf}, ValueError, "budget is inf, wanted minutes > 0, or None"),
        ({"test_images": 19}, ValueError, "data has 19 test images, wanted at least a batch of 20"),
        ({"train_images": 19}, ValueError, "data has 19 training images, wanted at least a batch"),
    ],
)
def test_arguments_that_cannot_be_measured(
    options: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=f"^f: {sentence}"):
        read(job(**options))


def test_a_batch_of_each_is_enough() -> None:
    found = read(job(train_images=20, test_images=20))
    assert (len(found.x_train), len(found.x_test)) == (20, 20)
