"""torch-mist, torchattacks and foolbox beside wcmi_fast on the CPU: values first, then times.

Run in an environment of its own, because two peers want old releases of numpy and requests:

    pip install '.[peers]'
    OMP_NUM_THREADS=1 python benchmarks/peers.py --threads 1 --markdown docs/benchmarks.md

The exit status is 1 if a value is not what it should be. A peer that is not there or does not run
is a row that says why, and no error.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median

import msgspec
import peer_attacks
import peer_bounds
import torch
from peer_case import Case, PeerFailedError, Values, import_peer
from rich.console import Console
from rich.table import Column, Table
from schema import Environment
from timing import environment, interleaved, ratio

from wcmi_fast.files import write_file

HEADING = "## Peers, side by side"
SAMPLE_SECONDS = 0.02
# Of a table that goes to a file or a pipe.
FILE_WIDTH = 180


@dataclass(frozen=True)
class Section:
    """A table: what it says below its title, and each peer's module and cases."""

    title: str
    notes: str
    columns: tuple[str, ...]
    cells: Callable[[Row], list[str]]
    peers: Mapping[str, tuple[str, Callable[[], Iterable[Case]]]]


@dataclass
class Row:
    """One comparison and what came of it; without a case where the peer could not be imported."""

    peer: str
    case: Case | None = None
    values: Values | None = None
    not_run: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def mismatch(self) -> bool:
        return self.values is not None and not self.values.ok

    def beyond(self, name: str, floor: str) -> float:
        """Return the median over rounds of name's seconds beyond floor's."""
        return median(x - y for x, y in zip(self.seconds[name], self.seconds[floor], strict=True))


# ---- checking and timing ------------------------------------------------------------------------


def checked(peer: str, module: str, cases: Callable[[], Iterable[Case]]) -> Iterator[Row]:
    """Yield the rows of one peer with their values compared."""
    try:
        import_peer(module)
        listed = list(cases())
    except PeerFailedError as reason:
        yield Row(peer, not_run=str(reason))
        return
    for case in listed:
        try:
            yield Row(peer, case, values=case.check())
        except PeerFailedError as reason:
            yield Row(peer, case, not_run=str(reason))


def time_row(row: Row, rounds: int) -> None:
    """Fill in the seconds per step of a row that ran."""
    if row.case is None or row.not_run is not None:
        return
    times = interleaved(row.case.programs, rounds=rounds, min_sample_s=SAMPLE_SECONDS)
    row.seconds = {name: [t / row.case.steps for t in ts] for name, ts in times.items()}


# ---- tables -------------------------------------------------------------------------------------


def verdict(row: Row) -> str:
    """Return what the values show."""
    if row.values is None:
        return f"not run: {row.not_run}"
    word = "MISMATCH" if row.mismatch else "agree"
    return f"{word} ({row.values.error:.2g} of {row.values.allowed:g})"


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.3f}"


def times_as_fast(row: Row) -> str:
    found = ratio(row.seconds, "theirs", "ours")
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def bound_cells(row: Row) -> list[str]:
    """Return the cells of a bound's row."""
    if row.case is None:
        return [row.peer, "", "", "", "", verdict(row), "", "", ""]
    case = row.case
    found = row.values.found if row.values else ""
    start = [case.name, case.size, case.program, case.definition, found, verdict(row)]
    if not row.seconds:
        return [*start, "", "", ""]
    ours, theirs = (milliseconds(row.seconds[name]) for name in ("ours", "theirs"))
    return [*start, ours, theirs, times_as_fast(row)]


def attack_cells(row: Row) -> list[str]:
    """Return the cells of an attack's row."""
    if row.case is None:
        return [row.peer, "", verdict(row), "", "", "", "", "", ""]
    case = row.case
    start = [f"{case.peer} {case.program}", f"{case.name}, {case.size}", verdict(row)]
    if not row.seconds:
        return [*start, "", "", "", "", "", ""]
    times = [f"{median(row.seconds[name]) * 1e6:.1f}" for name in ("gradient", "ours", "theirs")]
    overheads = [f"{row.beyond(name, 'gradient') * 1e6:.1f}" for name in ("ours", "theirs")]
    return [*start, *times, *overheads, times_as_fast(row)]


SECTIONS = (
    Section(
        "Bounds: torch-mist",
        peer_bounds.NOTES,
        (
            "bound", "size", "torch-mist's program", "its definition", "ours / theirs",
            "values (roundings)", "ours, ms", "theirs, ms", "theirs / ours",
        ),
        bound_cells,
        {peer_bounds.PEER: ("torch_mist", peer_bounds.cases)},
    ),
    Section(
        "PGD in the l-infinity ball: torchattacks and foolbox",
        peer_attacks.NOTES,
        (
            "peer", "model, images", "iterates (roundings a step)", "gradients alone, us",
            "ours, us", "theirs, us", "our overhead, us", "their overhead, us", "theirs / ours",
        ),
        attack_cells,
        {peer: (peer, partial(peer_attacks.cases, peer)) for peer in peer_attacks.PROGRAMS},
    ),
)  # fmt: skip


def rich_table(section: Section, rows: Sequence[Row]) -> Table:
    """Return a section for the terminal."""
    columns = [Column(name, overflow="fold") for name in section.columns]
    table = Table(*columns, title=section.title)
    for row in rows:
        table.add_row(*section.cells(row), style="bold red" if row.mismatch else None)
    return table


def markdown_table(section: Section, rows: Sequence[Row]) -> str:
    """Return a section for docs/."""
    lines = [section.columns, ["---"] * len(section.columns), *map(section.cells, rows)]
    table = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
    return f"### {section.title}\n\n{section.notes}\n\n{table}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- the run ------------------------------------------------------------------------------------


def peer_versions() -> dict[str, str]:
    """Return the peers' versions, and those of what they stand on."""
    peers = [peer for section in SECTIONS for peer in section.peers]
    return {name: _version(name) for name in (*peers, "eagerpy")}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def as_markdown(
    results: Sequence[tuple[Section, list[Row]]], where: Environment, rounds: int
) -> str:
    """Return the section that goes into docs/benchmarks.md."""
    versions = ", ".join(f"{k} {v}" for k, v in (where.versions | peer_versions()).items())
    head = f"""\
{HEADING}

`{where.command}`

{where.cpu}, {where.simd}, {where.threads} thread(s), {where.blas}; {versions}.

Values are compared before anything is timed: each program in float64 and float32 with its own
definition in float64, the larger error counted in roundings of the dtype; the nats shown are
float64's. Times are float32, forward and backward to all inputs, medians of {rounds} interleaved
rounds; theirs / ours is the median of the rounds' ratios (with its 95 % interval), above 1 where
ours is faster.
"""
    return "\n".join([head, *(markdown_table(section, rows) for section, rows in results)])


def put_section(file: Path, section: str) -> None:
    """Write the section in place of the one that the file ends with, or at its end."""
    before = file.read_text().partition(HEADING)[0] if file.exists() else ""
    write_file(file, before + section)


def as_json(results: Sequence[tuple[Section, list[Row]]], where: Environment) -> str:
    """Return everything measured; times are seconds, an attack's per step."""
    rows = [
        {
            "section": section.title,
            "peer": row.peer,
            **(
                {k: getattr(row.case, k) for k in ("program", "name", "size", "definition")}
                if row.case
                else {}
            ),
            "values": dataclasses.asdict(row.values) if row.values else None,
            "mismatch": row.mismatch,
            "not_run": row.not_run,
            "seconds": row.seconds,
        }
        for section, rows in results
        for row in rows
    ]
    found = {**msgspec.to_builtins(where), "peers": peer_versions()}
    return json.dumps({"environment": found, "rows": rows}, indent=1) + "\n"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--threads", type=_positive, default=1)
    parser.add_argument("--rounds", type=_positive, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def main(argv: Sequence[str]) -> int:
    """Compare, time, print; return the exit status."""
    arguments = parsed(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    results = [
        (
            section,
            [
                row
                for peer, (module, cases) in section.peers.items()
                for row in checked(peer, module, cases)
            ],
        )
        for section in SECTIONS
    ]
    rows = list(itertools.chain.from_iterable(rows for _, rows in results))
    for row in rows:
        time_row(row, arguments.rounds)
    where = environment()
    for section, section_rows in results:
        console.print(rich_table(section, section_rows))
    console.print(where)
    if arguments.json:
        write_file(arguments.json, as_json(results, where))
    if arguments.markdown:
        put_section(arguments.markdown, as_markdown(results, where, arguments.rounds))
    return int(any(row.mismatch for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
