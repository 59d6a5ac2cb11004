"""What every experiment of `wcmi-fast reproduce` shares."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from wcmi_fast.data import Data
from wcmi_fast.experiments import classifiers, standard_robust
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Job:
    """Squares numbers."""

    upto: int = 3
    """The largest."""


def squares(broken_at: int | None = None) -> Any:
    worked = []

    def work(number: int) -> dict[str, int]:
        if number == broken_at:
            raise KeyboardInterrupt
        worked.append(number)
        return {"square": number**2}

    def run(job: Job, folder: RunFolder, say: Any) -> dict[str, Any]:
        stages = {n: folder.stage(f"square-{n}", lambda n=n: work(n)) for n in range(job.upto)}
        return {"squares": [stage["square"] for stage in stages.values()]}

    return SimpleNamespace(
        NAME="squares",
        Job=Job,
        run=run,
        tables=lambda results: f"squares: {results['squares']}",
        figure=lambda results: Figure(),
        worked=worked,
    )


def test_a_run_leaves_results_text_and_figure(tmp_path: Path) -> None:
    found = reproduce(squares(), Job(upto=4), tmp_path, print)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["squares"] == [0, 1, 4, 9]
    assert found["settings"] == {"upto": 4}
    assert found["versions"]["torch"] == torch.__version__
    assert (tmp_path / "results.txt").read_text() == "squares: [0, 1, 4, 9]\n"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        reproduce(squares(broken_at=2), Job(), tmp_path, print)
    assert not (tmp_path / "results.json").exists()
    second = squares()
    assert reproduce(second, Job(), tmp_path, print)["squares"] == [0, 1, 4]
    assert second.worked == [2]


def test_a_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    reproduce(squares(), Job(upto=2), tmp_path, print)
    with pytest.raises(ValueError, match="holds a run with another upto, wanted the same settings"):
        reproduce(squares(), Job(upto=3), tmp_path, print)
    assert reproduce(squares(), Job(upto=2), tmp_path, print)["squares"] == [0, 1]


def tiny(folder: Path) -> Path:
    """Dark and light images: two classes, told apart by any classifier."""
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = generator.integers(0, 60, (120, 8, 8)) + 120 * labels[:, None, None]
    path = folder / "tiny.npz"
    np.savez(
        path,
        x_train=images[:80].astype(np.uint8),
        y_train=labels[:80],
        x_test=images[80:].astype(np.uint8),
        y_test=labels[80:],
    )
    return path


SETTINGS = {"eps": 0.1, "steps": 2, "epochs": 4, "train_images": 80}


def test_classifiers_are_trained_once_and_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "BATCH", 16)
    settings = classifiers.Classifiers(data=str(tiny(tmp_path)), **SETTINGS)
    data = classifiers.load(settings)
    run = RunFolder(tmp_path / "run")
    models = classifiers.trained(settings, data, run, print)
    x, y = data.x_test.float() / 255, data.y_test
    for model in models.values():
        assert (model(x).argmax(1) == y).float().mean() > 0.9
    assert not torch.equal(models["standard"](x), models["robust"](x))

    monkeypatch.delattr("torch.optim.Adam.step")
    again = classifiers.trained(settings, data, run, print)
    for kind, model in models.items():
        assert torch.equal(again[kind](x), model(x))


def test_only_the_robust_classifier_meets_an_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = []

    def seen(config: Any, model: Any, *args: Any, **options: Any) -> Any:
        attacks.append(config.attack)
        return model

    monkeypatch.setattr(classifiers, "train_classifier", seen)
    settings = classifiers.Classifiers(data=str(tiny(tmp_path)), eps=0.2, steps=4)
    classifiers.trained(settings, classifiers.load(settings), RunFolder(tmp_path / "run"), print)
    standard, robust = attacks
    assert standard is None
    assert (robust.eps, robust.steps, robust.step_size) == (0.2, 4, 0.125)
    assert robust.random_start


def test_classifiers_are_kept_for_several_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "BATCH", 16)
    options = {**SETTINGS, "epochs": 1, "folder": tmp_path / "kept"}
    settings = classifiers.Classifiers(data=str(tiny(tmp_path)), **options)
    data = classifiers.load(settings)
    models = classifiers.trained(settings, data, RunFolder(tmp_path / "one"), print)
    monkeypatch.delattr("torch.optim.Adam.step")
    again = classifiers.trained(settings, data, RunFolder(tmp_path / "two"), print)
    x = data.x_test.float() / 255
    assert all(torch.equal(again[kind](x), model(x)) for kind, model in models.items())
    with pytest.raises(ValueError, match="holds a run with another seed"):
        classifiers.trained(replace(settings, seed=1), data, RunFolder(tmp_path / "one"), print)


def test_training_images_are_limited(tmp_path: Path) -> None:
    settings = classifiers.Classifiers(data=str(tiny(tmp_path)), train_images=30)
    data = classifiers.load(settings)
    assert isinstance(data, Data)
    assert (len(data.x_train), len(data.y_train), len(data.x_test)) == (30, 30, 40)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifiers, "BATCH", 16)
        job = standard_robust.Job(
            classifiers=classifiers.Classifiers(data=str(tiny(folder)), **SETTINGS),
            steps=2,
            training_steps=1,
            trials=2,
            epochs=1,
            batch_size=10,
        )
        results = reproduce(standard_robust, job, folder / "run", print)
    return folder / "run", dict(results)


def test_both_models_are_measured(measured: tuple[Path, dict[str, Any]]) -> None:
    folder, results = measured
    for kind in ("standard", "robust"):
        report = results["reports"][kind]
        difference = report["information"]["mean"] - report["worst_case"]["mean"]
        assert report["vulnerability"]["mean"] == pytest.approx(difference)
        saved = json.loads((folder / f"report-{kind}" / "report.json").read_text())
        assert saved["information"]["mean"] == report["information"]["mean"]
        assert report["natural_accuracy"] > 0.9
    low = results["reports"]["standard"]["vulnerability"]["interval"][0]
    high = results["reports"]["robust"]["vulnerability"]["interval"][1]
    assert results["comparison"]["intervals_apart"] == (low > high)


def test_the_table_and_the_figure_show_the_reports(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    _, results = measured
    text = as_text(standard_robust.tables(results))
    axes = standard_robust.figure(results).axes[0]
    for row, kind in enumerate(("standard", "robust")):
        report = results["reports"][kind]
        assert f"{report['vulnerability']['mean']:.3f}" in text
        drawn = axes.containers[row].lines[0].get_xdata()
        names = ("vulnerability", "worst_case", "information")
        assert list(drawn) == pytest.approx([report[name]["mean"] for name in names])


def test_weights_are_saved_for_other_programs(measured: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    from wcmi_fast.models import BaselineH

    folder, _ = measured
    model = BaselineH((1, 8, 8), dim=2).eval()
    model.load_state_dict(load_file(folder / "robust.safetensors"))
    assert model.output.weight.abs().sum() > 0
