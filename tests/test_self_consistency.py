"""The self-consistency checks: ratios and verdicts from planted estimates, and real ones."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wcmi_fast.experiments import self_consistency
from wcmi_fast.experiments.reproduction import as_text
from wcmi_fast.information.results import Estimate
from wcmi_fast.information.sample_critic import SampleConfig
from wcmi_fast.information.samples import sample_information
from wcmi_fast.training.run_folder import RunFolder

HEIGHT = 8
JOB = self_consistency.Job(
    rows=(0, 4), checked=(4,), fewer=2, bounds=("dv", "smile"), trials=2, steps=10, batch_size=32
)


def saved(folder: Path, images: np.ndarray[Any, Any]) -> str:
    path = folder / "images.npz"
    half, labels = len(images) // 2, np.zeros(len(images) // 2, dtype=np.int64)
    np.savez(path, x_train=images[:half], y_train=labels, x_test=images[half:], y_test=labels)
    return str(path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> self_consistency.Job:
    images = np.random.default_rng(0).integers(0, 256, (240, HEIGHT, 6)).astype(np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(240), 255  # tells every image from the others
    return replace(JOB, data=saved(tmp_path_factory.mktemp("data"), images))


def run(job: self_consistency.Job, folder: Path) -> dict[str, Any]:
    found = self_consistency.run(job, RunFolder(folder), lambda line: None)
    return {"settings": json.loads(json.dumps(asdict(job))), **found}


def estimate(mean: float, spread: float = 0.01, seed: int = 0) -> Estimate:
    """An estimate of exactly this mean, from 3 trials and 20 parts; others have other noise."""
    noise = np.random.default_rng([seed, round(1e4 * abs(mean))]).normal(0, spread, (3, 20))
    return Estimate.of((mean + noise - noise.mean()).tolist())


PLANTED = {
    "baseline-0": 0.001,
    "baseline-4": 2.0,
    "baseline-8": 4.0,
    "processing-4": 2.02,
    "additivity-4": 3.98,
    "independent": 0.0005,
}


def verdicts(**changed: Estimate) -> dict[str, dict[str, Any]]:
    """The checks of the planted estimates, with some changed, by the first word that tells them."""
    planted = {name: estimate(mean) for name, mean in PLANTED.items()}
    planted |= {name.replace("_", "-"): found for name, found in changed.items()}
    names = ("zero", "monotone", "processing", "additivity", "independent")
    found = self_consistency.checks(JOB, planted, HEIGHT)
    return dict(zip(names, found, strict=True))


def test_consistent_estimates_hold() -> None:
    found = verdicts()
    assert {check["verdict"] for check in found.values()} == {"holds"}
    means = [found[name]["mean"] for name in found]
    assert means == pytest.approx([0.00025, 0.49975, 1.01, 1.99, 0.0005])
    assert [found[name]["wanted"] for name in found] == ["0", ">= 0", "1", "2", "0"]
    for check in found.values():
        assert check["interval"][0] < check["mean"] < check["interval"][1]


@pytest.mark.parametrize(
    ("check", "changed"),
    [
        ("zero", {"baseline_0": estimate(0.8)}),
        ("monotone", {"baseline_4": estimate(4.2)}),
        ("processing", {"processing_4": estimate(2.5)}),
        ("processing", {"processing_4": estimate(1.5)}),
        ("additivity", {"additivity_4": estimate(3.0)}),
        ("independent", {"independent": estimate(0.3)}),
        ("independent", {"independent": estimate(-0.3)}),
    ],
)
def test_an_inconsistent_estimate_fails_its_check_alone(
    check: str, changed: dict[str, Estimate]
) -> None:
    found = verdicts(**changed)
    failed = [name for name, each in found.items() if each["verdict"] != "holds"]
    assert (found[check]["verdict"], check in failed) == ("fails", True)
    # baseline-4 is what the other ratios are divided by.
    assert failed == [check] or "baseline_4" in changed


@pytest.mark.parametrize("check", ["zero", "monotone", "processing", "additivity"])
def test_wide_intervals_decide_nothing(check: str) -> None:
    wide = {
        "zero": {"baseline_0": estimate(0.0, spread=6.0)},
        "monotone": {"baseline_0": estimate(1.9, spread=6.0)},
        "processing": {"processing_4": estimate(2.0, spread=6.0)},
        "additivity": {"additivity_4": estimate(4.0, spread=12.0)},
    }
    assert verdicts(**wide[check])[check]["verdict"] == "undecided"


def test_no_information_gives_no_ratio() -> None:
    found = verdicts(baseline_8=estimate(-0.1), baseline_4=estimate(0.0, spread=0.0))
    for check in ("zero", "monotone", "processing", "additivity"):
        assert (found[check]["mean"], found[check]["interval"]) == (None, None)
        assert found[check]["verdict"] == "undecided"


def test_the_tolerance_is_a_share_of_what_is_wanted() -> None:
    assert verdicts(additivity_4=estimate(3.7))["additivity"]["verdict"] == "holds"
    assert verdicts(processing_4=estimate(1.7))["processing"]["verdict"] == "fails"


def test_the_least_step_is_shown() -> None:
    found = verdicts(baseline_4=estimate(3.9))["monotone"]
    assert found["mean"] == pytest.approx(0.025)
    falling = verdicts(baseline_4=estimate(4.2))["monotone"]
    assert falling["mean"] == pytest.approx(-0.05)


@given(r=st.floats(0.2, 3), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_what_a_ratio_shares_with_its_divisor_has_no_error(r: float, seed: int) -> None:
    below = estimate(3.0, spread=0.5, seed=seed)
    above = Estimate.of([[r * value for value in row] for row in below.batches])
    found = self_consistency.ratio(above, below)
    assert found is not None
    assert found.mean == pytest.approx(r)
    assert found.interval == pytest.approx((r, r), abs=1e-9)


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(60):
        above, below = (m + generator.normal(0, 0.5, (3, 10)) for m in (4.0, 2.0))
        found = self_consistency.ratio(Estimate.of(above.tolist()), Estimate.of(below.tolist()))
        assert found is not None
        covered += found.interval[0] <= 2.0 <= found.interval[1]
    assert covered >= 54


@pytest.mark.parametrize(
    ("interval", "decided"),
    [
        ((0.91, 1.09), "holds"),
        ((0.89, 1.0), "undecided"),
        ((1.0, 1.11), "undecided"),
        ((0.5, 0.89), "fails"),
        ((1.11, 1.2), "fails"),
        ((0.5, 1.5), "undecided"),
        ((0.85, 0.95), "undecided"),
        ((1.05, 1.2), "undecided"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(interval: tuple[float, float], decided: str) -> None:
    assert self_consistency.verdict(interval, 1.0, 0.1) == decided


def test_the_pairs_are_what_they_are_called(job: self_consistency.Job) -> None:
    first, second = self_consistency.halves(job)
    assert first.shape == second.shape == (120, 1, HEIGHT, 6)
    numbers = torch.cat([first, second])[:, 0, 0, 0]
    assert sorted(numbers.tolist()) == list(range(240))
    found = self_consistency.pairs(job, first, second)
    assert list(found) == list(PLANTED)
    # What is checked is divided by the baseline of the same rows, asked for or not.
    assert list(self_consistency.pairs(replace(job, rows=(0,)), first, second)) == list(PLANTED)
    assert torch.equal(found["baseline-8"][1], first)
    assert float(found["baseline-0"][1].float().abs().sum()) == 0
    x, y = found["processing-4"]
    assert torch.equal(x, first)
    assert torch.equal(y[:, :, :4], first[:, :, :4])
    assert torch.equal(y[:, :, 8:10], first[:, :, :2])
    assert float(y[:, :, 4:8].float().sum() + y[:, :, 10:].float().sum()) == 0
    x, y = found["additivity-4"]
    assert torch.equal(x, torch.cat([first, second], 2))
    assert torch.equal(y[:, :, :4], first[:, :, :4])
    assert torch.equal(y[:, :, 8:12], second[:, :, :4])
    assert found["independent"][0] is first
    assert found["independent"][1] is second


def test_every_bound_is_checked_with_its_own_estimates(
    job: self_consistency.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = iter(PLANTED.values())

    class Report:
        flags = ()

        def __init__(self) -> None:
            mean = next(means)
            self.estimates = {"dv": estimate(mean), "smile": estimate(3 * mean + 1)}

    monkeypatch.setattr(self_consistency, "sample_information", lambda *a, **k: Report())
    results = run(job, tmp_path / "run")
    found = {(c["bound"], c["check"]): c["mean"] for c in results["checks"]}
    processing, additivity = (
        "I(X; [Y(4), Y(2)]) / I(X; Y(4))",
        "I([X, X']; [Y(4), Y'(4)]) / I(X; Y(4))",
    )
    assert found["dv", processing] == pytest.approx(2.02 / 2)
    assert found["dv", additivity] == pytest.approx(3.98 / 2)
    assert found["smile", processing] == pytest.approx((3 * 2.02 + 1) / 7)
    assert found["smile", additivity] == pytest.approx((3 * 3.98 + 1) / 7)
    assert [p["mean"] for p in results["baseline"]["smile"]] == pytest.approx(
        [1.003 / 13, 7 / 13, 1]
    )
    assert [p["rows"] for p in results["baseline"]["dv"]] == [0, 4, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def results(job: self_consistency.Job, folder: Path) -> dict[str, Any]:
    return run(job, folder)


def test_real_estimates_are_shown(job: self_consistency.Job, results: dict[str, Any]) -> None:
    assert results["pairs"] == 120
    first, second = self_consistency.halves(job)
    direct = sample_information(
        first,
        second,
        bounds=job.bounds,
        trials=2,
        seed=0,
        config=SampleConfig(steps=10, batch_size=32),
    )
    shown = results["estimates"]["independent"]
    for bound, found in shown["bounds"].items():
        assert found["mean"] == pytest.approx(direct.estimates[bound].mean)
        assert found["interval"] == pytest.approx(list(direct.estimates[bound].interval))
    assert shown["flags"] == [flag.name for flag in direct.flags]

    text = as_text(self_consistency.tables(results))
    for name, found in results["estimates"].items():
        low, high = found["bounds"]["dv"]["interval"]
        cell = f"{found['bounds']['dv']['mean']:.2f} ({low:.2f}, {high:.2f})"
        assert any(name in line and cell in line for line in text.splitlines()), (name, cell)
        assert all(flag in text for flag in found["flags"])
    for check in results["checks"]:
        words = (check["bound"], check["check"], check["verdict"])
        assert any(all(word in line for word in words) for line in text.splitlines()), words
    held = sum(c["verdict"] == "holds" for c in results["checks"] if c["bound"] == "smile")
    assert f"smile {held} of 5" in text


def test_a_second_run_estimates_nothing_anew(
    job: self_consistency.Job,
    folder: Path,
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "stages" / "additivity-4.json").unlink()
    asked = []

    def counted(*pair: Any, **options: Any) -> Any:
        asked.append(pair[0].shape[2])
        return sample_information(*pair, **options)

    monkeypatch.setattr(self_consistency, "sample_information", counted)
    assert run(job, folder) == results
    assert asked == [2 * HEIGHT]


def test_the_figure_draws_the_ratios(
    job: self_consistency.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means = iter(PLANTED.values())

    class Report:
        flags = ()

        def __init__(self) -> None:
            mean = next(means)
            self.estimates = {"dv": estimate(mean), "smile": estimate(mean + 0.1)}

    monkeypatch.setattr(self_consistency, "sample_information", lambda *a, **k: Report())
    results = run(job, tmp_path / "run")
    left, right = self_consistency.figure(results).axes
    for number, bound in enumerate(job.bounds):
        line = left.containers[number].lines[0]
        assert list(line.get_xdata()) == [0, 4, 8]
        wanted = [point["mean"] for point in results["baseline"][bound]]
        assert list(line.get_ydata()) == pytest.approx(wanted)
        ratios = [
            check["mean"]
            for check in results["checks"]
            if check["bound"] == bound and check["wanted"] in "12"
        ]
        assert list(right.containers[number].lines[0].get_xdata()) == pytest.approx(ratios)


def independent(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (1000, 3) if kind == "vectors" else (600, 1, 8, 8)
    x, z = torch.randn(2, *shape, generator=generator)
    return x, z


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_independent_samples_have_no_information(kind: str) -> None:
    config = SampleConfig(steps=25, batch_size=64, learning_rate=3e-3, members=1)
    for seed in range(3):
        report = sample_information(*independent(kind, seed), trials=3, seed=seed, config=config)
        for bound, found in report.estimates.items():
            assert found.interval[0] <= 0 <= found.interval[1], (seed, bound)
            assert abs(found.mean) < 0.05


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_dependent_samples_of_that_size_have_some(kind: str) -> None:
    config = SampleConfig(steps=25, batch_size=64, learning_rate=3e-3, members=1)
    x, noise = independent(kind, 0)
    report = sample_information(x, x + 0.5 * noise, trials=3, config=config)
    for found in report.estimates.values():
        assert found.interval[0] > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": (0, 9)}, "rows has 9, wanted 0 to the height, 8"),
        ({"checked": (-1,)}, "rows has -1, wanted 0 to the height, 8"),
        ({"checked": (1,)}, "checked has 1, wanted fewer = 2 rows or more"),
        ({"images": 60}, "x has 30 rows, wanted 100 or more"),
    ],
)
def test_bad_settings_are_told(
    job: self_consistency.Job, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(replace(job, **options), tmp_path / "run")


def test_vectors_are_told(job: self_consistency.Job, tmp_path: Path) -> None:
    path = saved(tmp_path, np.zeros((200, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=r"data is .*, with rows of shape \(5,\), wanted images"):
        self_consistency.halves(replace(job, data=path))
