"""Measure a standard and an adversarially trained classifier of the same data (spec section 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.results import Report
from wcmi_fast.information.vulnerability import representation_vulnerability
from wcmi_fast.training.checkpoint import save_weights
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "standard-robust"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Train a standard and a robust Baseline-H, and measure the vulnerability of their logits."""

    classifiers: Classifiers = field(default_factory=Classifiers)
    """The two models, and the data."""
    eps: float = 0.1
    """Radius of the measurement's attack, in units of pixels from 0 to 1."""
    steps: int = 10
    """Steps of that attack, of 2.5 eps / steps."""
    training_steps: int = 5
    """Attack steps while a worst-case critic is trained."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic, or through the encoder only, as the authors do."""
    trials: int = 2
    """Critics trained per term and model."""
    epochs: int = 3
    """Passes over the training images, of the first critic and again of each term's."""
    batch_size: int = 50
    """Images per batch of an estimate; its value depends on it."""
    learning_rate: float = 3e-3
    """Adam's, for the critics, lowered along a cosine to 0."""
    train_images: int = 45_000
    """Images that critics are trained on, at most."""
    test_images: int = 1_000
    """Images for the estimates and accuracies, at most."""
    seed: int = 0
    """Decides the critics' weights and the order of their data."""


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train, measure, and save each model's weights and report; see `Experiment`."""
    data = classifiers.load(job.classifiers)
    models = classifiers.trained(job.classifiers, data, folder, say)
    for kind, model in models.items():
        save_weights(folder.path / f"{kind}.safetensors", model)
    reports = {kind: _measured(job, kind, models[kind], data, folder.path, say) for kind in KINDS}
    return {"reports": reports, "comparison": _comparison(reports)}


def tables(results: Results) -> RenderableType:
    """Return the table of both models, and what can be concluded."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{results['settings']['classifiers']['data']}, nats (95 % interval)")
    for column in ("model", "I", "worst-case I", "RV"):
        table.add_column(column)
    table.add_column("bound on adv. accuracy, %", justify="right")
    table.add_column("adv. accuracy, %", justify="right")
    table.add_column("natural, %", justify="right")
    table.add_column("flags")
    for kind in KINDS:
        table.add_row(kind, *_row(results["reports"][kind]))
    return Group(table, Text(_sentence(results)))


def figure(results: Results) -> Figure:
    """Plot I, worst-case I and RV of both models with their intervals."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(7, 4))
    axes = plot.add_subplot(xlabel="nats", yticks=range(3))
    axes.set_yticklabels(["RV", "worst-case I", "I"])
    for offset, kind in zip((0.12, -0.12), KINDS, strict=True):
        report = results["reports"][kind]
        found = [report[name] for name in ("vulnerability", "worst_case", "information")]
        means = [estimate["mean"] for estimate in found]
        reach = [
            [e["mean"] - e["interval"][0] for e in found],
            [e["interval"][1] - e["mean"] for e in found],
        ]
        rows = [row + offset for row in range(3)]
        axes.errorbar(means, rows, xerr=reach, fmt="o", capsize=4, label=kind)
    axes.axvline(0, color="0.8", zorder=0)
    axes.legend(title="logits of the classifier")
    return plot


def _measured(
    job: Job, kind: str, model: nn.Module, data: Any, folder: Path, say: Say
) -> dict[str, Any]:
    say(f"measuring the {kind} classifier")
    report = representation_vulnerability(
        model,
        data,
        eps=job.eps,
        critic_grad=job.critic_grad,
        steps=job.steps,
        trials=job.trials,
        seed=job.seed,
        head=nn.Identity(),
        training_steps=job.training_steps,
        critic=CriticConfig(
            epochs=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate
        ),
        train_images=job.train_images,
        test_images=job.test_images,
        folder=folder / kind,
    )
    report.save(folder / f"report-{kind}")
    return _plain(report)


def _plain(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    return found


def _comparison(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    standard, robust = (reports[kind]["vulnerability"]["interval"] for kind in KINDS)
    return {
        "intervals_apart": standard[0] > robust[1],
        "bound_holds": {
            kind: reports[kind]["accuracy_bound"] >= reports[kind]["adversarial_accuracy"]
            for kind in KINDS
        },
    }


def _row(report: Mapping[str, Any]) -> list[str]:
    estimates = [
        "{mean:.3f} ({low:.3f} to {high:.3f})".format(
            mean=estimate["mean"], low=estimate["interval"][0], high=estimate["interval"][1]
        )
        for estimate in (report[key] for key in ("information", "worst_case", "vulnerability"))
    ]
    shares = [
        f"{100 * report[key]:.1f}"
        for key in ("accuracy_bound", "adversarial_accuracy", "natural_accuracy")
    ]
    return [*estimates, *shares, ", ".join(flag["name"] for flag in report["flags"]) or "none"]


def _sentence(results: Results) -> str:
    comparison = results["comparison"]
    apart = "lies above" if comparison["intervals_apart"] else "does not lie wholly above"
    holds = [kind for kind in KINDS if comparison["bound_holds"][kind]]
    return (
        f"The interval of the standard model's RV {apart} the robust one's. The bound is at or "
        f"above the measured adversarial accuracy for: {', '.join(holds) or 'neither'}. "
        f"{results['reports']['standard']['caveat']}"
    )
