"""`torchrun -m wcmi_fast train`: from the command line, with a killed process, with bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_kinds import write_two_kinds

pytestmark = pytest.mark.slow

TRAIN = [
    "train",
    "encoder",
    "--steps",
    "1",
    "--units",
    "8",
    "--sync-batch-norm",
    "--checkpoint-every",
    "1",
]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_two_kinds(tmp_path / "digits.npz", train=80, test=20)


def command(count: int, digits: Path, out: Path, batch: int, epochs: int) -> list[str]:
    options = ["--data", digits, "--out", out, "--batch-size", batch, "--epochs", epochs]
    program = ["-m", "wcmi_fast", *TRAIN, *map(str, options)]
    if count == 1:
        return [sys.executable, *program]
    runner = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return [sys.executable, "-m", *runner, *program]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args),  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_do_what_one_does(digits: Path, tmp_path: Path) -> None:
    values = []
    for count in (1, 2):
        done = run(count, digits, tmp_path / str(count), 8, 1)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Run folder:") == 1
        results = json.loads((tmp_path / str(count) / "results.json").read_text())
        values.append(results["bound_nats"])
    # In float32 a rounding turns some of an attack's steps.
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_a_killed_process_ends_the_job_and_it_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    errors = (tmp_path / "errors").open("w+")
    job = subprocess.Popen(
        command(2, digits, out, 8, 100), stderr=errors, stdout=subprocess.DEVNULL, text=True
    )
    while not list((out / "checkpoints" / "encoder").glob("epoch-0000-batch-*")):
        time.sleep(0.1)
        assert job.poll() is None
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert job.wait(90) == 1
    errors.seek(0)
    said = re.sub(r"\s+", " ", errors.read())
    assert re.search("wcmi-fast: rank [01] of 2 failed, or lost another", said)
    assert "the same command with --out goes on there" in said
    newest = max((out / "checkpoints" / "encoder").iterdir()).name
    # The same options, stopped again after the first new checkpoint, on one process.
    again = subprocess.Popen(
        command(1, digits, out, 8, 100), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while max((out / "checkpoints" / "encoder").iterdir()).name == newest:
        time.sleep(0.1)
        assert again.poll() is None
    again.terminate()
    assert again.wait(60) == 128 + signal.SIGTERM
    assert max((out / "checkpoints" / "encoder").iterdir()).name > newest


def test_sigterm_to_torchrun_saves_and_ends_all(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    errors = (tmp_path / "errors").open("w+")
    job = subprocess.Popen(
        command(2, digits, out, 8, 100), stderr=errors, stdout=subprocess.DEVNULL, text=True
    )
    while not list((out / "checkpoints" / "encoder").glob("epoch-0000-batch-*")):
        time.sleep(0.1)
        assert job.poll() is None
    job.terminate()
    assert job.wait(90) != 0
    errors.seek(0)
    said = re.sub(r"\s+", " ", errors.read())
    assert said.count("stopped by SIGTERM in stage 'encoder'") == 1


def test_a_batch_that_cannot_be_shared(digits: Path, tmp_path: Path) -> None:
    done = run(2, digits, tmp_path / "run", 9, 1)
    assert done.returncode == 1
    sentence = (
        "train: batch_size is 9 on 2 processes, wanted a multiple of 2 with 2 images or more for "
        "each"
    )
    assert sentence in re.sub(r"\s+", " ", done.stderr)
    assert not (tmp_path / "run").exists()
