"""A measurement's report: tables for a terminal, a figure, and a folder of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from wcmi_fast.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from wcmi_fast.information.results import Report


def tables(report: Report) -> RenderableType:
    """Return what a terminal shows of a report."""
    return json.dumps(report.to_dict(), indent=1)


def figure(report: Report) -> Figure:
    """Plot a report's estimates."""
    from matplotlib.figure import Figure

    return Figure()


def save(report: Report, path: Path) -> None:
    """Write a report's files into a folder."""
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / "report.json", json.dumps(report.to_dict(), indent=1))
