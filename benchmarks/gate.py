"""Fail on a loss of speed: `python benchmarks/gate.py baseline.json new.json [more repeats]`.

A file is pytest-benchmark's JSON, of which the ratios are compared, or a baseline. A case is lost
if in every new file it is over 10 % worse and its interval lies apart from the baseline's. A case
that a new file lacks fails too; one that the baseline lacks passes and is named.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import tyro
from rich.console import Console
from rich.table import Table
from schema import Positive, Ratio, Run, read

from wcmi_fast.files import write_file

LOSS = 1.1
FAILURES = ("LOST", "missing")


class Baseline(msgspec.Struct, forbid_unknown_fields=True):
    """Ratios, or counts of which less is better, and what else they depend on."""

    conditions: dict[str, str]
    cases: dict[str, Ratio | Positive]


def load(path: Path) -> Baseline:
    """Read a file of either form; ValueError is one sentence that names it."""
    fields = read(path, dict[str, msgspec.Raw])
    return read(path, Baseline) if "cases" in fields else _of_run(read(path, Run))


def _of_run(run: Run) -> Baseline:
    environment = run.records[0].environment
    return Baseline(
        conditions={
            "cpu": environment.cpu,
            "simd": environment.simd,
            "blas": environment.blas,
            "torch": environment.versions["torch"],
        },
        cases={
            f"{record.name} {name}": ratio
            for record in run.records
            for name, ratio in record.ratios.items()
        },
    )


def worse(old: Ratio, new: Ratio) -> float:
    """Return by what factor the new median is worse."""
    factor = new.median / old.median
    return factor if old.better == "lower" else 1 / factor


def lost(old: Ratio, new: Ratio) -> bool:
    """Tell a loss from noise: over 10 %, and the intervals do not overlap."""
    return worse(old, new) > LOSS and (new.low > old.high or new.high < old.low)


def verdict(old: Ratio | None, new: list[Ratio | None]) -> str:
    """Judge one case by the baseline and every new file, None where it is not in one."""
    found = [ratio for ratio in new if ratio is not None]
    if old is None:
        return "new"
    if len(found) < len(new):
        return "missing"
    return "LOST" if all(lost(old, ratio) for ratio in found) else "ok"


def merged(runs: list[Baseline]) -> Baseline:
    """Return a baseline of several files: for each case the middle run's ratio."""
    names = list(dict.fromkeys(name for run in runs for name in run.cases))
    found = {name: [_ratio(run, name) for run in runs] for name in names}
    cases: dict[str, Ratio | Positive] = {}
    for name, ratios in found.items():
        ordered = sorted((ratio for ratio in ratios if ratio), key=lambda ratio: ratio.median)
        middle = ordered[len(ordered) // 2]
        cases[name] = middle.median if middle.low == middle.high else middle
    return Baseline(runs[0].conditions, cases)


def _ratio(run: Baseline, name: str) -> Ratio | None:
    entry = run.cases.get(name)
    return Ratio(entry, entry, entry) if isinstance(entry, float | int) else entry


def _number(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:,.0f}" if ratio.median >= 1000 else f"{ratio.median:.3f}"


def compare(baseline: Baseline, runs: list[Baseline], console: Console) -> bool:
    """Print a table of all cases and say whether they pass."""
    table = Table("case", "baseline", *(f"new {k}" for k in range(1, len(runs) + 1)), "worse by")
    table.add_column("verdict")
    names = list(dict.fromkeys([*baseline.cases, *(name for run in runs for name in run.cases)]))
    verdicts = []
    for name in names:
        old, new = _ratio(baseline, name), [_ratio(run, name) for run in runs]
        verdicts.append(verdict(old, new))
        change = min((worse(old, ratio) - 1 for ratio in new if old and ratio), default=None)
        table.add_row(
            name, _number(old), *map(_number, new), "-" if change is None else f"{change:+.1%}",
            verdicts[-1], style="bold red" if verdicts[-1] in FAILURES else None,
        )  # fmt: skip
    console.print(table)
    for run in runs:
        for key, value in baseline.conditions.items():
            if run.conditions.get(key) != value:
                console.print(
                    f"{key} is {run.conditions.get(key)!r}, the baseline's {value!r}: "
                    "that alone can change the figures.", markup=False, soft_wrap=True,
                )  # fmt: skip
    failed = [name for name, found in zip(names, verdicts, strict=True) if found in FAILURES]
    console.print(f"{len(failed)} of {len(names)} cases fail.")
    return not failed


def main(
    baseline: tyro.conf.Positional[Path],
    new: tyro.conf.Positional[Path],
    repeats: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    *,
    update: bool = False,
) -> int:
    """Compare runs with a baseline; return 0, 1 for a loss, 2 for a file that is wrong.

    Args:
        baseline: the stored figures.
        new: the new figures.
        repeats: more new figures; a loss counts if all files show it.
        update: write the baseline from the new figures instead.
    """
    try:
        runs = [load(path) for path in (new, *repeats)]
        if update:
            write_file(baseline, msgspec.json.format(msgspec.json.encode(merged(runs))) + b"\n")
            return 0
        return 0 if compare(load(baseline), runs, Console()) else 1
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"gate: {error}", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main, config=(tyro.conf.FlagCreatePairsOff,)))
