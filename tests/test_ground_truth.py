"""The experiment that holds estimates against known information."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from wcmi_fast.experiments import ground_truth as module
from wcmi_fast.experiments.distributions import TASKS
from wcmi_fast.experiments.reproduction import Results, as_text, reproduce
from wcmi_fast.information.results import Estimate

JOB = module.Job(tasks=("1v1-normal-0.75", "sparse-5"), samples=200, seeds=(3, 4, 5))
# What each bound adds to the truth, in nats, in the planted estimator below; what each seed adds,
# which bound is the best there, and the seconds that it takes.
OFFSETS = {"dv": -0.1, "infonce": -0.05, "nwj": -0.3, "smile": 0.2}
SEEDS = {3: (0.0, "infonce", 2.0), 4: (0.01, "dv", 3.0), 5: (0.08, "smile", 7.0)}


class Planted(NamedTuple):
    folder: Path
    results: Results
    calls: list[dict[str, Any]]


def batches(name: str, truth: float, seed: int) -> list[float]:
    middle = truth + OFFSETS[name] + SEEDS[seed][0]
    return [middle - 0.5, middle + 0.5]


def estimator(calls: list[dict[str, Any]]) -> Callable[..., SimpleNamespace]:
    """Return one that finds the truth, plus OFFSETS, plus what SEEDS say."""

    def estimated(x: Tensor, y: Tensor, *, seed: int, **options: Any) -> SimpleNamespace:
        calls.append({"x": x, "y": y, "seed": seed, **options})
        truth = next(
            TASKS[name].information for name in JOB.tasks if TASKS[name].dims[0] == len(x.T)
        )
        _, best, seconds = SEEDS[seed]
        estimates = {name: Estimate.of([batches(name, truth, seed)]) for name in OFFSETS}
        return SimpleNamespace(estimates=estimates, best=best, seconds=seconds)

    return estimated


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Run the experiment with a planted estimator."""
    folder, calls = tmp_path_factory.mktemp("planted"), list[dict[str, Any]]()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "sample_information", estimator(calls))
        return Planted(folder, reproduce(module, JOB, folder, print), calls)


def over_seeds(name: str, truth: float) -> Estimate:
    """Return what a bound, or "best", must have: each seed is one independent value."""
    names = {seed: best if name == "best" else name for seed, (_, best, _) in SEEDS.items()}
    return Estimate.of([[fmean(batches(names[seed], truth, seed)) for seed in SEEDS]])


def test_every_seed_draws_a_sample_of_its_own(planted: Planted) -> None:
    wanted = [(name, seed) for name in JOB.tasks for seed in JOB.seeds]
    for (name, seed), call in zip(wanted, planted.calls, strict=True):
        x, y = TASKS[name].sample(200, seed)
        assert torch.equal(call["x"], x)
        assert torch.equal(call["y"], y)
        assert call["seed"] == seed
        assert call["bounds"] == tuple(OFFSETS)


def test_errors_are_those_of_the_mean_over_seeds(planted: Planted) -> None:
    text = re.sub(r"[\s│┃]+", " ", as_text(module.tables(planted.results)))
    assert f"s per task truth {' '.join(OFFSETS)} best seed" in text
    assert f"200 rows, half held out; seeds [3, 4, 5]; {torch.get_num_threads()} threads" in text
    for row in planted.results["tasks"]:
        truth, cells, errors = TASKS[row["task"]].information, [], []
        for name in (*OFFSETS, "best"):
            found, wanted = row["bounds"].get(name, row["best"]), over_seeds(name, truth)
            low, high = wanted.interval
            assert found["mean"] == pytest.approx(wanted.mean)
            assert found["interval"] == pytest.approx([low, high])
            cells.append(f"{wanted.mean:.3f} ± {(high - low) / 2:.3f}")
            errors.append(f"{100 * (wanted.mean - truth) / truth:+.1f} %")
        assert row["best"]["bounds"] == ["infonce", "dv", "smile"]
        assert f"{row['task']} {truth:.4f} {' '.join(cells)} 4.0 {' '.join(errors)}" in text


def test_a_finished_seed_is_not_estimated_again(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "sample_information")
    again = reproduce(module, JOB, planted.folder, print)
    assert again["tasks"] == planted.results["tasks"]


def test_the_figure_has_the_results(planted: Planted) -> None:
    panels = module.figure(planted.results).axes
    truths = [TASKS[name].information for name in JOB.tasks]
    assert [axes.get_title() for axes in panels] == list(OFFSETS)
    for axes, name in zip(panels, OFFSETS, strict=True):
        wanted = [over_seeds(name, truth) for truth in truths]
        (drawn,) = axes.containers
        assert list(drawn.lines[0].get_xdata()) == truths
        assert list(drawn.lines[0].get_ydata()) == pytest.approx([each.mean for each in wanted])
        for bar, each in zip(drawn.lines[2][0].get_segments(), wanted, strict=True):
            assert bar[:, 1] == pytest.approx(each.interval)
        diagonal = axes.lines[0]
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, max(truths)]


def test_five_thousand_rows_and_three_seeds_unless_said_otherwise() -> None:
    """What the numbers of docs/estimators.md are of."""
    assert (module.Job().samples, module.Job().seeds) == (5000, (0, 1, 2))


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
