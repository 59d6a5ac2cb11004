"""Information between two samples, by all bounds from one training (spec sections 2 and 8)."""

from __future__ import annotations

import difflib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcmi_fast.diagnosis import versions
from wcmi_fast.information import flags, sample_critic
from wcmi_fast.information.job import digest_of
from wcmi_fast.information.results import Estimate, Evidence, Flag
from wcmi_fast.information.sample_critic import (
    SWEEP_ROWS,
    TRAININGS,
    Critic,
    Member,
    Pair,
    SampleConfig,
)
from wcmi_fast.information.sample_report import SampleReport
from wcmi_fast.information.towers import is_image
from wcmi_fast.progress import Progress, shown
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded

Sample = Tensor | np.ndarray[Any, Any]
BOUNDS = tuple(TRAININGS)
# smile clamps scores, and is no lower bound: its largest value proves nothing.
LOWER_BOUNDS = ("dv", "infonce", "nwj", "mine")
# Equal parts of the test rows, whose values the interval is made of.
PARTS = 20
LEAST_ROWS = 100
# Critics know fewer rows than these by heart; a round number, not a measured one.
FEW_ROWS = 1000


def sample_information(
    x: Sample,
    z: Sample,
    *,
    bounds: Sequence[str] = ("dv", "infonce", "nwj", "smile"),
    trials: int = 1,
    seed: int = 0,
    config: SampleConfig | None = None,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> SampleReport:
    """Estimate the information I(x; z) between two samples, in nats.

    Half of the rows train separable critics (`towers`), by the mean of dv and infonce: dv alone
    overfits, and infonce alone leaves a function of z open that dv needs. A fifth of them validate
    each critic and stop it early; a critic that is no better than a constant there counts as one,
    whose bounds are 0. On the other half one sweep over the scores gives every bound but mine, for
    whose gradient critics of its own are trained.

    Args:
        x: sample (N, ...), N at least 100, floating point, integers or bool; images are
            (N, 1 or 3, H, W), uint8 or floating point. Other shapes are taken as vectors.
        z: the other sample (N, ...), row i belonging to row i of x.
        bounds: "dv", "infonce", "nwj", "smile" (tau 5) or "mine", one at least.
        trials: how often critics are trained anew.
        seed: decides the split into halves (the same in every trial), weights and order.
        config: how to train.
        device: where to compute.
        folder: for the trials' results; the same call goes on there after an interruption.
        progress: whether to show a bar on stderr; None does on a terminal.

    Returns:
        Every bound, and which of the lower bounds to take: that of the highest validation value.

    Raises:
        TypeError, ValueError: samples or options that do not fit; a folder of another run.
        FloatingPointError: no finite value was found.
        OSError: the folder cannot be written to, or the disk is full.

    Equivalent torch program, towers f and g trained before, on the other half's rows::

        T = f(x) @ g(z).T
        T.diagonal().mean() - (T[off_diagonal].logsumexp(0) - math.log(N * (N - 1)))

    Source: Zhu et al. 2020, section 2; Belghazi et al. 2018; van den Oord et al. 2018; Poole et
    al. 2019.
    """
    begin = time.monotonic()
    _check_options(bounds, trials, seed)
    rows = _rows("x", x), _rows("z", z)
    _check_pair(*rows)
    config = _with_members(config or SampleConfig(), rows)
    run = None if folder is None else RunFolder(Path(folder))
    settings = _settings(rows, bounds, trials, seed, config, device)
    if run is not None:
        run.claim("sample_information", settings)
    halves = _halves(rows, seed, config, _checked_device(device))
    trainings = sorted({TRAININGS[name] for name in bounds})
    with shown(progress, trials * len(trainings) * (config.members or 1) * config.steps) as bar:
        found = [
            _stage(
                run, f"trial-{trial}", _Work(halves, bounds, trainings, config, seed, trial, bar)
            )
            for trial in range(trials)
        ]
    return _report(found, bounds, halves, settings, time.monotonic() - begin)


@dataclass(frozen=True)
class _Halves:
    """Rows of x and z to train on, and to test on."""

    train: Pair
    test: Pair


@dataclass(frozen=True)
class _Work:
    """One trial."""

    halves: _Halves
    bounds: Sequence[str]
    trainings: Sequence[str]
    config: SampleConfig
    seed: int
    trial: int
    bar: Progress

    def __call__(self) -> dict[str, Any]:
        """Train the critics of a trial and test them."""
        self.bar.say(f"trial {self.trial + 1}")
        critics = {training: self._critic(training) for training in self.trainings}
        values, validation = {}, {}
        for name in self.bounds:
            critic = critics[TRAININGS[name]]
            values[name] = _parts(critic, self.halves.test, name)
            validation[name] = _validation(critic, name)
        seen = [each for critic in critics.values() for each in _evidence(critic, self.halves.test)]
        return {"values": values, "validation": validation, "evidence": list(map(asdict, seen))}

    def _critic(self, training: str) -> Critic:
        with seeded(self.seed, "samples", training, self.trial) as generator:
            return sample_critic.train(
                self.halves.train, training, self.config, generator, self.bar.advance
            )


def _stage(run: RunFolder | None, name: str, work: _Work) -> Mapping[str, Any]:
    """Do a trial, or read what an interrupted call had found."""
    if run is None:
        found: Mapping[str, Any] = json.loads(json.dumps(work()))
        return found
    if run.stage_result(name) is not None:
        work.bar.advance(len(work.trainings) * (work.config.members or 1) * work.config.steps)
    return run.stage(name, work)


def _validation(critic: Critic, bound: str) -> float:
    """Return the mean of the members' bounds, in nats, each on its own validation rows."""
    if not critic.useful:
        return 0.0
    return fmean(sample_critic.value(m, m.checked, bound) for m in critic.members)


def _parts(critic: Critic, test: Pair, bound: str) -> list[float]:
    """Return a bound on equal parts of the test rows; their mean is the bound of all of them.

    Rows beyond `SWEEP_ROWS` make further sweeps, of equal size, as the value depends on it. Where
    critics were of no use, the critic is a constant.
    """
    if not critic.useful:
        return [0.0] * PARTS
    sweeps, size = _sweeps(len(test[0]))
    shares = [
        sample_critic.contributions(critic, x, z, (bound,))[0].unflatten(0, (PARTS, -1)).mean(1)
        for x, z in zip(*(side[: sweeps * size].split(size) for side in test), strict=True)
    ]
    found: list[float] = torch.stack(shares).mean(0).tolist()
    if not all(map(math.isfinite, found)):
        raise FloatingPointError(
            f"sample_information: the bound {bound!r} is {fmean(found)} on the test rows, wanted a "
            "finite value: try another of bounds, or a lower learning_rate"
        )
    return found


def _sweeps(rows: int) -> tuple[int, int]:
    """Return the number of sweeps over so many rows, and the size of each, a multiple of PARTS."""
    sweeps = math.ceil(rows / SWEEP_ROWS)
    return sweeps, rows // sweeps // PARTS * PARTS


def _evidence(critic: Critic, test: Pair) -> list[Evidence]:
    spread = sample_critic.spread(critic, test) if critic.useful else 0.0
    return [_member_evidence(member, test, spread) for member in critic.members]


def _member_evidence(member: Member, test: Pair, spread: float) -> Evidence:
    values = [sample_critic.value(member, rows, "dv") for rows in (member.fitted, test)]
    return Evidence(
        train_value=values[0] if spread else 0.0,
        test_value=values[1] if spread else 0.0,
        curve=member.curve,
        trace=(),
        zero_gradients=0.0,
        nonfinite_gradients=0.0,
        score_spread=spread,
        best_batch=member.best_step,
    )


def _report(
    found: Sequence[Mapping[str, Any]],
    bounds: Sequence[str],
    halves: _Halves,
    settings: Mapping[str, Any],
    seconds: float,
) -> SampleReport:
    estimates = {name: Estimate.of([each["values"][name] for each in found]) for name in bounds}
    validation = {name: fmean(each["validation"][name] for each in found) for name in bounds}
    evidence = tuple(Evidence.of(member) for each in found for member in each["evidence"])
    eligible = [name for name in bounds if name in LOWER_BOUNDS] or list(bounds)
    best = max(eligible, key=lambda name: validation[name])
    return SampleReport(
        estimates=estimates,
        validation=validation,
        best=best,
        flags=_doubts(estimates[best], best, evidence, halves),
        evidence=evidence,
        settings=settings,
        seconds=seconds,
    )


def _doubts(
    estimate: Estimate, bound: str, evidence: tuple[Evidence, ...], halves: _Halves
) -> tuple[Flag, ...]:
    _, rows = _sweeps(len(halves.test[0]))
    found = (
        flags.near_log_n("information", estimate.mean, bound=bound, n=rows),
        flags.negative("information", estimate),
        flags.critic_gap("information", estimate, evidence),
        _constant_critic(evidence),
        _few_rows(len(halves.train[0])),
        flags.one_trial([estimate]),
    )
    return tuple(flag for flag in found if flag is not None)


def _constant_critic(evidence: tuple[Evidence, ...]) -> Flag | None:
    constant = sum(each.score_spread == 0 for each in evidence)
    if not constant:
        return None
    return Flag(
        "collapsed_critic",
        f"{constant} of {len(evidence)} critics count as a constant, whose bounds are 0: most of "
        "their trial's were no better on the rows that validate them. Either there is no "
        "information, or critics of this size do not find it in so many rows.",
    )


def _few_rows(train: int) -> Flag | None:
    if train >= FEW_ROWS:
        return None
    return Flag(
        "few_samples",
        f"{train} rows train the critics, wanted {FEW_ROWS} or more: what they learn by heart "
        "lowers the value.",
    )


# ---- rows ---------------------------------------------------------------------------------------


def _halves(rows: Pair, seed: int, config: SampleConfig, device: torch.device) -> _Halves:
    """Split at random; what makes vectors normal is fitted to the training half."""
    with seeded(seed, "samples", "split") as generator:
        order = torch.randperm(len(rows[0]), generator=generator)
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    x, z = (_prepared(side, train, config).to(device) for side in rows)
    return _Halves((x[train], z[train]), (x[test], z[test]))


def _prepared(rows: Tensor, train: Tensor, config: SampleConfig) -> Tensor:
    if is_image(tuple(rows.shape[1:])):
        return rows.float() / 255 if rows.dtype == torch.uint8 else rows.float()
    flat = rows.flatten(1).double()
    if config.normal_scores:
        return _normal_scores(flat, flat[train]).float()
    mean, deviation = flat[train].mean(0), flat[train].std(0)
    return ((flat - mean) / deviation.where(deviation > 0, 1.0)).float()


def _normal_scores(rows: Tensor, known: Tensor) -> Tensor:
    """Return normal quantiles of each coordinate's rank among the known rows; the mean of equals'.

    Args:
        rows, known: (N, D) and (M, D), float64.
    """
    ordered, values = known.sort(0).values.T.contiguous(), rows.T.contiguous()
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    scores: Tensor = torch.special.ndtri((0.5 * (below + upto) + 0.5) / (len(known) + 1))
    return scores.T


# ---- arguments ----------------------------------------------------------------------------------


def _with_members(config: SampleConfig, rows: Pair) -> SampleConfig:
    if config.members is not None:
        return config
    images = any(is_image(tuple(side.shape[1:])) for side in rows)
    return replace(config, members=1 if images else 3)


def _settings(
    rows: Pair,
    bounds: Sequence[str],
    trials: int,
    seed: int,
    config: SampleConfig,
    device: str | torch.device,
) -> dict[str, Any]:
    return {
        "measured": "sample_information",
        "x_shape": list(rows[0].shape),
        "z_shape": list(rows[1].shape),
        "data_sha256": digest_of(rows),
        "bounds": list(bounds),
        "trials": trials,
        "seed": seed,
        **asdict(config),
        "device": str(device),
        **versions(),
    }


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"sample_information: device is {str(device)!r}, wanted one that torch can use here, "
            f"such as 'cpu' ({str(error).splitlines()[0]})"
        ) from error


def _rows(name: str, given: Sample) -> Tensor:
    if not isinstance(given, (Tensor, np.ndarray)):
        raise TypeError(
            f"sample_information: {name} is a {type(given).__name__}, wanted a tensor or an array"
        )
    try:
        rows = torch.as_tensor(given).detach()
    except TypeError as error:  # an array of objects, or of strings
        raise TypeError(
            f"sample_information: {name} is an array of {given.dtype}, wanted real numbers"
        ) from error
    if rows.is_complex():
        raise TypeError(f"sample_information: {name} has dtype {rows.dtype}, wanted real numbers")
    if rows.ndim == 0 or (rows.ndim > 1 and not rows[:1].numel()):
        raise ValueError(
            f"sample_information: {name} has shape {tuple(rows.shape)}, wanted (N, ...), a row for "
            "each observation"
        )
    if rows.is_floating_point() and not bool(rows.isfinite().all()):
        raise ValueError(
            f"sample_information: {name} has NaN or infinite values, wanted finite ones"
        )
    return rows[:, None] if rows.ndim == 1 else rows


def _check_pair(x: Tensor, z: Tensor) -> None:
    if len(x) != len(z):
        raise ValueError(
            f"sample_information: x has {len(x)} rows and z has {len(z)}, wanted as many: row i of "
            "z belongs to row i of x"
        )
    if len(x) < LEAST_ROWS:
        raise ValueError(
            f"sample_information: x has {len(x)} rows, wanted {LEAST_ROWS} or more: half of them "
            "train, the others test"
        )


def _check_options(bounds: Sequence[str], trials: int, seed: int) -> None:
    if not bounds or isinstance(bounds, str):
        raise ValueError(f"sample_information: bounds is {bounds!r}, wanted a tuple of {BOUNDS}")
    for name in bounds:
        if name not in BOUNDS:
            close = difflib.get_close_matches(str(name), BOUNDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"sample_information: bounds has {name!r}, wanted names out of {BOUNDS}{hint}"
            )
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"sample_information: trials is {trials!r}, wanted an integer, 1 or more")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"sample_information: seed is {seed!r}, wanted an integer")
