"""`wcmi-fast measure`: the vulnerability of a model's representation, with a report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from wcmi_fast import datasets, models
from wcmi_fast.data import Data, Feed
from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.vulnerability import representation_vulnerability
from wcmi_fast.models.classifiers import CIFAR10_MEAN, CIFAR10_STD
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.trained import load_trained


@dataclass(frozen=True, kw_only=True)
class MeasureCommand:
    """Measure I, worst-case I and vulnerability of a model's representation; write a report."""

    model: str
    """A name, as in `wcmi_fast.models.NAMES`; module:callable that returns an nn.Module; or the
    folder of a finished run of `wcmi-fast train`, which needs no checkpoint."""
    data: str
    """mnist, fashion_mnist, cifar10, svhn, mnist5k; an .npz file of x_train, y_train, x_test and
    y_test; or a folder of train/CLASS/ and test/CLASS/ with images."""
    eps: float
    """Radius of the attack, in units of pixels from 0 to 1."""
    checkpoint: Path | None = None
    """Weights: safetensors, or torch.save's format as far as weights_only reads it. None measures
    the model as it is made: a name then has random weights."""
    layer: str | None = None
    """Submodule whose output is the representation, such as layer3.1; None is the model's
    output."""
    bound: str = "dv"
    """Bound on information: dv, infonce, nwj, smile, mine, or dv_authors."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic (full), or the encoder only, as the authors do."""
    steps: int = 10
    """Attack steps."""
    step_size: float | None = None
    """Length of an attack step; None is 2.5 eps / steps."""
    training_steps: int | None = None
    """Attack steps while a worst-case critic is trained; None is steps."""
    trials: int = 4
    """Critics trained per term; their spread is part of the error."""
    epochs: int = 4
    """Passes of a critic over the training images."""
    units: int = 64
    """Size U of the critic's features."""
    batch_size: int = 100
    """Images per batch, in training and testing; values depend on it."""
    train_images: int = 10_000
    """Images that critics are trained on, at most."""
    test_images: int = 2_000
    """Images that the estimates are made on, at most."""
    budget: float | None = None
    """Minutes; trials, epochs and images are planned to fit, and the plan is printed."""
    classes: int | None = None
    """Number of classes; None takes it from the labels."""
    seed: int = 0
    """Decides critics, the order of the data, and the weights of a model without checkpoint."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""
    out: Path | None = None
    """Folder of the report; an interrupted measurement goes on there, with the same options. None
    makes runs/measure-<time>."""


def execute(command: MeasureCommand, console: Console) -> None:
    """Measure, show the report and write it.

    Raises:
        SystemExit: Ctrl-C, with code 130, after a sentence that says how to go on.
    """
    data = datasets.load(command.data)
    classes = command.classes or int(data.y_train.max()) + 1
    model = load_model(command, data, classes)
    folder = command.out or Path("runs") / f"measure-{datetime.now():%Y%m%d-%H%M%S}"
    console.print(f"Run folder: {folder}", soft_wrap=True)
    try:
        report = representation_vulnerability(
            model,
            command.data,
            eps=command.eps,
            layer=command.layer,
            bound=command.bound,
            critic_grad=command.critic_grad,
            steps=command.steps,
            step_size=command.step_size,
            training_steps=command.training_steps,
            trials=command.trials,
            seed=command.seed,
            budget=command.budget,
            head=nn.Identity() if _gives_logits(command, model, data, classes) else None,
            classes=classes,
            critic=CriticConfig(
                epochs=command.epochs, units=command.units, batch_size=command.batch_size
            ),
            train_images=command.train_images,
            test_images=command.test_images,
            device=command.device,
            folder=folder,
            say=lambda line: console.print(line, soft_wrap=True),
        )
    except KeyboardInterrupt:
        hint = f"Interrupted; to go on, add --out {folder} to the same command"
        console.print(hint, soft_wrap=True)
        raise SystemExit(130) from None
    report.save(folder)
    console.print(report)
    console.print(f"Report: {folder / 'report.html'}, report.json, report.png", soft_wrap=True)


def load_model(command: MeasureCommand, data: Data, classes: int) -> nn.Module:
    """Return the model that a command names, with the weights of its checkpoint.

    Raises:
        TypeError, ValueError: no such model; one that is no nn.Module; weights that do not fit; a
            folder without a finished run, or a checkpoint beside it.
        FileNotFoundError: no such checkpoint.
    """
    torch.manual_seed(command.seed)
    shape = (data.x_test.shape[1], data.x_test.shape[2], data.x_test.shape[3])
    if command.model not in models.NAMES and Path(command.model).is_dir():
        if command.checkpoint is not None:
            raise ValueError(
                f"measure: checkpoint is {command.checkpoint} beside the run {command.model}, "
                "which has its own weights, wanted none"
            )
        return load_trained(command.model, input_shape=shape).model
    if ":" not in command.model:
        # A checkpoint's own normaliser, where it has one, takes the place of these.
        mean, std = (CIFAR10_MEAN, CIFAR10_STD) if command.data == "cifar10" else (None, None)
        return models.load(
            command.model,
            command.checkpoint,
            input_shape=shape,
            classes=classes,
            mean=mean,
            std=std,
        )
    model = _imported(command.model)
    if command.checkpoint is not None:
        models.load_weights(model, command.checkpoint)
    return model


def _imported(name: str) -> nn.Module:
    """Return what module:callable makes; the module may lie in the current folder."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"measure: model is {name!r}, wanted module:callable that can be imported: {error}"
        ) from error
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"measure: model is {name!r}, which made a {type(model).__name__}, wanted an nn.Module"
        )
    return model


@torch.no_grad()
def _gives_logits(command: MeasureCommand, model: nn.Module, data: Data, classes: int) -> bool:
    """Tell whether the representation is the model's logits, so that it classifies as it is."""
    if command.layer is not None:
        return False
    mode = [(part, part.training) for part in model.modules()]
    try:
        found = model.eval()(Feed(data.x_test, "cpu")[:2])
    except (TypeError, ValueError, RuntimeError):
        return False  # the measurement says what does not fit
    finally:
        for part, training in mode:
            part.training = training
    return isinstance(found, torch.Tensor) and found.shape == (2, classes)
