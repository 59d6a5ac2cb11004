"""Training on augmented and normalised images: order, what is left alone, resumption, options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probes import NO_ATTACK
from torch import Tensor, nn

from wcmi_fast import PGD, datasets, models
from wcmi_fast.cli import main
from wcmi_fast.models import CIFAR10_MEAN, CIFAR10_STD, BaselineH, read_state
from wcmi_fast.training import encoder as encoder_module
from wcmi_fast.training import supervised
from wcmi_fast.training.augmentation import Augmentation
from wcmi_fast.training.config import ClassifierConfig, EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.stage import OnBatch, Values
from wcmi_fast.training.supervised import train_classifier, train_head
from wcmi_fast.training.watch import Watch

SHAPE = (3, 8, 8)
ATTACK = PGD(eps=0.1, step_size=0.05, steps=1, random_start=True)
CHANGED = Augmentation(crop_padding=2, flip=True, jitter=0.25, rotation=10)
ROWS = 24
X = torch.rand(ROWS, *SHAPE, generator=torch.Generator().manual_seed(3))
Y = torch.arange(ROWS) % 2
OPTIONS: dict[str, Any] = {"augmentation": CHANGED, "epochs": 2, "batch_size": 8, "eps_warmup": 0.0}
KINDS = ("encoder", "robust head", "standard head", "classifier")


def trained(kind: str, folder: Path, changed: bool = True, **options: Any) -> list[Tensor]:
    """Train on all rows; return all weights."""
    common = OPTIONS if changed else {**OPTIONS, "augmentation": None}
    given = {"seed": 0, "stage": "s", "run": RunFolder(folder, every=1), **options}
    torch.manual_seed(0)
    if kind == "encoder":
        config = EncoderConfig(attack=ATTACK, dim=4, units=8, **common)
        encoder, critic = train_encoder(config, X, **given)
        modules = [encoder, critic.global_, critic.local]
    elif kind == "classifier":
        model = BaselineH(SHAPE, dim=2)
        modules = [
            train_classifier(ClassifierConfig(attack=ATTACK, **common), model, X, Y, **given)
        ]
    else:
        attack = ATTACK if kind == "robust head" else None
        encoder = given.pop("encoder", BaselineH(SHAPE, dim=4).eval())
        settings = HeadConfig(attack=attack, **common)
        modules = [train_head(settings, encoder, X, Y, classes=2, **given)]
    return [value for module in modules for value in module.state_dict().values()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class KilledError(Exception):
    pass


def killed_in(batch: int) -> OnBatch:
    left = iter(range(batch))

    def on_batch(values: Values) -> None:
        if next(left, None) is None:
            raise KilledError

    return on_batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = trained(kind, tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(kind, tmp_path / "cut", on_batch=killed_in(4))
    assert equal(trained(kind, tmp_path / "cut"), whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert not equal(trained(kind, tmp_path / "unchanged", changed=False), whole)


def negative(self: Augmentation, images: Tensor, generator: torch.Generator, **part: Any) -> Tensor:
    torch.rand((), generator=generator)
    return 2 - images


def rows_of(images: list[Tensor]) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for batch in images for row in batch.flatten(1)}


@pytest.mark.parametrize("kind", ["encoder", "robust head", "classifier"])
def test_what_is_attacked_is_augmented(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[Tensor] = []

    def attack(self: PGD, loss_fn: Any, x: Tensor, **options: Any) -> Tensor:
        attacked.append(x)
        return x

    monkeypatch.setattr(Augmentation, "augment", negative)
    monkeypatch.setattr(PGD, "attack", attack)
    monkeypatch.setattr(encoder_module, "strength", lambda *given: NO_ATTACK)
    trained(kind, tmp_path)
    assert rows_of(attacked) == rows_of([2 - X])


class Seen(nn.Module):
    """An encoder that remembers what it was shown, in copies of it, too."""

    keep_layers = True

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Tensor] = []

    def __deepcopy__(self, memo: object) -> Seen:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(x)
        return x.flatten(1)[:, :4]


def test_a_standard_head_learns_from_every_augmented_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Augmentation, "augment", negative)
    seen = Seen()
    trained("standard head", tmp_path / "a", encoder=seen)
    probe, *batches = seen.images  # the first tells the size of a representation
    assert len(probe) == 1
    assert [len(batch) for batch in batches] == 2 * (ROWS // 8) * [8]
    assert rows_of(batches) == rows_of([2 - X])


def test_without_augmentation_its_features_are_computed_once(tmp_path: Path) -> None:
    seen = Seen()
    trained("standard head", tmp_path, changed=False, encoder=seen)
    assert [len(batch) for batch in seen.images] == [1, ROWS]


@pytest.mark.parametrize("kind", ["classifier", "head"])
def test_held_out_images_are_not_augmented(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[Tensor] = []
    measured: list[Tensor] = []

    def augment(
        self: Augmentation, images: Tensor, generator: torch.Generator, **part: Any
    ) -> Tensor:
        changed.append(images)
        return images

    def share(encoder: nn.Module, head: nn.Module, x: Tensor, y: Tensor, **options: Any) -> float:
        measured.append(x)
        return 0.5

    monkeypatch.setattr(Augmentation, "augment", augment)
    monkeypatch.setattr(supervised, "accuracy", share)
    watch, run = Watch(rows=8, attack=ATTACK), RunFolder(tmp_path)
    if kind == "classifier":
        config = ClassifierConfig(attack=None, watch=watch, **OPTIONS)
        model = BaselineH(SHAPE, dim=2)
        train_classifier(config, model, X, Y, seed=0, stage="s", run=run)
    else:
        settings = HeadConfig(attack=None, watch=watch, **OPTIONS)
        train_head(settings, nn.Flatten(), X, Y, classes=2, seed=0, stage="s", run=run)
    assert rows_of(changed) == rows_of([X[:-8]])
    assert rows_of(measured) == rows_of([X[-8:]])


# Normalisation


def test_an_encoder_and_its_critic_normalise_images(tmp_path: Path) -> None:
    plain = EncoderConfig(attack=ATTACK, dim=4, units=8, epochs=1, batch_size=8)
    mean, std = (0.2, 0.5, 0.4), (0.5, 0.25, 2.0)
    by = torch.tensor([mean, std]).view(2, 3, 1, 1)
    config = replace(plain, mean=mean, std=std)
    encoder, critic = train_encoder(config, X, seed=0, stage="s", run=RunFolder(tmp_path))
    for part, inner in ((encoder, BaselineH(SHAPE, dim=4)), (critic.local, critic.local[-1])):
        if part is encoder:
            state = {k: v for k, v in encoder.state_dict().items() if "normalise" not in k}
            inner.load_state_dict(state)
        torch.testing.assert_close(part(X), inner.eval()((X - by[0]) / by[1]))


# Options


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 24), ("test", 12)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 2
    np.savez(tmp_path / "pictures.npz", **arrays)
    return tmp_path / "pictures.npz"


def test_the_papers_cifar10_settings_train(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Augmentation] = []
    augment = Augmentation.augment

    def spy(self: Augmentation, images: Tensor, generator: torch.Generator, **part: Any) -> Tensor:
        used.append(self)
        return augment(self, images, generator, **part)

    monkeypatch.setattr(Augmentation, "augment", spy)
    small = ["--data", str(pictures), "--epochs", "1", "--batch-size", "8", "--test-steps", "1"]
    options = ["--preset", "paper/cifar10", *small, "--steps", "1", "--out"]
    e, h, c = (str(tmp_path / name) for name in ("e", "h", "c"))
    main(["train", "encoder", "--units", "8", *options, e])
    main(["train", "head", "--encoder", e, *options, h])
    main(["train", "classifier", *options, c])
    paper = Augmentation(crop_padding=4, flip=True, jitter=0.25, rotation=2)
    assert used == 9 * [paper]
    weights = ("e/encoder", "h/classifier", "c/classifier", "e/local_critic")
    for state in (read_state(tmp_path / f"{name}.safetensors") for name in weights):
        assert state["normalise.mean"].flatten().tolist() == pytest.approx(CIFAR10_MEAN)
        assert state["normalise.std"].flatten().tolist() == pytest.approx(CIFAR10_STD)
    # Test images are neither changed nor normalised twice.
    whole = models.load(
        "baseline_h_mlp", f"{h}/classifier.safetensors", input_shape=SHAPE, classes=2
    )
    data = datasets.load(pictures)
    share = accuracy(whole, nn.Identity(), data.x_test / 255, data.y_test, attack=None)
    assert f'"natural_accuracy": {share}' in (tmp_path / "h" / "results.json").read_text()
    # Its own config.toml repeats the run.
    main(["train", "encoder", "--config", f"{e}/config.toml", "--out", str(tmp_path / "again")])
    states = [read_state(Path(at) / "encoder.safetensors") for at in (e, tmp_path / "again")]
    assert equal(list(states[0].values()), list(states[1].values()))
