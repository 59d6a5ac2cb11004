"""Estimates against the truth, on distributions whose information is known (spec section 8)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from wcmi_fast.experiments.distributions import TASKS
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.results import Estimate
from wcmi_fast.information.samples import sample_information
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "ground-truth"
BOUNDS = ("dv", "infonce", "nwj", "smile")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Estimate known information from samples by every bound, and show the errors."""

    tasks: tuple[str, ...] = (
        "1v1-normal-0.75",
        "dense-2",
        "dense-3",
        "dense-5",
        "dense-25",
        "dense-50",
        "sparse-5",
        "student-5-5-2",
        "half-cube-sparse-5",
        "normal-cdf-sparse-5",
        "spiral-sparse-5",
    )
    """Names of distributions, of `wcmi_fast.experiments.distributions.TASKS`."""
    samples: int = 5000
    """Rows of each sample; half of them are held out for the estimate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws other samples and trains other critics."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                close = difflib.get_close_matches(task, TASKS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{NAME}: tasks has {task!r}, wanted some of {list(TASKS)}{hint}")
        for name in ("tasks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{NAME}: {name} is empty, wanted one or more")


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Estimate every task with every seed; see `Experiment`."""
    rows = [_task(job, task, folder, say) for task in job.tasks]
    return {"threads": torch.get_num_threads(), "tasks": rows}


def tables(results: Results) -> RenderableType:
    """Return the table of estimates and errors, a row per task."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="nats: mean over seeds ± half of its 95 % interval; error in % of the truth"
    )
    table.add_column("task", no_wrap=True)
    table.add_column("truth", justify="right")
    for name in (*BOUNDS, "best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("s per seed", justify="right")
    for row in results["tasks"]:
        found = [*(row["bounds"][bound] for bound in BOUNDS), row["best"]]
        cells = [_cell(each, row["truth"]) for each in found]
        table.add_row(row["task"], f"{row['truth']:.4f}", *cells, f"{row['seconds']:.1f}")
    settings = results["settings"]
    return Group(
        table,
        Text(
            f"{settings['samples']} rows, half held out; seeds {settings['seeds']}; "
            f"{results['threads']} threads. The seconds are those of all bounds together, whose "
            "critic is one. 'best' is the bound of the highest validation value in each seed."
        ),
    )


def figure(results: Results) -> Figure:
    """Plot each bound's estimates, with intervals, against the truth."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(3.4 * len(BOUNDS), 3.6), layout="constrained")
    panels = plot.subplots(1, len(BOUNDS), sharex=True, sharey=True)
    truths = [row["truth"] for row in results["tasks"]]
    for axes, bound in zip(panels, BOUNDS, strict=True):
        found = [row["bounds"][bound] for row in results["tasks"]]
        means = [each["mean"] for each in found]
        reach = [
            [each["mean"] - each["interval"][0] for each in found],
            [each["interval"][1] - each["mean"] for each in found],
        ]
        axes.plot([0, max(truths)], [0, max(truths)], color="0.7", label="truth")
        axes.errorbar(truths, means, yerr=reach, fmt="o", capsize=3, label=bound)
        axes.set(title=bound, xlabel="truth, nats")
    panels[0].set_ylabel("estimate, nats")
    return plot


def _task(job: Job, task: str, folder: RunFolder, say: Say) -> dict[str, Any]:
    truth = TASKS[task].information
    found = []
    for seed in job.seeds:
        say(f"{task}, seed {seed}")
        found.append(folder.stage(f"{task}-{seed}", partial(_seed, job, task, seed)))
    bounds = {bound: _over_seeds([each["batches"][bound] for each in found]) for bound in BOUNDS}
    best = _over_seeds([each["batches"][each["best"]] for each in found])
    return {
        "task": task,
        "truth": truth,
        "bounds": bounds,
        "best": {**best, "bounds": [each["best"] for each in found]},
        "seconds": fmean(each["seconds"] for each in found),
    }


def _seed(job: Job, task: str, seed: int) -> dict[str, Any]:
    x, y = TASKS[task].sample(job.samples, seed)
    report = sample_information(x, y, bounds=BOUNDS, seed=seed, progress=False)
    batches = {bound: list(report.estimates[bound].batches[0]) for bound in BOUNDS}
    return {"batches": batches, "best": report.best, "seconds": report.seconds}


def _over_seeds(batches: list[list[float]]) -> dict[str, Any]:
    """Return mean and interval over seeds, whose samples are independent: each is one value."""
    estimate = Estimate.of([[fmean(values) for values in batches]])
    return {"mean": estimate.mean, "interval": list(estimate.interval)}


def _cell(found: Mapping[str, Any], truth: float) -> str:
    low, high = found["interval"]
    error = 100 * (found["mean"] / truth - 1)
    return f"{found['mean']:.3f} ± {(high - low) / 2:.3f}\n{error:+.1f} %"
