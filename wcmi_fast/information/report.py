"""A measurement's report: tables for a terminal, a figure, and a folder of files."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wcmi_fast.files import write_file
from wcmi_fast.information.results import Estimate, Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

    from wcmi_fast.information.results import Report

NAMES = {"information": "I", "worst_case": "worst-case I", "vulnerability": "RV"}
ATTACKS = {
    "full": "full, as algorithm 1 is printed",
    "encoder_only": "encoder_only, as in the authors' code, a weaker attack",
}
COLOURS = {"information": "C0", "worst_case": "C1", "vulnerability": "0.35"}
NO_FLAGS = "None of the checks of docs/measuring.md found a reason to doubt these numbers."


class Row(NamedTuple):
    """An estimate as text: nats with their error, and bits."""

    name: str
    nats: str
    error: str
    interval: str
    bits: str
    bits_interval: str


def tables(report: Report) -> RenderableType:
    """Return what a terminal shows of a report: estimates, bound, flags, caveat and settings."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_estimates_table(report), Text(" ".join(notes(report))), Text()]
    if report.accuracy_bound is not None:
        parts += [_accuracy_table(report), Text()]
    parts += [Text(line) for line in _flag_lines(report)]
    parts += [Text(), Text(report.caveat), Text(), _settings_table(report)]
    return Group(*parts)


def figure(report: Report) -> Figure:
    """Plot the estimates with their intervals, the attack's path and the critics' curves.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    _check_package("matplotlib")
    from matplotlib.figure import Figure

    paths = [seen.trace for seen in report.evidence.get("worst_case", ()) if seen.trace]
    plot = Figure(figsize=(11.5 if paths else 8, 3.4), layout="constrained")
    axes = plot.subplots(1, 3 if paths else 2)
    _plot_estimates(axes[0], report.estimates())
    _plot_curves(axes[-1], report.evidence)
    if paths:
        _plot_paths(axes[1], paths)
    return plot


def save(report: Report, path: Path) -> None:
    """Write report.json, report.html and report.png into a folder, each whole or not at all.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed; nothing is written then.
        OSError: the folder cannot be written to, or the disk is full.
    """
    from wcmi_fast.experiments.reproduction import png

    picture = png(figure(report))
    page = _page(report, picture)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: the report's folder {path} cannot be made"
        ) from error
    write_file(path / "report.json", json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    write_file(path / "report.html", page)
    write_file(path / "report.png", picture)


def rows(report: Report) -> list[Row]:
    """Return the estimates as text."""
    return [_row(NAMES[name], estimate) for name, estimate in report.estimates().items()]


def notes(report: Report) -> list[str]:
    """Say how means, errors, intervals and the attack of a report are made."""
    attack = _attack_note(report.settings) if report.worst_case else ""
    return [note for note in (_interval_note(report), attack) if note]


def _attack_note(settings: Mapping[str, Any]) -> str:
    gradient = ATTACKS[settings["critic_grad"]]
    if settings["attack"] != "PGD":
        return f"Attack: {settings['attack']}; critic_grad {gradient}."
    return (
        f"Attack: PGD, eps {settings['eps']:g}, {settings['steps']} steps of "
        f"{settings['step_size']:.3g}; critic_grad {gradient}."
    )


def _interval_note(report: Report) -> str:
    values = next(iter(report.estimates().values())).batches
    trials, count, size = len(values), len(values[0]), report.settings["batch_size"]
    several = (
        f"Mean over {trials} critics trained anew (trials) and {count} test batches of {size} "
        "images; standard error of the trials' means. 95 % interval: Student's of the trials and a "
        "bootstrap of the batches (BCa), added in quadrature"
    )
    single = (
        f"Mean over {count} test batches of {size} images, with 1 critic; standard error of the "
        "batches. 95 % interval: a bootstrap of the batches (BCa)"
    )
    paired = (
        "; that of RV is of differences batch by batch (paired)" if report.vulnerability else ""
    )
    return f"{several if trials > 1 else single}{paired}."


def accuracy_rows(report: Report) -> list[tuple[str, str]]:
    """Return theorem 3.4's bound and the measured accuracies, in percent; none without classes."""
    if report.accuracy_bound is None:
        return []
    ends = report.accuracy_bound_interval
    interval = "" if ends is None else f" ({_percent(ends[0])} to {_percent(ends[1])})"
    bound = f"{_percent(report.accuracy_bound)}{interval}"
    found = [(f"bound on adversarial accuracy, {report.classes} classes (theorem 3.4)", bound)]
    if report.adversarial_accuracy is not None:
        found.append(("measured adversarial accuracy", _percent(report.adversarial_accuracy)))
    if report.natural_accuracy is not None:
        found.append(("measured natural accuracy", _percent(report.natural_accuracy)))
    return found


def _estimates_table(report: Report) -> Table:
    from rich.table import Table

    settings = report.settings
    layer = f", layer {settings['layer']}" if settings.get("layer") else ""
    table = Table(title=f"{settings['model']}{layer} on {settings['data']}", title_justify="left")
    for column in ("", "nats", "standard error", "95 % interval", "bits", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows(report):
        table.add_row(*row)
    return table


def _accuracy_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(show_header=False)
    for name, share in accuracy_rows(report):
        table.add_row(name, f"{share} %")
    return table


def _settings_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = f"Settings; {duration(report.seconds)}"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    for name, value in report.settings.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def _flag_lines(report: Report) -> list[str]:
    if not report.flags:
        return [NO_FLAGS]
    return [f"{flag.name}: {flag.sentence} See {flag.docs}." for flag in report.flags]


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _row(name: str, estimate: Estimate) -> Row:
    bits = [value / math.log(2) for value in estimate.interval]
    return Row(
        name,
        _number(estimate.mean),
        _number(estimate.standard_error),
        _ends(estimate.interval),
        _number(estimate.bits),
        _ends(bits),
    )


def _ends(interval: Sequence[float]) -> str:
    return f"{_number(interval[0])} to {_number(interval[1])}"


def _number(value: float) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return "unknown" if math.isnan(value) else f"{round(value, 3) + 0.0:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _plot_estimates(axes: Axes, estimates: Mapping[str, Estimate]) -> None:
    names: list[str] = list(estimates)[::-1]
    for place, name in enumerate(names):
        found = estimates[name]
        low, high = found.interval
        reach = None if math.isnan(low) else [[found.mean - low], [high - found.mean]]
        axes.errorbar(
            found.mean, place, xerr=reach, fmt="o", capsize=5, color=COLOURS[name], markersize=6
        )
        for trial in found.trials:
            axes.plot(trial, place + 0.16, "|", color=COLOURS[name], markersize=8)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set(xlabel="nats", title="95 % intervals; | trials")


def _plot_paths(axes: Axes, paths: Sequence[Sequence[float]]) -> None:
    for path in paths:
        axes.plot(range(len(path)), path, "o-", color=COLOURS["worst_case"], markersize=3)
    axes.set(xlabel="attack step", ylabel="nats", title="The attack on test batches")
    _whole_numbers(axes)


def _plot_curves(axes: Axes, evidence: Mapping[str, Sequence[Evidence]]) -> None:
    for term, seen in evidence.items():
        for trial, each in enumerate(seen):
            label = NAMES[term] if trial == 0 else None
            epochs = range(1, len(each.curve) + 1)
            axes.plot(epochs, each.curve, "o-", color=COLOURS[term], label=label, markersize=3)
    last = max(len(each.curve) for seen in evidence.values() for each in seen)
    axes.set_xlim(0.8, last + 0.2)
    axes.set(xlabel="epoch", ylabel="nats", title="Training batches of each critic")
    _whole_numbers(axes)
    axes.legend()


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _page(report: Report, picture: bytes) -> str:
    _check_package("jinja2")
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("wcmi_fast.information").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(source).render(
        report=report,
        settings=report.settings,
        rows=rows(report),
        notes=notes(report),
        accuracies=accuracy_rows(report),
        no_flags=NO_FLAGS,
        duration=duration(report.seconds),
        picture="data:image/png;base64," + base64.b64encode(picture).decode(),
        described=_described(report),
    )


def _described(report: Report) -> str:
    """Say in words what the figure shows."""
    said = [f"{row.name} {row.nats} nats ({row.interval})" for row in rows(report)]
    for seen in report.evidence.get("worst_case", ())[:1]:
        if seen.trace:
            said.append(f"the attack leads from {seen.trace[0]:.3f} to {seen.trace[-1]:.3f} nats")
    return "; ".join(said)


def _check_package(name: str) -> None:
    try:
        import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"Report: the package {name}, which the report is made with, is not installed: "
            "pip install 'wcmi_fast[demo]'"
        ) from None
