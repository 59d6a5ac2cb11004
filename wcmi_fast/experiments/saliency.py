"""Saliency maps of representations and of single features (the paper's figures 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wcmi_fast.data import Data, Feed, batches
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.critic import CriticConfig, evaluate_critic, train_critic
from wcmi_fast.information.saliency import Feature, object_share, saliency
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "saliency"
WHOLE = "representation"
UNIT = "nats per unit of pixel"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Draw saliency maps of a standard and a robust Baseline-H (figures 4 and 5)."""

    classifiers: Classifiers = field(default_factory=Classifiers)
    """The two models, whose logits are the representation, and the data."""
    features: tuple[int, ...] = (0, 9)
    """Logits whose maps are drawn too, each with a critic of its own."""
    images: int = 6
    """Test images that are drawn, of different classes."""
    critic_grad: CriticGrad = "encoder_only"
    """Differentiate the encoder's side alone, as the authors do, or the critic's image side too."""
    epochs: int = 4
    """Passes of a critic over its training images."""
    batch_size: int = 100
    """Images per batch; the information, and so its gradient, is that of a batch."""
    train_images: int = 10_000
    """Images that critics are trained on, at most."""
    test_images: int = 1_000
    """Images of which the table's means are taken, at most."""
    seed: int = 0
    """Decides the critics' weights and the order of their data."""


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train models and critics, and take gradients; see `Experiment`."""
    data = classifiers.load(job.classifiers)
    models = classifiers.trained(job.classifiers, data, folder, say)
    chosen = _chosen(data.y_test[: job.batch_size], job.images)
    encoders = {(kind, WHOLE): models[kind] for kind in KINDS}
    encoders |= {
        (kind, f"logit {index}"): Feature(models[kind], index)
        for kind in KINDS
        for index in job.features
    }
    maps: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for (kind, what), encoder in encoders.items():
        stage = f"{kind}-{what.replace(' ', '-')}"
        work = partial(_measured, job, folded(encoder), stage, data, chosen, folder, say)
        maps[kind][what] = folder.stage(stage, work)
    tested = data.x_test[: job.test_images]
    return {
        "labels": data.y_test[chosen].tolist(),
        "images": _plain(Feed(data.x_test, "cpu")[torch.tensor(chosen)].movedim(1, -1).squeeze(-1)),
        "tested": len(tested) // job.batch_size * job.batch_size,
        "object_pixels": float((tested != 0).any(1).double().mean()),
        "maps": maps,
    }


def tables(results: Results) -> RenderableType:
    """Return how much of each map's energy lies on the object, and how large the gradients are."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{results['settings']['classifiers']['data']}, logits of the classifiers")
    table.add_column("map of")
    table.add_column("model")
    for column in ("energy on the object, %", f"size, {UNIT}", "information, nats"):
        table.add_column(column, justify="right")
    for what in results["maps"][KINDS[0]]:
        for kind in KINDS:
            table.add_row(what, kind, *_row(results["maps"][kind][what]))
    return Group(table, Text(_sentence(results)))


def figure(results: Results) -> Figure:
    """Draw the images and their maps, a row for each model and map, each row with its scale."""
    import numpy as np
    from matplotlib.figure import Figure

    rows = [
        (f"{kind},\n{what}", results["maps"][kind][what]["maps"])
        for what in results["maps"][KINDS[0]]
        for kind in KINDS
    ]
    images = results["images"]
    size = (1.15 * len(images) + 1.9, 1.2 * len(rows) + 1.3)
    plot = Figure(figsize=size, layout="constrained")
    grid = plot.subplots(
        len(rows) + 1,
        len(images) + 1,
        squeeze=False,
        gridspec_kw={"width_ratios": [1] * len(images) + [0.06]},
    )
    grid[0, -1].set_axis_off()
    for axes, image in zip(grid[0, :-1], images, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    grid[0, 0].set_ylabel("image")
    for line, (name, maps) in zip(grid[1:], rows, strict=True):
        # A few pixels are much larger than the rest: they have the scale's end colours.
        end = np.quantile(np.abs(maps), 0.99) or 1.0
        for axes, each in zip(line[:-1], maps, strict=True):
            drawn = axes.imshow(each, cmap="RdBu_r", vmin=-end, vmax=end)
        line[0].set_ylabel(name)
        plot.colorbar(drawn, cax=line[-1], ticks=[-end, 0, end], format="%.1e", extend="both")
    for axes in grid[:, :-1].flat:
        axes.set(xticks=[], yticks=[])
    plot.suptitle(f"Gradient of the information loss, {UNIT} (red: brighter is less information)")
    return plot


def _chosen(labels: Tensor, count: int) -> list[int]:
    """Return the first image of each class, so many of them at most."""
    classes = labels.unique().tolist()[:count]
    return [int((labels == label).nonzero()[0]) for label in classes]


def _measured(
    job: Job,
    encoder: nn.Module,
    stage: str,
    data: Data,
    chosen: list[int],
    folder: RunFolder,
    say: Say,
) -> Mapping[str, Any]:
    """Train a critic, and return the maps of the chosen images and statistics of the test set's."""
    say(f"training the critic of {stage}")
    config = CriticConfig(epochs=job.epochs, batch_size=job.batch_size, critic_grad=job.critic_grad)
    critic = train_critic(
        encoder,
        data.x_train[: job.train_images],
        config,
        attack=None,
        seed=job.seed,
        stage=f"critic-{stage}",
        run=folder,
    ).critic
    x = Feed(data.x_test[: job.test_images], "cpu")
    parts = [x[indices] for indices in batches(len(x), job.batch_size)]
    maps = [saliency(encoder, critic, part, critic_grad=job.critic_grad) for part in parts]
    shares = torch.cat([object_share(*pair) for pair in zip(maps, parts, strict=True)]).double()
    values = evaluate_critic(encoder, critic, x, config, attack=None).values
    return {
        # An image's channels change together.
        "maps": _plain(maps[0][chosen].sum(1)),
        "share": float(shares.nanmean()),
        "share_standard_error": float(_standard_error(shares[shares.isfinite()])),
        "size": math.sqrt(float(torch.cat(maps).double().square().mean())),
        "information": sum(values) / len(values),
    }


def _standard_error(values: Tensor) -> Tensor:
    return values.std() / math.sqrt(len(values))


def _plain(values: Tensor) -> list[Any]:
    """Return nested lists, rounded to what a figure can show."""
    scale = values.abs().max().item() or 1.0
    found: list[Any] = (values.double() / scale).mul(1e4).round().mul(1e-4 * scale).tolist()
    return found


def _row(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{100 * found['share']:.1f} ± {100 * found['share_standard_error']:.1f}",
        f"{found['size']:.2e}",
        f"{found['information']:.3f}",
    ]


def _sentence(results: Results) -> str:
    settings = results["settings"]
    return (
        f"The object, the pixels that are not 0, is {100 * results['object_pixels']:.1f} % of the "
        f"images: a map that is even has that share of its energy there. Means over "
        f"{results['tested']} test images, ± their standard error; one critic each, so that "
        f"what critics add to the error is not in it. Size: root mean square of the gradient of a "
        f"batch of {settings['batch_size']}, through "
        f"{'both sides' if settings['critic_grad'] == 'full' else 'the encoder side'} of the "
        "critic."
    )
