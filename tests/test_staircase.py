"""The staircase: estimates against known information, stair by stair."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.experiments import distributions, staircase
from wcmi_fast.experiments.reproduction import as_text
from wcmi_fast.training.run_folder import RunFolder

TINY = staircase.Job(
    information=(2.0, 6.0), steps=25, test_batches=12, width=16, units=8, learning_rate=1e-2
)


def climb(folder: Path) -> dict[str, Any]:
    """Results as `reproduce` has them, without drawing the figure."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(staircase, "BLOCK", 20)
        patched.setattr(staircase, "BLOCK_BATCHES", 2)
        found = staircase.run(TINY, RunFolder(folder), lambda line: None)
    return {"settings": json.loads(json.dumps(asdict(TINY))), **found}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return climb(tmp_path_factory.mktemp("staircase"))


class Perfect(nn.Module):
    """log p(x, y) / (p(x) p(y)) as a separable critic of (x, |x|^2, 1) and (y, 1, |y|^2)."""

    def __init__(self, information: float, shape: str) -> None:
        super().__init__()
        self.rho, self.shape = math.sqrt(1 - math.exp(-information / 10)), shape

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y if self.shape == "linear" else y.sign() * y.abs() ** (1 / 3)
        noise, one = 1 - self.rho**2, torch.ones(len(x), 1)
        own = [-(self.rho**2) / (2 * noise) * (v**2).sum(1, keepdim=True) for v in (x, y)]
        z = torch.cat([self.rho / noise * x, own[0] - 10 * math.log(noise), one], 1)
        return z, torch.cat([y, one, own[1]], 1)


def perfect_values(information: float, shape: str, name: str, count: int = 100) -> Tensor:
    """Values of an estimate, by the experiment's own evaluation, with the perfect critic."""
    stair = distributions.staircase(information, 20, cubic=shape == "cubic")
    batches = staircase._batches(stair, 64, torch.Generator().manual_seed(1), count)
    wanted = {name: staircase.estimates((5.0,))[name]}
    return staircase._evaluate(Perfect(information, shape), wanted, batches)[name]


@pytest.mark.parametrize("shape", staircase.SHAPES)
@pytest.mark.parametrize("information", [2.0, 6.0])
def test_a_perfect_critic_finds_the_information_of_the_stair(
    shape: str, information: float
) -> None:
    values = perfect_values(information, shape, "nwj (jsd)", 200)
    error = 3 * float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(information, abs=error)
    assert error < 0.05 * information


def test_components_are_correlated_as_the_spec_says() -> None:
    stair = distributions.staircase(4.0, 20)
    batches = list(staircase._batches(stair, 64, torch.Generator().manual_seed(0), 120))
    x, y = (torch.cat(side) for side in zip(*batches, strict=True))
    assert x.shape == y.shape == (120 * 64, 20)
    found = torch.corrcoef(torch.cat([x, y], 1).t())[:20, 20:]
    rho = math.sqrt(1 - math.exp(-2 * 4.0 / 20))
    torch.testing.assert_close(found, rho * torch.eye(20), atol=0.06, rtol=0)


@given(
    values=st.lists(st.floats(-20, 20), min_size=2, max_size=30),
    truth=st.floats(0.5, 10),
)
@settings(max_examples=30)
def test_the_squared_error_is_squared_bias_plus_variance(values: list[float], truth: float) -> None:
    found = staircase.summary("dv", torch.tensor(values, dtype=torch.float64), truth, 64)
    assert found["mse"] == pytest.approx(found["bias"] ** 2 + found["variance"], abs=1e-9)
    assert found["mse"] == pytest.approx(sum((v - truth) ** 2 for v in values) / len(values))
    assert found["mean"] == pytest.approx(found["truth"] + found["bias"])


def test_infonce_saturates_and_is_flagged() -> None:
    assert flags_of_infonce(2.0) == []
    for information in (6.0, 10.0):
        values = perfect_values(information, "linear", "infonce")
        assert float(values.max()) <= math.log(64)
        assert flags_of_infonce(information) == ["near_log_n"]
    assert float(perfect_values(10.0, "linear", "infonce").mean()) > math.log(64) - 0.1


def flags_of_infonce(information: float) -> list[str]:
    values = perfect_values(information, "linear", "infonce")
    found: list[str] = staircase.summary("infonce", values, information, 64)["flags"]
    return found


def test_another_bound_of_the_same_value_is_not_near_its_limit() -> None:
    values = torch.full((10,), 3.9, dtype=torch.float64)
    assert staircase.summary("infonce", values, 6.0, 64)["flags"] == ["near_log_n"]
    assert staircase.summary("smile 5", values, 6.0, 64)["flags"] == []
    assert staircase.summary("smile 5", 2 * values, 6.0, 64)["flags"] == ["near_log_n"]


@pytest.mark.parametrize("value", [float("nan"), -math.inf])
def test_a_critic_that_diverged_is_told(value: float) -> None:
    values = torch.tensor([1.0, value], dtype=torch.float64)
    assert staircase.summary("nwj", values, 6.0, 64)["flags"] == ["diverged"]


@pytest.mark.parametrize("training", staircase.TRAININGS)
def test_every_training_finds_the_information(training: str) -> None:
    job = replace(
        TINY, information=(1.0,), dim=2, steps=250, test_batches=60, width=32, averaging=0.98
    )
    found = staircase._climb(job, "linear", training, "test")
    names = {n for n, e in staircase.estimates(job.taus).items() if e.training == training}
    assert set(found) == names
    for name in names - {"smile 1"}:
        assert found[name]["stairs"][0]["mean"] == pytest.approx(1.0, abs=0.2), name
        assert found[name]["curve"][0] < found[name]["curve"][-1]


def test_a_wrong_estimator_shows_in_its_bias(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = functional.infonce
    monkeypatch.setattr(functional, "infonce", lambda *args, **kw: right(*args, **kw) + 1.0)
    planted = climb(tmp_path)
    for shape in staircase.SHAPES:
        for name, found in planted["stairs"][shape].items():
            shift = 1.0 if name == "infonce" else 0.0
            for stair, true in zip(
                found["stairs"], results["stairs"][shape][name]["stairs"], strict=True
            ):
                assert stair["bias"] == pytest.approx(true["bias"] + shift, abs=1e-5)
                assert stair["variance"] == pytest.approx(true["variance"], rel=1e-3)


def test_an_interrupted_climb_goes_on_to_the_same_numbers(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(job: Any, shape: str, training: str, stage: str) -> dict[str, Any]:
        if stage == breaks_at:
            raise KeyboardInterrupt
        climbed.append(stage)
        return right(job, shape, training, stage)

    climbed: list[str] = []
    right = staircase._climb
    monkeypatch.setattr(staircase, "_climb", recorded)
    breaks_at = "cubic-jsd"
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path)
    breaks_at = ""
    assert climb(tmp_path) == results
    assert len(climbed) == len(set(climbed)) == 10


def test_the_seed_decides_the_numbers() -> None:
    job = replace(TINY, information=(2.0,), steps=5, test_batches=2)
    one, same = (staircase._climb(job, "linear", "dv", "test") for _ in range(2))
    other = staircase._climb(replace(job, seed=1), "linear", "dv", "test")
    assert one == same
    assert one["dv"]["stairs"][0]["mean"] != other["dv"]["stairs"][0]["mean"]


@pytest.mark.parametrize("shape", staircase.SHAPES)
def test_every_stair_is_climbed_on_one_thread(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(information: float, dim: int, *, cubic: bool) -> distributions.Task:
        seen.append((information, dim, cubic, torch.get_num_threads()))
        return right(information, dim, cubic=cubic)

    seen: list[tuple[float, int, bool, int]] = []
    right, before = distributions.staircase, torch.get_num_threads()
    monkeypatch.setattr(distributions, "staircase", recorded)
    try:
        torch.set_num_threads(2)
        staircase._climb(replace(TINY, steps=1, test_batches=2), shape, "dv", "test")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    cubic = shape == "cubic"
    assert seen == [(2.0, 20, cubic, 1), (6.0, 20, cubic, 1)]


def test_weights_are_averaged() -> None:
    slow, fast = nn.Linear(2, 1), nn.Linear(2, 1)
    wanted = 0.75 * slow.weight.detach() + 0.25 * fast.weight.detach()
    staircase._average_(slow, fast, 0.75)
    torch.testing.assert_close(slow.weight.detach(), wanted)


def test_the_table_shows_what_was_found(results: dict[str, Any]) -> None:
    text = as_text(staircase.tables(results))
    for shape in staircase.SHAPES:
        assert f"{shape} data, 12 fresh batches of 64 per stair" in text
        for name, found in results["stairs"][shape].items():
            for stair in found["stairs"]:
                wanted = (name, f"{stair['truth']:g}", f"{stair['bias']:+.3f}")
                assert re.search(".*".join(map(re.escape, wanted)), text), wanted
                assert f"{stair['mse']:.4g}" in text


def test_the_judgement_is_computed(results: dict[str, Any]) -> None:
    assert [each["name"] for each in results["judged"]] == ["dv", "smile 5", "smile inf"]
    for each in results["judged"]:
        stairs = results["stairs"]["linear"][each["name"]]["stairs"]
        largest = max(abs(stair["mean"] / stair["truth"] - 1) for stair in stairs)
        assert each["largest_error"] == pytest.approx(largest)
        assert each["within"] == (largest <= 0.1)
    stairs = {"dv": {"stairs": [{"bias": -0.19, "truth": 2.0}, {"bias": 3.0, "truth": 10.0}]}}
    found = staircase._judged(TINY, stairs, "dv")
    assert found == {"name": "dv", "largest_error": pytest.approx(0.095), "within": True}


def test_the_figure_draws_every_curve_against_the_truth(results: dict[str, Any]) -> None:
    plot = staircase.figure(results)
    panels = iter(plot.axes)
    for shape in staircase.SHAPES:
        for name, found in results["stairs"][shape].items():
            axes = next(panels)
            assert name in axes.get_title() or shape == "cubic"
            drawn = axes.lines[-1]
            assert list(drawn.get_xdata()) == [20, 25, 45, 50]
            assert list(drawn.get_ydata()) == pytest.approx(found["curve"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "staircase: steps is 0, wanted 1 or more"),
        ({"batch_size": 1}, "staircase: batch_size is 1, wanted 2 or more"),
        ({"information": ()}, r"staircase: information is \(\), wanted one number > 0 per stair"),
        ({"taus": (0.0,)}, r"staircase: taus is \(0.0,\), wanted finite numbers > 0"),
    ],
)
def test_bad_settings_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **options)
