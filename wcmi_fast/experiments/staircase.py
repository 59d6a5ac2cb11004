"""The staircase of Poole et al.: every bound's bias and variance as information rises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from wcmi_fast import functional
from wcmi_fast.experiments import distributions
from wcmi_fast.experiments.distributions import Task
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.information.flags import near_log_n
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "staircase"
SHAPES = ("linear", "cubic")
DIVERGED = "diverged"
TRAININGS = ("dv", "mine", "jsd", "infonce", "nwj")
# Steps between two points of the plot, and the fresh batches that a point is the mean of.
BLOCK, BLOCK_BATCHES = 50, 10
# What is judged: these estimates, up to so many nats, within so much of the truth, on linear data.
JUDGED, JUDGED_UP_TO, TOLERANCE = ("dv", "smile inf", "smile 5"), 6.0, 0.1

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Train a critic by each bound while the information of two Gaussians rises stair by stair."""

    information: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0, 10.0)
    """True information of each stair, in nats; a critic is carried on from stair to stair."""
    dim: int = 20
    """Components of x and of y; those of one index are correlated."""
    batch_size: int = 64
    """Pairs per batch, in training and in testing; the values depend on it."""
    steps: int = 3000
    """Training steps on each stair, each with a batch never seen before."""
    test_batches: int = 500
    """Fresh batches after each stair, whose values give bias, variance and mean squared error."""
    taus: tuple[float, ...] = (1.0, 5.0)
    """Where smile clamps the scores; without a clamp ("smile inf") is always shown."""
    width: int = 256
    """Width of the two hidden layers of either side of the critic."""
    units: int = 32
    """Size U of the critic's features, whose dot product is the score."""
    learning_rate: float = 5e-4
    """Adam's, constant."""
    averaging: float = 0.998
    """Decay of the running average of the critic's weights that is evaluated; 0 takes the last."""
    seed: int = 0
    """Decides weights and samples."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("test_batches", 2), ("batch_size", 2), ("dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"staircase: {name} is {getattr(self, name)}, wanted {least} or more"
                )
        if not self.information or min(self.information) <= 0:
            raise ValueError(
                f"staircase: information is {self.information}, wanted one number > 0 per stair"
            )
        if not all(0 < tau < math.inf for tau in self.taus):
            raise ValueError(f"staircase: taus is {self.taus}, wanted finite numbers > 0")


class Estimate(NamedTuple):
    """How a value in nats is got: whose gradient trained the critic, and the value of scores."""

    training: str
    value: Callable[..., Tensor]


class Critic(nn.Module):
    """A separable critic: the dot product of one multilayer perceptron of x and one of y."""

    def __init__(self, dim: int, width: int, units: int) -> None:
        super().__init__()
        self.z, self.h = (
            nn.Sequential(
                nn.Linear(dim, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, units),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (N, U) and h (N, U) of x (N, D) and y (N, D)."""
        return self.z(x), self.h(y)


def estimates(taus: Sequence[float]) -> dict[str, Estimate]:
    """Return what is shown, by name; several are values of one critic, trained by jsd."""
    clamped = {f"smile {t:g}": Estimate("jsd", partial(functional.smile, tau=t)) for t in taus}
    return {
        "dv": Estimate("dv", functional.dv),
        "mine": Estimate("mine", functional.dv),
        **clamped,
        "smile inf": Estimate("jsd", functional.dv),
        "infonce": Estimate("infonce", functional.infonce),
        "nwj": Estimate("nwj", functional.nwj),
        "nwj (jsd)": Estimate("jsd", _nwj_of_log_ratio),
    }


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Climb the stairs once for each shape and training; see `Experiment`."""
    found: dict[str, dict[str, Any]] = {shape: {} for shape in SHAPES}
    for shape in SHAPES:
        for training in TRAININGS:
            stage = f"{shape}-{training}"
            say(f"{shape} data, critic trained by {training}")
            found[shape] |= folder.stage(stage, partial(_climb, job, shape, training, stage))
    shown = {shape: {name: found[shape][name] for name in estimates(job.taus)} for shape in SHAPES}
    return {
        "points": list(_points(job)),
        "stairs": shown,
        "judged": [_judged(job, shown["linear"], name) for name in _names_judged(job)],
    }


def tables(results: Results) -> RenderableType:
    """Return bias, variance and mean squared error per bound and stair, and what is judged."""
    from rich.console import Group
    from rich.text import Text

    shown = [_table(results, shape) for shape in SHAPES]
    return Group(*shown, Text(_paragraph(results)))


def figure(results: Results) -> Figure:
    """Plot every bound's estimate by training step against the truth."""
    from matplotlib.figure import Figure

    settings, stairs = results["settings"], results["stairs"]
    names = list(stairs["linear"])
    plot = Figure(figsize=(2.1 * len(names), 5.6), layout="constrained")
    panels = plot.subplots(len(SHAPES), len(names), sharex=True, sharey=True, squeeze=False)
    steps, truth = settings["steps"], settings["information"]
    limit = math.log(settings["batch_size"])
    for row, shape in zip(panels, SHAPES, strict=True):
        row[0].set_ylabel(f"{shape}: information, nats")
        for axes, name in zip(row, names, strict=True):
            axes.stairs(
                truth, [steps * i for i in range(len(truth) + 1)], color="0.2", label="true"
            )
            axes.axhline(limit, color="0.6", linestyle=":", label=f"log {settings['batch_size']}")
            _draw(axes, results["points"], stairs[shape][name])
            axes.set_title(name, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    panels[0][0].set_ylim(-1, 1.5 * max(truth))
    panels[0][0].legend(fontsize=8, loc="upper left")
    return plot


def _nwj_of_log_ratio(*, scores: Tensor) -> Tensor:
    # jsd's best critic is the log of the ratio of densities; nwj's is that plus 1.
    return functional.nwj(scores=scores + 1)


def _climb(job: Job, shape: str, training: str, stage: str) -> dict[str, Any]:
    """Train one critic up all stairs; return the estimates that are values of it."""
    wanted = {n: e for n, e in estimates(job.taus).items() if e.training == training}
    found: dict[str, dict[str, list[Any]]] = {
        name: {"curve": [], "spread": [], "stairs": []} for name in wanted
    }
    with one_thread(), seeded(job.seed, NAME, stage) as generator:
        critic = Critic(job.dim, job.width, job.units)
        averaged = copy.deepcopy(critic)
        train = _trainer(critic, averaged, training, job)
        for information in job.information:
            stair = distributions.staircase(information, job.dim, cubic=shape == "cubic")
            fresh = partial(_batches, stair, job.batch_size, generator)
            for steps in _blocks(job.steps):
                train(fresh(steps))
                block = _evaluate(averaged, wanted, fresh(BLOCK_BATCHES))
                for name, values in block.items():
                    found[name]["curve"].append(round(float(values.mean()), 4))
                    found[name]["spread"].append(round(float(values.std()), 4))
            tested = _evaluate(averaged, wanted, fresh(job.test_batches))
            for name, values in tested.items():
                found[name]["stairs"].append(summary(name, values, information, job.batch_size))
    return found


def _trainer(
    critic: Critic, averaged: Critic, training: str, job: Job
) -> Callable[[Batches], None]:
    """Return what takes a step of the critic, and of the average of its weights, per batch."""
    objective: Callable[..., Tensor] = getattr(functional, training)
    if training == "mine":
        objective = partial(objective, ema_state=EMAState())
    optimizer = Adam(critic.parameters(), lr=job.learning_rate, fused=True)

    def train(batches: Batches) -> None:
        for x, y in batches:
            loss = -objective(*critic(x, y))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            _average_(averaged, critic, job.averaging)

    return train


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: products of 64 rows do not pay a second one's waiting.

    The numbers then do not depend on the threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _average_(slow: nn.Module, fast: nn.Module, decay: float) -> None:
    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def _blocks(count: int) -> Iterator[int]:
    """Cut a count into blocks of `BLOCK`, the last one smaller."""
    for start in range(0, count, BLOCK):
        yield min(BLOCK, count - start)


def _points(job: Job) -> Iterator[int]:
    """Yield the training steps after which a point of the plot is taken."""
    for stair in range(len(job.information)):
        yield from (stair * job.steps + done for done in accumulate(_blocks(job.steps)))


def _batches(task: Task, size: int, generator: torch.Generator, count: int) -> Batches:
    for block in _blocks(count):
        x, y = task.draw(block * size, generator)
        yield from zip(x.float().split(size), y.float().split(size), strict=True)


@torch.no_grad()
def _evaluate(
    critic: nn.Module,
    wanted: Mapping[str, Estimate],
    batches: Batches,
) -> dict[str, Tensor]:
    """Return each estimate's values of the batches, float64."""
    values: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for x, y in batches:
        z, h = critic(x, y)
        for name, estimate in wanted.items():
            values[name].append(estimate.value(scores=z @ h.T))
    return {name: torch.stack(each).double() for name, each in values.items()}


def summary(name: str, values: Tensor, truth: float, batch_size: int) -> dict[str, Any]:
    """Return how an estimate's values of single batches differ from the true information.

    Args:
        name: of the estimate.
        values: (K,) float64, in nats.
        truth: in nats.
        batch_size: pairs per batch.

    Returns:
        In nats: "truth"; "mean"; its "standard_error"; "bias", mean minus truth; in nats squared:
        "variance" over batches and "mse" = bias**2 + variance; "flags", names of
        `Flag`, or `DIVERGED` where the mean is not finite.
    """
    mean = float(values.mean())
    variance = float(values.var(correction=0))
    return {
        "truth": truth,
        "mean": mean,
        "standard_error": math.sqrt(variance / len(values)),
        "bias": mean - truth,
        "variance": variance,
        "mse": float(((values - truth) ** 2).mean()),
        "flags": _flags(name, mean, batch_size),
    }


def _flags(name: str, mean: float, batch_size: int) -> list[str]:
    if not math.isfinite(mean):
        return [DIVERGED]
    bound = "infonce" if name == "infonce" else "dv"
    flag = near_log_n("information", mean, bound=bound, n=batch_size)
    return [] if flag is None else [flag.name]


def _names_judged(job: Job) -> list[str]:
    return [name for name in estimates(job.taus) if name in JUDGED]


def _judged(job: Job, stairs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an estimate's largest error, relative to the truth, up to the judged information."""
    errors = [
        abs(stair["bias"]) / stair["truth"]
        for stair in stairs[name]["stairs"]
        if stair["truth"] <= JUDGED_UP_TO
    ]
    largest = max(errors, default=math.nan)
    return {"name": name, "largest_error": largest, "within": largest <= TOLERANCE}


def _table(results: Results, shape: str) -> RenderableType:
    from rich.table import Table

    settings = results["settings"]
    batches = f"{settings['test_batches']} fresh batches of {settings['batch_size']}"
    table = Table(title=f"{shape} data, {batches} per stair, nats")
    for column in ("bound", "true I", "estimate", "bias", "error, %", "variance", "mse"):
        table.add_column(column, justify="left" if column == "bound" else "right")
    table.add_column("flags")
    for name, found in results["stairs"][shape].items():
        for stair in found["stairs"]:
            table.add_row(name, *_row(stair))
        table.add_section()
    return table


def _row(stair: Mapping[str, Any]) -> list[str]:
    return [
        f"{stair['truth']:g}",
        f"{stair['mean']:.3f} ± {stair['standard_error']:.3f}",
        f"{stair['bias']:+.3f}",
        f"{100 * stair['bias'] / stair['truth']:+.1f}",
        f"{stair['variance']:.4g}",
        f"{stair['mse']:.4g}",
        ", ".join(stair["flags"]),
    ]


def _paragraph(results: Results) -> str:
    settings = results["settings"]
    size = settings["batch_size"]
    judged = [
        f"{each['name']} {'within' if each['within'] else 'NOT within'} {TOLERANCE:.0%} "
        f"(largest error {each['largest_error']:.1%})"
        for each in results["judged"]
    ]
    return (
        f"Linear data, up to {JUDGED_UP_TO:g} nats: {'; '.join(judged)}. ± is the standard error "
        f"of the mean. infonce cannot exceed log {size} = {math.log(size):.3f}; near_log_n marks "
        "values that are too near what a batch can show, diverged those of critics whose weights "
        "became NaN or infinite. smile and nwj (jsd) are values of one "
        "critic, which jsd's gradient trained; smile inf is dv's value of it."
    )


def _draw(axes: Any, points: Sequence[int], found: Mapping[str, Any]) -> None:
    curve, spread = torch.tensor(found["curve"]), torch.tensor(found["spread"])
    axes.fill_between(points, curve - spread, curve + spread, color="C0", alpha=0.25, linewidth=0)
    axes.plot(points, curve, color="C0", linewidth=1)
