"""The experiment on the masking slip: planted critics, what is concluded, and that it resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wcmi_fast.data import Feed
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments import masking as module
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.masking import BOUNDS, TERMS, Job
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information import CriticConfig
from wcmi_fast.information.critic import TrainedCritic
from wcmi_fast.training.objective import Critic
from wcmi_fast.training.run_folder import RunFolder

TINY = Job(
    batch_sizes=(8, 4),
    steps=2,
    training_steps=1,
    trials=1,
    units=8,
    updates=12,
    worst_updates=4,
    train_images=40,
    test_images=16,
    offsets=(0.0, -10.0, 10.0),
)


class Ones(nn.Module):
    """z = 1 for every representation."""

    def forward(self, representation: Tensor) -> Tensor:
        return torch.ones(len(representation), 1)


class Score(nn.Module):
    """h = a constant + a multiple of the image's first pixel, at three locations."""

    def __init__(self, constant: float, multiple: float) -> None:
        super().__init__()
        self.constant, self.multiple = constant, multiple

    def forward(self, x: Tensor) -> Tensor:
        score = self.constant + self.multiple * x.flatten(1)[:, :1]
        return torch.stack([score, score + 0.5, score - 1.0], dim=1)


class Level(nn.Module):
    """h = a constant at two locations."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 2, 1), self.constant)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def profile(local: nn.Module, n: int, size: int, *offsets: float) -> tuple[Any, Any]:
    critic, config = Critic(Ones(), local), CriticConfig(batch_size=size)
    return module.profile(nn.Flatten(), critic, Feed(images(n), "cpu"), config, offsets)


def test_a_constant_critic_has_the_analytic_slip() -> None:
    """Spec section 2: N = 128, constant c: -0.0078 at c = 0, -5.16 at c = -10."""
    normalisers, shifted = profile(Level(0.0), 256, 128, 0.0, -10.0)
    assert normalisers == pytest.approx([0.0, 0.0], abs=1e-5)
    assert np.array(shifted["dv"]) == pytest.approx(np.zeros((2, 2)), abs=1e-5)
    at_0, at_minus_10 = shifted["dv_authors"]
    assert at_0 == pytest.approx([-0.0078, -0.0078], abs=5e-5)
    assert at_minus_10 == pytest.approx([-5.16, -5.16], abs=5e-3)
    assert at_minus_10[0] == pytest.approx(-math.log1p(math.exp(10) / 127), rel=1e-5)
    itself, moved = (profile(Level(c), 128, 128, -c) for c in (-10.0, 3.0))
    assert itself[0] == pytest.approx([-10.0])
    assert moved[0] == pytest.approx([3.0])
    assert itself[1]["dv_authors"][0][0] == pytest.approx(at_0[0], abs=1e-5)


@pytest.mark.parametrize("offset", [-7.0, 0.0, 2.0])
def test_any_critic_has_the_slip_of_its_normaliser(offset: float) -> None:
    """dv_authors - dv is the mean over p of -log(1 + 1 / ((N - 1) mean exp(T)))."""
    normalisers, shifted = profile(Score(-2.0, 3.0), 40, 20, offset)
    for batch, (dv, authors) in enumerate(
        zip(shifted["dv"][0], shifted["dv_authors"][0], strict=True)
    ):
        pixels = images(40)[20 * batch : 20 * batch + 20].flatten(1)[:, 0].double()
        others = torch.stack([pixels[torch.arange(20) != i] for i in range(20)])
        logs = [
            (-2.0 + 3.0 * others + local + offset).exp().mean().log() for local in (0.0, 0.5, -1.0)
        ]
        slips = [-torch.log1p((-log).exp() / 19) for log in logs]
        assert authors - dv == pytest.approx(float(sum(slips)) / 3, rel=1e-4)
        assert normalisers[batch] == pytest.approx(float(sum(logs)) / 3 - offset, abs=1e-5)


def trial(step: float) -> dict[str, Any]:
    """Values of two batches, all differences of which are planted."""
    return {
        "information": {
            "dv": [2.0, 2.2],
            "dv_authors": [1.9, 2.1],
            "log_normaliser": [0.5, 0.7],
            "shifted": {"dv": [[2.0, 2.2]], "dv_authors": [[1.0, 1.0 + step]]},
        },
        "worst_case": {
            "dv": {"dv": [1.0, 1.2], "dv_authors": [0.7, 0.9]},
            "dv_authors": {"dv": [1.5, 1.7], "dv_authors": [0.9, 1.1]},
        },
    }


def test_a_row_compares_what_it_says() -> None:
    found = module.row([trial(0.0), trial(0.4)])
    values = {bound: [found["values"][bound][term]["mean"] for term in TERMS] for bound in BOUNDS}
    assert values["dv"] == pytest.approx([2.1, 1.1, 1.0])
    assert values["dv_authors"] == pytest.approx([2.0, 1.0, 1.0])
    slips = [found["slip"][term]["mean"] for term in TERMS]
    assert slips == pytest.approx([-0.1, -0.3, 0.2])
    assert found["slip"]["vulnerability"]["interval"] == pytest.approx((0.2, 0.2))
    assert found["attack"]["mean"] == pytest.approx(0.5)
    assert found["log_normaliser"]["mean"] == pytest.approx(0.6)
    assert found["shifted"]["dv"] == pytest.approx([0.0])
    assert found["shifted"]["dv_authors"] == pytest.approx([1.1 - 2.0])


def data_of(folder: Path) -> Classifiers:
    generator = np.random.default_rng(0)
    labels = np.arange(56) % 2
    pixels = generator.integers(0, 100, (56, 8, 8)) + 100 * labels[:, None, None]
    path = folder / "images.npz"
    arrays = {"x_train": pixels[:40].astype(np.uint8), "y_train": labels[:40]}
    np.savez(path, **arrays, x_test=pixels[40:].astype(np.uint8), y_test=labels[40:])
    return Classifiers(data=str(path))


def with_models(patched: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    models = {kind: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) for kind in KINDS}
    patched.setattr(classifiers, "trained", lambda *_: models)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("masking")
    with pytest.MonkeyPatch.context() as patched:
        with_models(patched)
        job = replace(TINY, classifiers=data_of(folder))
        return reproduce(module, job, folder / "run", print)


def test_trained_critics_have_the_slip(measured: Mapping[str, Any]) -> None:
    rows = measured["rows"]
    assert [(r["model"], r["batch_size"], r["trained"]) for r in rows] == list(
        product(KINDS, (4, 8), BOUNDS)
    )
    for row in rows:
        size, log_mean = row["batch_size"], row["log_normaliser"]["mean"]
        slip = row["slip"]["information"]["mean"]
        # The slip is concave in the log of the mean, which varies over locations and batches.
        assert slip <= -math.log1p(math.exp(-log_mean) / (size - 1)) + 1e-6
        assert slip > -0.5
        low, at_0, high = row["shifted"]["dv_authors"]
        assert row["shifted"]["dv"] == pytest.approx([0, 0, 0], abs=1e-4)
        assert at_0 == pytest.approx(0, abs=1e-5)
        assert high == pytest.approx(-slip, abs=2e-3)
        assert -10 < low < -10 + math.log(size - 1) + log_mean + 0.5
        assert len(row["values"]["dv"]["information"]["batches"][0]) == 16 // size


def test_the_whole_influence_is_of_both_bounds(measured: Mapping[str, Any]) -> None:
    rows = {(r["model"], r["batch_size"], r["trained"]): r["values"] for r in measured["rows"]}
    assert len(measured["whole"]) == 4
    for each in measured["whole"]:
        place = (each["model"], each["batch_size"])
        for term in TERMS:
            authors = rows[(*place, "dv_authors")]["dv_authors"][term]
            dv = rows[(*place, "dv")]["dv"][term]
            assert each[term]["mean"] == pytest.approx(authors["mean"] - dv["mean"])
            pairs = np.array(authors["batches"]) - np.array(dv["batches"])
            assert np.array(each[term]["batches"]) == pytest.approx(pairs)


class Fakes:
    """In place of training, attacking and evaluating: values that say what they are of."""

    def __init__(self) -> None:
        self.trained: list[tuple[Any, ...]] = []
        self.tested: set[tuple[int, int]] = set()

    def train(self, model: Any, x: Any, config: Any, **options: Any) -> TrainedCritic:
        attack, start = options["attack"], options["start"]
        folder = options["run"].path.name
        assert folder == f"critics-{config.bound}"
        key = (options["stage"], config.bound)
        if attack is None:
            assert start is None
        else:
            assert start == (options["stage"].replace("worst", "normal"), config.bound)
            assert (attack.eps, attack.steps, attack.step_size) == (0.1, 1, 0.25)
        self.trained.append((*key, len(x), config.epochs, config.batch_size))
        return TrainedCritic(key, (), 0)  # type: ignore[arg-type]

    def attack(self, model: Any, critic: Any, x: Tensor, attack: Any, config: Any) -> Tensor:
        assert "worst" in critic[0]
        assert len(x) == config.batch_size
        assert (attack.eps, attack.steps, attack.step_size) == (0.1, 2, 0.125)
        return torch.full((len(x), 1), 100.0 * (1 + BOUNDS.index(config.bound)))

    def evaluate(self, model: Any, critic: Any, x: Any, config: Any, **options: Any) -> Any:
        stage, trained = critic
        _, size, term, number = stage.split("-")
        assert int(size) == config.batch_size
        attacked = 0.0 if isinstance(x, Feed) else float(x[0, 0])
        assert (attacked > 0) == (term == "worst")
        self.tested.add((config.batch_size, len(x)))
        value = attacked + 10 * BOUNDS.index(trained) + BOUNDS.index(config.bound)
        value += 1000 * int(number) + 10000 * KINDS.index(stage.split("-")[0]) + int(size) / 100
        return type("Found", (), {"values": (value, value)})

    @staticmethod
    def profile(*_: Any) -> Any:
        return [0.0, 0.0], {bound: [[0.0, 0.0]] * 3 for bound in BOUNDS}


def patch(patched: pytest.MonkeyPatch, fakes: Fakes) -> None:
    with_models(patched)
    patched.setattr(module, "train_critic", fakes.train)
    patched.setattr(module, "attack_information", fakes.attack)
    patched.setattr(module, "evaluate_critic", fakes.evaluate)
    patched.setattr(module, "profile", fakes.profile)


def test_each_row_is_of_its_critics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    patch(monkeypatch, fakes)
    job = replace(TINY, classifiers=data_of(tmp_path), trials=2)
    results = module.run(job, RunFolder(tmp_path / "run"), print)
    for row in results["rows"]:
        base = 10000 * KINDS.index(row["model"]) + 500 + row["batch_size"] / 100
        base += 10 * BOUNDS.index(row["trained"])
        for i, bound in enumerate(BOUNDS):
            means = [row["values"][bound][term]["mean"] for term in TERMS[:2]]
            assert means == pytest.approx([base + i, base + i + 100 * (1 + i)])
        assert [row["slip"][term]["mean"] for term in TERMS] == pytest.approx([1, 1, 0])
        assert row["attack"]["mean"] == pytest.approx(100)
    # 12 updates of 4 are 48 images of the 40 there are: about one epoch; of 8, two and a half.
    stages = {each for each in fakes.trained if each[0].startswith("robust")}
    assert len(stages) == len(fakes.trained) / 2 == 16
    for bound in BOUNDS:
        assert {
            ("robust-4-normal-1", bound, 40, 1, 4),
            ("robust-8-normal-0", bound, 40, 2, 8),
            ("robust-4-worst-0", bound, 16, 1, 4),
            ("robust-8-worst-0", bound, 32, 1, 8),
        } <= stages


def test_there_are_two_batches_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    patch(monkeypatch, fakes)
    job = replace(TINY, classifiers=data_of(tmp_path), test_images=12)
    module.run(job, RunFolder(tmp_path / "run"), print)
    assert fakes.tested == {(4, 12), (8, 16)}


def test_a_finished_run_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(TINY, classifiers=data_of(tmp_path))
    patch(monkeypatch, Fakes())
    whole = module.run(job, RunFolder(tmp_path / "run"), print)
    again = Fakes()
    patch(monkeypatch, again)
    assert module.run(job, RunFolder(tmp_path / "run"), print) == whole
    assert not again.trained


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_models(monkeypatch)
    job = replace(TINY, classifiers=data_of(tmp_path), batch_sizes=(4,), updates=4)
    whole = module.run(job, RunFolder(tmp_path / "whole"), print)
    attack, done = module.attack_information, []

    def interrupted(*args: Any) -> Tensor:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return attack(*args)

    monkeypatch.setattr(module, "attack_information", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.run(job, RunFolder(tmp_path / "cut"), print)
    monkeypatch.setattr(module, "attack_information", attack)
    assert len(list((tmp_path / "cut/stages").iterdir())) == 2
    assert module.run(job, RunFolder(tmp_path / "cut"), print) == whole


def test_the_figure_has_the_results(measured: Mapping[str, Any]) -> None:
    measured = json.loads(json.dumps(measured))
    for row, bound, term in product(measured["rows"], BOUNDS, TERMS):
        row["values"][bound][term]["interval"][0] -= 0.3  # two batches' are symmetric
    panels = module.figure(measured).axes
    assert len(panels) == 6
    for kind, (slips, values, offsets) in zip(KINDS, (panels[:3], panels[3:]), strict=True):
        rows = {(r["trained"], r["batch_size"]): r for r in measured["rows"] if r["model"] == kind}
        drawn = {line.get_label(): line for line in slips.lines}
        for bound, (term, label) in product(BOUNDS, list(module.LABELS.items())[:2]):
            line = drawn.pop(f"{label}, trained with {bound}")
            assert list(line.get_xdata()) == [4, 8]
            wanted = [-rows[bound, size]["slip"][term]["mean"] for size in (4, 8)]
            assert list(line.get_ydata()) == wanted
        assert list(drawn) == ["constant critic 0"]
        constant = drawn["constant critic 0"].get_ydata()
        assert list(constant) == pytest.approx([math.log(4 / 3), math.log(8 / 7)])
        curves = {curve.get_label(): curve for curve in values.containers}
        assert len(curves) == 6
        for bound, (term, label) in product(BOUNDS, module.LABELS.items()):
            line, _, (bars,) = curves[f"{label}, {bound}"].lines
            found = [rows[bound, size]["values"][bound][term] for size in (4, 8)]
            assert list(line.get_ydata()) == [estimate["mean"] for estimate in found]
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            assert ends == pytest.approx(np.array([estimate["interval"] for estimate in found]))
        shown = {line.get_label(): list(line.get_ydata()) for line in offsets.lines}
        assert shown == {
            "dv_authors, N = 4": rows["dv", 4]["shifted"]["dv_authors"],
            "dv_authors, N = 8": rows["dv", 8]["shifted"]["dv_authors"],
            "dv": rows["dv", 8]["shifted"]["dv"],
        }
        assert list(offsets.lines[0].get_xdata()) == [-10.0, 0.0, 10.0]


def test_the_tables_have_the_results(measured: Mapping[str, Any]) -> None:
    text = as_text(module.tables(measured))
    show = partial("{:.3f} ({:.3f}, {:.3f})".format)
    for row in measured["rows"]:
        for term in TERMS:
            estimate = row["values"]["dv"][term]
            assert show(estimate["mean"], *estimate["interval"]) in text
            assert f"{row['slip'][term]['mean']:.4f}" in text
        assert f"{row['attack']['mean']:.4f}" in text
        assert f" {row['log_normaliser']['mean']:.2f} " in text
    for each in measured["whole"]:
        assert show(each["vulnerability"]["mean"], *each["vulnerability"]["interval"]) in text


def planted() -> dict[str, Any]:
    def estimate(mean: float, reach: float) -> dict[str, Any]:
        return {"mean": mean, "interval": [mean - reach, mean + reach]}

    rows = []
    for kind, size, trained in product(KINDS, (16, 512), BOUNDS):
        factor = (kind == "robust") + 2 * (trained == "dv_authors") + 1
        slip = {
            "information": estimate(-0.32 * factor / size, 0),
            "worst_case": estimate(-0.16 * factor / size, 0),
            "vulnerability": estimate((-1) ** factor * 0.08 * factor / size, 0),
        }
        rows.append(
            {
                "model": kind,
                "batch_size": size,
                "trained": trained,
                "slip": slip,
                "values": {
                    "dv": {"vulnerability": estimate(3.0 / factor if factor < 4 else -1, 0.5)}
                },
                "log_normaliser": estimate(factor, 0.5),
                "shifted": {
                    "dv": [1e-6 * factor, 0.0, -3e-6],
                    "dv_authors": [0.1 * factor / size, 0.0, -7.0 - factor / 10],
                },
            }
        )
    whole = [
        {"model": kind, "batch_size": size, "vulnerability": estimate(mean, 0.2)}
        for (kind, size), mean in zip(
            product(KINDS, (16, 512)), (0.3, -0.1, -0.5, 0.1), strict=True
        )
    ]
    return {"offsets": [10.0, 0.0, -10.0], "rows": rows, "whole": whole}


def test_the_paragraph_says_what_the_results_say() -> None:
    text = module.paragraph(planted())
    assert text.startswith(
        "The same trained critics evaluated with and without the slip differ at batches of 16 by "
        "at most 0.0800 nats in I, 0.0400 in worst-case I and 0.0200 in RV (1.5 % of it, at most), "
        "and at batches of 512 by at most 0.0025 nats in I, 0.0013 in worst-case I and 0.0006 in "
        "RV (0.0 % of it, at most)."
    )
    assert (
        "RV changes most in the robust model at batches of 16: by -0.500 (-0.700, -0.300) nats of "
        "1.500; 2 of 4 such intervals exclude 0."
    ) in text
    assert "is exp(1.50) for critics trained with dv and exp(3.50) for those" in text
    assert (
        "A constant added to all scores, from -10 to 10 nats, changes dv by at most 4.0e-06 nats. "
        "The value with the slip changes by -7.400 to -7.100 nats at -10, and by at most 0.0250 at "
        "10."
    ) in text
    assert "estimates and not certificates" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_sizes": ()}, r"masking: batch_sizes is \(\), wanted different sizes, 2 or more"),
        ({"batch_sizes": (1, 16)}, r"masking: batch_sizes is \(1, 16\), wanted"),
        ({"batch_sizes": (16, 16)}, r"masking: batch_sizes is \(16, 16\), wanted"),
        ({"offsets": ()}, r"masking: offsets is \(\), wanted one number or more"),
        ({"trials": 0}, "masking: trials is 0, wanted 1 or more"),
        ({"updates": 0}, "masking: updates is 0, wanted 1 or more"),
    ],
)
def test_settings_that_are_none(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Job(**options)
