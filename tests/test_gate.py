from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gate
import pytest
from benchmark_runs import record, run
from schema import Ratio

CASE = "dv N=128 threads=1 vs_floor"


def write(folder: Path, name: str, **ratios: tuple[float, float, float] | None) -> Path:
    """Write a run of `dv` at N=128 and perhaps `nwj`, each with one ratio (low, median, high)."""
    records = [
        record(op, ratios={"vs_floor": {"low": low, "median": median, "high": high}})
        for op, values in ratios.items()
        if values is not None
        for low, median, high in [values]
    ]
    path = folder / name
    path.write_text(json.dumps(run(records)))
    return path


def counts(folder: Path, name: str, **cases: int) -> Path:
    path = folder / name
    path.write_text(json.dumps({"conditions": {"compiler": f"of {name}"}, "cases": cases}))
    return path


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return write(tmp_path, "baseline.json", dv=(1.15, 1.2, 1.25))


SAME = (1.15, 1.2, 1.25)
SLOWER = (1.35, 1.4, 1.45)


@pytest.mark.parametrize(
    ("repeats", "code"),
    [
        ([SAME], 0),
        ([SLOWER], 1),
        ([SLOWER, SLOWER, SLOWER], 1),
        ([SLOWER, SAME, SLOWER], 0),  # not in every repeat
        ([(1.2, 1.4, 1.6)], 0),  # the intervals overlap
        ([(1.26, 1.31, 1.36)], 0),  # apart, but within 10 %
        ([(0.5, 0.6, 0.7)], 0),  # faster
    ],
)
def test_loss(
    tmp_path: Path, baseline: Path, repeats: list[tuple[float, float, float]], code: int
) -> None:
    runs = [write(tmp_path, f"{k}.json", dv=values) for k, values in enumerate(repeats)]
    assert gate.main(baseline, runs[0], tuple(runs[1:])) == code


def test_a_speed_up_is_lost_when_it_falls() -> None:
    old = Ratio(2.9, 3.0, 3.1, better="higher")
    assert gate.lost(old, Ratio(2.4, 2.5, 2.6, better="higher"))
    assert not gate.lost(old, Ratio(3.4, 3.5, 3.6, better="higher"))


def test_a_missing_case_fails(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = write(tmp_path, "without.json", nwj=SAME)
    whole = write(tmp_path, "whole.json", dv=SAME, nwj=SAME)
    assert gate.main(baseline, without) == 1
    assert gate.main(baseline, whole, (without,)) == 1
    assert "missing" in capsys.readouterr().out


def test_a_new_case_is_named_and_passes(
    tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main(baseline, write(tmp_path, "new.json", dv=SAME, nwj=SLOWER)) == 0
    out = capsys.readouterr().out
    assert "nwj N=128" in out
    assert " new " in out


def test_update_keeps_the_middle_run(tmp_path: Path, baseline: Path) -> None:
    runs = [write(tmp_path, f"{k}.json", dv=(k, k + 0.1, k + 0.2)) for k in (3, 1, 2)]
    assert gate.main(baseline, runs[0], tuple(runs[1:]), update=True) == 0
    stored = gate.load(baseline)
    assert stored.cases == {CASE: Ratio(2, 2.1, 2.2)}
    assert gate.main(baseline, runs[2]) == 0
    assert gate.main(baseline, runs[0]) == 1


def test_instruction_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = counts(tmp_path, "gcc-12", lse=1000, step=500)
    assert gate.main(old, counts(tmp_path, "a", lse=1100, step=550)) == 0
    assert gate.main(old, counts(tmp_path, "b", lse=1101, step=500)) == 1
    assert "compiler is 'of b', the baseline's 'of gcc-12'" in capsys.readouterr().out


def broken(change: dict[str, Any]) -> str:
    return json.dumps(run([record("dv") | change]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a file of benchmarks: Input data was truncated"),
        (broken({"ratios": {"vs_floor": {"low": 1, "median": "x", "high": 1}}}), "got `str` - at"),
        (broken({"seconds": {"ours": 0}}), "Expected `float` > 0.0 - at `$.benchmarks[0]"),
        (broken({"tpyo": 1}), "unknown field `tpyo`"),
        ('{"machine_info": {"cpu": {"brand_raw": "x"}}, "benchmarks": []}', "length >= 1"),
        ('{"conditions": {}, "cases": {"lse": "many"}}', "$.cases[...]"),
        ("{}", "missing required field `machine_info`"),
    ],
)
def test_a_bad_file_gets_one_sentence(
    tmp_path: Path, baseline: Path, content: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert gate.main(baseline, path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gate: {path} ")
    assert sentence in error
    assert error.count("\n") == 1


def test_no_baseline(tmp_path: Path, baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(tmp_path / "none.json", baseline) == 2
    assert "none.json could not be read: No such file" in capsys.readouterr().err
