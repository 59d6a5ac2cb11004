"""The paper's classifiers: their counts, normalisation, layers and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import CIFAR, MNIST, images
from torch import nn

from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.vulnerability import representation_vulnerability
from wcmi_fast.models import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    NAMES,
    BaselineH,
    Normalise,
    classifiers,
    densenet121,
    load,
    resnet18,
    vgg16,
)
from wcmi_fast.models.classifiers import CLASSIFIERS
from wcmi_fast.models.folding import folded

SMALL = (3, 8, 8)


@pytest.mark.parametrize(
    ("name", "count"),
    # Of kuangliu/pytorch-cifar, as published by many who count them; Baseline-H by hand, see
    # test_models.py: the encoder's 4,922,304 for 64 outputs, and heads of
    # 64 * 200 + 200 + 400 + 2010 and of 650.
    [
        ("vgg16", 14_728_266),
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
        ("densenet121", 6_956_298),
        ("baseline_h", 4_922_304 - 54 * 1025),
        ("baseline_h_mlp", 4_922_304 + 15_410),
        ("baseline_h_linear", 4_922_304 + 650),
    ],
)
def test_number_of_parameters(name: str, count: int) -> None:
    assert sum(p.numel() for p in CLASSIFIERS[name]().parameters()) == count


@pytest.mark.parametrize("name", NAMES)
def test_grey_images_give_as_many_logits_as_classes(name: str) -> None:
    model, x = CLASSIFIERS[name](MNIST, 7), images(3, *MNIST)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    logits = model.eval()(x)
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    assert logits.std(0).max() > 0


def test_poolings_round_up() -> None:
    model, sizes = vgg16(MNIST), []
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(lambda _, args, out: sizes.append(out.shape[-1]))
    model.eval()(images(1, *MNIST))
    assert sizes == [14, 7, 4, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_normalised_inside(name: str) -> None:
    torch.manual_seed(0)
    plain = CLASSIFIERS[name](SMALL).eval()
    torch.manual_seed(0)
    normalising = CLASSIFIERS[name](SMALL, mean=CIFAR10_MEAN, std=CIFAR10_STD).eval()
    x = images(2, *SMALL)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    torch.testing.assert_close(normalising(x), plain((x - mean) / std))
    assert not torch.allclose(normalising(x), plain(x))


def test_normalising_by_default_changes_no_bit() -> None:
    x = images(2, *CIFAR)
    assert torch.equal(Normalise("it", CIFAR)(x), x)


def test_normalisation_is_part_of_the_state() -> None:
    state = resnet18(CIFAR, mean=CIFAR10_MEAN, std=CIFAR10_STD).state_dict()
    assert state["normalise.mean"].flatten().tolist() == pytest.approx(CIFAR10_MEAN)
    assert state["normalise.std"].flatten().tolist() == pytest.approx(CIFAR10_STD)


def test_baseline_h_is_the_encoder_with_classes_as_outputs() -> None:
    model, encoder = classifiers.baseline_h(MNIST, 7).eval(), BaselineH(MNIST, dim=7).eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if "normalise" not in k})
    x = images(4, *MNIST)
    torch.testing.assert_close(model(x), encoder(x))


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet18", "layer3.1", (256, 8, 8)),
        ("resnet50", "layer4", (2048, 4, 4)),
        ("densenet121", "denseblock2", (512, 16, 16)),
        ("densenet121", "transition3", (512, 4, 4)),
        ("vgg16", "features.33", (512, 2, 2)),
        ("baseline_h_mlp", "output", (64,)),
    ],
)
def test_layers_have_names(name: str, layer: str, shape: tuple[int, ...]) -> None:
    model, found = CLASSIFIERS[name](CIFAR).eval(), []
    model.get_submodule(layer).register_forward_hook(lambda *args: found.append(args[2].shape[1:]))
    model(images(1, *CIFAR))
    assert found == [torch.Size(shape)]


@pytest.mark.parametrize("name", NAMES)
def test_folding_keeps_the_function(name: str) -> None:
    model = CLASSIFIERS[name](SMALL, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    x = images(4, *SMALL)
    with torch.no_grad():
        model.train()(x)
        wanted = model.eval()(x)
        atol = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(folded(model)(x), wanted, rtol=1e-4, atol=atol)


def test_a_layer_can_be_measured() -> None:
    x, y = images(120, 1, 8, 8), torch.arange(120) % 3
    report = representation_vulnerability(
        load("resnet18", input_shape=(1, 8, 8), classes=3),
        (x, y),
        eps=0.1,
        layer="layer3.1",
        steps=1,
        trials=1,
        critic=CriticConfig(epochs=1, batch_size=10, units=8),
        train_images=40,
        test_images=20,
        progress=False,
    )
    assert report.information is not None
    assert report.worst_case is not None
    assert report.vulnerability is not None
    assert report.vulnerability.mean == pytest.approx(
        report.information.mean - report.worst_case.mean
    )
    assert report.adversarial_accuracy is not None


def test_torchvision_is_imported_only_when_a_network_needs_it() -> None:
    code = "import sys, wcmi_fast, wcmi_fast.models; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"classes": 0}, "densenet121: classes is 0, wanted a positive integer"),
        ({"input_shape": (3, 7, 32)}, r"densenet121: input_shape is \(3, 7, 32\), wanted H and W"),
        ({"mean": (0.5,)}, r"densenet121: mean is \(0.5,\), wanted a value for each of 3 channels"),
        ({"std": (1, 1, 0)}, r"densenet121: std is \(1, 1, 0\), wanted a positive value for each"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        densenet121(**arguments)


def test_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"resnet18: x has shape \(2, 1, 28, 28\), wanted \(N, 3,"):
        resnet18()(images(2, *MNIST))
