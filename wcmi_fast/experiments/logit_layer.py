"""Figures 1 and 2 of the paper: the vulnerability of logits, and how robust their classifier is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from wcmi_fast import datasets
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Data, Feed
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.job import Options
from wcmi_fast.information.results import CAVEAT, Report
from wcmi_fast.information.vulnerability import representation_vulnerability
from wcmi_fast.models import CIFAR10_MEAN, CIFAR10_STD
from wcmi_fast.models import load as load_model
from wcmi_fast.theory import adversarial_accuracy_upper_bound
from wcmi_fast.training.checkpoint import save_weights
from wcmi_fast.training.config import ClassifierConfig, CriticGrad
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.supervised import train_classifier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "logit-layer"
ESTIMATES = ("information", "worst_case", "vulnerability")
SUFFIXES = (".safetensors", ".pt", ".pth")
MARKERS = "osD^vPX*"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Train classifiers, standard and robust, and measure the vulnerability of their logits.

    The defaults are for a laptop: few images and one trial, which its flags say, and two networks.
    Baseline-H takes a few minutes on two cores, ResNet-18 several times as long, the others longer.
    The paper's is ``--data cifar10 --models vgg16 resnet18 resnet50 densenet121 baseline_h_mlp
    --train-eps 0 0.00784 0.03137 --eps 0.03137 --train-images 50000 --train-epochs 200``, and more
    of all else, for a GPU.
    """

    data: str = "fashion_mnist"
    """Data set, or the path of an .npz file or a folder of images."""
    models: tuple[str, ...] = ("baseline_h", "resnet18")
    """Networks, as in `wcmi_fast.models.NAMES`."""
    train_eps: tuple[float, ...] = (0.0, 0.025, 0.1)
    """Each network is trained against each radius, in units of pixels from 0 to 1; 0 is standard
    training."""
    train_steps: int = 2
    """Attack steps in training, from a random start, of 2.5 eps / train_steps."""
    train_epochs: int = 3
    """Passes over the images that networks are trained on."""
    train_batch: int = 64
    """Images per batch of training."""
    train_images: int = 1_000
    """Images that networks are trained on, at most."""
    checkpoints: Path | None = None
    """Folder of trained networks, which are then not trained: files such as
    resnet18-eps-0.1.safetensors, or .pt or .pth, and resnet18-standard.safetensors. A run leaves
    its own in its folder models."""
    eps: float = 0.1
    """Radius of the measurement's attack, in units of pixels from 0 to 1."""
    steps: int = 5
    """Steps of that attack, of 2.5 eps / steps."""
    training_steps: int = 1
    """Attack steps while a worst-case critic is trained."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic, or through the encoder only, as the authors do."""
    trials: int = 1
    """Critics trained per term and model."""
    epochs: int = 5
    """Passes of a critic over its training images."""
    batch_size: int = 50
    """Images per batch of an estimate; its value depends on it."""
    critic_images: int = 1_500
    """Images that critics are trained on, at most."""
    test_images: int = 400
    """Images for the estimates and accuracies, at most."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""
    seed: int = 0
    """Decides first weights, critics and the order of the data."""


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train or load the networks, keep their weights, and measure them; see `Experiment`."""
    data = datasets.load(job.data)
    kept = folder.path / "models"
    kept.mkdir(exist_ok=True)
    trained: dict[str, nn.Module] = {}
    for network in job.models:
        for eps in job.train_eps:
            name = label(network, eps)
            trained[name] = _trained(job, network, eps, data, folder, say)
            save_weights(kept / f"{_slug(name)}.safetensors", trained[name])
    return logit_layer_study(
        trained,
        data,
        eps=job.eps,
        steps=job.steps,
        training_steps=job.training_steps,
        critic_grad=job.critic_grad,
        trials=job.trials,
        seed=job.seed,
        critic=CriticConfig(epochs=job.epochs, batch_size=job.batch_size),
        train_images=job.critic_images,
        test_images=job.test_images,
        device=job.device,
        folder=folder.path / "measured",
        say=say,
    )


def logit_layer_study(
    models: Mapping[str, nn.Module],
    data: Any,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    training_steps: int | None = None,
    bound: str = "dv",
    critic_grad: CriticGrad = "full",
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Measure the logits of several classifiers, and how their vulnerability goes with robustness.

    Args:
        models: classifiers by name: images (N, C, H, W), float32 in [0, 1], to logits (N, K). In
            the figure models share a colour whose names begin with the same word, such as "resnet18
            standard" and "resnet18 eps 0.1".
        data, eps, steps, step_size, training_steps, bound, critic_grad: as for
            `representation_vulnerability`; the data must have labels.
        options: classes, trials, seed, budget, critic, train_images, test_images, device, folder,
            progress and say, as there. With a folder each model's report is written there too.

    Returns:
        What `tables` and `figure` of this module show, plain values: "eps", "classes", "models"
        (name to estimates in nats with intervals, accuracies and bound in [0, 1], adversarial gap,
        names of flags), and "correlation" of vulnerability and gap over the models (None for fewer
        than three, or where one of them is constant).

    Raises:
        TypeError, ValueError, FloatingPointError, OSError: as `representation_vulnerability`; no
            models; data without labels; a model whose output is not logits of the labels.

    Equivalent program::

        reports = {name: representation_vulnerability(model, data, eps=eps, head=nn.Identity())
                   for name, model in models.items()}

    Source: Zhu et al. 2020, section 5, figures 1 and 2.
    """
    if not models:
        raise ValueError("logit_layer_study: models is empty, wanted at least one")
    given: dict[str, Any] = dict(options)
    folder, say = given.pop("folder", None), given.get("say", lambda line: None)
    rows: dict[str, dict[str, Any]] = {}
    classes = 0
    for name, model in models.items():
        say(f"measuring {name}")
        own = None if folder is None else Path(folder) / _slug(name)
        report = representation_vulnerability(
            model,
            data,
            eps=eps,
            steps=steps,
            step_size=step_size,
            training_steps=training_steps,
            bound=bound,
            critic_grad=critic_grad,
            head=nn.Identity(),
            folder=own,
            **given,
        )
        if own is not None:
            report.save(own / "report")
        rows[name], classes = _row(name, report), report.classes or 0
    return {"eps": eps, "classes": classes, "models": rows, "correlation": _correlation(rows)}


def label(network: str, eps: float) -> str:
    """Return the name of a network trained against a radius, such as "resnet18 eps 0.1"."""
    return f"{network} eps {eps:.4g}" if eps else f"{network} standard"


def tables(results: Results) -> RenderableType:
    """Return the table of all models, and what can be concluded."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Logits under eps {results['eps']:.4g}: nats (95 % interval), and %")
    table.add_column("model", no_wrap=True)
    for column in ("I", "worst-case I", "RV"):
        table.add_column(column, justify="right")
    for column in ("natural", "adv.", "gap", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in results["models"].items():
        estimates = [_with_interval(row[key]) for key in ESTIMATES]
        shares = [
            f"{100 * row[key]:.1f}"
            for key in ("natural_accuracy", "adversarial_accuracy", "gap", "accuracy_bound")
        ]
        table.add_row(name, *estimates, *shares)
    flags = [
        Text(f"Flags of {name} (docs/measuring.md): {', '.join(row['flags']) or 'none'}.")
        for name, row in results["models"].items()
    ]
    return Group(table, *flags, Text(_sentence(results)), Text(CAVEAT))


def figure(results: Results) -> Figure:
    """Plot RV against the adversarial gap, and information against adversarial accuracy."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(11, 4.6), layout="constrained")
    gaps, bounds = plot.subplots(1, 2)
    styles = _styles(list(results["models"]))
    for name, row in results["models"].items():
        _plot_gap(gaps, name, row, styles[name])
        _plot_information(bounds, row, styles[name])
    gaps.set(xlabel="RV of the logits, nats", ylabel="adversarial gap, percentage points")
    _plot_bound(bounds, results)
    bounds.set(
        xlabel="information of the logits, nats", ylabel="adversarial accuracy, %", ylim=(-4, 104)
    )
    handles, labels = gaps.get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside right upper", fontsize="small")
    return plot


def _trained(
    job: Job, network: str, eps: float, data: Data, folder: RunFolder, say: Say
) -> nn.Module:
    """Train a network, or read its weights from a checkpoint or an earlier session."""
    name = label(network, eps)
    arguments = _arguments(job, data)
    file = _checkpoint(job, name)
    if file is not None:
        return load_model(network, file, device=job.device, **arguments)
    say(f"training {name}")
    with seeded(job.seed, network, "weights"):
        model = load_model(network, device=job.device, **arguments)
    config = ClassifierConfig(
        attack=_attack(job, eps) if eps else None,
        epochs=job.train_epochs,
        batch_size=job.train_batch,
    )
    return train_classifier(
        config,
        model,
        Feed(data.x_train[: job.train_images], job.device),
        Feed(data.y_train[: job.train_images], job.device),
        seed=job.seed,
        stage=f"train-{_slug(name)}",
        run=folder,
    )


def _attack(job: Job, eps: float) -> PGD:
    step_size = 2.5 * eps / job.train_steps
    return PGD(eps=eps, step_size=step_size, steps=job.train_steps, random_start=True)


def _arguments(job: Job, data: Data) -> dict[str, Any]:
    cifar = job.data == "cifar10"
    return {
        "input_shape": tuple(data.x_train.shape[1:]),
        "classes": int(data.y_train.max()) + 1,
        "mean": CIFAR10_MEAN if cifar else None,
        "std": CIFAR10_STD if cifar else None,
    }


def _checkpoint(job: Job, name: str) -> Path | None:
    if job.checkpoints is None:
        return None
    files = [job.checkpoints / f"{_slug(name)}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), None)


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _row(name: str, report: Report) -> dict[str, Any]:
    natural, adversarial = report.natural_accuracy, report.adversarial_accuracy
    if natural is None or adversarial is None:
        raise ValueError(
            f"logit_layer_study: {name} has no accuracy on data without labels, wanted data with "
            "labels"
        )
    estimates = {
        key: {"mean": each.mean, "interval": list(each.interval)}
        for key, each in report.estimates().items()
    }
    return {
        **estimates,
        "natural_accuracy": natural,
        "adversarial_accuracy": adversarial,
        "gap": natural - adversarial,
        "accuracy_bound": report.accuracy_bound,
        "flags": list(dict.fromkeys(flag.name for flag in report.flags)),
        "seconds": report.seconds,
    }


def _correlation(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    from scipy.stats import pearsonr, spearmanr

    vulnerabilities = [row["vulnerability"]["mean"] for row in rows.values()]
    gaps = [row["gap"] for row in rows.values()]
    if len(rows) < 3 or len(set(gaps)) == 1 or len(set(vulnerabilities)) == 1:
        return None
    return {
        "pearson": float(pearsonr(vulnerabilities, gaps).statistic),
        "spearman": float(spearmanr(vulnerabilities, gaps).statistic),
    }


def _with_interval(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{estimate['mean']:.3f} ({low:.3f} to {high:.3f})"


def _sentence(results: Results) -> str:
    rows, correlation = results["models"], results["correlation"]
    broken = [n for n, r in rows.items() if r["accuracy_bound"] < r["adversarial_accuracy"]]
    holds = (
        f"Theorem 3.4's bound is at or above the measured adversarial accuracy for "
        f"{len(rows) - len(broken)} of {len(rows)} models"
        + (f", not for {', '.join(broken)}" if broken else "")
        + "."
    )
    if correlation is None:
        return holds
    return (
        f"Over {len(rows)} models RV and the adversarial gap have a correlation of "
        f"{correlation['pearson']:.2f} (of ranks: {correlation['spearman']:.2f}). {holds}"
    )


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give models a colour by the first word of their name, and a marker by the rest."""
    first = list(dict.fromkeys(name.partition(" ")[0] for name in names))
    rest = list(dict.fromkeys(name.partition(" ")[2] for name in names))
    return {
        name: {
            "color": f"C{first.index(name.partition(' ')[0]) % 10}",
            "marker": MARKERS[rest.index(name.partition(" ")[2]) % len(MARKERS)],
        }
        for name in names
    }


def _reach(estimate: Mapping[str, Any]) -> list[list[float]]:
    low, high = estimate["interval"]
    return [[estimate["mean"] - low], [high - estimate["mean"]]]


def _plot_gap(axes: Axes, name: str, row: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    found, gap = row["vulnerability"], 100 * row["gap"]
    axes.errorbar(found["mean"], gap, xerr=_reach(found), ls="", capsize=3, label=name, **style)


def _plot_information(axes: Axes, row: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    share = 100 * row["adversarial_accuracy"]
    worst, normal = row["worst_case"], row["information"]
    axes.plot([worst["mean"], normal["mean"]], [share, share], color=style["color"], lw=0.6)
    axes.errorbar(worst["mean"], share, xerr=_reach(worst), ls="", capsize=3, **style)
    axes.errorbar(normal["mean"], share, xerr=_reach(normal), ls="", capsize=3, mfc="w", **style)


def _plot_bound(axes: Axes, results: Results) -> None:
    low, high = axes.get_xlim()
    nats = [low + (high - low) * i / 200 for i in range(201)]
    bound = [100 * adversarial_accuracy_upper_bound(x, results["classes"]) for x in nats]
    axes.plot(nats, bound, color="0.3", ls="--", lw=1, label="theorem 3.4: at most")
    axes.plot([], [], "ko", ls="", label="worst-case information")
    axes.plot([], [], "ko", ls="", mfc="w", label="normal information")
    axes.legend(fontsize="small")
