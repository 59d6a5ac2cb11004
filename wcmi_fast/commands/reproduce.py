"""`wcmi-fast reproduce NAME`: the experiments of the package, each into a folder."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from rich.console import Console

from wcmi_fast.experiments import (
    attack_gradient,
    ground_truth,
    logit_layer,
    masking,
    neurons,
    representations,
    saliency,
    self_consistency,
    staircase,
    standard_robust,
)
from wcmi_fast.experiments.reproduction import FIGURE, RESULTS, Experiment, reproduce

EXPERIMENTS: dict[str, Experiment] = {
    experiment.NAME: experiment
    for experiment in (
        ground_truth,
        staircase,
        self_consistency,
        standard_robust,
        representations,
        attack_gradient,
        masking,
        logit_layer,
        neurons,
        saliency,
    )
}
OUT_HELP = (
    "Folder of the run; one that was interrupted goes on there, with the same options. None makes "
    "runs/<experiment>-<time>."
)


def command_type(experiment: Experiment) -> Any:
    """Return the experiment's `Job` with the field `out`, as a command of that name."""
    job = experiment.Job
    out = ("out", Annotated[Path | None, tyro.conf.arg(help=OUT_HELP)], None)
    made = make_dataclass("Command", [out], bases=(job,), frozen=True, kw_only=True)
    made.__doc__ = job.__doc__
    return Annotated[made, tyro.conf.subcommand(experiment.NAME)]


@dataclass(frozen=True, kw_only=True)
class ReproduceCommand:
    """Run an experiment of the paper or of this package; write its table, figure and numbers."""

    experiment: Annotated[
        Union[tuple(map(command_type, EXPERIMENTS.values()))],  # type: ignore[valid-type]  # noqa: UP007
        tyro.conf.arg(name=""),
    ]
    """Which one; each has options of its own."""


def execute(command: ReproduceCommand, console: Console) -> None:
    """Run the experiment and show what it found.

    Raises:
        SystemExit: Ctrl-C, with code 130, after a sentence that says how to go on.
    """
    chosen: Any = command.experiment
    experiment = next(e for e in EXPERIMENTS.values() if isinstance(chosen, e.Job))
    job = experiment.Job(**{f.name: getattr(chosen, f.name) for f in fields(experiment.Job)})
    folder = chosen.out or Path("runs") / f"{experiment.NAME}-{datetime.now():%Y%m%d-%H%M%S}"
    console.print(f"Run folder: {folder}", soft_wrap=True)
    with console.status("starting") as status:
        try:
            results = reproduce(experiment, job, folder, status.update)
        except KeyboardInterrupt:
            hint = f"Interrupted; to go on, add --out {folder} to the same command"
            console.print(hint, soft_wrap=True)
            raise SystemExit(130) from None
    console.print(experiment.tables(results))
    console.print(f"Results: {folder / RESULTS}, {folder / FIGURE}", soft_wrap=True)
