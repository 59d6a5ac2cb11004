"""The loop of a stage: resumption within an epoch, broken checkpoints, signals, values."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import files
from wcmi_fast.training import checkpoint, signals
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import OnBatch, Stage, Values, ignore, run_stage

STEPS = 15  # three epochs of five batches


class PlannedError(Exception):
    pass


def noisy_stage(on_batch: OnBatch = ignore, bad: int | None = None) -> Stage:
    """Return a stage whose steps depend on all that a checkpoint must hold."""
    with seeded("weights"):
        model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(22, 3, generator=torch.Generator().manual_seed(0))
    count = iter(range(10**6))

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> Values:
        noise = torch.randn(4, 3) + torch.randn(4, 3, generator=generator)
        loss = model(x[indices] + noise).square().mean() * (1 - done)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = float("nan") if next(count) == bad else loss.item()
        return {"loss_nats": found, "noise": noise.mean().item()}

    return Stage(
        owner="f",
        name="s",
        seed=0,
        rows=22,
        epochs=3,
        batch_size=4,
        modules={"model": model},
        optimizer=optimizer,
        train_batch=train_batch,
        on_batch=on_batch,
    )


def finished(folder: Path, **options: int) -> tuple[list[Tensor], str]:
    stage = noisy_stage()
    run_stage(stage, RunFolder(folder, **options))
    weights = list(stage.modules["model"].state_dict().values())
    return weights, (folder / "metrics.jsonl").read_text()


def same(left: tuple[list[Tensor], str], right: tuple[list[Tensor], str]) -> bool:
    equal = all(torch.equal(a, b) for a, b in zip(left[0], right[0], strict=True))
    return equal and left[1] == right[1]


def stopping_after(batches: int) -> OnBatch:
    left = iter(range(batches - 1))

    def on_batch(values: Values) -> None:
        if next(left, None) is None:
            raise PlannedError

    return on_batch


@pytest.mark.parametrize("batches", [1, 2, 3, 5, 6, 9, 11, 14, 15])
@pytest.mark.parametrize("every", [1, 2, None])
def test_a_killed_stage_goes_on_bit_for_bit(
    batches: int, every: int | None, tmp_path: Path
) -> None:
    wanted = finished(tmp_path / "whole")
    killed = RunFolder(tmp_path / "killed", every=every)
    with pytest.raises(PlannedError):
        run_stage(noisy_stage(stopping_after(batches)), killed)
    assert same(finished(tmp_path / "killed"), wanted)


def test_it_goes_on_after_the_last_checkpoint(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(PlannedError):
        run_stage(noisy_stage(stopping_after(9)), RunFolder(tmp_path, every=3))
    run_stage(noisy_stage(lambda values: done.append(1)), RunFolder(tmp_path))
    assert len(done) == STEPS - 8  # an epoch of five, and three batches


def test_checkpoints_change_nothing(tmp_path: Path) -> None:
    assert same(finished(tmp_path / "a", every=1), finished(tmp_path / "b"))


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    finished(tmp_path, every=2, keep=3)
    names = sorted(f.name for f in (tmp_path / "checkpoints" / "s").iterdir())
    assert names == ["epoch-0002-batch-0000002", "epoch-0002-batch-0000004", "epoch-0003"]


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-7], lambda data: b"", lambda data: data[::-1]]
)
@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.META])
def test_the_one_before_a_broken_checkpoint_is_used(
    harm: Callable[[bytes], bytes], file: str, tmp_path: Path
) -> None:
    wanted = finished(tmp_path / "whole")
    folder = tmp_path / "killed"
    with pytest.raises(PlannedError):
        run_stage(noisy_stage(stopping_after(9)), RunFolder(folder, every=1))
    newest = max((folder / "checkpoints" / "s").iterdir())
    (newest / file).write_bytes(harm((newest / file).read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest}.*going on from the one before it"):
        found = finished(folder)
    assert same(found, wanted)
    assert not newest.exists()


def test_a_broken_checkpoint_is_warned_of_once(tmp_path: Path) -> None:
    with pytest.raises(PlannedError):
        run_stage(noisy_stage(stopping_after(9)), RunFolder(tmp_path, every=1))
    newest = max((tmp_path / "checkpoints" / "s").iterdir())
    (newest / checkpoint.TENSORS).write_bytes(b"")
    with pytest.warns(UserWarning, match="truncated"), pytest.raises(PlannedError):
        run_stage(noisy_stage(stopping_after(1)), RunFolder(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finished(tmp_path)


def test_no_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    finished(tmp_path)
    for file in (tmp_path / "checkpoints").rglob(checkpoint.TENSORS):
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="going on from the one before it"),
        pytest.raises(checkpoint.CheckpointError, match="truncated or changed"),
    ):
        finished(tmp_path)
    assert len(list((tmp_path / "checkpoints" / "s").iterdir())) == 2


@pytest.mark.parametrize("written", [3, 4, 7])
def test_a_full_disk_leaves_the_last_checkpoint(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = finished(tmp_path / "whole")
    real, left = files._write_synced, iter(range(written))

    def full(path: Path, data: bytes) -> None:
        if next(left, None) is None:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, data)

    run = RunFolder(tmp_path / "full", every=2)
    monkeypatch.setattr(files, "_write_synced", full)
    with pytest.raises(OSError, match=r"No space left on device: could not write .*nothing was"):
        run_stage(noisy_stage(), run)
    monkeypatch.setattr(files, "_write_synced", real)
    with warnings.catch_warnings():
        # Of a checkpoint that cannot be read.
        warnings.simplefilter("error")
        assert same(finished(tmp_path / "full"), wanted)


def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    sentence = "f: loss_nats is nan in stage 's', epoch 1, batch 2; try a lower learning_rate"
    with pytest.raises(FloatingPointError, match=sentence):
        run_stage(noisy_stage(bad=7), RunFolder(tmp_path, every=1))
    wanted = finished(tmp_path / "whole")
    assert same(finished(tmp_path), wanted)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("batches", "epoch", "batch"), [(2, 0, 2), (5, 1, 0), (8, 1, 3)])
def test_a_signal_waits_for_the_step_and_its_checkpoint(
    asked: signal.Signals, batches: int, epoch: int, batch: int, tmp_path: Path
) -> None:
    left = iter(range(batches - 1))

    def on_batch(values: Values) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), asked)

    before = signal.getsignal(asked)
    with signals.finishing_steps(), pytest.raises(signals.StoppedError) as raised:
        run_stage(noisy_stage(on_batch), RunFolder(tmp_path))
    stopped = raised.value
    assert (stopped.signal, stopped.epoch, stopped.batch) == (asked, epoch, batch)
    assert f"stopped by {asked.name} in stage 's'" in str(stopped)
    assert signal.getsignal(asked) is before
    done: list[int] = []
    run_stage(noisy_stage(lambda values: done.append(1)), RunFolder(tmp_path))
    assert len(done) == STEPS - batches


def interrupt_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


@pytest.fixture
def python_handles_sigint() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and then so does Python."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_sigint")
def test_a_second_signal_acts_at_once() -> None:
    with signals.finishing_steps(), pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert signals.received() is None


PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_stage import noisy_stage
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.stage import run_stage

def on_batch(values):
    print("batch", flush=True)
    time.sleep(0.02)

run_stage(noisy_stage(on_batch), RunFolder(Path({folder!r}), every=2))
"""


@pytest.mark.slow
def test_kill_9_at_ten_moments(tmp_path: Path) -> None:
    """Each time resumed; the result is the uninterrupted run's, bit for bit."""
    wanted = finished(tmp_path / "whole")
    folder = tmp_path / "killed"
    tests = str(Path(__file__).parent)
    program = PROGRAM.format(tests=tests, folder=str(folder))
    moments = torch.rand(10, generator=torch.Generator().manual_seed(1)) * 0.06
    for moment in moments.tolist():
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert same(finished(folder), wanted)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
