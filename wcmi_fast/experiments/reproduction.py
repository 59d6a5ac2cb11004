"""What the experiments share: a resumable run folder, its results, tables and figure."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wcmi_fast.diagnosis import versions
from wcmi_fast.files import write_file
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Results = Mapping[str, Any]
RESULTS, FIGURE, TEXT = "results.json", "figure.png", "results.txt"
Say = Callable[[str], None]


class Experiment(Protocol):
    """A module of this package that `wcmi-fast reproduce` runs.

    Its `Job` is a frozen dataclass of the options, each documented by the string below it.
    """

    NAME: str
    Job: Any

    def run(self, job: Any, folder: RunFolder, say: Say) -> Results:
        """Do the work, stage by stage (`RunFolder.stage`), and return plain values."""

    def tables(self, results: Results) -> RenderableType:
        """Return what a terminal shows of results.json."""

    def figure(self, results: Results) -> Figure:
        """Return the plot of results.json."""


def reproduce(experiment: Experiment, job: Any, folder: Path, say: Say) -> Results:
    """Run an experiment into a folder: results.json, results.txt and figure.png.

    Args:
        experiment: one of this package's modules.
        job: its settings.
        folder: an interrupted run with the same settings goes on there.
        say: told what begins.

    Returns:
        The content of results.json: "experiment", "settings", "versions", and what the experiment
        found.

    Raises:
        ValueError: the folder holds a run with other settings.
        OSError: the folder cannot be written to, or the disk is full.
        ModuleNotFoundError: matplotlib is not installed.
    """
    run = RunFolder(folder)
    settings = json.loads(json.dumps(asdict(job), default=str))
    run.claim("reproduce", {"experiment": experiment.NAME, **settings, "versions": versions()})
    about = {"experiment": experiment.NAME, "settings": settings, "versions": versions()}
    results = {**about, **experiment.run(job, run, say)}
    write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_file(folder / TEXT, as_text(experiment.tables(results)))
    write_file(folder / FIGURE, png(experiment.figure(results)))
    return results


def as_text(shown: RenderableType) -> str:
    """Return a table as plain text."""
    from rich.console import Console

    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()
