"""The command line of `wcmi-fast`; each command's work is in `wcmi_fast.commands`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from wcmi_fast import diagnosis
from wcmi_fast.commands import export, measure, quickstart, reproduce, train

# What a user can mend; anything else is our mistake, and keeps its traceback.
ERRORS = (TypeError, ValueError, OSError, FloatingPointError, ModuleNotFoundError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Say what works on this machine, and why something else does not."""


Command = (
    Annotated[InfoCommand, tyro.conf.subcommand("info")]
    | Annotated[quickstart.QuickstartCommand, tyro.conf.subcommand("quickstart")]
    | Annotated[measure.MeasureCommand, tyro.conf.subcommand("measure")]
    | Annotated[reproduce.ReproduceCommand, tyro.conf.subcommand("reproduce")]
    | Annotated[train.TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[export.ExportCommand, tyro.conf.subcommand("export")]
)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's error is one sentence on stderr and exit code 1."""
    given = sys.argv[1:] if args is None else args
    console = Console()
    try:
        if given[:1] == ["train"] and len(given) > 1:
            given = ["train", *train.with_defaults(given[1:])]
        command = tyro.cli(Command, args=given or ["info"], prog="wcmi-fast")
        match command:
            case InfoCommand():
                _info(console)
            case quickstart.QuickstartCommand():
                quickstart.execute(command, console)
            case measure.MeasureCommand():
                measure.execute(command, console)
            case reproduce.ReproduceCommand():
                reproduce.execute(command, console)
            case train.TrainCommand():
                train.execute(command, console)
            case export.ExportCommand():
                export.execute(command, console)
    except ERRORS as error:
        Console(stderr=True).print(f"wcmi-fast: {error}", style="red", markup=False)
        raise SystemExit(1) from error


def _info(console: Console) -> None:
    table = Table(show_header=False, box=None)
    for what, finding in diagnosis.lines():
        table.add_row(what, finding)
    console.print(table)
