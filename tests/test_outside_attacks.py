"""benchmarks/outside_attacks.py: torchattacks where it is installed, and a stand-in for it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import outside_attacks
import pytest
import torch
from outside_attacks import Row
from torch import Tensor, nn

from wcmi_fast import models

CLASSES, IMAGE = 5, (1, 4, 4)


class Plain:
    """PGD of plain torch, with the arguments of torchattacks' one."""

    factor = 1.0

    def __init__(
        self, model: nn.Module, *, eps: float, alpha: float, steps: int, random_start: bool
    ) -> None:
        self.model, self.alpha, self.steps, self.random_start = model, alpha, steps, random_start
        self.eps = eps * self.factor

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        lowest, highest = (x - self.eps).clamp_min(0), (x + self.eps).clamp_max(1)
        start = x + self.random_start * self.eps * (2 * torch.rand_like(x) - 1)
        found = start.clamp(0, 1)
        for _ in range(self.steps):
            found.requires_grad_()
            loss = nn.functional.cross_entropy(self.model(found), labels)
            (gradient,) = torch.autograd.grad(loss, found)
            found = (found.detach() + self.alpha * gradient.sign()).clamp(lowest, highest)
        return found


class Weak(Plain):
    factor = 0.2


class Unchanged:
    """AutoAttack that finds nothing."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        assert self.settings == {
            "norm": "Linf", "eps": 0.1, "version": "standard", "n_classes": CLASSES, "seed": 0,
        }  # fmt: skip
        return x


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Export a linear classifier, and write images that it mostly classifies; the arguments."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    models.export(model, tmp_path / "c.pt2", input_shape=IMAGE)
    x = torch.rand(150, *IMAGE, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % CLASSES
    x, y = x.numpy(), y.numpy()
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    files = [str(tmp_path / "c.pt2"), "--data", str(tmp_path / "data.npz")]
    return [*files, "--images", "140", "--json", str(tmp_path / "found.json")]


def stand_in(monkeypatch: pytest.MonkeyPatch, pgd: type[Plain]) -> None:
    library = SimpleNamespace(PGD=pgd, AutoAttack=Unchanged)
    monkeypatch.setitem(sys.modules, "torchattacks", library)
    monkeypatch.setattr(outside_attacks, "peer_version", lambda: "stand-in")


def found_rows(tmp_path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    content = json.loads((tmp_path / "found.json").read_text())
    return {(each["attack"], each["by"]): each for each in content["rows"]}


def test_plain_torch_in_its_place_agrees(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, Plain)
    assert outside_attacks.main([*given, "--autoattack"]) == 0
    rows = found_rows(tmp_path)
    assert list(rows) == [
        ("none", ""),
        ("PGD", "wcmi_fast"),
        ("PGD", "torchattacks"),
        ("PGD, random start", "wcmi_fast"),
        ("PGD, random start", "torchattacks"),
        ("AutoAttack", "torchattacks"),
    ]
    accuracies = [each["accuracy"] for each in rows.values()]
    assert accuracies[0] == accuracies[-1] == pytest.approx(90)
    # On a linear classifier PGD is about as good from anywhere.
    assert 10 < accuracies[1] < 80
    assert accuracies[1:5] == pytest.approx([accuracies[1]] * 4, abs=1)
    changes = [each["change"] for each in rows.values()]
    assert changes == pytest.approx([0, 0.1, 0.1, 0.1, 0.1, 0], abs=1e-6)
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["settings"] == {"eps": 0.1, "step_size": 0.025, "steps": 10, "seed": 0}
    assert content["images"] == 140
    assert content["agree"]


@pytest.mark.parametrize("attack", [outside_attacks.our_pgd, outside_attacks.their_pgd])
def test_both_start_where_they_are_told(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Plain)
    settings = outside_attacks.Settings(eps=0.1, step_size=0.001, steps=2)
    x, y = torch.full((40, 1, 4, 4), 0.5), torch.zeros(40, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    changes = [
        (attack(model, settings, random_start=random_start)(x, y) - x).abs().max().item()
        for random_start in (False, True)
    ]
    assert changes[0] == pytest.approx(0.002, abs=1e-6)
    assert 0.09 < changes[1] <= 0.1 + 1e-6


def test_a_weaker_attack_is_seen(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(monkeypatch, Weak)
    assert outside_attacks.main(given) == 1
    content = json.loads((tmp_path / "found.json").read_text())
    assert not content["agree"]
    points = content["differences_points"]["PGD"]
    rows = found_rows(tmp_path)
    ours, theirs = (rows["PGD", by]["accuracy"] for by in ("wcmi_fast", "torchattacks"))
    assert points == theirs - ours > 10
    assert f"PGD: theirs - ours = {points:+.1f} points, at most 1 allowed" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("theirs", "agree"), [(60.0, True), (61.0, True), (59.0, True), (61.2, False), (58.8, False)]
)
def test_a_point_is_allowed_either_way(theirs: float, agree: bool) -> None:
    rows = [
        Row("PGD", "wcmi_fast", 60.0, 0.1, 1.0),
        Row("PGD", "torchattacks", theirs, 0.1, 1.0),
        Row("AutoAttack", "torchattacks", 20.0, 0.1, 1.0),
    ]
    assert outside_attacks.agree(rows) == agree
    assert outside_attacks.differences(rows) == {"PGD": theirs - 60.0}


def test_the_first_images_are_taken(tmp_path: Path) -> None:
    x = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    y = np.array([2, 1, 0])
    np.savez(tmp_path / "data.npz", x_train=x[::-1], y_train=y[::-1], x_test=x, y_test=y)
    images, labels = outside_attacks.first_images(str(tmp_path / "data.npz"), 2)
    assert torch.equal(images, torch.tensor(x[:2, None]).float() / 255)
    assert labels.tolist() == [2, 1]


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as raised:
        outside_attacks.main(list(args))
    assert raised.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_what_does_not_run_is_said(
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    assert "torchattacks does not run: ModuleNotFoundError" in said(capsys, *given)
    stand_in(monkeypatch, Plain)
    assert "and there is no such file" in said(capsys, str(tmp_path / "none.pt2"))
    assert "images is 151 of 150 test images" in said(capsys, *given, "--images", "151")
    for option, value in (("--eps", "0"), ("--steps", "0"), ("--step-size", "nan")):
        assert f"argument {option}" in said(capsys, *given, option, value)
    models.export(nn.Flatten(), tmp_path / "flat.pt2", input_shape=(1, 2, 2))
    error = said(capsys, str(tmp_path / "flat.pt2"), *given[1:])
    assert "data has images of shape (1, 4, 4), wanted those of the file" in error
    models.export(nn.AdaptiveAvgPool2d(1), tmp_path / "maps.pt2", input_shape=IMAGE)
    error = said(capsys, str(tmp_path / "maps.pt2"), *given[1:])
    assert "file gives outputs of shape (1, 1, 1, 1) for an image, wanted logits for 5" in error
    assert not (tmp_path / "found.json").exists()


def test_torchattacks_agrees(given: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    assert outside_attacks.main(given) == 0
    rows = found_rows(tmp_path)
    assert rows["PGD", "torchattacks"]["accuracy"] == rows["PGD", "wcmi_fast"]["accuracy"]
    assert rows["PGD", "torchattacks"]["accuracy"] < rows["none", ""]["accuracy"] - 10


@pytest.mark.slow
def test_autoattack_is_as_strong_as_pgd(given: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    assert outside_attacks.main([*given, "--images", "40", "--autoattack"]) == 0
    rows = found_rows(tmp_path)
    found = rows["AutoAttack", "torchattacks"]
    assert 0 < found["accuracy"] <= rows["PGD", "wcmi_fast"]["accuracy"]
    assert found["change"] <= 0.1 + 1e-6


def test_the_settings_of_the_arguments_are_used() -> None:
    arguments = outside_attacks.parser().parse_args(["c.pt2", "--eps", "0.2", "--steps", "4"])
    assert outside_attacks.settings_of(arguments) == outside_attacks.Settings(0.2, 0.125, 4, 0)
    given = argparse.Namespace(eps=0.2, steps=4, step_size=0.05, seed=3)
    assert outside_attacks.settings_of(given) == outside_attacks.Settings(0.2, 0.05, 4, 3)
