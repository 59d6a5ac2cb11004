"""The network that a finished run of `wcmi-fast train` leaves, from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from wcmi_fast import datasets, models
from wcmi_fast.models.loading import State, read_state
from wcmi_fast.training import tasks
from wcmi_fast.training.options import TASKS
from wcmi_fast.training.run_folder import SETTINGS


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained network.

    Attributes:
        task: encoder, head or classifier.
        name: the network's, for `wcmi_fast.models.load`.
        input_shape: (C, H, W) of one image.
        outputs: number of classes, or size of an encoder's representation.
        model: in eval mode, on the CPU: images (N, C, H, W) in [0, 1] to (N, outputs).
    """

    task: str
    name: str
    input_shape: tuple[int, ...]
    outputs: int
    model: nn.Module


def load_trained(run: str | Path, *, input_shape: Sequence[int] | None = None) -> Trained:
    """Load the network that a finished run of `wcmi-fast train` trained.

    A run of a head gives encoder and head together.

    Args:
        run: its folder.
        input_shape: (C, H, W) of one image; None takes it from the run's data.

    Raises:
        FileNotFoundError: no such folder; no input_shape, and the run's data are not there.
        ValueError: the folder holds no finished run; weights that are damaged or do not fit.
    """
    run = Path(run)
    settings = _finished(run)
    task = settings["task"]
    file = run / (tasks.ENCODER if task == "encoder" else tasks.CLASSIFIER)
    name = _network(settings)
    if input_shape is None:
        input_shape = datasets.load(settings["data"]).x_train.shape[1:]
    shape, outputs = tuple(input_shape), _outputs(name, input_shape, read_state(file))
    model = models.load(name, file, input_shape=shape, classes=outputs)
    return Trained(task=task, name=name, input_shape=shape, outputs=outputs, model=model)


def _finished(run: Path) -> dict[str, Any]:
    """Return the settings of a finished run; else raise, saying what the folder holds."""
    if not run.is_dir():
        raise FileNotFoundError(f"load_trained: run is {run}, and there is no such folder")
    settings = _settings(run / SETTINGS)
    task = settings.get("task")
    holds = "no run of wcmi-fast train"
    if task in TASKS:
        if (run / tasks.RESULTS).is_file():
            return settings
        holds = f"{'an' if task == 'encoder' else 'a'} {task} run that is not finished"
    raise ValueError(
        f"load_trained: run is {run}, which holds {holds}, wanted the folder of a finished one"
    )


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _network(settings: dict[str, Any]) -> str:
    names = {
        "encoder": "baseline_h",
        "head": f"baseline_h_{settings.get('kind')}",
        "classifier": settings.get("network"),
    }
    return str(names[settings["task"]])


def _outputs(name: str, input_shape: Sequence[int], state: State) -> int:
    """Return the size of the last layer; every network's last parameter is that layer's bias."""
    built = models.load(name, input_shape=input_shape)
    last, default = list(built.named_parameters())[-1]
    return len(state.get(last, default))
