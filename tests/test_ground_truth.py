"""The experiment that holds estimates against known information."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wcmi_fast.experiments import ground_truth as module
from wcmi_fast.experiments.distributions import TASKS
from wcmi_fast.experiments.reproduction import as_text, reproduce
from wcmi_fast.information.results import Estimate

JOB = module.Job(tasks=("1v1-normal-0.75", "sparse-5"), samples=200, seeds=(3, 4, 5))
# What each bound adds to the truth, in nats, in the planted estimator below.
OFFSETS = {"dv": -0.1, "infonce": -0.05, "nwj": -0.3, "smile": 0.2}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Replace the estimator: the truth, plus OFFSETS, plus a hundredth of the seed."""
    calls: list[tuple[int, int]] = []

    def estimated(x: Any, y: Any, *, seed: int, **options: Any) -> SimpleNamespace:
        calls.append((x.shape[1], seed))
        truth = next(
            t.information for t in TASKS.values() if t.name in JOB.tasks and t.dims[0] == x.shape[1]
        )
        values = {name: truth + offset + seed / 100 for name, offset in OFFSETS.items()}
        estimates = {name: Estimate.of([[value, value]]) for name, value in values.items()}
        return SimpleNamespace(estimates=estimates, best="infonce", seconds=2.0)

    monkeypatch.setattr(module, "sample_information", estimated)
    return calls


def test_errors_are_those_of_the_mean_over_seeds(
    tmp_path: Path, planted: list[tuple[int, int]]
) -> None:
    results = reproduce(module, JOB, tmp_path, print)
    assert planted == [(1, 3), (1, 4), (1, 5), (5, 3), (5, 4), (5, 5)]
    for row in results["tasks"]:
        truth = TASKS[row["task"]].information
        for name, offset in OFFSETS.items():
            assert row["bounds"][name]["mean"] == pytest.approx(truth + offset + 0.04)
        low, high = row["best"]["interval"]
        assert row["best"]["mean"] == pytest.approx(truth - 0.01)
        assert low < truth - 0.01 < high
        assert high - low < 0.15  # three seeds that differ by 0.01
        assert row["best"]["bounds"] == ["infonce"] * 3
    text = re.sub(r"\s+", " ", as_text(module.tables(results)))
    assert "0.403 ± 0.0" in text  # best of 0.4133
    assert "-2.4 %" in text
    assert "1.012 ± 0.0" in text  # best of 1.0217
    assert "-1.0 %" in text


def test_a_finished_seed_is_not_estimated_again(
    tmp_path: Path, planted: list[tuple[int, int]]
) -> None:
    first = reproduce(module, JOB, tmp_path, print)
    planted.clear()
    assert reproduce(module, JOB, tmp_path, print)["tasks"] == first["tasks"]
    assert planted == []


def test_the_figure_has_the_results(tmp_path: Path, planted: list[tuple[int, int]]) -> None:
    results = reproduce(module, JOB, tmp_path, print)
    panels = module.figure(results).axes
    assert [axes.get_title() for axes in panels] == list(OFFSETS)
    for axes, name in zip(panels, OFFSETS, strict=True):
        line = axes.containers[0].lines[0]
        assert list(line.get_xdata()) == [row["truth"] for row in results["tasks"]]
        means = [row["bounds"][name]["mean"] for row in results["tasks"]]
        assert list(line.get_ydata()) == pytest.approx(means)


def test_seeds_draw_other_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []

    def seen(x: Any, y: Any, **options: Any) -> SimpleNamespace:
        sums.append(float(x.sum()))
        estimates = {name: Estimate.of([[0.0, 0.0]]) for name in OFFSETS}
        return SimpleNamespace(estimates=estimates, best="dv", seconds=1.0)

    monkeypatch.setattr(module, "sample_information", seen)
    reproduce(module, JOB, tmp_path, print)
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": ("sparse5",)}, "tasks has 'sparse5', wanted some of .* did you mean 'sparse-5'"),
        ({"tasks": ()}, "tasks is empty, wanted one or more"),
        ({"seeds": ()}, "seeds is empty, wanted one or more"),
    ],
)
def test_jobs_that_cannot_be_done(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        module.Job(**options)
