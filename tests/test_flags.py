"""Every reason to doubt a measurement: its threshold, and a measurement in which it is planted."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from measuring import SMALL, images, labelled, measured
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wcmi_fast.information import Estimate, Evidence, Flag
from wcmi_fast.information import flags as module
from wcmi_fast.information.flags import flags

NAN = math.nan
NAMES = set(re.findall(r'Flag\(\s*"(\w+)"', inspect.getsource(module)))


def estimate(mean: float, spread: float = 0.05, batches: int = 20, trials: int = 4) -> Estimate:
    """Return an estimate whose batches differ by +-spread."""
    row = [mean + spread * (-1) ** i for i in range(batches)]
    return Estimate.of([row] * trials)


NORMAL = Evidence(
    train_value=1.04,
    test_value=1.0,
    curve=(0.4, 0.9, 1.0, 1.01),
    trace=(),
    zero_gradients=0.0,
    nonfinite_gradients=0.0,
    score_spread=1.0,
    best_batch=310,
)
WORST = replace(
    NORMAL, train_value=0.52, test_value=0.5, trace=(1.0, 0.7, 0.55, 0.51, 0.505, 0.502, 0.5)
)
CLEAN: dict[str, Any] = {
    "information": estimate(1.0),
    "worst_case": estimate(0.5),
    "vulnerability": estimate(0.5),
    "evidence": {"information": (NORMAL,) * 4, "worst_case": (WORST,) * 4},
    "batch_size": 100,
    "train_images": 10_000,
    "test_images": 2_000,
    "unequal_batches": False,
    "dropped_images": 0,
    "stochastic": False,
    "batch_norms_in_train_mode": 0,
    "batch_norms_without_statistics": 0,
    "bound": "dv",
    "negatives": None,
    "blind": 0.0,
    "accuracy_bound": 0.7,
    "adversarial_accuracy": 0.6,
    "class_entropy": math.log(10),
    "classes": 10,
}


def seen(term: str, one: Evidence) -> dict[str, Any]:
    """Return evidence in which one of a term's four trials is another."""
    trials = CLEAN["evidence"][term]
    return {"evidence": CLEAN["evidence"] | {term: (one, *trials[1:])}}


def all_seen(term: str, one: Evidence) -> dict[str, Any]:
    return {"evidence": CLEAN["evidence"] | {term: (one,) * 4}}


# What is changed of CLEAN, the flag, and what its sentence says.
DOUBTFUL: list[tuple[dict[str, Any], str, str]] = [
    (
        {"information": estimate(6.9)},
        "near_log_n",
        r"6.900 nats, is within 2.3 nats of 9.200 = log",
    ),
    (
        {"information": estimate(3.61), "bound": "infonce"},
        "near_log_n",
        r"3.610 nats, is within 1.0 nats of 4.605 = log 100, which infonce",
    ),
    ({"worst_case": estimate(3.0), "bound": "nwj", "negatives": 2}, "near_log_n", "log 200"),
    ({"worst_case": estimate(-0.2)}, "negative", "worst-case information, -0.200 nats, is below 0"),
    (
        all_seen("information", replace(NORMAL, train_value=1.3)),
        "critic_gap",
        "information reach 1.300 nats on their training images and 1.000",
    ),
    (
        seen("worst_case", replace(WORST, score_spread=1e-3)),
        "collapsed_critic",
        r"1 of 4 critics of the worst-case information .* \(standard deviation 0.001\)",
    ),
    (seen("information", replace(NORMAL, score_spread=NAN)), "collapsed_critic", "deviation nan"),
    (
        all_seen("information", replace(NORMAL, curve=(0.4, 0.8, 1.0))),
        "undertrained_critic",
        "gained 0.200 nats in their last epoch, to 1.000",
    ),
    (
        seen("worst_case", replace(WORST, best_batch=99)),
        "early_critic",
        r"1 of 4 kept critics .* first quarter of training \(batch 99 of 400\)",
    ),
    (
        all_seen("worst_case", replace(WORST, trace=(0.5, 0.51, 0.5, 0.5))),
        "attack_without_effect",
        "led from 0.500 to 0.500 nats, no lower",
    ),
    (
        all_seen("worst_case", replace(WORST, trace=(1.0, 0.8, 0.7, 0.6))),
        "attack_unfinished",
        "lowered the value by 0.100 nats each, of 0.400 in 3 steps",
    ),
    (seen("worst_case", replace(WORST, zero_gradients=0.02)), "zero_gradients", "for 2.0 %"),
    ({"blind": 0.25}, "zero_gradients", "for 25.0 % of the images"),
    (
        seen("worst_case", replace(WORST, nonfinite_gradients=1e-4)),
        "nonfinite_gradients",
        "0.01 % of the gradients' elements",
    ),
    (
        {"vulnerability": estimate(-0.01, spread=0.02)},
        "worst_above_normal",
        r"lies 0.010 nats above that of clean images \(vulnerability -0.0\d+ to -0.00\d+\)",
    ),
    ({"adversarial_accuracy": 0.71}, "accuracy_above_bound", "71.0 %, is above .* 70.0 %"),
    (
        {"class_entropy": 2.2},
        "unequal_classes",
        r"2.200 nats and not log 10 = 2.303: .* 4.5 points",
    ),
    ({"train_images": 1900}, "few_samples", "1900 training and 2000 test images are 19 and 20"),
    ({"test_images": 950}, "few_samples", "100 and 9 batches of 100, wanted 20 and 10"),
    (
        {
            "information": estimate(1.0, trials=1),
            "worst_case": estimate(0.5, trials=1),
            "vulnerability": estimate(0.5, trials=1),
        },
        "one_trial",
        "1 trial: the interval says how far test batches differ",
    ),
    ({"unequal_batches": True}, "unequal_batches", "cut anew into batches of 100"),
    ({"dropped_images": 7}, "dropped_images", "7 test images did not fill a batch of 100"),
    ({"stochastic": True}, "stochastic_model", "different representations"),
    ({"batch_norms_in_train_mode": 3}, "batch_norm_in_train_mode", "3 batch norms of the model"),
    ({"batch_norms_without_statistics": 1}, "batch_norm_without_statistics", "1 batch norm of"),
]
# Changes that stay on the other side of a threshold.
HARMLESS: list[dict[str, Any]] = [
    {"information": estimate(6.85)},
    {"information": estimate(3.59), "bound": "infonce"},
    {"worst_case": estimate(-0.02, spread=0.2), "vulnerability": estimate(1.0)},
    all_seen("information", replace(NORMAL, train_value=1.1)),
    all_seen("worst_case", replace(WORST, train_value=0.049, test_value=0.0)),
    all_seen("information", replace(NORMAL, train_value=0.5)),
    seen("information", replace(NORMAL, score_spread=0.011)),
    all_seen("information", replace(NORMAL, curve=(0.4, 0.8, 0.84))),
    all_seen("information", replace(NORMAL, curve=(0.7,), best_batch=99)),
    seen("worst_case", replace(WORST, best_batch=100)),
    all_seen("worst_case", replace(WORST, trace=())),
    all_seen("worst_case", replace(WORST, trace=(1.0, 0.5))),
    all_seen("worst_case", replace(WORST, trace=(1.0, 0.5, 0.49, 0.481))),
    seen("worst_case", replace(WORST, zero_gradients=0.01)),
    {"adversarial_accuracy": 0.7},
    {"adversarial_accuracy": None, "accuracy_bound": None, "class_entropy": 1.0},
    {"class_entropy": 2.26},
    {"train_images": 2000, "test_images": 1000},
    {"information": None, "vulnerability": None},
    {"worst_case": None, "vulnerability": None},
]


def test_nothing_is_doubtful() -> None:
    assert flags(**CLEAN) == ()


@pytest.mark.parametrize(("changes", "name", "sentence"), DOUBTFUL)
def test_a_reason_to_doubt(changes: dict[str, Any], name: str, sentence: str) -> None:
    (found,) = flags(**(CLEAN | changes))
    assert found.name == name
    assert re.search(sentence, found.sentence), found.sentence
    assert found.docs == f"docs/measuring.md#{name.replace('_', '-')}"


@pytest.mark.parametrize("changes", HARMLESS)
def test_no_reason_to_doubt(changes: dict[str, Any]) -> None:
    assert flags(**(CLEAN | changes)) == ()


def test_a_noisy_gap_is_no_reason_to_doubt() -> None:
    noisy = CLEAN | {"information": estimate(1.0, spread=0.5)}
    assert flags(**(noisy | all_seen("information", replace(NORMAL, train_value=1.3)))) == ()


def test_every_flag_is_tested_and_one_sentence() -> None:
    assert {name for _, name, _ in DOUBTFUL} == NAMES
    for changes, _, _ in DOUBTFUL:
        (found,) = flags(**(CLEAN | changes))
        assert found.sentence.endswith(".")
        assert ". " not in found.sentence


def test_every_flag_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs" / "measuring.md").read_text()
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    anchors = {heading.strip().lower().replace(" ", "-") for heading in headings}
    for name in NAMES:
        file, _, anchor = Flag(name, "").docs.partition("#")
        assert file == "docs/measuring.md"
        assert anchor in anchors, name


# Causes, planted in measurements.


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] + 0.01 * torch.randn(len(x), 4)


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (10 * x.flatten(1)[:, :4]).round()


class Comparing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, :4] > 0.5).float()


class Root(nn.Module):
    """Has an infinite derivative at one pixel of every image."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)[:, :4]
        return rows + (rows - rows.detach()).sqrt()


class Doubling:
    """An attack that does not attack: it brings dark images to where a model tells them apart."""

    def attack(self, loss_fn: Any, x: Tensor, *, generator: Any = None) -> Tensor:
        return (2 * x).clamp(0, 1)


class Idle:
    """An attack that looks and stays."""

    def attack(self, loss_fn: Any, x: Tensor, *, generator: Any = None) -> Tensor:
        loss_fn(x)
        return x


def with_norm(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, **options))


def loader(n: int, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images(n)), batch_size=batch)


LONG = replace(SMALL, epochs=10)
DARK = (0.5 * images(40, 0), 0.5 * images(40, 1))
VECTORS = torch.randn(160, 2, generator=torch.Generator().manual_seed(0))
MANY = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
BRIGHT, LABELS = labelled(400, classes=10)


def brightness() -> nn.Module:
    """Logits of ten classes of brightness."""
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(1, 10))
    mean = BRIGHT.flatten(1).mean(1)
    middles = torch.stack([mean[LABELS.eq(k)].median() for k in range(10)])
    with torch.no_grad():
        model[2].weight.copy_(200 * middles[:, None])
        model[2].bias.copy_(-100 * middles**2)
    return model


PLANTED: list[tuple[str, Callable[[], Any]]] = [
    ("stochastic_model", lambda: measured(Noisy())),
    ("zero_gradients", lambda: measured(Rounding())),
    ("zero_gradients", lambda: measured(Comparing())),
    ("zero_gradients", lambda: measured(Rounding(), critic_grad="encoder_only")),
    ("attack_without_effect", lambda: measured(Rounding(), critic_grad="encoder_only")),
    ("attack_without_effect", lambda: measured(attack=Idle())),
    ("nonfinite_gradients", lambda: measured(Root())),
    ("attack_unfinished", lambda: measured(steps=4, step_size=1e-2)),
    ("worst_above_normal", lambda: measured(Comparing(), DARK, attack=Doubling(), critic=LONG)),
    ("batch_norm_in_train_mode", lambda: measured(with_norm().train())),
    (
        "batch_norm_without_statistics",
        lambda: measured(with_norm(track_running_stats=False).eval()),
    ),
    ("unequal_batches", lambda: measured(data=loader(80, 30))),
    ("dropped_images", lambda: measured(data=(images(40), images(45, 1)))),
    ("few_samples", measured),
    ("one_trial", measured),
    (
        "near_log_n",
        lambda: measured(
            nn.Identity(),
            VECTORS,
            bound="infonce",
            eps=1e-3,
            critic=replace(SMALL, batch_size=4),
        ),
    ),
    (
        "critic_gap",
        lambda: measured(nn.Identity(), (MANY[:20], MANY[60:]), critic=replace(SMALL, epochs=25)),
    ),
    ("collapsed_critic", lambda: measured(data=(images(1).expand(40, 1, 8, 8),) * 2)),
    (
        "undertrained_critic",
        lambda: measured(nn.Identity(), (VECTORS, VECTORS[:40]), critic=replace(SMALL, epochs=2)),
    ),
    (
        "negative",
        lambda: measured(
            data=(images(40), images(400, 1)), critic=replace(SMALL, units=64, learning_rate=2.0)
        ),
    ),
    ("early_critic", lambda: measured(critic=replace(SMALL, epochs=4, learning_rate=30.0))),
    (
        "accuracy_above_bound",
        lambda: measured(
            brightness(),
            (BRIGHT, LABELS),
            eps=0.0,
            head=nn.Identity(),
            critic=replace(SMALL, learning_rate=1e-9),
        ),
    ),
    (
        "unequal_classes",
        lambda: measured(data=(images(80), (torch.arange(80) % 10 == 0).long()), classes=4),
    ),
]


def test_every_flag_is_planted() -> None:
    assert {name for name, _ in PLANTED} == NAMES


@pytest.mark.parametrize(("name", "measure"), PLANTED)
def test_a_planted_cause_is_flagged(name: str, measure: Callable[[], Any]) -> None:
    report = measure()
    assert name in {flag.name for flag in report.flags}


def test_without_its_cause_there_is_no_flag() -> None:
    """Of two causes of which a few numbers decide: the attack that does not attack, and any."""
    idle = measured(Comparing(), DARK, attack=Idle(), critic=LONG)
    assert "worst_above_normal" not in {flag.name for flag in idle.flags}
    gentle = measured(data=(images(40), images(400, 1)), critic=replace(SMALL, units=64), eps=0.0)
    assert "negative" not in {flag.name for flag in gentle.flags}


@pytest.mark.slow
def test_a_sound_measurement_has_no_flags() -> None:
    """All of the causes above are absent: the flags are not merely always there."""
    x = torch.randn(1400, 2, generator=torch.Generator().manual_seed(0))
    sound = measured(
        nn.Linear(2, 2),
        (x[:1000], x[1000:]),
        eps=0.3,
        steps=10,
        training_steps=2,
        trials=2,
        critic=replace(SMALL, units=16, batch_size=40, epochs=5),
    )
    assert [flag.sentence for flag in sound.flags] == []
