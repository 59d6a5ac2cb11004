"""The study of logits: its rows, correlation, table and figure, and the experiment around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.experiments import logit_layer
from wcmi_fast.experiments.logit_layer import logit_layer_study
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.results import Report
from wcmi_fast.models import load
from wcmi_fast.theory import adversarial_accuracy_upper_bound
from wcmi_fast.training.config import ClassifierConfig
from wcmi_fast.training.run_folder import RunFolder

TINY = {
    "models": ("baseline_h",),
    "train_eps": (0.0, 0.1),
    "train_steps": 1,
    "train_epochs": 3,
    "train_batch": 16,
    "steps": 2,
    "training_steps": 1,
    "trials": 1,
    "epochs": 1,
    "batch_size": 10,
    "critic_images": 40,
    "test_images": 40,
}


def tiny(folder: Path) -> Path:
    """Dark and light images: two classes, told apart by any classifier."""
    generator = np.random.default_rng(0)
    labels = np.arange(160) % 2
    images = generator.integers(0, 60, (160, 8, 8)) + 120 * labels[:, None, None]
    path = folder / "tiny.npz"
    np.savez(
        path,
        x_train=images[:120].astype(np.uint8),
        y_train=labels[:120],
        x_test=images[120:].astype(np.uint8),
        y_test=labels[120:],
    )
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("logits")
    job = logit_layer.Job(data=str(tiny(folder)), **TINY)
    return folder, dict(reproduce(logit_layer, job, folder / "run", print))


def run_without_reports(
    job: logit_layer.Job, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Reports take longer to draw than all else."""
    monkeypatch.setattr(Report, "save", lambda *args: None)
    return dict(logit_layer.run(job, RunFolder(folder), print))


def test_every_network_is_trained_for_every_radius(found: tuple[Path, dict[str, Any]]) -> None:
    folder, results = found
    assert list(results["models"]) == ["baseline_h standard", "baseline_h eps 0.1"]
    for name, row in results["models"].items():
        rv = row["information"]["mean"] - row["worst_case"]["mean"]
        assert row["vulnerability"]["mean"] == pytest.approx(rv)
        gap = row["natural_accuracy"] - row["adversarial_accuracy"]
        assert row["gap"] == pytest.approx(gap)
        assert row["natural_accuracy"] > 0.9
        bound = adversarial_accuracy_upper_bound(row["worst_case"]["mean"], 2)
        assert row["accuracy_bound"] == pytest.approx(bound)
        slug = name.replace(" ", "-")
        report = json.loads((folder / f"run/measured/{slug}/report/report.json").read_text())
        assert report["worst_case"]["mean"] == row["worst_case"]["mean"]
        assert report["settings"]["eps"] == 0.1


def test_trained_networks_differ_and_can_be_loaded(found: tuple[Path, dict[str, Any]]) -> None:
    folder, results = found
    weights = []
    for kind in ("standard", "eps-0.1"):
        file = folder / f"run/models/baseline_h-{kind}.safetensors"
        model = load("baseline_h", file, input_shape=(1, 8, 8), classes=2)
        with np.load(folder / "tiny.npz") as data:
            x, y = torch.from_numpy(data["x_test"])[:, None] / 255, data["y_test"]
        share = float((model(x).argmax(1).numpy() == y).mean())
        name = f"baseline_h {kind.replace('-', ' ')}"
        assert share == pytest.approx(results["models"][name]["natural_accuracy"])
        weights.append(model.output.weight)
    assert not torch.equal(*weights)


def test_only_robust_networks_are_trained_under_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks: list[PGD | None] = []

    def train(config: ClassifierConfig, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        attacks.append(config.attack)
        return model

    monkeypatch.setattr(logit_layer, "train_classifier", train)
    monkeypatch.setattr(logit_layer, "logit_layer_study", lambda *args, **options: {})
    job = logit_layer.Job(data=str(tiny(tmp_path)), **{**TINY, "train_steps": 5})
    logit_layer.run(job, RunFolder(tmp_path / "run"), print)
    assert attacks == [None, PGD(eps=0.1, step_size=0.05, steps=5, random_start=True)]


def test_a_finished_run_trains_nothing_again(
    found: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = found

    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("torch.optim.Adam.step", refused)
    job = logit_layer.Job(data=str(folder / "tiny.npz"), **TINY)
    again = run_without_reports(job, folder / "run", monkeypatch)
    for name, row in results["models"].items():
        assert again["models"][name]["vulnerability"] == row["vulnerability"]


def test_checkpoints_take_the_place_of_training(
    found: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = found
    kept = tmp_path / "kept"
    shutil.copytree(folder / "run/models", kept)
    (kept / "baseline_h-eps-0.1.safetensors").unlink()
    trained: list[str] = []
    train = logit_layer.train_classifier
    monkeypatch.setattr(
        logit_layer,
        "train_classifier",
        lambda *args, stage, **options: (
            trained.append(stage) or train(*args, stage=stage, **options)
        ),
    )
    job = logit_layer.Job(data=str(folder / "tiny.npz"), checkpoints=kept, **TINY)
    again = run_without_reports(job, tmp_path / "run", monkeypatch)
    assert trained == ["train-baseline_h-eps-0.1"]
    for name, row in results["models"].items():
        same = again["models"][name]["vulnerability"]["mean"]
        assert same == pytest.approx(row["vulnerability"]["mean"], rel=1e-5)


def rows(**values: tuple[float, float, float, float]) -> dict[str, Any]:
    """Results of models with (I, worst-case I, natural, adversarial accuracy)."""

    def row(normal: float, worst: float, natural: float, adversarial: float) -> dict[str, Any]:
        def estimate(mean: float) -> dict[str, Any]:
            return {"mean": mean, "interval": [mean - 0.1, mean + 0.2]}

        return {
            "information": estimate(normal),
            "worst_case": estimate(worst),
            "vulnerability": estimate(normal - worst),
            "natural_accuracy": natural,
            "adversarial_accuracy": adversarial,
            "gap": natural - adversarial,
            "accuracy_bound": adversarial_accuracy_upper_bound(worst, 10),
            "flags": ["near_log_n"] if worst > 1 else [],
        }

    models = {name.replace("_", " ", 1): row(*found) for name, found in values.items()}
    correlation = logit_layer._correlation(models)
    return {"eps": 0.1, "classes": 10, "models": models, "correlation": correlation}


PAPER = {
    "BaselineH_standard": (1.10, 0.21, 0.86, 0.02),
    "BaselineH_eps_8/255": (1.75, 1.03, 0.71, 0.39),
    "ResNet_standard": (1.04, 0.02, 0.93, 0.00),
    "ResNet_eps_8/255": (1.69, 1.06, 0.80, 0.52),
}


def test_the_correlation_is_that_of_vulnerability_and_gap() -> None:
    correlation = rows(**PAPER)["correlation"]
    vulnerability, gap = [0.89, 0.72, 1.02, 0.63], [0.84, 0.32, 0.93, 0.28]
    assert correlation["pearson"] == pytest.approx(np.corrcoef(vulnerability, gap)[0, 1])
    assert correlation["spearman"] == pytest.approx(1)


def test_too_few_or_equal_models_have_no_correlation() -> None:
    few = dict(list(PAPER.items())[:2])
    assert rows(**few)["correlation"] is None
    gaps = [(1.0, 0.1 * i, 0.75, 0.5) for i in range(3)]
    vulnerabilities = [(1.0, 0.5, 0.75, 0.1 * i) for i in range(3)]
    for equal in (gaps, vulnerabilities):
        assert rows(**dict(zip("abc", equal, strict=True)))["correlation"] is None
    assert "correlation" not in as_text(logit_layer.tables(rows(**few)))


def test_the_table_shows_numbers_and_what_follows() -> None:
    results = rows(**PAPER)
    text = " ".join(as_text(logit_layer.tables(results)).split())
    for number in ("1.750", "1.030", "0.720", "71.0", "39.0", "32.0"):
        assert number in text
    assert f"{100 * adversarial_accuracy_upper_bound(1.03, 10):.1f}" in text
    pearson = results["correlation"]["pearson"]
    assert f"correlation of {pearson:.2f} (of ranks: 1.00)" in text
    assert "measured adversarial accuracy for 4 of 4 models." in text
    assert "Flags of BaselineH standard (docs/measuring.md): none." in text
    assert "Flags of ResNet eps_8/255 (docs/measuring.md): near_log_n." in text
    assert "estimates and not certificates" in text


def test_a_broken_bound_is_said() -> None:
    results = rows(**PAPER, Odd_one=(0.5, 0.0, 0.9, 0.6))
    text = " ".join(as_text(logit_layer.tables(results)).split())
    assert "for 4 of 5 models, not for Odd one." in text


def test_the_figure_shows_the_models_and_the_line() -> None:
    results = rows(**PAPER)
    gaps, bounds = logit_layer.figure(results).axes
    drawn = [(bar.lines[0].get_xdata()[0], bar.lines[0].get_ydata()[0]) for bar in gaps.containers]
    wanted = [(normal - worst, 100 * (n - a)) for normal, worst, n, a in PAPER.values()]
    assert np.allclose(drawn, wanted)
    pairs = [bar.lines[0] for bar in bounds.containers]
    assert np.allclose(
        [(p.get_xdata()[0], p.get_ydata()[0]) for p in pairs],
        [(x, 100 * a) for normal, worst, _, a in PAPER.values() for x in (worst, normal)],
    )
    assert [p.get_markerfacecolor() == "w" for p in pairs] == [False, True] * 4
    line = next(each for each in bounds.lines if each.get_linestyle() == "--")
    nats, share = line.get_data()
    assert share[np.abs(nats - 1.08).argmin()] == pytest.approx(77.0, abs=0.6)
    assert [text.get_text() for text in logit_layer.figure(results).legends[0].get_texts()] == list(
        results["models"]
    )


def test_networks_share_a_colour_and_trainings_a_marker() -> None:
    bars = logit_layer.figure(rows(**PAPER)).axes[0].containers
    colours = [bar.lines[0].get_color() for bar in bars]
    markers = [bar.lines[0].get_marker() for bar in bars]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert markers[0] == markers[2] != markers[1] == markers[3]


class Brightness(nn.Module):
    """Logits of dark against light."""

    def forward(self, x: Tensor) -> Tensor:
        level = 20 * (x.flatten(1).mean(1, keepdim=True) - 0.5)
        return torch.cat([-level, level], 1)


def of_users(**options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 2
    x = 0.3 * torch.rand(120, 1, 8, 8, generator=generator) + 0.6 * y.view(-1, 1, 1, 1)
    return logit_layer_study(
        {"mine": Brightness()},
        options.pop("data", (x.clamp(0, 1), y)),
        eps=0.4,
        steps=2,
        critic=CriticConfig(epochs=1, batch_size=10, units=8),
        train_images=40,
        test_images=40,
        trials=1,
        progress=False,
        **options,
    )


def test_a_users_model_is_measured() -> None:
    found = of_users()
    row = found["models"]["mine"]
    assert (found["eps"], found["classes"], found["correlation"]) == (0.4, 2, None)
    assert row["natural_accuracy"] == 1
    # 0.15 and 0.75 on average: within 0.4 every image crosses 0.5.
    assert row["adversarial_accuracy"] < 0.1
    assert row["gap"] > 0.9


def test_data_need_labels() -> None:
    images = torch.rand(60, 1, 8, 8)
    with pytest.raises(ValueError, match="logit_layer_study: mine has no accuracy on data without"):
        of_users(data=(images, torch.rand(60, 1, 8, 8)))


def test_models_are_needed() -> None:
    with pytest.raises(ValueError, match="logit_layer_study: models is empty"):
        logit_layer_study({}, "fashion_mnist", eps=0.1)
