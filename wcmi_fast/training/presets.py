"""Named settings of tasks: those of the paper (spec section 6), and some for two cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wcmi_fast.models import CIFAR10_MEAN, CIFAR10_STD

# All training images; Adam at a constant 1e-4, 300 epochs of batches of 128; the attack has its
# full radius from the first step, and starts at the image.
_COMMON = {
    "train_images": 1_000_000,
    "epochs": 300,
    "batch_size": 128,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "eps_warmup": 0.0,
}
_ATTACKS = {
    "mnist": {"eps": 0.3, "steps": 10, "step_size": 0.1},
    "fashion_mnist": {"eps": 0.1, "steps": 10, "step_size": 0.02},
    "svhn": {"eps": 4 / 255, "steps": 10, "step_size": 0.005},
    "cifar10": {"eps": 8 / 255, "steps": 7, "step_size": 0.01},
}
_AUGMENTATIONS = {
    "cifar10": {"crop_padding": 4, "flip": True, "jitter": 0.25, "rotation": 2.0},
}
_NORMALISATIONS = {"cifar10": {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}}
# The paper clips no gradient and averages no weights.
_ENCODER = {"units": 2048, "grad_clip": 1e9, "averaging": 0.0}


def _papers(data: str, task: str) -> dict[str, Any]:
    further = _ENCODER if task == "encoder" else {}
    # A head has no normalisation: its encoder normalises images.
    normalisation = _NORMALISATIONS.get(data, {}) if task != "head" else {}
    augmentation = _AUGMENTATIONS.get(data, {})
    return {"data": data, **_COMMON, **_ATTACKS[data], **augmentation, **normalisation, **further}


# Radius, augmentation and normalisation of the paper; the rest for less than an hour on two cores,
# for an encoder and a head on 60,000 images of 28 x 28: docs/training.md has the times.
_CPU: dict[str, dict[str, Any]] = {
    "encoder": {"epochs": 20, "batch_size": 64, "learning_rate": 2e-3, "schedule": "one_cycle"},
    "head": {"epochs": 8, "batch_size": 128, "learning_rate": 5e-3, "schedule": "linear"},
    "classifier": {"epochs": 8, "batch_size": 128, "learning_rate": 2e-3, "schedule": "one_cycle"},
}


def _small(data: str, task: str) -> dict[str, Any]:
    papers = _papers(data, task)
    kept = {"data", "eps", *papers.keys() & {"mean", "std", *_AUGMENTATIONS.get(data, {})}}
    # Five steps of eps / 2 are too coarse: after ten epochs an encoder had learned to defeat them.
    steps = {"steps": 7, "step_size": papers["eps"] / 4}
    shared = {"train_images": 60_000, "eps_warmup": 0.25, **steps}
    return {**{name: papers[name] for name in sorted(kept)}, **shared, **_CPU[task]}


_TASKS = ("encoder", "head", "classifier")
PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    f"{name}/{data}": {task: settings(data, task) for task in _TASKS}
    for name, settings in (("paper", _papers), ("cpu", _small))
    for data in _ATTACKS
}


def preset(name: str, task: str) -> dict[str, Any]:
    """Return the options that a preset sets for a task.

    Args:
        name: a key of `PRESETS`.
        task: "encoder", "head" or "classifier".
    """
    return dict(PRESETS[name][task])
