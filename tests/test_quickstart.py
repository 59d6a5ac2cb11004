from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wcmi_fast.experiments import quickstart

TINY = ("quickstart", "--budget", "0.2", "--seed", "5")


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wcmi_fast", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(*args: str, cwd: Path) -> str:
    process = start(*args, cwd=cwd)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def run_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def interrupt(cwd: Path, reached: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    process = start(*TINY, cwd=cwd)
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(how)
    said, _ = process.communicate()
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    cwd = tmp_path_factory.mktemp("whole")
    return cwd, finish(*TINY, cwd=cwd)


@pytest.mark.slow
def test_a_run_leaves_all_its_files(whole: tuple[Path, str]) -> None:
    cwd, said = whole
    folder = run_folder(cwd)
    found = results(folder)
    assert [(row["representation"], row["head"]) for row in found["accuracy"]] == [
        (name, head) for name in quickstart.REPRESENTATIONS for head in quickstart.HEADS
    ]
    for row in found["accuracy"]:
        assert 0 <= row["adversarial"] <= row["natural"] <= 1
        assert f"{100 * row['natural']:.1f}" in said
    for name in quickstart.REPRESENTATIONS:
        information = found["information"][name]
        difference = information["information"]["mean"] - information["worst_case"]["mean"]
        assert information["vulnerability"]["mean"] == pytest.approx(difference)
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["job"] == {"seed": 5, "eps": 0.2, "budget": 0.2, "device": "cpu"}
    stages = {json.loads(line)["stage"] for line in (folder / "metrics.jsonl").open()}
    assert stages == {path.name for path in (folder / "checkpoints").iterdir()}
    assert "http" not in (folder / "report.html").read_text().replace("http://www.w3.org", "")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(whole: tuple[Path, str], tmp_path: Path) -> None:
    finish(*TINY, cwd=tmp_path)
    assert results(run_folder(tmp_path)) == results(run_folder(whole[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "delay"),
    [
        ("config.toml", 0.5),
        ("checkpoints/encoder-standard/epoch-*", 0.0),
        ("checkpoints/head-standard-robust/epoch-*", 1.0),
        ("checkpoints/encoder-worst-case/epoch-*", 0.3),
        ("stages/information-standard.json", 0.7),
    ],
)
def test_a_killed_run_resumes_to_the_same_results(
    pattern: str, delay: float, whole: tuple[Path, str], tmp_path: Path
) -> None:
    def reached() -> bool:
        if not any(tmp_path.glob(f"runs/*/{pattern}")):
            return False
        time.sleep(delay)
        return True

    assert interrupt(tmp_path, reached, signal.SIGKILL)[0] == -signal.SIGKILL
    folder = run_folder(tmp_path)
    assert not (folder / "results.json").exists()
    finish("quickstart", "--resume", str(folder), cwd=tmp_path)
    assert results(folder) == results(run_folder(whole[0]))
    lines = [(path / "metrics.jsonl").read_text() for path in (folder, run_folder(whole[0]))]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_control_c_says_how_to_go_on(tmp_path: Path) -> None:
    reached = lambda: any(tmp_path.glob("runs/*/metrics.jsonl"))  # noqa: E731
    code, said = interrupt(tmp_path, reached, signal.SIGINT)
    assert code == 130
    folder = run_folder(tmp_path).relative_to(tmp_path)
    assert f"Interrupted; to go on: wcmi-fast quickstart --resume {folder}" in said


def test_a_budget_decides_the_work() -> None:
    full = quickstart.plan(quickstart.Quickstart())
    half = quickstart.plan(quickstart.Quickstart(budget=quickstart.FULL_BUDGET / 2))
    tiny = quickstart.plan(quickstart.Quickstart(budget=0.1))
    for name in quickstart.REPRESENTATIONS:
        assert half.encoders[name].epochs == round(full.encoders[name].epochs / 2)
        assert tiny.encoders[name].epochs == 1
    assert (full.train_images, half.train_images, tiny.train_images) == (4000, 4000, 400)


def test_both_representations_differ_in_the_attack_only() -> None:
    work = quickstart.plan(quickstart.Quickstart(eps=0.1))
    standard, worst = (vars(work.encoders[name]).copy() for name in quickstart.REPRESENTATIONS)
    assert standard.pop("attack") is None
    assert worst.pop("attack").eps > 0
    assert standard == worst


@pytest.mark.slow
def test_progress_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = quickstart.Quickstart(budget=0.1)
    monkeypatch.setattr(quickstart, "write_report", lambda *args: None)
    promised = quickstart.nominal_seconds(job, tmp_path)
    done: list[float] = []
    quickstart.run(job, tmp_path, advance=done.append)
    assert sum(done) == pytest.approx(promised)
    assert quickstart.nominal_seconds(job, tmp_path) == 0
