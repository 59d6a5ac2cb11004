"""How a mean gets its error and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wcmi_fast.information import Estimate


def half_width(found: Estimate) -> tuple[float, float]:
    return found.mean - found.interval[0], found.interval[1] - found.mean


def test_batches_that_agree_leave_students_interval_of_the_trials() -> None:
    trials = [1.0, 1.3, 0.8, 1.1]
    found = Estimate.of([[trial] * 5 for trial in trials])
    error = np.std(trials, ddof=1) / 2
    assert found.mean == pytest.approx(1.05)
    assert found.standard_error == pytest.approx(error)
    wanted = stats.t.interval(0.95, 3, loc=1.05, scale=error)
    assert found.interval == pytest.approx(wanted)
    assert found.trials == pytest.approx(trials)
    assert found.bits == pytest.approx(1.05 / math.log(2))


def test_one_trial_has_the_bootstrap_of_its_batches() -> None:
    batches = np.random.default_rng(0).gamma(2.0, size=30)
    found = Estimate.of([batches])
    resampled = np.random.default_rng(1).choice(batches, (20_000, 30)).mean(1)
    percentiles = np.quantile(resampled, (0.025, 0.975)) - batches.mean()
    widened = percentiles * stats.t.ppf(0.975, 29) / stats.norm.ppf(0.975) * math.sqrt(30 / 29)
    assert found.mean == pytest.approx(batches.mean())
    assert found.standard_error == pytest.approx(np.std(batches, ddof=1) / math.sqrt(30))
    # BCa shifts both ends towards the long tail.
    low, high = half_width(found)
    assert low == pytest.approx(-widened[0], rel=0.15)
    assert high == pytest.approx(widened[1], rel=0.2)
    assert high > low


def test_errors_of_trials_and_of_batches_add_in_quadrature() -> None:
    batches = np.random.default_rng(0).normal(size=20)
    trials = np.array([[-0.3], [0.0], [0.3]])
    both = half_width(Estimate.of(batches[None] + trials))
    one = half_width(Estimate.of([batches]))
    other = half_width(Estimate.of(trials + np.zeros((3, 20))))
    wanted = [math.hypot(a, b) for a, b in zip(one, other, strict=True)]
    assert both == pytest.approx(wanted, rel=1e-6)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=20)
    one = Estimate.of([2 + hard + 0.01 * rng.normal(size=20) for _ in range(2)])
    other = Estimate.of([1 + hard + 0.01 * rng.normal(size=20) for _ in range(2)])
    difference = one.minus(other)
    assert difference.mean == pytest.approx(one.mean - other.mean)
    assert difference.batches[1][3] == pytest.approx(one.batches[1][3] - other.batches[1][3])
    assert sum(half_width(difference)) < 0.2 * sum(half_width(one))


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0.1, 4))
def test_intervals_move_and_scale_with_the_values(seed: int, shift: float, scale: float) -> None:
    values = np.random.default_rng(seed).gamma(1.0, size=(2, 12))
    found, moved = Estimate.of(values), Estimate.of(scale * values + shift)
    assert found.interval[0] <= found.mean <= found.interval[1]
    wanted = [scale * end + shift for end in found.interval]
    assert moved.interval == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_intervals_of_few_batches_cover() -> None:
    assert coverage(trials=1, batches=5, trial_error=0.0) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trials", "batches", "trial_error"),
    [(1, 10, 0.0), (1, 40, 0.0), (4, 10, 0.1), (4, 40, 1.0), (4, 40, 0.1)],
)
def test_intervals_cover(trials: int, batches: int, trial_error: float) -> None:
    assert 0.91 < coverage(trials, batches, trial_error) <= 1.0


def coverage(trials: int, batches: int, trial_error: float, repeats: int = 200) -> float:
    """Return how often the interval of simulated trials x batches contains the true mean 1."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(repeats):
        training = trial_error * rng.normal(size=(trials, 1))
        drawing = 0.3 * rng.normal(size=(1, batches))
        low, high = Estimate.of(1 + training + drawing).interval
        hits += low <= 1 <= high
    return hits / repeats


def test_one_batch_has_no_interval() -> None:
    alone = Estimate.of([[1.0]])
    assert alone.mean == 1
    assert math.isnan(alone.standard_error)
    assert all(map(math.isnan, alone.interval))
    assert all(map(math.isnan, Estimate.of([[1.0], [2.0]]).interval))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "values has rows of \\[\\], wanted trials x batches"),
        ([[]], "values has rows of \\[0\\]"),
        ([[1.0, 2.0], [1.0]], "values has rows of \\[2, 1\\]"),
        ([[1.0, math.nan]], "values has NaN or infinite ones"),
        ([[1.0, -math.inf]], "values has NaN or infinite ones"),
    ],
)
def test_values_without_a_mean(values: Sequence[Sequence[float]], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"Estimate.of: {sentence}"):
        Estimate.of(values)
