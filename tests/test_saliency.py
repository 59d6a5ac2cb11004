"""Saliency: gradients of the information loss, and the experiment of figures 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import images, randomised
from torch import Tensor, nn

from wcmi_fast import reference
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments import saliency as experiment
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information.saliency import Feature, object_share, saliency
from wcmi_fast.models.folding import folded
from wcmi_fast.training.objective import Critic, new_critic

SHAPE = (1, 8, 8)
BOUNDS = {
    "dv": reference.dv,
    "infonce": reference.infonce,
    "dv_authors": lambda T: reference.dv(T, diagonal="zero"),
}


def smooth_encoder() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten())
    return randomised(nn.Sequential(*layers, nn.Linear(27, 4))).double().eval()


class SmoothLocal(nn.Module):
    """Image side of a critic, without kinks that finite differences would meet."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = randomised(nn.Conv2d(1, 16, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).tanh().flatten(2).transpose(1, 2)


def smooth_critic() -> Critic:
    return Critic(randomised(nn.Linear(4, 16)).double(), SmoothLocal().double())


@pytest.mark.parametrize("critic_grad", ["full", "encoder_only"])
@pytest.mark.parametrize("bound", list(BOUNDS))
def test_saliency_is_what_finite_differences_give(bound: str, critic_grad: Any) -> None:
    encoder, critic = smooth_encoder(), smooth_critic()
    x = images(5, *SHAPE).double()
    kept = critic.local(x)

    def loss(point: Tensor) -> float:
        h = critic.local(point) if critic_grad == "full" else kept
        return -BOUNDS[bound](reference.scores(critic.global_(encoder(point)), h)).item()

    found = saliency(encoder, critic, x, bound=bound, critic_grad=critic_grad)
    assert found.shape == x.shape
    for image, row, column in [(0, 0, 0), (1, 3, 5), (2, 6, 6), (4, 2, 1)]:
        step = torch.zeros_like(x)
        step[image, 0, row, column] = 1e-5
        wanted = (loss(x + step) - loss(x - step)) / 2e-5
        assert found[image, 0, row, column].item() == pytest.approx(wanted, rel=1e-5, abs=1e-9)


class Rows(nn.Module):
    """Sees the upper rows of an image only."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x[:, 0, :3].flatten(1).tanh()


class Columns(nn.Module):
    """Sees the left columns of an image only."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x[:, 0, :, :3].flatten(1)[:, None].tanh()


def test_pixels_that_nobody_sees_have_none() -> None:
    x, critic = images(6, *SHAPE), Critic(nn.Identity(), Columns())
    of_encoder = saliency(Rows(), critic, x, critic_grad="encoder_only")
    assert (of_encoder[:, :, 3:] == 0).all()
    assert (of_encoder[:, :, :3] != 0).all()
    of_both = saliency(Rows(), critic, x)
    assert (of_both[:, :, 3:, 3:] == 0).all()
    assert (of_both[:, :, 3:, :3] != 0).all()
    assert torch.equal(of_both[:, :, :3, 3:], of_encoder[:, :, :3, 3:])
    assert not torch.equal(of_both[:, :, :3, :3], of_encoder[:, :, :3, :3])


def test_a_feature_does_not_see_what_only_others_see() -> None:
    x = images(6, *SHAPE)
    one = Feature(Rows(), 5)
    assert torch.equal(one(x), Rows()(x)[:, 5:6])
    critic = Critic(nn.Linear(1, 24), Columns())
    found = saliency(one, critic, x, critic_grad="encoder_only")
    assert (found[:, 0, 0, 5] != 0).all()
    found[:, 0, 0, 5] = 0
    assert (found == 0).all()


def test_networks_run_in_eval_mode_and_are_left_as_they_were() -> None:
    encoder = randomised(nn.Sequential(nn.Conv2d(1, 2, 8), nn.BatchNorm2d(2), nn.Flatten()))
    critic = new_critic(2, 8, SHAPE)
    x = images(10, *SHAPE)
    with torch.no_grad():
        found = saliency(encoder.train(), critic, x)
    fixed = Critic(folded(critic.global_), folded(critic.local))
    assert torch.allclose(found, saliency(folded(encoder), fixed, x), atol=1e-6)
    assert found.abs().max() > 1e-4
    assert not found.requires_grad
    for module in (encoder, critic.global_, critic.local):
        assert module.training
        assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_the_share_of_the_object() -> None:
    x = torch.zeros(3, 2, 2, 2)
    x[0, 1, 0, 0] = x[1, :, 0, :] = x[2, 0, 0, 0] = 0.5
    maps = torch.zeros(3, 2, 2, 2)
    maps[0, 0] = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    maps[0, 1] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    maps[1, 0, 0] = torch.tensor([2.0, -2.0])
    found = object_share(maps, x)
    assert found[:2].tolist() == pytest.approx([9 / 12, 1])
    assert found[2].isnan()


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).detach()[:, :24]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: saliency(Rows(), Critic(nn.Identity(), Columns()), x, bound="jsd"),
            "saliency: bound is 'jsd', wanted one of",
        ),
        (
            lambda x: saliency(
                Blind(), Critic(nn.Identity(), Columns()), x, critic_grad="encoder_only"
            ),
            "saliency: the information loss does not depend on x",
        ),
        (lambda x: Feature(Rows(), 24)(x), "Feature: index is 24, wanted 0 to 23"),
        (lambda x: Feature(Rows(), -1)(x), "Feature: index is -1, wanted 0 to 23"),
        (lambda x: object_share(x[:2], x), r"maps has shape \(2, 1, 8, 8\) and x \(6, 1, 8, 8\)"),
    ],
)
def test_what_cannot_be(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(images(6, *SHAPE))


# ---- the experiment -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two classes of objects before black: a bright square at the left or at the right."""
    folder = tmp_path_factory.mktemp("saliency")
    labels = np.arange(120) % 2
    pixels = np.zeros((120, 8, 8), np.uint8)
    noise = np.random.default_rng(0).integers(60, 255, (120, 4, 3))
    for image, label, square in zip(pixels, labels, noise, strict=True):
        image[2:6, 1 + 3 * label : 4 + 3 * label] = square
    parts = {"x_train": pixels[:80], "y_train": labels[:80], "x_test": pixels[81:]}
    np.savez(folder / "tiny.npz", **parts, y_test=labels[81:])
    settings = classifiers.Classifiers(data=str(folder / "tiny.npz"), epochs=1, steps=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifiers, "BATCH", 40)
        job = experiment.Job(classifiers=settings, features=(1,), batch_size=13, epochs=1)
        results = reproduce(experiment, job, folder / "run", print)
    return folder, dict(results)


def test_the_experiment_draws_the_first_image_of_each_class(
    drawn: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = drawn
    x_test = np.load(folder / "tiny.npz")["x_test"]
    assert results["labels"] == [0, 1]
    wanted = x_test[[1, 0]] / 255  # the first test image is of class 1
    assert np.allclose(results["images"], wanted, atol=1e-4)
    assert results["object_pixels"] == pytest.approx((x_test != 0).mean())
    assert results["tested"] == 39
    for kind in classifiers.KINDS:
        maps = results["maps"][kind]
        assert list(maps) == ["representation", "logit 1"]
        for found in maps.values():
            assert np.shape(found["maps"]) == (2, 8, 8)
            assert 0 < found["share"] < 1
    standard, robust = (results["maps"][kind]["logit 1"] for kind in classifiers.KINDS)
    assert standard["maps"] != robust["maps"]
    saved = json.loads((folder / "run" / "results.json").read_text())
    assert saved["maps"] == results["maps"]


def test_its_maps_and_numbers_are_those_of_the_models(
    drawn: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = drawn
    representations = []

    def seen(encoder: nn.Module, critic: Critic, x: Tensor, **options: Any) -> Tensor:
        representations.append(encoder(x))
        return x - 0.25

    monkeypatch.setattr(experiment, "saliency", seen)
    settings = classifiers.Classifiers(data=str(folder / "tiny.npz"), epochs=1, steps=1)
    monkeypatch.setattr(classifiers, "BATCH", 40)
    job = experiment.Job(classifiers=settings, features=(1,), batch_size=13, epochs=1)
    found = reproduce(experiment, job, tmp_path / "run", print)["maps"]["robust"]["representation"]
    assert np.allclose(found["maps"], np.array(results["images"]) - 0.25, atol=1e-3)
    # Three batches each: two models' logits, then logit 1 of both.
    logits, features = representations[:6], representations[6:]
    assert all(torch.allclose(a[:, 1:2], b) for a, b in zip(logits, features, strict=True))
    x = torch.from_numpy(np.load(folder / "tiny.npz")["x_test"])[:39, None].float() / 255
    shares = object_share(x - 0.25, x)
    assert found["share"] == pytest.approx(shares.mean().item(), rel=1e-5)
    error = shares.std().item() / 39**0.5
    assert found["share_standard_error"] == pytest.approx(error, rel=1e-4)
    assert found["size"] == pytest.approx((x - 0.25).square().mean().sqrt().item(), rel=1e-5)


def test_its_table_and_figure_show_the_results(drawn: tuple[Path, dict[str, Any]]) -> None:
    _, results = drawn
    text = as_text(experiment.tables(results))
    axes = [each for each in experiment.figure(results).axes if each.images]
    wanted = [np.array(image) for image in results["images"]]
    for what in ("representation", "logit 1"):
        for kind in classifiers.KINDS:
            found = results["maps"][kind][what]
            share, error = 100 * found["share"], 100 * found["share_standard_error"]
            assert f"{share:.1f} ± {error:.1f}" in text
            assert f"{found['size']:.2e}" in text
            assert f"{found['information']:.3f}" in text
            wanted += [np.array(each) for each in found["maps"]]
    assert len(axes) == len(wanted) == 10
    for each, values in zip(axes, wanted, strict=True):
        assert np.array_equal(each.images[0].get_array(), values)
    for first, second in zip(axes[2::2], axes[3::2], strict=True):
        low, high = first.images[0].get_clim()
        assert low == -high < 0
        assert second.images[0].get_clim() == (low, high)
    assert f"{100 * results['object_pixels']:.1f} % of the images" in " ".join(text.split())
