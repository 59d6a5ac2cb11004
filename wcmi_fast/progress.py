"""A progress bar on stderr, or none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Progress(NamedTuple):
    """Where a measurement says how far it is.

    Attributes:
        say: told the name of what begins.
        advance: told the work done, in units of the whole.
        note: told what to show beside the bar.
    """

    say: Callable[[str], None]
    advance: Callable[[float], None]
    note: Callable[[str], None] = lambda text: None


@contextmanager
def shown(
    wanted: bool | None, work: float, *, rate: tuple[float, str] | None = None
) -> Iterator[Progress]:
    """Show a bar for so much work.

    Args:
        wanted: whether to show it; None shows it if stderr is a terminal.
        work: the whole, in any unit.
        rate: shows a speed: how many of what a unit of work is, such as (64, "images/s").
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield Progress(lambda name: None, lambda done: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}  {task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=60) as bar:
        task = bar.add_task("start", total=work, rate="", note="")

        def advance(done: float) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            if rate is not None and speed is not None:
                bar.update(task, rate=f"{speed * rate[0]:.0f} {rate[1]}")

        yield Progress(
            lambda name: bar.update(task, description=f"{name:<28}"),
            advance,
            lambda text: bar.update(task, note=text),
        )
