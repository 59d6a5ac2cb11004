"""The command line: `wcmi-fast info` and `wcmi-fast quickstart`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from wcmi_fast import diagnosis

if TYPE_CHECKING:
    from wcmi_fast.experiments import quickstart


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Say what works on this machine, and why something else does not."""


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


Command = (
    Annotated[InfoCommand, tyro.conf.subcommand("info")]
    | Annotated[QuickstartCommand, tyro.conf.subcommand("quickstart")]
)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's error is one sentence on stderr and exit code 1."""
    given = sys.argv[1:] if args is None else args
    command = tyro.cli(Command, args=given or ["info"], prog="wcmi-fast")
    console = Console()
    if isinstance(command, InfoCommand):
        _info(console)
        return
    try:
        _quickstart(command, console)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, RuntimeError) as error:
        Console(stderr=True).print(f"wcmi-fast: {error}", style="red", markup=False)
        raise SystemExit(1) from error


def _info(console: Console) -> None:
    table = Table(show_header=False, box=None)
    for what, finding in diagnosis.lines():
        table.add_row(what, finding)
    console.print(table)


def _quickstart(command: QuickstartCommand, console: Console) -> None:
    # Here rather than above: `wcmi-fast info` needs no trainer.
    from wcmi_fast.experiments import quickstart, report

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
    from wcmi_fast.experiments import quickstart

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
