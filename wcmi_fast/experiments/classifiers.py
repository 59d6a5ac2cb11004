"""A standard and an adversarially trained Baseline-H of one data set, which experiments measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from wcmi_fast import datasets
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Data, Feed
from wcmi_fast.diagnosis import versions
from wcmi_fast.models import BaselineH
from wcmi_fast.training.config import ClassifierConfig
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.supervised import train_classifier

KINDS = ("standard", "robust")
BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Classifiers:
    """Which classifiers to train; their logits are the representation (spec section 5)."""

    data: str = "fashion_mnist"
    """Data set, or the path of an .npz file or a folder of images."""
    eps: float = 0.1
    """Radius of the attack in adversarial training, in units of pixels from 0 to 1."""
    steps: int = 7
    """Steps of that attack, from a random start, of 2.5 eps / steps."""
    epochs: int = 3
    """Passes over the training images."""
    train_images: int = 60_000
    """Training images, at most."""
    seed: int = 0
    """Decides the first weights, the order of the data and the attack's starts."""
    folder: Path | None = None
    """Folder that keeps them for several experiments; None trains them in the experiment's own."""


def load(settings: Classifiers) -> Data:
    """Load the data that the classifiers are trained on, with so many training images."""
    data = datasets.load(settings.data)
    count = settings.train_images
    return data._replace(x_train=data.x_train[:count], y_train=data.y_train[:count])


def trained(
    settings: Classifiers, data: Data, run: RunFolder, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """Train both, or read what an earlier session trained.

    Args:
        settings: what to train.
        data: see `load`.
        run: the experiment's folder; a finished epoch is not done again.
        say: told what begins.

    Returns:
        "standard" and "robust": images -> logits, in eval mode, without gradient.

    Raises:
        ValueError: settings.folder holds classifiers of other settings.
    """
    if settings.folder is not None:
        run = RunFolder(settings.folder)
        run.claim("trained", {**asdict(replace(settings, folder=None)), **versions()})
    attack = PGD(
        eps=settings.eps,
        step_size=2.5 * settings.eps / settings.steps,
        steps=settings.steps,
        random_start=True,
    )
    classes = int(data.y_train.max()) + 1
    found = {}
    for kind in KINDS:
        say(f"training the {kind} classifier")
        with seeded(settings.seed, "classifier", "weights"):
            shape = (data.x_train.shape[1], data.x_train.shape[2], data.x_train.shape[3])
            model = BaselineH(shape, dim=classes)
        config = ClassifierConfig(
            attack=attack if kind == "robust" else None,
            epochs=settings.epochs,
            batch_size=BATCH,
        )
        found[kind] = train_classifier(
            config,
            model,
            Feed(data.x_train, "cpu"),
            Feed(data.y_train, "cpu"),
            seed=settings.seed,
            stage=f"classifier-{kind}",
            run=run,
        )
    return found
