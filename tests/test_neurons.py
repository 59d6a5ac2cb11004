"""Single neurons: functions of patches, their critics, and the study of figure 3."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CIFAR, MNIST, images, randomised
from torch import Tensor, nn

from wcmi_fast import PGD, reference
from wcmi_fast.data import Feed
from wcmi_fast.experiments import classifiers, neurons
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information import CriticConfig, neuron_critics
from wcmi_fast.information.neuron_critics import PatchCritics, neuron_bounds
from wcmi_fast.information.neurons import PerNeuron, neuron_information
from wcmi_fast.information.patches import Field, PatchNeurons
from wcmi_fast.information.representation import Representation
from wcmi_fast.models import BaselineH

SHAPE = (1, 12, 12)
SMALL = CriticConfig(units=8, epochs=2, batch_size=20, learning_rate=1e-2)
FAST: dict[str, Any] = {"eps": 0.05, "steps": 2, "trials": 1, "critic": SMALL, "progress": False}


def baseline_h(shape: tuple[int, int, int]) -> nn.Module:
    return randomised(BaselineH(shape, dim=3)).eval()


def bright_images(n: int, seed: int) -> Tensor:
    """Images of one brightness each, with noise."""
    level = images(n, 1, 1, 1, seed=seed)
    return (0.8 * level + 0.2 * images(n, *SHAPE, seed=seed + 100)).clamp(0, 1)


# ---- functions of patches -----------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "grid"), [(MNIST, (7, 7)), (CIFAR, (8, 8))])
def test_a_second_layer_kernel_sees_10_by_10_pixels_every_4_from_minus_3(
    shape: tuple[int, int, int], grid: tuple[int, int]
) -> None:
    model = baseline_h(shape)
    functions = PatchNeurons(model, "convolutions.4", shape)
    assert (functions.field, functions.grid) == (Field(10, 4, 3), grid)
    for row, column in [(0, 0), (3, 2), (grid[0] - 1, grid[1] - 1)]:
        x = images(4, *shape).requires_grad_()
        maps = Representation(model, "convolutions.4")(x).view(4, functions.count, *grid)
        (gradient,) = torch.autograd.grad(maps[:, :, row, column].square().sum(), x)
        seen = (gradient != 0).any(0).any(0).nonzero()
        last = [
            min(4 * i + 6, extent - 1) for i, extent in zip((row, column), shape[1:], strict=True)
        ]
        assert seen.amin(0).tolist() == [max(4 * row - 3, 0), max(4 * column - 3, 0)]
        assert seen.amax(0).tolist() == last


@pytest.mark.parametrize("layer", [0, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 9, 13)])
def test_functions_of_patches_are_what_the_model_computes(
    layer: int, shape: tuple[int, int, int]
) -> None:
    model, x = baseline_h(shape), images(3, *shape)
    name = f"convolutions.{layer}"
    found = PatchNeurons(model, name, shape).maps(x)
    assert torch.allclose(found.flatten(1), Representation(model, name)(x), rtol=1e-4, atol=1e-5)


def test_biases_and_an_activation_of_0_that_is_not_0() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 3, 1, 1))
    x = images(3, *SHAPE)
    found = PatchNeurons(model, "2", SHAPE).maps(x)
    assert torch.allclose(found, model(x).flatten(2), atol=1e-5)


def test_each_neuron_sees_its_own_patches() -> None:
    functions = PatchNeurons(baseline_h(MNIST), "convolutions.4", MNIST)
    patches, where = images(3, 6, 1, 10, 10), torch.arange(6) * 8
    chosen = torch.tensor([9, 4, 100])
    together = functions(patches, where, chosen)
    alone = [functions(patches[i : i + 1], where, chosen[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


# ---- critics ------------------------------------------------------------------------------------


def test_the_bound_of_each_neuron_is_dv() -> None:
    z, h = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    wanted = [reference.dv((z[k][:, None] * h[k])[:, :, None]).item() for k in range(5)]
    assert neuron_bounds(z, h).tolist() == pytest.approx(wanted, rel=1e-12)


def attacked(attack: Any, critic_grad: Any = "full") -> tuple[PatchNeurons, Tensor, Tensor, Tensor]:
    functions = PatchNeurons(baseline_h(SHAPE), "convolutions.4", SHAPE)
    where = torch.arange(functions.locations)
    patches = functions.patches(images(len(where), *SHAPE), where)[None]
    critics = PatchCritics(torch.arange(20), 100, 8)
    found = neuron_critics._attacked(functions, critics, patches, where, attack, critic_grad)
    before = neuron_bounds(functions(patches, where, critics.neurons), critics(patches))
    after = neuron_bounds(functions(found, where, critics.neurons), critics(found))
    return functions, found - patches, before, after


@pytest.mark.parametrize("critic_grad", ["full", "encoder_only"])
def test_an_attack_lowers_each_neuron_and_leaves_what_is_outside_the_image(
    critic_grad: str,
) -> None:
    attack = PGD(eps=0.05, step_size=0.01, steps=5)
    functions, change, before, after = attacked(attack, critic_grad)
    assert (after < before).all()
    inside = functions.inside(torch.arange(functions.locations)).bool().expand_as(change)
    assert (change[~inside] == 0).all()
    assert (change[inside] != 0).double().mean() > 0.8
    assert change.abs().max() <= 0.05 + 1e-6
    assert not torch.equal(change[0], change[1])


def test_encoder_only_does_not_see_what_the_critic_sees() -> None:
    functions = PatchNeurons(planted(), "0", SHAPE)
    where = torch.arange(functions.locations)
    patches = functions.patches(images(len(where), *SHAPE), where)[None]
    critics = PatchCritics(torch.arange(2), 16, 8)
    attack = PGD(eps=0.05, step_size=0.05, steps=1)
    moved = {
        grad: neuron_critics._attacked(functions, critics, patches, where, attack, grad) - patches
        for grad in ("full", "encoder_only")
    }
    assert (moved["encoder_only"][0] == 0).all()  # the neuron that ignores its patch
    assert (moved["encoder_only"][1] != 0).double().mean() > 0.9
    assert (moved["full"][0] != 0).double().mean() > 0.5


def trained(attack: Any, data: Feed) -> tuple[PatchNeurons, PatchCritics]:
    functions = PatchNeurons(planted(), "0", SHAPE)
    config = replace(SMALL, epochs=4, learning_rate=0.1)
    critics = neuron_critics.train_neuron_critics(
        functions, torch.arange(3), data, config, attack=attack, seed=0, stage="critics"
    )
    return functions, critics


def test_worst_case_critics_are_trained_on_attacked_patches() -> None:
    attack = PGD(eps=0.05, step_size=0.03, steps=3)
    means = []
    for training in (None, attack):
        functions, critics = trained(training, Feed(bright_images(100, 0), "cpu"))
        tested = neuron_critics.evaluate_neuron_critics(
            functions, critics, Feed(bright_images(100, 1), "cpu"), SMALL, attack=attack, seed=0
        )
        means.append(tested.mean(0)[2].item())
    assert means[1] > means[0] + 0.1


def test_both_terms_are_tested_on_the_same_patches() -> None:
    functions, critics = trained(None, Feed(bright_images(40, 0), "cpu"))
    attacks = (None, PGD(eps=0.0, step_size=1.0, steps=1))
    clean, still = (
        neuron_critics.evaluate_neuron_critics(
            functions, critics, Feed(bright_images(60, 1), "cpu"), SMALL, attack=each, seed=0
        )
        for each in attacks
    )
    assert clean.shape == (3, 3)
    assert torch.allclose(clean, still, atol=1e-5)
    assert not torch.allclose(clean[0, 1], clean[1, 1], atol=1e-3)


def test_an_attack_neither_sees_nor_moves_the_padding() -> None:
    losses = []

    class Everywhere:
        def attack(self, loss_fn: Any, x: Tensor, **options: Any) -> Tensor:
            outside = (x == 0).all(0)  # the images have no pixel of 0
            losses.append((loss_fn(x), loss_fn(x + 0.5 * outside)))
            return x + 0.5

    functions, change, *_ = attacked(Everywhere())
    inside = functions.inside(torch.arange(functions.locations)).bool().expand_as(change)
    assert (change[~inside] == 0).all()
    assert torch.allclose(change[inside], torch.tensor(0.5))
    assert len(losses) == 2
    assert all(torch.equal(*pair) for pair in losses)


def test_the_critic_of_each_neurons_best_batch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    made: list[PatchCritics] = []
    best = torch.tensor([2, 7, 4])

    class Kept(PatchCritics):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def highest_at_its_batch(z: Tensor, h: Tensor) -> Tensor:
        seen.append(made[0].W.detach().clone())
        return 1e-2 * neuron_bounds(z, h) - (best - (len(seen) - 1)).abs()

    monkeypatch.setattr(neuron_critics, "PatchCritics", Kept)
    monkeypatch.setattr(neuron_critics, "neuron_bounds", highest_at_its_batch)
    functions = PatchNeurons(baseline_h(SHAPE), "convolutions.4", SHAPE)
    found = neuron_critics.train_neuron_critics(
        functions,
        torch.tensor([0, 1, 2]),
        Feed(images(100, *SHAPE), "cpu"),
        SMALL,
        attack=None,
        seed=0,
        stage="critics",
    )
    assert len(seen) == 10
    for neuron, batch in enumerate(best.tolist()):
        assert torch.equal(found.W[neuron], seen[batch][neuron])
        assert not torch.equal(found.W[neuron], seen[batch + 1][neuron])


# ---- the whole ----------------------------------------------------------------------------------


def test_a_neuron_of_many_is_measured_as_if_it_were_alone() -> None:
    model, data = baseline_h(SHAPE), (bright_images(100, 0), bright_images(60, 1))
    many = neuron_information(model, data, neurons=range(40), **FAST)
    for k in (0, 17, 39):
        alone = neuron_information(model, data, neurons=[k], **FAST)
        assert alone.neurons == (k,)
        for key in ("information", "worst_case", "vulnerability"):
            found, wanted = getattr(many, key), getattr(alone, key)
            assert found.mean[k] == pytest.approx(wanted.mean[0], abs=1e-4)
            assert found.standard_error[k] == pytest.approx(wanted.standard_error[0], abs=1e-4)


def planted() -> nn.Module:
    """Kernel 0 ignores its input, 1 is the mean brightness, 2 that and a strong checkerboard."""
    layer = nn.Conv2d(1, 3, 4, 4)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.7, -2.0, -2.0]))
        layer.weight[1:] = 4 / 16
        layer.weight[2] += 2 * (-1.0) ** (torch.arange(4)[:, None] + torch.arange(4))
    return nn.Sequential(layer)


def test_planted_neurons_get_the_information_and_vulnerability_that_they_have() -> None:
    x, test = bright_images(400, 0), bright_images(200, 1)
    critic = replace(SMALL, epochs=6, units=16, learning_rate=0.1)
    options = {**FAST, "eps": 0.02, "critic": critic, "layer": "0"}
    report = neuron_information(planted(), (x, test), **options)
    information, vulnerability = report.information.mean, report.vulnerability.mean
    assert information[0] == pytest.approx(0, abs=1e-3)
    assert report.worst_case.mean[0] == pytest.approx(0, abs=1e-3)
    # The score is linear in z, and so is the best critic of it, nearly: h = c (z - mean).
    z = PatchNeurons(planted(), "0", SHAPE).maps(test)[:, 1, 0].view(10, 20)
    centred = (z - z.mean()) / z.std()
    linear = max(neuron_bounds(z, c * centred).mean().item() for c in np.linspace(0.2, 3, 15))
    assert 0.2 < 0.9 * linear < information[1] < 1.1 * linear
    # The same eps moves z of the checkerboard by 0.6 of its standard deviation, of the mean by 0.1.
    assert vulnerability[2] > 2 * vulnerability[1] > 0.02
    assert report.worst_case.mean[2] < report.worst_case.mean[1] < information[1]


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = baseline_h(SHAPE), (bright_images(60, 0), bright_images(40, 1))

    def measured(folder: str) -> Any:
        options = {**FAST, "trials": 2, "neurons": [3, 1], "folder": tmp_path / folder}
        return neuron_information(model, data, **options)

    whole = measured("whole")
    batch_values, left = neuron_critics._batch_values, iter(range(19))

    def until(*args: Any) -> Tensor:
        next(left)
        return batch_values(*args)

    with monkeypatch.context() as patched:
        patched.setattr(neuron_critics, "_batch_values", until)
        with pytest.raises(StopIteration):
            measured("cut")
    resumed = measured("cut")
    assert resumed.information == whole.information
    assert resumed.worst_case == whole.worst_case
    with pytest.raises(ValueError, match="holds a run with another neurons"):
        neuron_information(
            model, data, **{**FAST, "trials": 2, "neurons": [3, 2], "folder": tmp_path / "cut"}
        )


def test_the_model_is_left_as_it_was() -> None:
    model = baseline_h(SHAPE).train()
    before = copy.deepcopy(model.state_dict())
    neuron_information(model, (bright_images(40, 0), bright_images(40, 1)), neurons=[0], **FAST)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_statistics_of_the_report() -> None:
    values = torch.tensor([[[1.0, 10.0], [3.0, 10.0]], [[5.0, 30.0], [7.0, 30.0]]])
    found = PerNeuron.of(values.double())
    assert found.mean == (4.0, 20.0)
    assert found.standard_error == pytest.approx((2.0, 10.0))
    assert found.average.batches == ((5.5, 6.5), (17.5, 18.5))
    one = PerNeuron.of(values[:1].double())
    assert one.standard_error == pytest.approx((1.0, 0.0))
    assert math.isnan(PerNeuron.of(values[:1, :1].double()).standard_error[0])


class Elsewhere(nn.Module):
    """Gives its convolution other images than it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3))
        self.convolution = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(1 - x) + self.convolution(x).mean()


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (Elsewhere(), {"layer": "layers.0"}, "layer 'layers.0' is no function of patches"),
        (Elsewhere(), {"layer": "layers.2"}, "has a MaxPool2d before it, wanted convolutions"),
        (Elsewhere(), {"layer": "convolution"}, "is inside a Elsewhere, wanted one in an nn.Seq"),
        (Elsewhere(), {"layer": "layers.9"}, "wanted a submodule of the model"),
        (nn.Sequential(nn.ReLU()), {"layer": "0"}, "has no convolution before it"),
        (nn.Sequential(nn.Conv2d(1, 2, (3, 2))), {"layer": "0"}, "wanted square ones"),
        (planted(), {"layer": "0", "neurons": [3]}, r"neurons is \[3\], wanted different numbers"),
        (planted(), {"layer": "0", "neurons": []}, r"neurons is \[\], wanted different numbers"),
        (planted(), {"layer": "0", "neurons": [1, 1]}, "from 0 to 2, or None for all"),
        (planted(), {"critic": replace(SMALL, bound="nwj")}, "critic.bound is 'nwj', wanted 'dv'"),
        (planted(), {"critic": replace(SMALL, negatives=3)}, "critic.negatives is 3, wanted None"),
    ],
)
def test_what_cannot_be_measured(model: nn.Module, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        neuron_information(model, (images(60, *SHAPE), images(60, *SHAPE)), **{**FAST, **options})
    assert str(error.value).startswith("neuron_information: ")


def test_vectors_have_no_patches() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"data has rows of shape \(4,\), wanted images"):
        neuron_information(model, (torch.rand(60, 4), torch.rand(60, 4)), layer="0", **FAST)


# ---- the experiment -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("neurons")
    rows = (255 * bright_images(120, 0)).byte().squeeze(1).numpy()
    labels = np.arange(120) % 2
    np.savez(
        folder / "tiny.npz",
        x_train=rows[:80],
        y_train=labels[:80],
        x_test=rows[80:],
        y_test=labels[80:],
    )
    settings = classifiers.Classifiers(data=str(folder / "tiny.npz"), epochs=1, steps=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(classifiers, "BATCH", 40)
        job = neurons.Job(
            classifiers=settings, steps=1, training_steps=1, trials=2, epochs=1, batch_size=20
        )
        results = reproduce(neurons, job, folder / "run", print)
    return folder / "run", dict(results)


def test_the_study_measures_both_models(studied: tuple[Path, dict[str, Any]]) -> None:
    folder, results = studied
    assert json.loads((folder / "results.json").read_text())["reports"] == results["reports"]
    for kind in classifiers.KINDS:
        report = results["reports"][kind]
        assert report["neurons"] == list(range(128))
        found = np.array(report["information"]["mean"]) - np.array(report["worst_case"]["mean"])
        assert report["vulnerability"]["mean"] == pytest.approx(found.tolist())
        assert report["vulnerability"]["average"]["mean"] == pytest.approx(found.mean())
    one, other = (results["reports"][kind]["information"] for kind in classifiers.KINDS)
    assert one != other


def test_its_table_and_figure_show_the_results(studied: tuple[Path, dict[str, Any]]) -> None:
    _, results = studied
    text = as_text(neurons.tables(results))
    panels = neurons.figure(results).axes
    for axes, key in zip(panels, ("information", "worst_case", "vulnerability"), strict=True):
        for bars, kind in zip(axes.containers, classifiers.KINDS, strict=True):
            values = results["reports"][kind][key]["mean"]
            average = results["reports"][kind][key]["average"]
            assert f"{average['mean']:.4f} ({average['interval'][0]:.4f} to" in text
            assert f"{np.std(values, ddof=1):.4f}" in text
            edges = [bar.get_x() for bar in bars]
            edges.append(edges[-1] + bars[-1].get_width())
            counts = np.histogram(values, np.array(edges))[0]
            assert sum(bar.get_height() for bar in bars) == 128
            assert abs(counts - [bar.get_height() for bar in bars]).sum() <= 2  # edges round
    kept = [
        results["reports"][kind]["worst_case"]["average"]["mean"]
        / results["reports"][kind]["information"]["average"]["mean"]
        for kind in classifiers.KINDS
    ]
    words = " ".join(text.split())
    assert f"keeps {100 * kept[0]:.0f} % of the standard neurons' information" in words
