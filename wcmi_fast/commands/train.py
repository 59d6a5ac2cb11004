"""`wcmi-fast train encoder|head|classifier`: training into a folder, resumable."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from dataclasses import dataclass, fields, make_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.table import Table

from wcmi_fast import datasets
from wcmi_fast.distributed import ranks
from wcmi_fast.progress import shown
from wcmi_fast.training import signals, tasks
from wcmi_fast.training.options import TASKS
from wcmi_fast.training.presets import PRESETS, preset

HELP = {
    "preset": f"Settings to begin with: {', '.join(PRESETS)}. --config and options go before them.",
    "config": "TOML file of options, such as a run's config.toml. Options given here go before it.",
    "out": (
        "Folder of the run; one that was interrupted goes on there, with the same options. None "
        "makes runs/<task>-<time>."
    ),
}


def command_type(name: str) -> Any:
    """Return a task with the fields of the command line, as a command of that name."""
    kind = TASKS[name]
    extra: list[Any] = []
    for key, text in HELP.items():
        of: Any = str | None if key == "preset" else Path | None
        extra.append((key, Annotated[of, tyro.conf.arg(help=text)], None))
    made = make_dataclass("Command", extra, bases=(kind,), frozen=True, kw_only=True)
    made.__doc__ = kind.__doc__
    return Annotated[made, tyro.conf.subcommand(name)]


COMMANDS: dict[str, Any] = {name: command_type(name) for name in TASKS}


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train an encoder, a head on one, or a classifier."""

    task: Annotated[
        Union[tuple(COMMANDS.values())],  # type: ignore[valid-type]  # noqa: UP007
        tyro.conf.arg(name=""),
    ]
    """What to train; each has options of its own."""


def with_defaults(args: list[str]) -> list[str]:
    """Return the arguments of `wcmi-fast train TASK`, with those of a preset and file before them.

    Raises:
        ValueError: an unknown preset; a file that is no TOML, or has unknown keys.
        FileNotFoundError: no such file.
    """
    name, given = args[0], args[1:]
    if name not in TASKS:
        return args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(given)
    options = {**_of_preset(known.preset, name), **_of_file(known.config, name)}
    return [name, *_as_arguments(options), *given]


def execute(command: TrainCommand, console: Console) -> None:
    """Train, and show the results; under torchrun, on all of its processes.

    Raises:
        SystemExit: a signal, with code 130 or 143, after a sentence that says how to go on.
        RuntimeError: on several processes, one of them failed.
    """
    task: Any = command.task
    with ranks.joined(task.device), ranks.explained():
        _train(command, console if ranks.is_first() else Console(quiet=True))


def _train(command: TrainCommand, console: Console) -> None:
    chosen: Any = command.task
    name, kind = next((n, k) for n, k in TASKS.items() if isinstance(chosen, k))
    task = kind(**{each.name: getattr(chosen, each.name) for each in fields(kind)})
    made = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = chosen.out or ranks.from_first(lambda: made)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    data = datasets.load(task.data)
    work, rate = tasks.batches_of(task, len(data.x_train)), (task.batch_size, "images/s")
    try:
        bar = None if ranks.is_first() else False
        with signals.finishing_steps(), shown(bar, work, rate=rate) as progress:
            progress.say(name)
            results = tasks.train(task, folder, progress, data)
    except signals.StoppedError as stopped:
        hint = f"{stopped}; to go on, add --out {folder} to the same command"
        Console(stderr=True, quiet=not ranks.is_first()).print(hint, soft_wrap=True, markup=False)
        raise SystemExit(128 + stopped.signal) from None
    console.print(_table(results))
    console.print(f"Results: {folder / tasks.RESULTS}", soft_wrap=True)


def _of_preset(name: str | None, task: str) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        raise ValueError(f"train: preset is {name!r}, wanted one of {_wanted(name, PRESETS)}")
    return preset(name, task)


def _of_file(path: Path | None, task: str) -> dict[str, Any]:
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"train: config is {path}, and there is no such file")
    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"train: config is {path}, wanted a TOML file: {error}") from error
    others = sorted(found.keys() & TASKS.keys() - {task})
    if others:
        raise ValueError(f"train: config {path} is of a {others[0]}, wanted one of a {task}")
    options: dict[str, Any] = found.get(task, found)
    known = [each.name for each in fields(TASKS[task])]
    for key in options:
        if key not in known:
            raise ValueError(
                f"train: config {path} has the key {key!r}, wanted one of {_wanted(key, known)}"
            )
    return options


def _wanted(given: str, names: Any) -> str:
    close = difflib.get_close_matches(given, list(names), n=1)
    return ", ".join(names) + (f"; did you mean {close[0]!r}?" if close else "")


def _as_arguments(options: dict[str, Any]) -> list[str]:
    found = []
    for key, value in options.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (list, tuple)):
            found += [f"--{option}", *map(str, value)]
        else:
            found += [f"--{option}", str(value)]
    return found


def _table(results: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    if "bound_nats" in results:
        table.add_row("objective, mean of the last epoch", f"{results['bound_nats']:.3f} nats")
    for name in ("natural", "adversarial"):
        if f"{name}_accuracy" in results:
            share = f"{100 * results[f'{name}_accuracy']:.2f} %"
            low, high = (f"{100 * end:.2f}" for end in results[f"{name}_interval"])
            images = f"{results['test_images']} test images"
            table.add_row(f"{name} accuracy", f"{share} of {images} (95 %: {low} to {high})")
    return table
