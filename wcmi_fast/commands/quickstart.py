"""`wcmi-fast quickstart`: the paper's comparison on 5,000 digits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wcmi_fast.experiments import quickstart, report


@dataclass(frozen=True, kw_only=True)
class QuickstartCommand:
    """Train and attack a standard and a worst-case representation of 5,000 MNIST digits."""

    seed: int = 0
    """Decides the split of the data, the weights and the order of the batches."""
    eps: float = 0.2
    """Radius of the attack, in units of pixels from 0 to 1."""
    budget: float = 6.0
    """Minutes on two cores; less trains for fewer epochs. The same budget is the same work."""
    out: Path = Path("runs")
    """Folder in which quickstart-<time>/ is made."""
    resume: Path | None = None
    """Folder of an interrupted run to go on with; its settings are used, all others ignored."""
    device: str = "cpu"
    """Where the tensors live, such as cpu or cuda."""


def execute(command: QuickstartCommand, console: Console) -> None:
    """Run the quickstart, or go on with one; show what it found.

    Raises:
        SystemExit: Ctrl-C, with code 130, after a sentence that says how to go on.
    """
    if command.resume is None:
        settings = {k: v for k, v in asdict(command).items() if k not in ("out", "resume")}
        job = quickstart.Quickstart(**settings)
        folder = command.out / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}"
    else:
        job, folder = quickstart.interrupted(command.resume), command.resume
    console.print(f"Run folder: {folder}", soft_wrap=True)
    try:
        results = _with_progress(job, folder, console)
    except KeyboardInterrupt:
        resume = f"Interrupted; to go on: wcmi-fast quickstart --resume {folder}"
        console.print(resume, soft_wrap=True)
        raise SystemExit(130) from None
    console.print(report.accuracy_table(results))
    console.print(report.information_table(results))
    console.print(f"Report: {folder / 'report.html'} ({results['seconds']:.0f} s)", soft_wrap=True)


def _with_progress(job: quickstart.Quickstart, folder: Path, console: Console) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        task = progress.add_task("start", total=quickstart.nominal_seconds(job, folder))
        return quickstart.run(
            job,
            folder,
            say=lambda stage: progress.update(task, description=f"{stage:<28}"),
            advance=lambda seconds: progress.advance(task, seconds),
        )
