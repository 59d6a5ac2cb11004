"""`wcmi-fast train`: tasks end to end, where options come from, interruptions, bad input."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from two_kinds import write_two_kinds

from wcmi_fast import PGD, datasets, models
from wcmi_fast.cli import main
from wcmi_fast.commands.train import with_defaults
from wcmi_fast.training import tasks
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.evaluation import accuracy, interval
from wcmi_fast.training.options import TASKS, ClassifierTask
from wcmi_fast.training.presets import PRESETS, preset
from wcmi_fast.training.watch import Watch

SMALL = [
    "--epochs",
    "2",
    "--batch-size",
    "10",
    "--test-images",
    "20",
    "--steps",
    "1",
    "--test-steps",
    "2",
]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_two_kinds(tmp_path / "digits.npz", train=60, test=30)


def run(*args: str | Path) -> None:
    main(["train", *map(str, args)])


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """Return what a command that fails says."""
    with pytest.raises(SystemExit) as raised:
        run(*args)
    assert raised.value.code == 1
    return re.sub(r"\s+", " ", capsys.readouterr().err)


# Tasks


def test_encoder_and_heads(digits: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    run("encoder", "--data", digits, "--units", "8", *SMALL, "--out", encoder)
    assert isinstance(results(encoder)["bound_nats"], float)
    data = datasets.load(digits)
    x, y = data.x_test[:20].float() / 255, data.y_test[:20]
    for kind in ("mlp", "linear"):
        head = tmp_path / kind
        options = ["--kind", kind, "--robust", "--learning-rate", "0.05"]
        run("head", "--data", digits, "--encoder", encoder, *options, *SMALL, "--out", head)
        whole = models.load(
            f"baseline_h_{kind}", head / "classifier.safetensors", input_shape=(1, 8, 8), classes=2
        )
        attack = PGD(eps=0.1, step_size=0.125, steps=2)
        nothing = torch.nn.Identity()
        found = results(head)
        assert found["natural_accuracy"] == accuracy(whole, nothing, x, y, attack=None)
        assert found["adversarial_accuracy"] == accuracy(whole, nothing, x, y, attack=attack)
        assert found["test_attack"]["eps"] == 0.1
        assert found["test_images"] == 20
        for name in ("natural", "adversarial"):
            assert found[f"{name}_interval"] == list(interval(found[f"{name}_accuracy"], 20))
        # The encoder is the one that was trained.
        alone = models.load(
            "baseline_h", encoder / "encoder.safetensors", input_shape=(1, 8, 8), classes=64
        )
        torch.testing.assert_close(whole[:-1](x), alone(x))


def test_a_classifier_learns(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("classifier", "--data", digits, *SMALL, "--epochs", "6", "--out", tmp_path / "c")
    found = results(tmp_path / "c")
    assert found["natural_accuracy"] > 0.9
    low, high = (f"{100 * end:.2f}" for end in found["natural_interval"])
    assert f"of 20 test images (95 %: {low} to {high})" in re.sub(
        r"\s+", " ", capsys.readouterr().out
    )
    config = tomllib.loads((tmp_path / "c" / "config.toml").read_text())
    assert config["classifier"]["epochs"] == 6
    assert config["versions"]["torch"] == torch.__version__


def test_the_data_are_loaded_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = datasets.load

    def load(data: Any, **given: Any) -> Any:
        loaded.append(data)
        return real(data, **given)

    monkeypatch.setattr(datasets, "load", load)
    run("classifier", "--data", digits, *SMALL, "--out", tmp_path / "c")
    assert loaded == [str(digits)]


@pytest.mark.parametrize("task", ["classifier", "head"])
def test_robust_means_attacked(task: str, digits: Path, tmp_path: Path) -> None:
    options: list[str | Path] = [task, "--data", digits, *SMALL, "--eps", "0.3"]
    if task == "head":
        run("encoder", "--data", digits, "--units", "8", *SMALL, "--out", tmp_path / "encoder")
        options += ["--encoder", tmp_path / "encoder"]
    run(*options, "--out", tmp_path / "standard")
    run(*options, "--robust", "--out", tmp_path / "robust")
    # The last epoch's: in the first one the attack has little of its radius.
    standard, robust = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["loss_nats"]
        for name in ("standard", "robust")
    )
    assert robust > standard + 0.01


def test_an_encoders_options_reach_its_config(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[EncoderConfig] = []

    def train_encoder(config: EncoderConfig, *rest: Any, **options: Any) -> None:
        given.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "train_encoder", train_encoder)
    options = "--beta 0.5 --bound nwj --units 8 --grad-clip 2 --averaging 0.5 --learning-rate 0.1"
    with pytest.raises(KeyboardInterrupt):
        run(
            *("encoder", "--data", digits, *SMALL, "--out", tmp_path / "e"),
            *options.split(),
            "--stop-on-overfitting",
        )
    assert given == [
        EncoderConfig(
            attack=PGD(eps=0.1, step_size=0.25, steps=1),
            epochs=2,
            batch_size=10,
            beta=0.5,
            bound="nwj",
            units=8,
            grad_clip=2.0,
            averaging=0.5,
            learning_rate=0.1,
            stop_on_overfitting=True,
        )
    ]


def test_what_is_held_out_is_what_the_options_say() -> None:
    task = ClassifierTask(
        eps=0.2, held_out=7, held_out_steps=5, early_stop=True, stop_on_overfitting=True
    )
    attack = PGD(eps=0.2, step_size=0.1, steps=5)
    assert task.watch() == Watch(rows=7, attack=attack, keep_best=True, stop=True)
    assert ClassifierTask(held_out=7).watch() == Watch(
        rows=7, attack=PGD(eps=0.1, step_size=0.025, steps=10)
    )
    assert ClassifierTask().watch() is None


def test_early_stopping_holds_images_out(digits: Path, tmp_path: Path) -> None:
    options = ["--held-out", "20", "--held-out-steps", "2", "--early-stop"]
    run("classifier", "--data", digits, *SMALL, *options, "--out", tmp_path / "c")
    records = [json.loads(line) for line in (tmp_path / "c" / "metrics.jsonl").open()]
    assert all(0 <= record["held_out_adversarial_accuracy"] <= 1 for record in records)


# Where options come from


def test_presets_are_the_papers() -> None:
    """Spec section 6, written out again."""
    wanted = {
        "mnist": (0.3, 10, 0.1),
        "fashion_mnist": (0.1, 10, 0.02),
        "svhn": (4 / 255, 10, 0.005),
        "cifar10": (8 / 255, 7, 0.01),
    }
    assert set(PRESETS) == {f"{kind}/{name}" for name in wanted for kind in ("paper", "cpu")}
    for name, (eps, steps, step_size) in wanted.items():
        found = preset(f"paper/{name}", "classifier")
        assert found["data"] == name
        assert (found["eps"], found["steps"], found["step_size"]) == (eps, steps, step_size)
        assert (found["batch_size"], found["epochs"], found["learning_rate"]) == (128, 300, 1e-4)
    changed = {"crop_padding": 4, "flip": True, "jitter": 0.25, "rotation": 2}
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    for name in wanted:
        for task in TASKS:
            found = preset(f"paper/{name}", task)
            augmentation = changed if name == "cifar10" else {}
            assert {key: found[key] for key in changed if key in found} == augmentation
            # A head's encoder normalises images.
            given = (found.get("mean"), found.get("std"))
            assert given == ((mean, std) if name == "cifar10" and task != "head" else (None, None))


def test_small_presets_have_the_papers_radius_and_changes_of_images() -> None:
    for name, task in itertools.product(("mnist", "fashion_mnist", "svhn", "cifar10"), TASKS):
        small, papers = preset(f"cpu/{name}", task), preset(f"paper/{name}", task)
        same = ("data", "eps", "crop_padding", "flip", "jitter", "rotation", "mean", "std")
        assert {key: small.get(key) for key in same} == {key: papers.get(key) for key in same}
        assert small["epochs"] <= {"encoder": 20, "head": 8, "classifier": 8}[task]
        assert (small["steps"], small["step_size"]) == (7, small["eps"] / 4)
        options = {"encoder": Path("e")} if task == "head" else {}
        TASKS[task](**small, **options)


def test_options_go_before_a_file_and_that_before_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epochs = 7\nseed = 5\nrandom_start = true\n")
    given = ["--preset", "paper/mnist", "--config", str(file), "--seed", "9"]
    found = with_defaults(["encoder", *given])
    last = {found[k]: found[k + 1] for k in range(1, len(found) - 1) if found[k].startswith("--")}
    assert (last["--eps"], last["--epochs"], last["--seed"]) == ("0.3", "7", "9")
    assert "--random-start" in found
    assert last["--units"] == "2048"
    assert "--units" not in with_defaults(["head", *given])


def test_a_runs_own_config_repeats_it(digits: Path, tmp_path: Path) -> None:
    run("classifier", "--data", digits, *SMALL, "--robust", "--out", tmp_path / "a")
    run("classifier", "--config", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert results(tmp_path / "a") == results(tmp_path / "b")
    settings = [(tmp_path / name / "settings.json").read_text() for name in "ab"]
    assert settings[0] == settings[1]


# Interruptions


def test_the_same_options_go_on_and_others_are_named(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["classifier", "--data", str(digits), *SMALL, "--out", str(tmp_path / "c")]
    run(*options)
    first = results(tmp_path / "c")
    run(*options)
    assert results(tmp_path / "c") == first
    error = said(capsys, *options, "--eps", "0.2", "--seed", "1")
    assert "holds a run with another eps, seed, wanted the same settings or a new folder" in error
    assert "; eps is 0.1 there and 0.2 here, seed is 0 there and 1 here" in error
    error = said(capsys, "encoder", *options[1:])
    assert "holds a run with another" in error
    assert "task" in error


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_step_and_the_run_goes_on(
    asked: signal.Signals, code: int, digits: Path, tmp_path: Path
) -> None:
    options = ["train", "classifier", "--data", str(digits), *SMALL, "--epochs", "300"]
    entry = "import sys; from wcmi_fast.cli import main; main(sys.argv[1:])"
    program = [sys.executable, "-c", entry, *options]
    folder = tmp_path / "c"
    process = subprocess.Popen(
        [*program, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoints = folder / "checkpoints" / "classifier"
    while process.poll() is None and not list(checkpoints.glob("epoch-*")):
        pass
    process.send_signal(asked)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"stopped by {asked.name} in stage 'classifier'" in error
    assert f"to go on, add --out {folder} to the same command" in " ".join(error.split())
    assert not (folder / "results.json").exists()
    subprocess.run([*program, "--out", str(folder)], check=True, capture_output=True)
    subprocess.run([*program, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    for file in ("results.json", "metrics.jsonl", "classifier.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# Bad input


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--preset", "paper/mnits"], "preset is 'paper/mnits', wanted one of paper/mnist"),
        (["--preset", "paper/mnits"], "did you mean 'paper/mnist'?"),
        (["--config", "none.toml"], "config is none.toml, and there is no such file"),
        (["--data", "fashion"], "did you mean 'fashion_mnist'?"),
        (["--eps", "-1"], "eps is -1.0"),
        (["--steps", "0"], "train: steps is 0, wanted 1 or more"),
        (["--test-steps", "0"], "train: test_steps is 0, wanted 1 or more"),
        (["--held-out", "20", "--held-out-steps", "0"], "train: held_out_steps is 0, wanted 1 or"),
        (["--train-images", "0"], "train_images is 0, wanted 1 or more"),
        (["--test-images", "0"], "test_images is 0, wanted 1 or more"),
        (["--batch-size", "0"], "batch_size is 0, wanted 1 or more"),
        (["--checkpoint-every", "0"], "checkpoint_every is 0, wanted 1 or more"),
        (["--early-stop"], "early_stop needs held_out images, wanted held_out 1 or more"),
        (["--stop-on-overfitting"], "stop_on_overfitting needs held_out images"),
        (["--held-out", "55"], "60 training images with 55 held out leave 5, wanted a batch"),
        (["--batch-size", "61"], "batch_size is 61, and 60 training images with 0 held out leave"),
        (["--held-out", "-1"], "held_out is -1, wanted 0 or more"),
        (["--network", "resnet19"], "did you mean 'resnet18'?"),
        (["--epochs", "0"], "epochs is 0, wanted 1 or more"),
        (
            ["--eps", "8"],
            "eps is 8.0, wanted 0 to 1, as pixels are; of 255 grey values that is 0.0314",
        ),
        (["--data", "fashon_mnist"], "did you mean 'fashion_mnist'?"),
        (["--preset", "cpu/fashion"], "did you mean 'cpu/fashion_mnist'?"),
        (["--jitter", "2"], "Augmentation: jitter is 2.0, wanted 0 to 1"),
        (["--mean", "0.1", "0.2"], "mean is (0.1, 0.2), wanted a value for each of 1 channels"),
    ],
)
def test_bad_options(
    args: list[str],
    sentence: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["classifier", "--data", str(digits), *SMALL, "--out", str(tmp_path / "c"), *args]
    assert sentence in said(capsys, *given)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch = 3", "has the key 'epoch', wanted one of data,"),
        ("epoch = 3", "did you mean 'epochs'?"),
        ("[encoder]\nepochs = 3", "is of a encoder, wanted one of a classifier"),
        ("epochs 3", "wanted a TOML file"),
    ],
)
def test_bad_config_files(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert sentence in said(capsys, "classifier", "--config", tmp_path / "run.toml")


def test_an_encoder_that_is_none(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["head", "--data", str(digits), *SMALL, "--out", str(tmp_path / "h"), "--encoder"]
    (tmp_path / "empty").mkdir()
    assert "which holds no run, wanted the folder of a finished encoder run" in said(
        capsys, *given, tmp_path / "empty"
    )
    run("classifier", "--data", digits, *SMALL, "--out", tmp_path / "c")
    assert "which holds a classifier run, wanted" in said(capsys, *given, tmp_path / "c")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "settings.json").write_text(json.dumps({"task": "encoder"}))
    assert "holds an encoder run that is not finished" in said(capsys, *given, tmp_path / "e")


def test_a_bound_that_is_none(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["encoder", "--data", str(digits), *SMALL, "--bound", "info_nce"]
    assert "did you mean 'infonce'?" in said(capsys, *given, "--out", tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_vectors_are_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).random((20, 3)), np.arange(20) % 2
    np.savez(tmp_path / "v.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    error = said(
        capsys, "classifier", "--data", tmp_path / "v.npz", *SMALL, "--out", tmp_path / "c"
    )
    assert "data has rows of shape (3,), wanted images" in error


def test_the_environment_is_left(digits: Path, tmp_path: Path) -> None:
    """By a run of one batch an epoch, which takes all images."""
    before = dict(os.environ)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run("classifier", "--data", digits, *SMALL, "--batch-size", "60", "--out", tmp_path / "c")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert dict(os.environ) == before
