"""The experiment on the two attacks: what is measured, what is concluded, and that it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from wcmi_fast.experiments import attack_gradient as module
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.attack_gradient import Cell, Job
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information import Estimate
from wcmi_fast.information.critic import Evaluation, TrainedCritic
from wcmi_fast.training.run_folder import RunFolder

TINY = Job(
    steps=(8, 1),
    training_steps=1,
    units=8,
    epochs=3,
    batch_size=10,
    learning_rate=1e-2,
    train_images=60,
    test_images=20,
    eps=0.1,
)


class Sides(nn.Module):
    """Whether pixels are light: no gradient, and no image of `data_of` changes sides within eps.

    All that an attack can lower is the critic's image side.
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, ::16] - 90 / 255).sign()


def data_of(folder: Path) -> Classifiers:
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 2
    images = generator.integers(0, 60, (80, 8, 8)) + 120 * labels[:, None, None]
    images = images.astype(np.uint8)
    path = folder / "images.npz"
    arrays = {"x_train": images[:60], "y_train": labels[:60]}
    np.savez(path, **arrays, x_test=images[60:], y_test=labels[60:])
    return Classifiers(data=str(path))


def with_models(patched: pytest.MonkeyPatch, model: nn.Module) -> None:
    patched.setattr(classifiers, "trained", lambda *_: dict.fromkeys(KINDS, model))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("blind")
    with pytest.MonkeyPatch.context() as patched:
        with_models(patched, Sides())
        job = replace(TINY, classifiers=data_of(folder), trials=1)
        return reproduce(module, job, folder / "run", print)


def test_full_finds_what_encoder_only_cannot_see(blind: Mapping[str, Any]) -> None:
    """Without a gradient encoder_only leaves the clean images; full lowers the image side."""
    rows = {Cell(*(row[k] for k in Cell._fields)): row["worst_case"] for row in blind["rows"]}
    assert len(rows) == 32
    for cell, found in rows.items():
        if cell.tested == "encoder_only":
            assert found["batches"] == rows[cell._replace(steps=1)]["batches"]
        elif cell.steps == 8:
            assert found["mean"] < rows[cell._replace(tested="encoder_only")]["mean"] + 1e-3
    missed = [row for row in blind["critic"] if row["steps"] == 8]
    assert len(missed) == 8
    assert sum(row["missed"]["mean"] for row in missed) > 0.3
    for row in missed:
        assert row["missed"]["mean"] == pytest.approx(row["full"] - row["encoder_only"])


def test_the_differences_are_paired_by_batch(blind: Mapping[str, Any]) -> None:
    information = np.array(blind["information"]["robust"]["batches"])
    assert information.shape == (1, 2)
    for row in blind["rows"]:
        if row["model"] == "robust":
            wanted = information - np.array(row["worst_case"]["batches"])
            assert np.array(row["vulnerability"]["batches"]) == pytest.approx(wanted)


def test_the_figure_has_the_results(blind: Mapping[str, Any]) -> None:
    blind = json.loads(json.dumps(blind))
    for row in blind["rows"]:
        row["worst_case"]["interval"][0] -= 0.3  # two batches' are symmetric
    panels = module.figure(blind).axes
    assert len(panels) == 4
    places = [(kind, trained) for kind in KINDS for trained in module.GRADIENTS]
    for axes, (kind, trained) in zip(panels, places, strict=True):
        assert axes.get_title() == f"{kind} model, critic trained for {trained}"
        assert len(axes.containers) == 4
        for curve in axes.containers:
            tested, start = curve.get_label().split(", ")
            rows = {
                row["steps"]: row["worst_case"]
                for row in blind["rows"]
                if (row["model"], row["trained"], row["tested"]) == (kind, trained, tested)
                and row["random_start"] == (start == "random start")
            }
            line, _, (bars,) = curve.lines
            assert list(line.get_xdata()) == [1, 8]
            assert list(line.get_ydata()) == [rows[1]["mean"], rows[8]["mean"]]
            ends = [segment[:, 1] for segment in bars.get_segments()]
            assert np.array(ends) == pytest.approx(
                np.array([rows[1]["interval"], rows[8]["interval"]])
            )
        (level,) = (line for line in axes.lines if line.get_label() == "I, no attack")
        assert set(level.get_ydata()) == {blind["information"][kind]["mean"]}


def test_the_table_has_the_results(blind: Mapping[str, Any]) -> None:
    lines = as_text(module.tables(blind)).splitlines()
    assert f"robust model, I {blind['information']['robust']['mean']:.3f}" in "\n".join(lines)
    shown = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    assert len(shown) == 32
    for cells, row in zip(shown, blind["rows"], strict=True):
        trained, tested, start, steps, worst, rv = (cell.strip() for cell in cells)
        assert (trained, tested, int(steps)) == (row["trained"], row["tested"], row["steps"])
        assert start == ("random" if row["random_start"] else "clean")
        for text, name in ((worst, "worst_case"), (rv, "vulnerability")):
            numbers = [row[name]["mean"], *row[name]["interval"]]
            assert text == "{:.3f} ({:.3f} to {:.3f})".format(*numbers)


def planted(values: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Results of I = 2 and given worst-case I by (training, test) gradient, in any other case 9."""
    worst = {
        cell: Estimate.of([[9.0, 9.0]])
        for cell in module.cells(Job(steps=(1, 5)))
        if cell.steps == 1 or cell.random_start or cell.model == "robust"
    }
    for (trained, tested), value in values.items():
        cell = Cell("standard", trained, tested, False, 5)  # type: ignore[arg-type]
        worst[cell] = Estimate.of([[value - 0.1, value + 0.1]])
    information = Estimate.of([[2.0, 2.0]])
    return module.summary({"standard": information, "robust": information}, worst)


def test_the_paragraph_says_what_the_results_say() -> None:
    results = planted(
        {
            ("encoder_only", "encoder_only"): 1.8,
            ("encoder_only", "full"): -2.0,
            ("full", "encoder_only"): 1.5,
            ("full", "full"): 1.0,
        }
    )
    text = module.paragraph(results)
    assert text.startswith("Attacks of 5 steps from the clean images. Standard model: ")
    assert (
        "on the critic trained for full, encoder_only finds 50.0 % of the drop that full finds (RV "
        "0.500 and 1.000 nats; missed 0.500 (0.500 to 0.500)); on the critic trained for "
        "encoder_only, 5.0 % of the drop that full finds (RV 0.200 and 4.000 nats; missed 3.800"
    ) in text
    assert (
        "as the authors' code has it, RV is 0.200 nats; with full in both, as printed, 1.000: a "
        "difference of 0.800 (0.800 to 0.800)."
    ) in text
    assert "Robust model: on the critic trained for full, encoder_only finds no share" in text
    assert "estimates and not certificates" in text


def test_the_paragraph_of_a_run_has_its_numbers(blind: Mapping[str, Any]) -> None:
    text = module.paragraph(blind)
    for row in blind["critic"] + blind["procedure"]:
        if row["steps"] == 8 and not row["random_start"]:
            assert f"{row['encoder_only']:.3f}" in text
            assert f"{row['full']:.3f}" in text


class Fakes:
    """In place of training and evaluating: values that say what they are of."""

    def __init__(self) -> None:
        self.attacks: set[tuple[int, float, float, bool]] = set()
        self.trained: list[str] = []
        self.left = 10**6

    def train(self, model: Any, x: Any, config: Any, **options: Any) -> TrainedCritic:
        attack, start = options["attack"], options["start"]
        assert (attack is None) == (start is None)
        if attack is not None:
            assert start == ("normal", options["stage"].rsplit("-", 1)[0])
            assert attack.steps * attack.step_size == pytest.approx(2.5 * attack.eps)
            assert options["run"].path.name == f"critics-{config.critic_grad}"
        self.trained.append(f"{options['stage']} {config.critic_grad}")
        stage = options["stage"].rsplit("-", 1)[0]
        name = "normal" if attack is None else config.critic_grad
        return TrainedCritic((name, stage), (), 0)  # type: ignore[arg-type]

    def evaluate(self, model: Any, critic: Any, x: Any, config: Any, **options: Any) -> Evaluation:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        attack = options["attack"]
        value = self.value(*critic, attack and (config.critic_grad, attack))
        if attack is not None:
            self.attacks.add((attack.steps, attack.step_size, attack.eps, attack.random_start))
        return Evaluation((value, value + 0.5), (), 0.0, 0.0, 1.0)

    @staticmethod
    def value(trained: str, stage: str, attacked: Any) -> float:
        kind, trial = stage.split("-")
        value = 1000 * KINDS.index(kind) + 10000 * int(trial)
        if attacked is None:
            assert trained == "normal"
            return float(value)
        tested, attack = attacked
        marks = (trained == "full") + 2 * (tested == "full") + 4 * attack.random_start
        return float(value + marks + 10 * attack.steps)


def patch(patched: pytest.MonkeyPatch, fakes: Fakes) -> None:
    with_models(patched, Sides())
    patched.setattr(module, "train_critic", fakes.train)
    patched.setattr(module, "evaluate_critic", fakes.evaluate)


def test_each_row_is_of_its_critic_and_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = Fakes()
    patch(monkeypatch, fakes)
    job = replace(TINY, classifiers=data_of(tmp_path))
    results = module.run(job, RunFolder(tmp_path / "run"), print)
    for row in results["rows"]:
        marks = (row["trained"] == "full") + 2 * (row["tested"] == "full") + 4 * row["random_start"]
        first = 1000.0 * KINDS.index(row["model"]) + marks + 10 * row["steps"]
        wanted = [(value, value + 0.5) for value in (first, first + 10000)]
        assert [tuple(values) for values in row["worst_case"]["batches"]] == wanted
    for kind in KINDS:
        assert results["information"][kind]["mean"] == 1000 * KINDS.index(kind) + 5000.25
    lengths = [(1, 0.25), (8, 0.25 / 8)]
    assert fakes.attacks == {(*each, 0.1, start) for each in lengths for start in (False, True)}
    assert len(fakes.trained) == 12
    assert fakes.trained.count("robust-1-worst encoder_only") == 1


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(TINY, classifiers=data_of(tmp_path), trials=1, steps=(1,))
    with_models(monkeypatch, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    whole = module.run(job, RunFolder(tmp_path / "whole"), print)
    evaluate, done = module.evaluate_critic, []

    def interrupted(*args: Any, **options: Any) -> Evaluation:
        if len(done) == 11:
            raise KeyboardInterrupt
        done.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate_critic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.run(job, RunFolder(tmp_path / "cut"), print)
    monkeypatch.setattr(module, "evaluate_critic", evaluate)
    stages = {file.name: file.read_bytes() for file in (tmp_path / "cut/stages").iterdir()}
    assert len(stages) == 11
    assert module.run(job, RunFolder(tmp_path / "cut"), print) == whole
    for name, content in stages.items():
        assert (tmp_path / "cut/stages" / name).read_bytes() == content


def test_a_finished_run_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(TINY, classifiers=data_of(tmp_path))
    fakes = Fakes()
    patch(monkeypatch, fakes)
    whole = module.run(job, RunFolder(tmp_path / "run"), print)
    again = Fakes()
    patch(monkeypatch, again)
    assert module.run(job, RunFolder(tmp_path / "run"), print) == whole
    assert not again.trained
    assert not again.attacks


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": ()}, r"attack-gradient: steps is \(\), wanted different numbers of steps"),
        ({"steps": (0, 1)}, r"attack-gradient: steps is \(0, 1\), wanted"),
        ({"steps": (7, 7)}, r"attack-gradient: steps is \(7, 7\), wanted"),
        ({"trials": 0}, "attack-gradient: trials is 0, wanted 1 or more"),
    ],
)
def test_settings_that_are_none(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Job(**options)
