"""Turn pytest-benchmark's JSON into tables and plots: `python benchmarks/report.py run.json`."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
import tyro
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console
from schema import Ratio, Record, Run, read

from wcmi_fast.files import write_file

# Ten colours that the colour-blind tell apart; a variant keeps its own in every plot.
COLOURS = [to_hex(colour) for colour in mpl.color_sequences["petroff10"]]
MIB = 1 << 20
Name = TypeVar("Name", str, int)


def slug(text: str) -> str:
    """Return a name for files: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def significant(value: float) -> str:
    """Write three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Write seconds in the unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds / 1e-6)} µs"


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table as GitHub reads it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def union(groups: Iterable[Iterable[Name]]) -> list[Name]:
    """Return all names, each once, in the order in which they first come."""
    return list(dict.fromkeys(name for group in groups for name in group))


def by_op(records: list[Record]) -> dict[str, list[Record]]:
    """Return the cases of each operator."""
    return {
        op: [record for record in records if record.op == op]
        for op in union([record.op] for record in records)
    }


def ratio_cell(ratio: Ratio | None) -> str:
    """Write a ratio, its interval and whether it reaches its target."""
    if ratio is None:
        return ""
    text = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    if ratio.target is None:
        return text
    sign = "≤" if ratio.better == "lower" else "≥"
    return f"{text}, {sign} {ratio.target:g} **{verdict(ratio.met)}**"


def verdict(met: bool) -> str:
    """Say whether a target is reached."""
    return "met" if met else "missed"


def memory_cell(record: Record, variant: str) -> str:
    """Write a variant's peak in MiB; behind ours, whether it keeps below its target."""
    if variant not in record.peak_bytes:
        return ""
    peak, limit = record.peak_bytes[variant], record.peak_target
    text = significant(peak / MIB)
    if variant != "ours" or limit is None:
        return text
    return f"{text}, ≤ {limit / MIB:g} **{verdict(peak <= limit)}**"


def targets(record: Record) -> dict[str, tuple[str, bool]]:
    """Return a case's figures that have a target, each with whether it is reached."""
    found = {
        name: (ratio_cell(ratio), ratio.met)
        for name, ratio in record.ratios.items()
        if ratio.target is not None
    }
    if record.peak_target is not None and "ours" in record.peak_bytes:
        met = record.peak_bytes["ours"] <= record.peak_target
        found["extra memory, MiB"] = (memory_cell(record, "ours"), met)
    return found


def target_table(records: list[Record]) -> str:
    """Return every figure that has a target: a row for a case and a ratio, a column for threads."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    verdicts = []
    for record in records:
        threads = record.environment.threads
        for name, (text, met) in targets(record).items():
            row = (record.name.removesuffix(f" threads={threads}"), name)
            cells.setdefault(row, {})[threads] = text
            verdicts.append(met)
    counts = sorted(union(cells.values()))
    table = markdown_table(
        ["case", "figure", *(f"{count} thread{'s' * (count > 1)}" for count in counts)],
        ([*row, *(by.get(count, "") for count in counts)] for row, by in cells.items()),
    )
    return f"{sum(verdicts)} of {len(verdicts)} figures reach their target.\n\n{table}"


def op_tables(records: list[Record]) -> str:
    """Return an operator's ratios with their targets, then its times, rates and memory."""
    variants = union(record.seconds for record in records)
    ratios = union(record.ratios for record in records)
    names = [record.name.removeprefix(f"{record.op} ") for record in records]
    judged = markdown_table(
        ["case", *ratios],
        (
            [name, *(ratio_cell(record.ratios.get(key)) for key in ratios)]
            for name, record in zip(names, records, strict=True)
        ),
    )
    measured = markdown_table(
        ["case", "variant", "time", "GFLOP/s", "GB/s", "extra memory, MiB"],
        (
            [
                name,
                variant,
                duration(record.seconds[variant]),
                significant(record.gflop_per_s[variant]) if variant in record.gflop_per_s else "",
                significant(record.gb_per_s[variant]) if variant in record.gb_per_s else "",
                memory_cell(record, variant),
            ]
            for name, record in zip(names, records, strict=True)
            for variant in variants
            if variant in record.seconds
        ),
    )
    return f"{judged}\n\n{measured}" if ratios else measured


def without_folders(command: str) -> str:
    """Leave away the folders of absolute paths, which say nothing on another machine."""
    return re.sub(r"(^|[\s='\"])/\S*/", r"\1", command)


def provenance(records: list[Record]) -> str:
    """Say by which command, on what and when the figures were made."""
    found = [record.environment for record in records]
    dates = sorted(environment.date for environment in found)
    versions = union(
        [f"{name} {version}" for name, version in environment.versions.items()]
        for environment in found
    )
    facts = {
        "command": union([f"`{without_folders(environment.command)}`"] for environment in found),
        "commit": union([environment.commit] for environment in found),
        "processor": union([environment.cpu] for environment in found),
        "SIMD level": union([environment.simd] for environment in found),
        "threads": union([str(environment.threads)] for environment in found),
        "matrix products": union([environment.blas] for environment in found),
        "versions": versions,
        "time": [dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"],
    }
    return "\n".join(f"- {what}: {', '.join(values)}" for what, values in facts.items())


def series(records: list[Record]) -> dict[str, list[Record]]:
    """Return the cases that differ in N alone, sorted by N, where there are at least two."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if "N" in record.case:
            rest = re.sub(r" N=\S+", "", record.name)
            groups.setdefault(rest, []).append(record)
    return {
        rest: sorted(group, key=lambda record: int(record.case["N"]))
        for rest, group in groups.items()
        if len(group) > 1
    }


def growth_plot(title: str, records: list[Record], colour: dict[str, str]) -> Figure:
    """Plot time and, where it was measured, extra memory against N."""
    panels = {"seconds": [record.seconds for record in records]}
    if any(record.peak_bytes for record in records):
        panels["extra memory, MiB"] = [
            {name: peak / MIB for name, peak in record.peak_bytes.items()} for record in records
        ]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    figure.suptitle(title)
    for axes, (label, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in union(values):
            points = [
                (int(record.case["N"]), value[name])
                for record, value in zip(records, values, strict=True)
                if name in value
            ]
            axes.plot(*zip(*points, strict=True), "o-", color=colour[name], label=name)
        ticks = [int(record.case["N"]) for record in records]
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=label)
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(loc="upper left")
    return figure


def speed_up_plot(op: str, records: list[Record]) -> Figure | None:
    """Plot an operator's speed-ups with their intervals, and a line at each target."""
    bars = [
        (f"{record.name.removeprefix(f'{op} ')}, {name}", ratio)
        for record in records
        for name, ratio in record.ratios.items()
        if ratio.better == "higher"
    ]
    if not bars:
        return None
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(bars)), layout="constrained")
    figure.suptitle(f"{op}: times faster, with the 95 % interval; thick lines are targets")
    axes = figure.subplots()
    for place, (_, ratio) in enumerate(bars):
        error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(place, ratio.median, xerr=error, color=COLOURS[0], ecolor="0.2")
        if ratio.target is not None:
            axes.vlines(ratio.target, place - 0.45, place + 0.45, color=COLOURS[1], linewidth=3)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    return figure


def plots(records: list[Record]) -> dict[str, Figure]:
    """Return an operator's plots by the name of their file."""
    variants = union(record.seconds for record in records)
    colour = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(variants)}
    found = {
        slug(f"{rest} growth"): growth_plot(rest, group, colour)
        for rest, group in series(records).items()
    }
    op = records[0].op
    speed_ups = speed_up_plot(op, records)
    return found if speed_ups is None else {slug(f"{op} speed-up"): speed_ups, **found}


def png(figure: Figure) -> bytes:
    """Draw a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def merged(runs: list[Run]) -> tuple[str, list[Record]]:
    """Return the runs' machine and their cases, of which later runs replace earlier ones'.

    Raises:
        ValueError: the runs are of several machines.
    """
    machine, *others = union([run.machine_info.cpu.brand_raw] for run in runs)
    if others:
        raise ValueError(f"the runs are of {machine} and {others[0]}, wanted one machine")
    return machine, list({record.name: record for run in runs for record in run.records}.values())


def write(runs: list[Run], command: str, out: Path) -> Path:
    """Write <machine>.md and its plots into `out`; return the page."""
    machine, records = merged(runs)
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        f"# Benchmarks on {machine}",
        f"Written by `{command}`; the figures:",
        provenance(records),
        "Ratios are of times in the same round: the median over rounds and its 95 % interval. "
        "The median is what meets or misses a target.",
    ]
    if any(targets(record) for record in records):
        sections += ["## Targets", target_table(records)]
    for op, cases in by_op(records).items():
        sections += [f"## {op}", op_tables(cases)]
        for name, figure in plots(cases).items():
            path = out / f"{slug(machine)}-{name}.png"
            write_file(path, png(figure))
            sections.append(f"![{name}]({path.name})")
    page = out / f"{slug(machine)}.md"
    write_file(page, "\n\n".join(sections) + "\n")
    return page


def main(
    runs: tyro.conf.Positional[list[Path]], /, *, out: Path = Path(__file__).parent / "results"
) -> int:
    """Write tables and plots of a machine's runs; return 2 if a file is wrong.

    Args:
        runs: pytest-benchmark's JSON; a later file's cases replace those of an earlier one.
        out: the folder to write into.
    """
    command = shlex.join(["python", "benchmarks/report.py", *(run.name for run in runs)])
    try:
        page = write([read(run, Run) for run in runs], command, out)
        Console().print(str(page), soft_wrap=True)
        return 0
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"report: {error}", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
