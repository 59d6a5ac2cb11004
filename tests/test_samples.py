"""Information between two samples."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wcmi_fast import reference
from wcmi_fast.experiments.distributions import TASKS
from wcmi_fast.information import sample_critic, samples, towers
from wcmi_fast.information.results import Evidence
from wcmi_fast.information.sample_critic import Critic, Member, SampleConfig
from wcmi_fast.information.sample_report import SampleReport
from wcmi_fast.information.samples import sample_information
from wcmi_fast.progress import Progress

QUICK = SampleConfig(units=4, width=16, members=2, steps=50, batch_size=64, learning_rate=1e-2)
# For what does not depend on how well critics are trained.
BRIEF = replace(QUICK, members=1, steps=10)
EVERY = ("dv", "infonce", "nwj", "smile", "mine")


def correlated(n: int, seed: int = 0, rho: float = 0.9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, 1, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def independent(n: int, seed: int = 0, dim: int = 2) -> tuple[Tensor, Tensor]:
    x, z = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed))
    return x, z


def values(report: SampleReport) -> dict[str, float]:
    return {name: estimate.mean for name, estimate in report.estimates.items()}


class Exact(nn.Module):
    """A side of the critic c (rho xy - rho^2 (x^2 + y^2) / 2) / (1 - rho^2), and an offset."""

    def __init__(self, scale: float, square: float) -> None:
        super().__init__()
        self.scale, self.square = scale, square

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.scale * x, self.square * x**2], 1)


def member(
    scale: float, square: float, *, shift: float = 0.0, curve: tuple[float, ...] = (1.0,)
) -> Member:
    sides = nn.ModuleList([Exact(1.0, square), Exact(scale, square)])
    nothing = (torch.zeros(0, 1), torch.zeros(0, 1))
    return Member(sides, nothing, nothing, curve, 0, shift)


def scores(critic: Critic | Member, x: Tensor, z: Tensor) -> Tensor:
    """T, representations z[i] in rows, as the bounds have it."""
    left, right = critic.sides(x, z)
    return (left @ right[:, 0].T)[:, :, None]


# ---- bounds of a fixed critic -------------------------------------------------------------------


def test_shares_of_the_rows_add_up_to_the_bounds() -> None:
    critic = member(3.0, -0.8, shift=0.3)
    x, z = correlated(40)
    T = scores(critic, x, z).double()
    assert T[3, 5, 0] == pytest.approx(
        3 * x[5, 0] * z[3, 0] - 0.8 * (x[5, 0] ** 2 + z[3, 0] ** 2) - 0.3
    )
    found = sample_critic.contributions(critic, x, z, EVERY).mean(1).tolist()
    wanted = [
        reference.dv(T),
        reference.infonce(T),
        reference.nwj(T + 1),
        reference.smile(T, tau=5.0),
        reference.dv(T),
    ]
    assert found == pytest.approx([bound.item() for bound in wanted], rel=1e-5)
    assert len(set(found)) == 4


@pytest.mark.parametrize("bound", ["dv", "nwj", "smile"])
def test_shares_of_the_rows_vary_as_the_bound_does(bound: str) -> None:
    """Also for a critic that is wrong about both sides, whose columns and rows differ."""
    critic = member(0.3, 0.05, shift=-1.0)
    found, errors = [], []
    for seed in range(300):
        shares = sample_critic.contributions(critic, *correlated(200, seed, 0.5), (bound,))[0]
        found.append(float(shares.mean()))
        errors.append(float(shares.std()) / math.sqrt(200))
    assert np.std(found) == pytest.approx(np.median(errors), rel=0.25)


def test_a_critic_is_the_mean_of_its_members() -> None:
    members = (member(1.0, -0.1, shift=0.2), member(2.0, 0.0), member(0.5, 0.1, shift=-1.0))
    x, z = correlated(30)
    wanted = torch.stack([scores(each, x, z) for each in members]).mean(0) - 0.7
    assert scores(Critic(members, 0.7), x, z) == pytest.approx(wanted, abs=1e-5)


def test_validation_is_on_the_rows_that_each_member_did_not_see() -> None:
    members = [
        member(scale, -0.1)._replace(fitted=correlated(40, 1), checked=correlated(30, seed))
        for scale, seed in ((1.0, 2), (2.0, 3))
    ]
    wanted = [reference.infonce(scores(each, *each.checked)).item() for each in members]
    found = samples._validation(Critic(tuple(members)), "infonce")
    assert found == pytest.approx(fmean(wanted), rel=1e-5)
    useless = [each._replace(curve=(-0.1,)) for each in members]
    assert samples._validation(Critic(tuple(useless)), "infonce") == 0


def test_evidence_is_of_each_member_and_the_spread_of_all() -> None:
    fitted, test = correlated(40, 1), correlated(150, 2)
    members = tuple(
        member(scale, -0.1, curve=(0.1, scale))._replace(fitted=fitted, best_step=step)
        for scale, step in ((1.0, 24), (2.0, 49))
    )
    critic = Critic(members, 0.3)
    spread = scores(critic, *(side[:128] for side in test)).std().item()
    for found, each in zip(samples._evidence(critic, test), members, strict=True):
        of_dv = [reference.dv(scores(each, *rows)).item() for rows in (fitted, test)]
        assert [found.train_value, found.test_value] == pytest.approx(of_dv, rel=1e-5)
        assert found.score_spread == pytest.approx(spread, rel=1e-5)
        assert (found.curve, found.best_batch) == (each.curve, each.best_step)
    useless = Critic(tuple(each._replace(curve=(-0.1,)) for each in members))
    for found in samples._evidence(useless, test):
        assert found.train_value == found.test_value == found.score_spread == 0


def test_a_value_is_of_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_critic, "SWEEP_ROWS", 25)
    critic, rows = member(1.0, -0.1), correlated(40)
    wanted = reference.dv(scores(critic, *(side[:25] for side in rows))).item()
    assert sample_critic.value(critic, rows, "dv") == pytest.approx(wanted, rel=1e-5)


def test_trained_scores_are_ratios_of_densities() -> None:
    """Mean exp(T) is 1 over pairs of training rows, for the members on theirs too."""
    rows = correlated(200)
    critic = sample_critic.train(
        rows, "joint", QUICK, torch.Generator().manual_seed(0), lambda steps: None
    )
    for each, known in ((critic, rows), *((m, m.fitted) for m in critic.members)):
        assert reference.log_mean_exp(scores(each, *known)) == pytest.approx(0, abs=1e-4)


def test_members_are_validated_on_different_rows_that_they_did_not_see() -> None:
    rows = correlated(103)
    critic = sample_critic.train(
        rows, "joint", QUICK, torch.Generator().manual_seed(0), lambda steps: None
    )
    seen = [set(each.checked[0].flatten().tolist()) for each in critic.members]
    assert not seen[0] & seen[1]
    for each, checked in zip(critic.members, seen, strict=True):
        fitted = set(each.fitted[0].flatten().tolist())
        assert not fitted & checked
        assert fitted | checked == set(rows[0].flatten().tolist())
        assert len(checked) in (20, 21)


def test_the_weights_of_the_best_validation_value_are_kept() -> None:
    config = replace(QUICK, members=1, steps=200, learning_rate=2e-2, width=64)
    x, z = independent(400, dim=8)
    z[:, 0] = x[:, 0] + 0.5 * z[:, 0]
    critic = sample_critic.train(
        (x, z), "joint", config, torch.Generator().manual_seed(0), lambda steps: None
    )
    (found,) = critic.members
    assert found.best_step == (found.curve.index(max(found.curve)) + 1) * 25 - 1
    assert max(found.curve) > found.curve[-1] + 0.2
    T = scores(found, *found.checked) + found.shift
    value = (reference.dv(T) + reference.infonce(T)) / 2
    assert value == pytest.approx(max(found.curve), abs=1e-4)


def test_a_critic_is_a_constant_where_most_members_are_no_better() -> None:
    good, bad = member(1.0, 0.0, curve=(-0.2, 0.1)), member(1.0, 0.0, curve=(-0.2, -0.1))
    assert Critic((good, good, bad), 0.0).useful
    assert not Critic((good, bad, bad), 0.0).useful
    assert not Critic((bad,), 0.0).useful


# ---- estimates ----------------------------------------------------------------------------------


def test_every_bound_is_near_the_truth() -> None:
    config = SampleConfig(members=1, width=32, steps=150)
    report = sample_information(*correlated(3000, rho=0.75), config=config, bounds=EVERY)
    assert list(report.estimates) == list(EVERY)
    for estimate in report.estimates.values():
        assert estimate.mean == pytest.approx(0.4133, abs=0.04)
        assert estimate.interval[0] < 0.4133 < estimate.interval[1]
        assert 0.005 < estimate.standard_error < 0.03
    assert report.information is report.estimates[report.best]


@pytest.mark.parametrize("dim", [1, 8])
def test_independent_samples_have_no_information(dim: int) -> None:
    report = sample_information(*independent(1000, dim=dim), config=QUICK, bounds=EVERY)
    for estimate in report.estimates.values():
        assert estimate.interval[0] <= 0 <= estimate.interval[1]
    assert "collapsed_critic" in [flag.name for flag in report.flags]
    assert set(values(report).values()) == {0.0}


def test_estimates_are_of_the_half_that_critics_do_not_see() -> None:
    """Rows after training decide them: pairs that are shuffled there leave nothing."""
    x, z = correlated(600)
    config, cpu = replace(QUICK, normal_scores=False), torch.device("cpu")
    halves = samples._halves((x, z), 0, config, cpu)
    seen = torch.cat([halves.train[0], halves.test[0]]).flatten()
    assert (len(halves.train[0]), len(halves.test[0])) == (300, 300)
    assert len(seen.unique()) == 600
    other = samples._halves((x, z), 1, config, cpu).test[0]
    assert not torch.equal(other.sort(0).values, halves.test[0].sort(0).values)
    generator = torch.Generator().manual_seed(0)
    critic = sample_critic.train(halves.train, "joint", QUICK, generator, lambda steps: None)
    known = samples._parts(critic, halves.test, "dv")
    broken = samples._parts(critic, (halves.test[0], halves.test[1].roll(1, 0)), "dv")
    assert fmean(known) > 0.5
    assert fmean(broken) < 0


@pytest.mark.parametrize("normal_scores", [True, False])
def test_what_makes_vectors_normal_knows_nothing_of_the_test_half(normal_scores: bool) -> None:
    config, cpu = replace(QUICK, normal_scores=normal_scores), torch.device("cpu")
    numbers = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    x = torch.randn(200, 2) * torch.tensor([1.0, 50.0])
    halves = samples._halves((numbers, x), 0, config, cpu)
    tested = (255 * halves.test[0][:, 0, 0, 0]).round().long()
    other = x.clone()
    other[tested] = 9 * other[tested] - 40
    assert torch.equal(samples._halves((numbers, other), 0, config, cpu).train[1], halves.train[1])
    assert halves.train[1].std(0) == pytest.approx(torch.ones(2), abs=0.1)


def test_parts_are_equal_and_their_mean_is_the_bound_of_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic, test = Critic((member(3.0, -0.8),), 0.0), correlated(130)
    known = [side[:120] for side in test]
    found = samples._parts(critic, test, "dv")
    assert len(found) == samples.PARTS
    assert fmean(found) == pytest.approx(reference.dv(scores(critic, *known)).item(), rel=1e-5)
    shares = sample_critic.contributions(critic, *known, ("dv",))[0]
    assert found[1] == pytest.approx(shares[6:12].mean().item())

    monkeypatch.setattr(samples, "SWEEP_ROWS", 70)  # two sweeps of 60
    sweeps = [[side[:60] for side in test], [side[60:120] for side in test]]
    wanted = fmean(reference.infonce(scores(critic, *each)).item() for each in sweeps)
    assert fmean(samples._parts(critic, test, "infonce")) == pytest.approx(wanted, rel=1e-5)


def test_normal_scores_make_invertible_maps_of_coordinates_irrelevant() -> None:
    x, z = correlated(400)
    plain = sample_information(x, z, config=BRIEF)
    bent = sample_information(x.double().exp(), -(z.double() ** 3), config=BRIEF)
    mirrored = sample_information(x, -z, config=BRIEF)
    assert values(bent) == values(mirrored)
    assert values(bent) != values(plain)
    without = replace(BRIEF, normal_scores=False)
    linear = sample_information(x, z, config=without)
    assert values(sample_information(5 * x.double(), z, config=without)) == pytest.approx(
        values(linear), abs=1e-3
    )
    assert values(linear) != pytest.approx(values(plain), abs=1e-4)


def test_normal_scores_are_quantiles_of_ranks_in_the_training_half() -> None:
    known = torch.tensor([[0.0], [1.0], [1.0], [3.0]], dtype=torch.float64)
    rows = torch.tensor([[-9.0], [0.0], [1.0], [2.0], [99.0]], dtype=torch.float64)
    shares = torch.special.ndtr(samples._normal_scores(rows, known)).flatten()
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.5, 0.7, 0.9])


def test_a_constant_coordinate_does_no_harm() -> None:
    x, z = correlated(400)
    flat = torch.cat([x, torch.full_like(x, 7.0)], 1)
    for scores_ in (True, False):
        config = replace(QUICK, normal_scores=scores_)
        assert values(sample_information(flat, z, config=config))["dv"] > 0.3


def test_rows_of_any_shape_and_type_are_vectors() -> None:
    x, z = correlated(400)
    wanted = values(sample_information(x, z, config=BRIEF))
    assert values(sample_information(x[:, 0].numpy(), z.double().numpy(), config=BRIEF)) == wanted
    assert values(sample_information(x[:, None, :], z.requires_grad_(), config=BRIEF)) == wanted
    six = torch.randn(400, 6) + z.detach()
    assert values(sample_information(six, z, config=BRIEF)) == values(
        sample_information(six.reshape(400, 2, 3), z, config=BRIEF)
    )
    whole = (100 * six).int()
    assert values(sample_information(whole, z > 0, config=QUICK))["infonce"] > 0.1


def test_images_have_convolutions_and_bytes_are_images() -> None:
    level = torch.linspace(0, 1, 400)[torch.randperm(400)]
    images = (200 * level[:, None, None, None] + 50 * torch.rand(400, 1, 8, 8)).byte()
    config = replace(QUICK, members=None)
    report = sample_information(images, level, config=config)
    assert report.settings["members"] == 1
    assert values(report)["dv"] > 0.5
    assert values(sample_information(images / 255, level, config=config)) == values(report)
    assert isinstance(towers.new_tower((3, 4, 4), 2, 8), towers.ImageTower)
    assert isinstance(towers.new_tower((32,), 2, 8), towers.VectorTower)
    assert not towers.is_image((2, 8, 8))
    assert not towers.is_image((1, 3, 8))
    vectors = sample_information(*correlated(200), config=replace(config, steps=1))
    assert vectors.settings["members"] == 3


def test_the_same_seed_gives_the_same_numbers() -> None:
    pair = correlated(300)
    state = torch.get_rng_state()
    first = sample_information(*pair, seed=1, config=BRIEF)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert values(sample_information(*pair, seed=1, config=BRIEF)) == values(first)
    assert values(sample_information(*pair, seed=2, config=BRIEF)) != values(first)


def test_trials_train_anew_and_test_on_the_same_rows() -> None:
    report = sample_information(*correlated(400), trials=3, config=QUICK)
    rows = report.information.batches
    assert len(rows) == 3
    assert len(set(rows)) == 3
    assert np.corrcoef(rows[0], rows[1])[0, 1] > 0.9
    assert len(report.evidence) == 6
    assert "one_trial" not in [flag.name for flag in report.flags]


def test_bounds_share_one_training_but_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    train = sample_critic.train

    def watched(rows: Any, training: str, *others: Any) -> Critic:
        trained.append(training)
        return train(rows, training, *others)

    monkeypatch.setattr(sample_critic, "train", watched)
    pair = correlated(300)
    together = sample_information(*pair, bounds=EVERY, config=BRIEF)
    assert trained == ["joint", "mine"]
    for name in EVERY:
        alone = sample_information(*pair, bounds=(name,), config=BRIEF)
        assert values(alone)[name] == values(together)[name]
        assert alone.best == name
    assert values(together)["mine"] != values(together)["dv"]


def test_the_best_bound_is_that_of_the_validation_rows_and_never_smile() -> None:
    seen = Evidence(
        train_value=1.0,
        test_value=1.0,
        curve=(1.0,),
        trace=(),
        zero_gradients=0.0,
        nonfinite_gradients=0.0,
        score_spread=1.0,
        best_batch=0,
    )
    found: dict[str, Any] = {
        "values": {name: [k, k + 0.1] for k, name in enumerate(EVERY)},
        "validation": {"dv": 0.3, "infonce": 0.2, "nwj": 0.1, "smile": 9.0, "mine": 0.0},
        "evidence": [vars(seen)],
    }
    pair = (torch.zeros(500, 1), torch.zeros(500, 1))
    halves = samples._Halves(pair, pair)
    for k, name in enumerate(EVERY):
        if name != "smile":
            other = found | {"validation": found["validation"] | {name: 1.0}}
            report = samples._report([other], EVERY, halves, {}, 0.0)
            assert report.best == name
            assert report.information.mean == pytest.approx(k + 0.05)
    assert samples._report([found], ("smile",), halves, {}, 0.0).best == "smile"


# ---- doubts -------------------------------------------------------------------------------------


def flagged(report: SampleReport) -> set[str]:
    return {flag.name for flag in report.flags}


def test_information_beyond_what_the_rows_can_show_is_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "SWEEP_ROWS", 40)  # four sweeps of 20 of 150 rows
    x = torch.randn(300, 3)
    found = sample_information(x, x, bounds=("infonce",), config=replace(QUICK, steps=150))
    assert {"near_log_n", "critic_gap"} <= flagged(found)
    assert found.information.mean < math.log(20)
    assert "2.996 = log 20" in found.flags[0].sentence


def test_what_is_learned_well_from_many_rows_is_not_doubted() -> None:
    found = sample_information(*correlated(2000), config=QUICK)
    assert flagged(found) == {"one_trial"}
    assert "few_samples" in flagged(sample_information(*correlated(1998), config=BRIEF))


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_is_shown_and_written_with_its_numbers() -> None:
    report = sample_information(*correlated(300), config=BRIEF)
    text = str(report)
    for name, estimate in report.estimates.items():
        row = next(line for line in text.splitlines() if line.startswith(f"│ {name}"))
        assert f"{estimate.mean:.4f}" in row
        assert f"{estimate.interval[0]:.4f} to {estimate.interval[1]:.4f}" in row
        assert ("(best)" in row) == (name == report.best)
    assert "one_trial" in text
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["estimates"]["dv"]["mean"] == report.estimates["dv"].mean
    assert found["best"] == report.best
    assert found["settings"]["batch_size"] == 64
    (axes,) = report.plot().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(report.estimates)
    drawn = [bar.lines[0].get_xdata()[0] for bar in axes.containers]
    assert drawn == [estimate.mean for estimate in report.estimates.values()]


def test_settings_say_all_that_the_numbers_depend_on() -> None:
    x, _ = correlated(120)
    config = replace(BRIEF, steps=1)
    found = sample_information(x, x + torch.randn(120, 3), seed=4, config=config, device="cpu:0")
    wanted = {
        "x_shape": [120, 1],
        "z_shape": [120, 3],
        "bounds": ["dv", "infonce", "nwj", "smile"],
        "trials": 1,
        "seed": 4,
        "device": "cpu:0",
        "torch": torch.__version__,
        **asdict(config),
    }
    assert {key: found.settings[key] for key in wanted} == wanted


def test_an_interrupted_estimate_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = correlated(300)
    wanted = sample_information(*pair, trials=2, config=BRIEF)
    train, calls = sample_critic.train, []

    def once(*arguments: Any) -> Critic:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sample_critic, "train", once)
        with pytest.raises(KeyboardInterrupt):
            sample_information(*pair, trials=2, config=BRIEF, folder=tmp_path)
        calls.clear()
        found = sample_information(*pair, trials=2, config=BRIEF, folder=tmp_path)
        assert len(calls) == 1
    assert values(found) == values(wanted)
    for other in ((pair[0] + 1, pair[1]), (pair[0], pair[1] + 1)):
        with pytest.raises(ValueError, match="holds a run with another data_sha256, wanted"):
            sample_information(*other, trials=2, config=BRIEF, folder=tmp_path)


def test_progress_reaches_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[float] = []
    done: list[float] = []

    def shown(wanted: bool | None, work: float) -> Any:
        totals.append(work)
        return nullcontext(Progress(lambda name: None, done.append))

    monkeypatch.setattr(samples, "shown", shown)
    options: dict[str, Any] = {"trials": 2, "bounds": EVERY, "config": replace(QUICK, steps=3)}
    for folder in (None, tmp_path, tmp_path):
        done.clear()
        sample_information(*correlated(120), folder=folder, **options)
        assert sum(done) == totals[-1] == 2 * 2 * 2 * 3


# ---- errors -------------------------------------------------------------------------------------

X, Z = correlated(120)
SPOILT = X.index_fill(0, torch.tensor([7]), math.nan)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows": ({"z": Z[:100]}, ValueError, "x has 120 rows and z has 100, wanted as many"),
    "few": ({"x": X[:99], "z": Z[:99]}, ValueError, "x has 99 rows, wanted 100 or more"),
    "nan": ({"x": SPOILT}, ValueError, "x has NaN or infinite values"),
    "inf": ({"z": 1 / SPOILT.nan_to_num(0)}, ValueError, "z has NaN or infinite values"),
    "complex": ({"z": Z + 1j}, TypeError, "z has dtype torch.complex64, wanted real numbers"),
    "list": ({"x": [1.0]}, TypeError, "x is a list, wanted a tensor or an array"),
    "words": ({"x": np.array(["a"] * 120)}, TypeError, "x is an array of <U1, wanted real numbers"),
    "scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \(N, ...\)"),
    "empty": ({"x": torch.zeros(120, 0)}, ValueError, r"x has shape \(120, 0\), wanted \(N, ...\)"),
    "bound": ({"bounds": ("infonse",)}, ValueError, "bounds has 'infonse'.*did you mean 'infonce'"),
    "no bound": ({"bounds": ()}, ValueError, r"bounds is \(\), wanted a tuple of"),
    "a word": ({"bounds": "dv"}, ValueError, "bounds is 'dv', wanted a tuple of"),
    "no trials": ({"trials": True}, ValueError, "trials is True, wanted an integer, 1 or more"),
    "no seed": ({"seed": False}, TypeError, "seed is False, wanted an integer"),
    "trials": ({"trials": 0}, ValueError, "trials is 0, wanted an integer, 1 or more"),
    "seed": ({"seed": 0.5}, TypeError, "seed is 0.5, wanted an integer"),
    "device": ({"device": "nowhere"}, ValueError, "device is 'nowhere', wanted one that torch"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_said(name: str) -> None:
    given, error, message = BAD[name]
    with pytest.raises(error, match=f"sample_information: {message}"):
        sample_information(**{"x": X, "z": Z, "config": QUICK, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"units": 0}, "units is 0, wanted an integer, 1 or more"),
        ({"batch_size": 1}, "batch_size is 1, wanted an integer, 2 or more"),
        ({"members": 6}, "members is 6, wanted 5 or fewer"),
        ({"steps": 1.5}, "steps is 1.5, wanted an integer, 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, wanted a finite number"),
        ({"weight_decay": math.inf}, "weight_decay is inf, wanted a finite number"),
        ({"averaging": 1.0}, r"averaging is 1.0, wanted a number in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SampleConfig: {message}"):
        SampleConfig(**given)


def test_the_least_and_the_most_that_fit() -> None:
    few = replace(QUICK, members=5, steps=1, batch_size=2)
    assert sample_information(X[:100], Z[:100], config=few).settings["members"] == 5


def test_a_value_that_is_not_finite_on_the_test_rows() -> None:
    critic = Critic((member(math.inf, 0.0),))
    with pytest.raises(FloatingPointError, match="the bound 'dv' is nan on the test rows"):
        samples._parts(critic, (X, Z), "dv")


def test_training_without_a_finite_value_is_said() -> None:
    config = replace(QUICK, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"sample_information: .* wanted a finite|finite"):
        sample_information(X, Z, config=config)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1v1-normal-0.75", "sparse-5"])
def test_known_information_is_found_within_five_per_cent(name: str) -> None:
    task = TASKS[name]
    report = sample_information(*task.sample(5000, 0), seed=0)
    assert report.information.mean == pytest.approx(task.information, rel=0.05)
