from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import schema
import timing
import torch
from benchmark_runs import run


class FakeClock:
    """Seconds that pass only while a variant runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def variant(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.ran.append(name)

        return call


def test_every_round_times_every_variant() -> None:
    clock = FakeClock()
    variants = {"slow": clock.variant("slow", 1.0), "fast": clock.variant("fast", 0.25)}
    times = timing.interleaved(variants, rounds=5, warmup=3, clock=clock)
    assert times == {"slow": [1.0] * 5, "fast": [0.25] * 5}
    # Three calls to warm up, one to calibrate, one a round.
    assert clock.ran.count("slow") == clock.ran.count("fast") == 3 + 1 + 5


def test_the_order_changes_and_each_variant_follows_each_other() -> None:
    clock = FakeClock()
    variants = {name: clock.variant(name, 1.0) for name in "abc"}
    timing.interleaved(variants, rounds=6, warmup=0, clock=clock)
    measured = clock.ran[3:]
    orders = ["".join(measured[at : at + 3]) for at in range(0, 18, 3)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_short_calls_are_batched() -> None:
    clock = FakeClock()
    times = timing.interleaved(
        {"short": clock.variant("short", 2.0**-20)}, rounds=2, warmup=0, min_sample_s=2.0**-9,
        clock=clock,
    )  # fmt: skip
    assert times == {"short": [2.0**-20] * 2}
    # Calibration sees one call, then the 2^11 that fill a sample.
    assert len(clock.ran) == 1 + 2**11 + 2 * 2**11


def test_a_clock_that_stands_still_for_one_call_is_given_more() -> None:
    clock = FakeClock()
    coarse = lambda: float(int(clock.now))  # noqa: E731
    times = timing.interleaved(
        {"call": clock.variant("call", 0.25)}, rounds=1, min_sample_s=1.0, warmup=0, clock=coarse
    )
    assert times == {"call": [0.25]}
    # One, two and four calls until the clock has moved; then the sample.
    assert len(clock.ran) == 1 + 2 + 4 + 4


def test_ratio_is_of_each_round() -> None:
    # Both three times slower in the last rounds: no ratio but 2 ever is.
    times = {"ours": [2.0, 2.0, 6.0, 6.0], "floor": [1.0, 1.0, 3.0, 3.0]}
    found = timing.ratio(times, "ours", "floor", target=2.5)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert found.met
    assert not timing.ratio(times, "ours", "floor", better="higher", target=2.5).met


@pytest.mark.parametrize(
    ("rounds", "low", "high"),
    # The ranks of the sign test's interval in any table, such as 2 and 8 of 9; 4 and 12 of 15.
    [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (15, 4, 12), (20, 6, 15)],
)
def test_interval_is_between_order_statistics(rounds: int, low: int, high: int) -> None:
    times = {"a": [float(k) for k in range(rounds, 0, -1)], "b": [1.0] * rounds}
    found = timing.ratio(times, "a", "b")
    assert (found.low, found.median, found.high) == (low, (rounds + 1) / 2, high)


MIB = 1 << 20


def scratch() -> torch.Tensor:
    """Hold 64 MiB for a moment: more than malloc ever keeps, once it is freed."""
    block = torch.ones(64 * MIB // 4)
    time.sleep(0.05)
    return block.sum()


@pytest.mark.parametrize("measure", [timing.peak_memory, timing._sampled_peak])
def test_peak_counts_what_is_freed_before_the_end(measure: Callable[..., int]) -> None:
    assert 63 * MIB < measure(scratch) < 68 * MIB


def test_peak_falls_back_where_the_mark_cannot_be_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Path, text: str) -> int:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(timing, "_sampled_peak", lambda call: 7)
    assert timing.peak_memory(lambda: None) == 7


def test_environment_says_what_a_figure_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WCMI_FAST_SIMD", raising=False)
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest", "benchmarks", "-k", "dv and not jsd"])
    found = timing.environment()
    assert found.command == "OMP_NUM_THREADS=1 pytest benchmarks -k 'dv and not jsd'"
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__
    monkeypatch.setattr("sys.argv", ["/lib/pytest/__main__.py", "benchmarks"])
    assert timing.environment().command == "OMP_NUM_THREADS=1 python -m pytest benchmarks"


def test_what_is_measured_is_read_back(tmp_path: Path) -> None:
    times = {"ours": [1.0, 2.0, 3.0], "eager": [2.0, 4.0, 6.0]}
    info = schema.extra_info(
        "dv", {"N": 128, "dtype": "float32"}, times, flop=4e9, peak_bytes={"ours": 5},
        ratios={"vs_eager": timing.ratio(times, "eager", "ours", better="higher", target=1.5)},
        environment=timing.environment(),
    )  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run([info])))
    (found,) = schema.read(path, schema.Run).records
    assert found.name == f"dv N=128 dtype=float32 threads={torch.get_num_threads()}"
    assert found.seconds == {"ours": 2.0, "eager": 4.0}
    assert found.gflop_per_s == {"ours": 2.0, "eager": 1.0}
    assert found.gb_per_s == {}
    assert found.ratios["vs_eager"].met
