"""`wcmi-fast export`: what the file computes without wcmi_fast, and what cannot be exported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from networks import MNIST, images, randomised
from torch import Tensor, nn

from wcmi_fast import PGD, datasets, models
from wcmi_fast.cli import main
from wcmi_fast.models import exporting
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.trained import load_trained

SMALL = (8, 8)
IMAGE = (1, *SMALL)
BASELINES = ("baseline_h", "baseline_h_mlp", "baseline_h_linear")
# What a user without wcmi_fast runs: logits and input gradients, in whatever mode is asked for.
ALONE = """
import sys
sys.modules["wcmi_fast"] = None
import torch
threads, program, given, found = sys.argv[1:]
torch.set_num_threads(int(threads))
model = torch.export.load(program).module()
del model.train, model.eval
results = []
for x in torch.load(given):
    for mode in (True, False):
        model.train(mode)
        x = x.clone().requires_grad_()
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits.square().sum(), x)
        results.append((logits.detach(), gradient))
torch.save(results, found)
print([name for name in sys.modules if name.startswith("wcmi_fast")])
"""


def values(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


def network(name: str, shape: tuple[int, int, int] = IMAGE) -> nn.Module:
    return randomised(models.load(name, input_shape=shape, classes=10))


# A file by itself


@pytest.mark.parametrize(
    "name", ["baseline_h_mlp", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_torch_alone_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    model = network(name)
    models.export(model, tmp_path / "c.pt2", input_shape=IMAGE)
    batches = [images(count, *IMAGE, seed=count) for count in (1, 7)]
    torch.save(batches, tmp_path / "given.pt")
    files = [str(tmp_path / file) for file in ("c.pt2", "given.pt", "found.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(torch.get_num_threads()), *files],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['wcmi_fast']"  # the name that stands for no module
    found = torch.load(tmp_path / "found.pt")
    wanted = [values(model, x) for x in batches for _ in range(2)]
    assert len(found) == len(wanted) == 4
    for theirs, ours in zip(found, wanted, strict=True):
        assert torch.equal(theirs[0], ours[0])
        assert torch.equal(theirs[1], ours[1])
        assert ours[1].abs().max() > 0


@pytest.mark.parametrize(
    "name",
    [
        *BASELINES,
        *(pytest.param(n, marks=pytest.mark.slow) for n in models.NAMES if n not in BASELINES),
    ],
)
def test_every_network_can_be_exported(name: str, tmp_path: Path) -> None:
    model = network(name, MNIST)
    found = models.export(model, tmp_path / "c.pt2", input_shape=MNIST)
    assert found == (0, 0)
    x = images(3, *MNIST)
    again = models.load_exported(tmp_path / "c.pt2")
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for ours, theirs in zip(values(model, x), values(again, x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_is_exported_in_eval_mode_and_left_as_it_is(tmp_path: Path) -> None:
    model = network("baseline_h_mlp").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.export(model, tmp_path / "c.pt2", input_shape=IMAGE)
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = images(4, *IMAGE)
    assert torch.equal(models.load_exported(tmp_path / "c.pt2")(x), model.eval()(x))


def test_weights_say_how_the_network_is_built(tmp_path: Path) -> None:
    model = network("baseline_h_linear")
    found = models.export_weights(
        model, tmp_path / "c.safetensors", name="baseline_h_linear", input_shape=IMAGE, classes=10
    )
    assert found == (0, 0)
    with safetensors.safe_open(tmp_path / "c.safetensors", "pt") as file:
        built = json.loads(file.metadata()["wcmi_fast.models.load"])
    assert built == {"name": "baseline_h_linear", "input_shape": [1, 8, 8], "classes": 10}
    x = images(3, *IMAGE)
    for again in (
        models.load_exported(tmp_path / "c.safetensors"),
        models.load(built.pop("name"), tmp_path / "c.safetensors", **built),
    ):
        assert torch.equal(again(x), model(x))


class Detached(nn.Module):
    """The values of a model, with half of its gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.model(x)
        return 0.5 * (outputs + outputs.detach())


class Shifted(Detached):
    """The gradients of a model, with other values."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.model(x)
        return outputs + 1e-3 * outputs.detach().abs().max()


@pytest.mark.parametrize("wrong", [Detached, Shifted])
def test_a_file_that_computes_something_else_is_removed(
    wrong: type[Detached], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = exporting.load_exported
    monkeypatch.setattr(exporting, "load_exported", lambda path: wrong(load(path)))
    with pytest.raises(RuntimeError, match=r"differs from the model.* the file was removed"):
        models.export(network("baseline_h"), tmp_path / "c.pt2", input_shape=IMAGE)
    assert not list(tmp_path.iterdir())


# What cannot be loaded


def test_files_that_are_no_exports(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_exported: path is .*, and there is no such"):
        models.load_exported(tmp_path / "none.pt2")
    with pytest.raises(ValueError, match=r"wanted a name that ends in \.pt2 or \.safetensors"):
        models.load_exported(tmp_path / "c.onnx")
    for name, sentence in (
        ("c.pt2", "cannot be read as a program of torch.export"),
        ("c.safetensors", "is a truncated or damaged safetensors file"),
    ):
        (tmp_path / name).write_bytes(b"no program")
        with pytest.raises(ValueError, match=rf"load_exported: .*{name} {re.escape(sentence)}"):
            models.load_exported(tmp_path / name)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"has no wcmi_fast\.models\.load in its header"):
        models.load_exported(tmp_path / "w.safetensors")


def test_a_truncated_program_is_refused(tmp_path: Path) -> None:
    models.export(network("baseline_h"), tmp_path / "c.pt2", input_shape=IMAGE)
    whole = (tmp_path / "c.pt2").read_bytes()
    (tmp_path / "c.pt2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as a program"):
        models.load_exported(tmp_path / "c.pt2")


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an encoder, a head on it and a classifier, on a data set of bright and dark images."""
    root = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % 3
        noise = generator.integers(0, 120, (count, *SMALL))
        arrays[f"x_{part}"] = (noise + 60 * labels[:, None, None]).astype(np.uint8)
        arrays[f"y_{part}"] = labels
    np.savez(root / "data.npz", **arrays)
    common = ["--data", root / "data.npz", "--epochs", 2, "--batch-size", 10]
    common += ["--test-images", 20, "--steps", 1, "--test-steps", 2]
    for task, options in (
        ("encoder", ["--units", 8]),
        ("head", ["--encoder", root / "encoder"]),
        ("classifier", ["--robust", "--network", "baseline_h_linear"]),
    ):
        main(["train", task, *map(str, [*common, *options, "--out", root / task])])
    return root


def export(*args: str | Path | int) -> None:
    main(["export", *map(str, args)])


def said(capsys: pytest.CaptureFixture[str], *args: str | Path | int) -> str:
    """Return what a command that fails says."""
    with pytest.raises(SystemExit) as raised:
        export(*args)
    assert raised.value.code == 1
    return re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("ending", [".pt2", ".safetensors"])
@pytest.mark.parametrize("task", ["head", "classifier"])
def test_an_exported_run_has_its_accuracies(
    task: str,
    ending: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(folder / task, "--out", tmp_path / f"c{ending}")
    text = capsys.readouterr().out
    name = {"head": "baseline_h_mlp", "classifier": "baseline_h_linear"}[task]
    assert f"{name}: images (N, 1, 8, 8) in [0, 1] to logits (N, 3)" in text
    assert "Loaded again, and compared on 6 random images: the outputs differ by 0, the" in text
    assert [path.name for path in tmp_path.iterdir()] == [f"c{ending}"]
    model = models.load_exported(tmp_path / f"c{ending}")
    data = datasets.load(folder / "data.npz")
    x, y = data.x_test[:20].float() / 255, data.y_test[:20]
    results: dict[str, Any] = json.loads((folder / task / "results.json").read_text())
    # Not by accuracy(), which folds batch norms: by the module as a stranger would call it.
    attack = PGD(eps=0.1, step_size=0.125, steps=2)
    x_adv = attack.attack(lambda v: nn.functional.cross_entropy(model(v), y, reduction="none"), x)
    for kind, given in (("natural", x), ("adversarial", x_adv)):
        share = (model(given).argmax(1) == y).float().mean().item()
        assert share == pytest.approx(results[f"{kind}_accuracy"])


def test_an_encoder_gives_representations(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(folder / "encoder", "--out", tmp_path / "e.pt2")
    assert "baseline_h: images (N, 1, 8, 8) in [0, 1] to representations (N, 64)" in (
        capsys.readouterr().out
    )
    x = images(3, *IMAGE)
    head = load_trained(folder / "head")
    assert (head.task, head.name, head.outputs) == ("head", "baseline_h_mlp", 3)
    assert isinstance(head.model, nn.Sequential)
    # The head's network is the encoder and the head on it.
    z = models.load_exported(tmp_path / "e.pt2")(x)
    assert torch.equal(head.model[-1](z), head.model(x))
    assert accuracy(head.model, nn.Identity(), x, head.model(x).argmax(1), attack=None) == 1


def test_a_run_without_its_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in ("classifier.safetensors", "results.json", "settings.json"):
        content = (folder / "classifier" / file).read_bytes()
        (run / file).write_bytes(content.replace(b"data.npz", b"gone.npz"))
    assert "gone.npz', and there is no such file" in said(capsys, run, "--out", tmp_path / "c.pt2")
    export(run, "--out", tmp_path / "c.pt2", "--input-shape", 1, 8, 8)
    x = images(3, *IMAGE)
    again = models.load_exported(tmp_path / "c.pt2")
    assert torch.equal(again(x), load_trained(folder / "classifier").model(x))


def test_folders_that_hold_no_finished_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "c.pt2"]
    wanted = "wanted the folder of a finished one"
    assert "run is nowhere, and there is no such folder" in said(capsys, "nowhere", *out)
    assert f"which holds no run of wcmi-fast train, {wanted}" in said(capsys, tmp_path, *out)
    for content in ("[]", '{"task": "measure"}', "{"):
        (tmp_path / "settings.json").write_text(content)
        assert f"which holds no run of wcmi-fast train, {wanted}" in said(capsys, tmp_path, *out)
    for task in ("an encoder", "a head", "a classifier"):
        (tmp_path / "settings.json").write_text(json.dumps({"task": task.split()[1]}))
        assert f"holds {task} run that is not finished, {wanted}" in said(capsys, tmp_path, *out)
    assert not (tmp_path / "c.pt2").exists()


def test_files_that_are_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.pt2").write_text("mine")
    error = said(capsys, folder / "head", "--out", tmp_path / "c.pt2")
    assert "export: path is" in error
    assert "c.pt2, which is there already, wanted a new file" in error
    assert (tmp_path / "c.pt2").read_text() == "mine"
    error = said(capsys, folder / "head", "--out", tmp_path / "c.onnx")
    assert "c.onnx, wanted a name that ends in .pt2 or .safetensors" in error
    error = said(capsys, folder / "head", "--out", tmp_path / "nowhere" / "c.pt2")
    assert "could not write" in error
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt2"]
    for function, ending in ((models.export, ".pt2"), (models.export_weights, ".safetensors")):
        options = {} if ending == ".pt2" else {"name": "baseline_h", "classes": 10}
        with pytest.raises(ValueError, match=rf"wanted a name that ends in \{ending}$"):
            function(nn.Identity(), tmp_path / "c.txt", input_shape=IMAGE, **options)
