"""The paper's table of representations and heads: accuracies, natural and under attack."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from wcmi_fast.experiments.published import PUBLISHED
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.progress import Progress
from wcmi_fast.training import tasks
from wcmi_fast.training.evaluation import interval
from wcmi_fast.training.options import TASKS, Task
from wcmi_fast.training.presets import PRESETS, preset
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "representations"
KINDS: tuple[Literal["mlp", "linear"], ...] = ("mlp", "linear")
# Representations and how their heads are trained, as the paper's table has them.
ROWS = (
    ("standard", "standard"),
    ("standard", "robust"),
    ("worst_case", "standard"),
    ("worst_case", "early_stop"),
    ("worst_case", "robust"),
    ("supervised", "standard"),
    ("supervised", "robust"),
)
ACCURACIES = ("natural", "adversarial")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Train representations and heads, standard and robust, and attack them all."""

    preset: str = "cpu/fashion_mnist"
    """Which settings: a preset of `wcmi-fast train`."""
    seeds: tuple[int, ...] = (0,)
    """Each trains everything anew."""
    kinds: tuple[Literal["mlp", "linear"], ...] = KINDS
    """Heads."""
    supervised_kinds: tuple[Literal["mlp", "linear"], ...] = ("mlp",)
    """Heads of the supervised networks."""
    held_out: int = 1000
    """Training images that tell the epoch of early stopping."""
    test_images: int = 10_000
    """Test images for the accuracies, at most."""
    train_images: int | None = None
    """Training images, at most; None leaves it to the preset."""
    epochs: int | None = None
    """Epochs of every training; None leaves them to the preset."""
    amp: bool = False
    """Compute convolutions and products in bfloat16."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"{NAME}: preset is {self.preset!r}, wanted one of {tuple(PRESETS)}")
        for name in ("seeds", "kinds"):
            if not getattr(self, name):
                raise ValueError(f"{NAME}: {name} is empty, wanted one or more")


class Part(NamedTuple):
    """One training: its folder's name and its task."""

    name: str
    task: Task


def encoders(job: Job, seed: int) -> Iterator[Part]:
    """Iterate over the encoders' trainings."""
    for name, beta in (("standard", 0.0), ("worst_case", 1.0)):
        yield Part(f"{seed}-encoder-{name}", replace(_task(job, "encoder", seed), beta=beta))


def classifiers(job: Job, seed: int, folder: Path) -> Iterator[tuple[tuple[str, str, str], Part]]:
    """Iterate over (representation, head's training, head's kind) and its training."""
    for representation, head in ROWS:
        supervised = representation == "supervised"
        for kind in job.supervised_kinds if supervised else job.kinds:
            name = f"{seed}-{representation}-{head}-{kind}"
            options: dict[str, Any] = {"robust": head == "robust"}
            if head == "early_stop":
                options |= {"held_out": job.held_out, "early_stop": True}
            if supervised:
                task: Task = replace(
                    _task(job, "classifier", seed), network=f"baseline_h_{kind}", **options
                )
            else:
                encoder = folder / f"{seed}-encoder-{representation}"
                task = replace(_task(job, "head", seed, encoder=encoder), kind=kind, **options)
            yield (representation, head, kind), Part(name, task)


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train and attack everything, each in a folder of its own; see `Experiment`."""
    images = 0
    seconds: dict[str, float] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {
        row: {kind: {name: [] for name in ACCURACIES} for kind in KINDS} for row in ROWS
    }
    for seed in job.seeds:
        for part in encoders(job, seed):
            seconds[part.name] = _train(part, folder, say)["seconds"]
        for (representation, head, kind), part in classifiers(job, seed, folder.path):
            found = _train(part, folder, say)
            seconds[part.name] = found["seconds"]
            images = found["test_images"]
            for name in ACCURACIES:
                rows[representation, head][kind][name].append(found[f"{name}_accuracy"])
    attack = asdict(_task(job, "classifier", 0).test_attack())
    return {
        "data": _task(job, "classifier", 0).data,
        "test_attack": attack,
        "test_images": images,
        "rows": [
            {"representation": row[0], "head": row[1], **found} for row, found in rows.items()
        ],
        "seconds": seconds,
    }


def tables(results: Results) -> RenderableType:
    """Return the table of accuracies beside the paper's, and of times."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    published = PUBLISHED.get(results["data"], {})
    table = Table(title=f"{results['data']}: accuracy in %, ours (the paper's)")
    for column in ("representation", "head trained"):
        table.add_column(column)
    for kind in KINDS:
        for name in ACCURACIES:
            table.add_column(f"{kind}, {name}", justify="right")
    for row in results["rows"]:
        theirs = published.get((row["representation"], row["head"]), {})
        cells = [
            _cell(row[kind][name], theirs.get(kind, ())[place : place + 1])
            for kind in KINDS
            for place, name in enumerate(ACCURACIES)
        ]
        table.add_row(row["representation"], row["head"], *cells)
    times = Table(title="minutes of training and testing")
    times.add_column("part")
    times.add_column("min", justify="right")
    for part, seconds in results["seconds"].items():
        times.add_row(part, f"{seconds / 60:.1f}")
    times.caption = "of a part that was interrupted, since then"
    return Group(table, times, Text(_sentence(results)))


def figure(results: Results) -> Figure:
    """Plot natural against adversarial accuracy of MLP heads, ours and the paper's."""
    from matplotlib.figure import Figure

    published = PUBLISHED.get(results["data"], {})
    plot = Figure(figsize=(7, 5))
    axes = plot.add_subplot(xlabel="natural accuracy, %", ylabel="adversarial accuracy, %")
    for place, row in enumerate(results["rows"]):
        name, head = row["representation"], row["head"]
        ours = [100 * fmean(row["mlp"][each]) for each in ACCURACIES if row["mlp"][each]]
        if len(ours) == len(ACCURACIES):
            axes.plot(*ours, "o", color=f"C{place}", label=f"{name}, {head} head")
        if (name, head) in published:
            axes.plot(*published[name, head]["mlp"], "x", color=f"C{place}")
    axes.plot([], [], "kx", label="the paper's")
    axes.legend(fontsize="small")
    return plot


def _task(job: Job, name: str, seed: int, **further: Any) -> Any:
    options = {**preset(job.preset, name), "seed": seed, "amp": job.amp, **further}
    options["test_images"] = job.test_images
    for key in ("train_images", "epochs"):
        if getattr(job, key) is not None:
            options[key] = getattr(job, key)
    return TASKS[name](**options)


def _train(part: Part, folder: RunFolder, say: Say) -> dict[str, Any]:
    """Do a training into its folder, unless it is there; `wcmi-fast train` could go on with it."""
    done = [0]

    def advance(batches: float) -> None:
        done[0] += round(batches)

    def note(text: str) -> None:
        say(f"{part.name}: batch {done[0]}  {text}")

    def work() -> dict[str, Any]:
        say(part.name)
        began = time.perf_counter()
        found = tasks.train(part.task, folder.path / part.name, Progress(say, advance, note))
        return {**found, "seconds": time.perf_counter() - began}

    return folder.stage(part.name, work)


def _cell(ours: Sequence[float], theirs: Sequence[float]) -> str:
    found = f"{100 * fmean(ours):.2f}" if ours else "-"
    if len(ours) > 1:
        found += f" ± {100 * stdev(ours):.2f}"
    return found + "".join(f" ({value:.2f})" for value in theirs)


def _sentence(results: Results) -> str:
    attack: Mapping[str, Any] = results["test_attack"]
    job: Mapping[str, Any] = results["settings"]
    images = results["test_images"]
    low, high = interval(0.5, images)
    return (
        f"Seeds {job['seeds']}, ± their standard deviation if there are several; {images} test "
        f"images, which leave {50 * (high - low):.1f} points to either side of 50 % uncertain (95 "
        f"%); attacked by PGD of {attack['steps']} steps of {attack['step_size']:g} within "
        f"{attack['eps']:g}. The paper's numbers are of other settings (its section 6), means over "
        "4 trials."
    )
