from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report
from benchmark_runs import ENVIRONMENT, record, run

MIB = 1 << 20


def ratio(median: float, **fields: Any) -> dict[str, Any]:
    return {"low": median - 0.1, "median": median, "high": median + 0.1, **fields}


DATE = ENVIRONMENT["date"]


def dv(n: int, threads: int = 1, date: object = DATE, **fields: Any) -> dict[str, Any]:
    return record(
        "dv",
        case={"N": n, "P": 64},
        seconds={"ours": 1e-6 * n**2, "authors": 4e-6 * n**2},
        gflop_per_s={"ours": 40.0, "authors": 10.0},
        environment=ENVIRONMENT | {"threads": threads, "date": date},
        **fields,
    )


RECORDS = [
    dv(
        256,
        peak_bytes={"ours": 32 * MIB, "authors": 1024 * MIB},
        peak_target=64 * MIB,
        ratios={
            "vs_floor": ratio(1.3, target=1.25),
            "vs_authors": ratio(4.0, target=3, better="higher"),
        },
    ),
    dv(128, ratios={"vs_eager": ratio(2.0, better="higher")}),
    dv(
        128,
        threads=2,
        date="2026-01-02T04:00:00+00:00",
        ratios={"vs_floor": ratio(1.2, target=1.25)},
    ),
    record("linf_step", seconds={"ours": 2e-6}, gb_per_s={"ours": 12.345}),
]


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run(RECORDS)))
    assert report.main([path], out=tmp_path / "results") == 0
    (found,) = (tmp_path / "results").glob("*.md")
    assert capsys.readouterr().out.strip() == str(found)
    return found


def row(page: Path, *cells: str) -> None:
    assert f"| {' | '.join(cells)} |" in page.read_text().splitlines()


def test_the_page_is_named_after_the_machine(page: Path) -> None:
    assert page.name == "test-r-cpu-2-50ghz.md"
    assert page.read_text().startswith("# Benchmarks on Test(R) CPU @ 2.50GHz\n")


def test_targets_are_judged(page: Path) -> None:
    case = "N=256 P=64 threads=1"
    missed, met = "1.30 (1.20 to 1.40), ≤ 1.25 **missed**", "4.00 (3.90 to 4.10), ≥ 3 **met**"
    row(page, "case", "vs_floor", "vs_authors", "vs_eager")
    row(page, case, missed, met, "")
    row(page, case, "ours", "65.5 ms", "40.0", "", "32.0, ≤ 64 **met**")
    row(page, case, "authors", "262 ms", "10.0", "", "1024")
    row(page, "N=128 threads=1", "ours", "2.00 µs", "", "12.3", "")


def test_targets_stand_together(page: Path) -> None:
    row(page, "case", "figure", "1 thread", "2 threads")
    case = "dv N=256 P=64"
    row(page, case, "vs_floor", "1.30 (1.20 to 1.40), ≤ 1.25 **missed**", "")
    row(page, case, "vs_authors", "4.00 (3.90 to 4.10), ≥ 3 **met**", "")
    row(page, "dv N=128 P=64", "vs_floor", "", "1.20 (1.10 to 1.30), ≤ 1.25 **met**")
    row(page, case, "extra memory, MiB", "32.0, ≤ 64 **met**", "")
    assert "\n3 of 4 figures reach their target.\n" in page.read_text()


def test_no_targets_no_table_of_them(tmp_path: Path) -> None:
    runs = [report.read(write_run(tmp_path, dv(64)), report.Run)]
    assert "Targets" not in report.write(runs, "command", tmp_path).read_text()


def test_a_later_run_replaces_a_case_in_its_place(tmp_path: Path) -> None:
    first, later = tmp_path / "first.json", tmp_path / "later.json"
    first.write_text(json.dumps(run([dv(64), dv(128)])))
    later.write_text(json.dumps(run([dv(64, peak_bytes={"ours": MIB}), dv(256)])))
    _, records = report.merged([report.read(path, report.Run) for path in (first, later)])
    assert [record.case["N"] for record in records] == [64, 128, 256]
    assert records[0].peak_bytes == {"ours": MIB}
    assert report.main([first, later], out=tmp_path) == 0
    page = (tmp_path / "test-r-cpu-2-50ghz.md").read_text()
    assert "`python benchmarks/report.py first.json later.json`" in page


def test_runs_of_two_machines_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = write_run(tmp_path, dv(64)), tmp_path / "other.json"
    other.write_text(path.read_text().replace("Test(R) CPU @ 2.50GHz", "Another"))
    assert report.main([path, other], out=tmp_path / "results") == 2
    assert "Another, wanted one machine" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def write_run(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "one.json"
    path.write_text(json.dumps(run(list(records))))
    return path


def test_no_table_of_ratios_where_there_are_none(page: Path) -> None:
    assert "| case |\n" not in page.read_text()


def test_memory_over_its_target_is_missed(tmp_path: Path) -> None:
    path = write_run(tmp_path, dv(64, peak_bytes={"ours": 65 * MIB}, peak_target=64 * MIB))
    (over,) = report.read(path, report.Run).records
    assert report.memory_cell(over, "ours") == "65.0, ≤ 64 **missed**"


def test_provenance(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert "- command: `OMP_NUM_THREADS=1 pytest benchmarks --benchmark-json=run.json`" in lines
    assert "- threads: 1, 2" in lines
    assert "- time: 2026-01-02T03:04:05+00:00 to 2026-01-02T04:00:00+00:00" in lines
    assert "- versions: torch 2.6.0, wcmi_fast 0.1.0" in lines


def test_folders_of_the_machine_are_left_away() -> None:
    command = "python /home/me/run.py --json=/tmp/a/b.json -k 'x/y' benchmarks/c"
    assert report.without_folders(command) == "python run.py --json=b.json -k 'x/y' benchmarks/c"


def test_plots_are_written_and_shown(page: Path) -> None:
    plots = sorted(path.name for path in page.parent.glob("*.png"))
    # Of two threads there is one N, of linf_step too: nothing grows there.
    assert plots == [
        "test-r-cpu-2-50ghz-dv-p-64-threads-1-growth.png",
        "test-r-cpu-2-50ghz-dv-speed-up.png",
    ]
    for name in plots:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page.read_text()
    assert not list(page.parent.glob(".*"))


def test_growth_is_sorted_and_of_one_variant_per_line(page: Path) -> None:
    records = report.read(page.parent.parent / "run.json", report.Run).records
    ((title, group),) = report.series(records).items()
    time, memory = report.growth_plot(title, group, {"ours": "r", "authors": "b"}).axes
    assert [list(map(float, line.get_xdata())) for line in time.lines] == [[128, 256]] * 2
    assert [line.get_label() for line in time.lines] == ["ours", "authors"]
    assert [list(map(float, line.get_ydata())) for line in memory.lines] == [[32], [1024]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2.00 s"), (123.4, "123 s"), (0.0999, "99.9 ms"), (1.234e-5, "12.3 µs")],
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_a_bad_file_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, record("dv") | {"seconds": {"ours": -1.0}})
    assert report.main([path], out=tmp_path / "results") == 2
    assert capsys.readouterr().err.startswith(f"report: {path} is not a file of benchmarks: ")
    assert not (tmp_path / "results").exists()
