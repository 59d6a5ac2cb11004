"""`wcmi-fast measure` and `wcmi-fast reproduce`, as they are typed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wcmi_fast import cli, datasets, models
from wcmi_fast.commands import measure, reproduce
from wcmi_fast.data import Data, Feed
from wcmi_fast.models import BaselineH
from wcmi_fast.models.classifiers import CIFAR10_MEAN
from wcmi_fast.training.checkpoint import save_weights

MODULE = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))

def text():
    return "no model"

ready = small()
"""
QUICK = shlex.split("--eps 0.1 --steps 2 --trials 1 --epochs 1 --batch-size 10 --units 8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, the current one, with a data set tiny.npz and a module of models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 2
    images = (generator.integers(0, 60, (90, 8, 8)) + 120 * labels[:, None, None]).astype(np.uint8)
    np.savez(
        "tiny.npz", x_train=images[:50], y_train=labels[:50], x_test=images[50:], y_test=labels[50:]
    )
    Path("handmade.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("handmade", None)


def measured(*args: str) -> dict[str, Any]:
    cli.main(["measure", "--data", "tiny.npz", *QUICK, "--out", "found", *args])
    report: dict[str, Any] = json.loads(Path("found/report.json").read_text())
    return report


def test_a_model_of_the_users_is_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured("--model", "handmade:small")
    difference = report["information"]["mean"] - report["worst_case"]["mean"]
    assert report["vulnerability"]["mean"] == pytest.approx(difference)
    assert report["settings"]["eps"] == 0.1
    assert report["settings"]["batch_size"] == 10
    assert report["classes"] == 2
    assert 0 <= report["adversarial_accuracy"] <= report["natural_accuracy"] <= 1
    shown = capsys.readouterr().out
    assert f"{report['vulnerability']['mean']:.3f}" in shown
    assert "found/report.html" in shown
    assert {"report.html", "report.json", "report.png"} <= {
        path.name for path in Path("found").iterdir()
    }


def test_a_name_gets_the_weights_of_its_checkpoint(place: Path) -> None:
    torch.manual_seed(3)
    model = BaselineH((1, 8, 8), dim=2)
    save_weights(Path("weights.safetensors"), model)
    first = measured("--model", "baseline_h", "--checkpoint", "weights.safetensors")
    with torch.no_grad():
        model.output.weight.mul_(-1)
    save_weights(Path("other.safetensors"), model)
    Path("found").rename("first")
    second = measured("--model", "baseline_h", "--checkpoint", "other.safetensors")
    assert first["settings"]["model_sha256"] != second["settings"]["model_sha256"]
    assert first["information"]["mean"] != second["information"]["mean"]


def test_a_run_of_train_is_measured_by_its_folder(place: Path) -> None:
    options = shlex.split("--data tiny.npz --steps 1 --epochs 1 --batch-size 10 --test-steps 1")
    cli.main(["train", "encoder", *options, "--units", "8", "--out", "encoder"])
    cli.main(["train", "head", *options, "--encoder", "encoder", "--out", "head"])
    data = datasets.load("tiny.npz")
    x = Feed(data.x_test, "cpu")[:5]
    for file, name, outputs in (
        ("encoder/encoder.safetensors", "baseline_h", 64),
        ("head/classifier.safetensors", "baseline_h_mlp", 2),
    ):
        wanted = models.load(name, file, input_shape=(1, 8, 8), classes=outputs)
        command = measure.MeasureCommand(model=file.split("/")[0], data="tiny.npz", eps=0.1)
        assert torch.equal(measure.load_model(command, data, 2)(x), wanted(x))
    assert measured("--model", "head", "--layer", "output")["adversarial_accuracy"] is not None


def test_cifar10_is_normalised_inside_the_model() -> None:
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    data = Data(images, labels, images, labels)
    for name, wanted in (("cifar10", CIFAR10_MEAN), ("other.npz", (0.0, 0.0, 0.0))):
        command = measure.MeasureCommand(model="baseline_h", data=name, eps=0.1)
        found = measure.load_model(command, data, 10).get_buffer("normalise.mean")
        assert found.flatten().tolist() == pytest.approx(list(wanted))


def test_a_layer_is_measured(place: Path) -> None:
    report = measured("--model", "handmade:ready", "--layer", "1")
    assert report["settings"]["layer"] == "1"
    assert report["natural_accuracy"] is not None  # of the whole model


def test_a_budget_is_planned_and_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured("--model", "handmade:small", "--budget", "0.05")
    assert "plan: 1 trial of" in capsys.readouterr().out
    assert report["settings"]["budget_minutes"] == 0.05


def test_the_same_command_twice_reads_what_is_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured("--model", "handmade:ready")
    monkeypatch.delattr("torch.optim.Adam.step")
    again = measured("--model", "handmade:ready")
    assert again["vulnerability"] == first["vulnerability"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--model", "handmade:none"], "measure: model is 'handmade:none', wanted module:callable"),
        (["--model", "missing:none"], "wanted module:callable that can be imported"),
        (["--model", "handmade:text"], "which made a str, wanted an nn.Module"),
        (["--model", "resnet_18"], "did you mean"),
        (["--model", "."], "load_trained: run is ., which holds no run of wcmi-fast train"),
        (["--model", ".", "--checkpoint", "weights.pt"], "checkpoint is weights.pt beside the run"),
        (["--model", "handmade:small", "--layer", "fc"], "layer is 'fc', wanted a submodule"),
        (["--model", "handmade:small", "--eps", "-1"], "eps is -1.0, wanted"),
        (["--model", "handmade:small", "--checkpoint", "none.pt"], "none.pt"),
        (["--model", "handmade:small", "--bound", "dw"], "bound is 'dw', wanted one of"),
    ],
)
def test_bad_options_get_one_sentence(
    place: Path, args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["measure", "--data", "tiny.npz", *QUICK, "--out", "found", *args])
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert "Traceback" not in said
    assert not Path("found/report.json").exists()


def test_an_interrupt_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wcmi_fast.information.trials.train_critic", interrupted)
    with pytest.raises(SystemExit) as stopped:
        measured("--model", "handmade:ready")
    assert stopped.value.code == 130
    assert "to go on, add --out found" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_every_experiment_has_a_command_with_its_options_explained(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in fields(reproduce.EXPERIMENTS[name].Job):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "--out" in shown


def test_an_experiment_runs_with_its_options(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reproduced(experiment: Any, job: Any, folder: Path, say: Any) -> None:
        seen.append((experiment.NAME, job, folder))
        raise ValueError("enough")

    monkeypatch.setattr(reproduce, "reproduce", reproduced)
    command = "reproduce standard-robust --eps 0.3 --classifiers.epochs 7 --out here"
    with pytest.raises(SystemExit):
        cli.main(shlex.split(command))
    name, job, folder = seen[0]
    assert (name, job.eps, job.classifiers.epochs, folder) == (
        "standard-robust",
        0.3,
        7,
        Path("here"),
    )
    assert type(job) is reproduce.EXPERIMENTS["standard-robust"].Job


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["reproduce", "ground-troth"])
    assert stopped.value.code == 2
    assert "ground-truth" in capsys.readouterr().err


def test_the_installed_command_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wcmi_fast", "reproduce", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in done.stdout for name in reproduce.EXPERIMENTS)
