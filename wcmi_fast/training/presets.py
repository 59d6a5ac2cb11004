"""Named settings of tasks: those of the paper (spec section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
}
# The paper clips no gradient and averages no weights.
_ENCODER = {"units": 2048, "grad_clip": 1e9, "averaging": 0.0}

_TASKS = ("encoder", "head", "classifier")
PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    f"paper/{data}": {
        task: {"data": data, **_COMMON, **attack, **(_ENCODER if task == "encoder" else {})}
        for task in _TASKS
    }
    for data, attack in _ATTACKS.items()
}


def preset(name: str, task: str) -> dict[str, Any]:
    """Return the options that a preset sets for a task.

    Args:
        name: a key of `PRESETS`.
        task: "encoder", "head" or "classifier".
    """
    return dict(PRESETS[name][task])
