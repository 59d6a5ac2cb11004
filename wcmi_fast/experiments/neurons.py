"""Information and vulnerability of single neurons, standard against robust (the paper's figure 3).

A neuron is a second-layer kernel of Baseline-H, a function of 10 x 10 image patches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from statistics import stdev
from typing import TYPE_CHECKING, Any

from torch import nn

from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.neurons import CRITIC, LAYER, QUANTITIES, histograms, neuron_information
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "neurons"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Measure every second-layer kernel of a standard and a robust Baseline-H (figure 3)."""

    classifiers: Classifiers = field(default_factory=Classifiers)
    """The two models, and the data."""
    layer: str = LAYER
    """Layer whose kernels are measured; "convolutions.5" is behind the ReLU, as the authors do."""
    eps: float = 8 / 255
    """Radius of each neuron's attack on its patches, in units of pixels from 0 to 1."""
    steps: int = 10
    """Steps of that attack, of 2.5 eps / steps."""
    training_steps: int = 5
    """Attack steps while worst-case critics are trained."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic, or through the neuron only, as the authors do."""
    trials: int = 4
    """Critics trained per neuron, term and model."""
    epochs: int = CRITIC.epochs
    """Passes of the critics over the training images, a patch of each."""
    batch_size: int = CRITIC.batch_size
    """Patches per batch; the value depends on it."""
    train_images: int = 10_000
    """Images that critics are trained on, at most."""
    test_images: int = 1_000
    """Images for the estimates, at most."""
    seed: int = 0
    """Decides the critics' weights and which patches are drawn."""


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train the models, and measure each one's neurons; see `Experiment`."""
    data = classifiers.load(job.classifiers)
    models = classifiers.trained(job.classifiers, data, folder, say)
    return {
        "reports": {kind: _measured(job, models[kind], data, kind, folder, say) for kind in KINDS}
    }


def tables(results: Results) -> RenderableType:
    """Return each model's means over the neurons, and how its neurons compare with the other's."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    settings, reports = results["settings"], results["reports"]
    count = len(reports["standard"]["neurons"])
    table = Table(
        title=f"{settings['classifiers']['data']}, {count} neurons of {settings['layer']}, "
        f"eps {settings['eps']:.3g}, nats"
    )
    for column in (
        "model",
        "quantity",
        "mean (95 % interval)",
        "sd over neurons",
        "se of a neuron",
    ):
        table.add_column(column, justify="right" if column.startswith("s") else "left")
    for kind in KINDS:
        for key, name in QUANTITIES.items():
            table.add_row(kind, name, *_row(reports[kind][key]))
    return Group(table, Text(_sentence(results)))


def figure(results: Results) -> Figure:
    """Plot histograms of the neurons' values, standard against robust."""
    return histograms(results["reports"])


def _measured(
    job: Job, model: nn.Module, data: Any, kind: str, folder: RunFolder, say: Say
) -> dict[str, Any]:
    say(f"measuring the neurons of the {kind} classifier")
    report = neuron_information(
        model,
        data,
        eps=job.eps,
        layer=job.layer,
        steps=job.steps,
        training_steps=job.training_steps,
        trials=job.trials,
        seed=job.seed,
        critic=replace(
            CRITIC, epochs=job.epochs, batch_size=job.batch_size, critic_grad=job.critic_grad
        ),
        train_images=job.train_images,
        test_images=job.test_images,
        folder=folder.path / kind,
        progress=False,
    )
    found: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    return found


def _row(quantity: Any) -> list[str]:
    average = quantity["average"]
    low, high = average["interval"]
    errors = quantity["standard_error"]
    return [
        f"{average['mean']:.4f} ({low:.4f} to {high:.4f})",
        f"{stdev(quantity['mean']):.4f}",
        f"{sum(errors) / len(errors):.4f}",
    ]


def _sentence(results: Results) -> str:
    standard, robust = (results["reports"][kind] for kind in KINDS)
    kept = [f"{100 * _kept(report):.0f} %" for report in (standard, robust)]
    low = standard["vulnerability"]["average"]["interval"][0]
    high = robust["vulnerability"]["average"]["interval"][1]
    above = "lies above" if low > high else "does not lie wholly above"
    return (
        f"On average the worst case keeps {kept[0]} of the standard neurons' information and "
        f"{kept[1]} of the robust ones'. The interval of the standard neurons' mean vulnerability "
        f"{above} the robust ones'. {standard['caveat']}"
    )


def _kept(report: Any) -> float:
    worst, normal = (report[key]["average"]["mean"] for key in ("worst_case", "information"))
    return float(worst / normal)
