"""Information between two samples, by all bounds from one trained critic (spec section 2)."""

from __future__ import annotations

import copy
import difflib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.diagnosis import versions
from wcmi_fast.functional.bounds import CriticStats
from wcmi_fast.information import flags
from wcmi_fast.information.progress import Progress, shown
from wcmi_fast.information.results import Estimate, Evidence, Flag, plain
from wcmi_fast.information.towers import features, new_tower
from wcmi_fast.training.loop import seeded
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Sample = Tensor | np.ndarray[Any, Any]
BOUNDS = ("dv", "infonce", "nwj", "smile")
# smile is no lower bound, so that its largest value proves nothing.
LOWER_BOUNDS = ("dv", "infonce", "nwj")
TAU = 5.0
TEST_BATCHES = 10
VALIDATION = 0.2
CHECK_EVERY = 25
# Test batches of fewer than 50 rows average too few pairs.
FEW_ROWS = 500
CAVEAT = (
    "Lower bounds in expectation: what a critic of this size finds in a sample of this size. The"
    " interval says what other test rows, and critics trained anew, would give; not how far the"
    " truth lies above."
)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to train the critic of two samples.

    Args:
        units: number of features of each side.
        width: of the hidden layers.
        steps: updates at most; the weights of the best validation value are kept.
        batch_size: pairs per update.
        learning_rate: Adam's, lowered along a cosine to 0.
        weight_decay: AdamW's.
        averaging: decay of the running average of the weights, which is what is validated.
        normal_scores: replace each coordinate of vectors by the normal quantile of its rank. It is
            invertible, so that it changes no information, and it tames heavy tails.
    """

    units: int = 16
    width: int = 64
    steps: int = 500
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    averaging: float = 0.99
    normal_scores: bool = True

    def __post_init__(self) -> None:
        for name in ("units", "width", "steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SampleConfig: {name} is {value!r}, wanted an integer, 1 or more")
        if self.batch_size < 2:
            raise ValueError(f"SampleConfig: batch_size is {self.batch_size}, wanted 2 or more")


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """Information between two samples by every bound; prints as a table.

    Attributes:
        estimates: of each bound, on the held-out half.
        validation: of each bound, nats on the validation rows, mean over trials.
        best: the lower bound of the highest validation value; the test rows have no part in it.
        flags: reasons to doubt the numbers.
        evidence: of each trial's critic.
        settings: all that the numbers depend on, and versions.
        seconds: time that it took.
        caveat: what the numbers are not.
    """

    estimates: Mapping[str, Estimate]
    validation: Mapping[str, float]
    best: str
    flags: tuple[Flag, ...]
    evidence: tuple[Evidence, ...]
    settings: Mapping[str, Any]
    seconds: float
    caveat: str = field(default=CAVEAT)

    @property
    def information(self) -> Estimate:
        """Return the estimate of the best bound."""
        return self.estimates[self.best]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; null where a number is not finite."""
        found = asdict(self)
        for name, estimate in self.estimates.items():
            found["estimates"][name] |= {"bits": estimate.bits, "trials": list(estimate.trials)}
        found["flags"] = [asdict(flag) | {"docs": flag.docs} for flag in self.flags]
        made: dict[str, Any] = plain(found)
        return made

    def __rich__(self) -> RenderableType:
        """Return the table that a terminal shows."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Information between two samples")
        for column in ("bound", "nats", "± s.e.", "95 % interval", "bits", "validation, nats"):
            table.add_column(column, justify="left" if column == "bound" else "right")
        for name, estimate in self.estimates.items():
            low, high = estimate.interval
            chosen = f"{name} (best)" if name == self.best else name
            table.add_row(
                chosen,
                f"{estimate.mean:.4f}",
                f"{estimate.standard_error:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{estimate.bits:.4f}",
                f"{self.validation[name]:.4f}",
            )
        doubts = [Text(f"{flag.name}: {flag.sentence} See {flag.docs}.") for flag in self.flags]
        return Group(table, *doubts, Text(self.caveat))

    def __str__(self) -> str:
        """Return the table as text."""
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self) -> Figure:
        """Return a figure: every bound's estimate with its interval.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 0.6 + 0.5 * len(self.estimates)))
        axes = figure.add_subplot(xlabel="nats", yticks=range(len(self.estimates)))
        axes.set_yticklabels(list(self.estimates))
        for row, estimate in enumerate(self.estimates.values()):
            low, high = estimate.interval
            reach = [[estimate.mean - low], [high - estimate.mean]]
            axes.errorbar([estimate.mean], [row], xerr=reach, fmt="o", capsize=4)
        return figure


def sample_information(
    x: Sample,
    z: Sample,
    *,
    bounds: Sequence[str] = BOUNDS,
    trials: int = 1,
    seed: int = 0,
    config: SampleConfig | None = None,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> SampleReport:
    """Estimate the information I(x; z) between two samples, in nats.

    Half of the rows train a separable critic (`towers`), by the mean of dv and infonce: dv alone
    overfits, and infonce alone leaves an offset per row of z open that dv needs. A fifth of them
    validate it and stop it early. On the other half one sweep over the scores gives every bound, on
    10 equal batches. nwj needs a constant, which is dv's log term on the training rows.

    Args:
        x: sample (N, ...), floating point or uint8; images are (N, 1 or 3, H, W).
        z: the other sample (N, ...), row i belonging to row i of x.
        bounds: "dv", "infonce", "nwj", "smile" (tau 5), one at least.
        trials: critics trained anew.
        seed: decides the split into halves (the same in every trial), weights and order.
        config: how to train.
        device: where to compute.
        folder: for the trials' results; the same call goes on there after an interruption.
        progress: whether to show a bar on stderr; None does on a terminal.

    Raises:
        TypeError, ValueError: samples or options that do not fit; a folder of another run.
        FloatingPointError: no finite value was found.

    Equivalent torch program, for one batch, towers f and g trained before::

        T = f(x) @ g(z).T
        T.diagonal().mean() - (T[off_diagonal].logsumexp(0) - math.log(N * (N - 1)))

    Source: Zhu et al. 2020, section 2; Belghazi et al. 2018; van den Oord et al. 2018.
    """
    begin = time.monotonic()
    config = config or SampleConfig()
    _check_options(bounds, trials)
    x, z = _rows("x", x), _rows("z", z)
    _check_pair(x, z)
    settings = {
        "x_shape": list(x.shape),
        "z_shape": list(z.shape),
        "bounds": list(bounds),
        "trials": trials,
        "seed": seed,
        **asdict(config),
        "device": str(device),
        **versions(),
    }
    run = None if folder is None else RunFolder(Path(folder))
    if run is not None:
        run.claim("sample_information", settings)
    parts = _split(x, z, seed, config, torch.device(device))
    with shown(progress, trials * config.steps) as bar:
        found = [_trial(parts, config, trial, seed, run, bar) for trial in range(trials)]
    estimates = {name: Estimate.of([each["values"][name] for each in found]) for name in bounds}
    validation = {name: fmean(each["validation"][name] for each in found) for name in bounds}
    evidence = tuple(Evidence.of(each["evidence"]) for each in found)
    eligible = [name for name in bounds if name in LOWER_BOUNDS] or list(bounds)
    best = max(eligible, key=lambda name: validation[name])
    return SampleReport(
        estimates=estimates,
        validation=validation,
        best=best,
        flags=_doubts(estimates[best], best, evidence, parts),
        evidence=evidence,
        settings=settings,
        seconds=time.monotonic() - begin,
    )


@dataclass(frozen=True)
class _Parts:
    """Rows of x and z: for training, for validation, for the estimate."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def _trial(
    parts: _Parts, config: SampleConfig, trial: int, seed: int, run: RunFolder | None, bar: Progress
) -> Mapping[str, Any]:
    """Train and test one critic, or read what an interrupted call had found."""
    bar.say(f"trial {trial + 1}")
    if run is None:
        known: Mapping[str, Any] = json.loads(json.dumps(_tried(parts, config, trial, seed, bar)))
        return known
    if run.stage_result(f"trial-{trial}") is not None:
        bar.advance(config.steps)
    return run.stage(f"trial-{trial}", lambda: _tried(parts, config, trial, seed, bar))


def _tried(
    parts: _Parts, config: SampleConfig, trial: int, seed: int, bar: Progress
) -> dict[str, Any]:
    with seeded(seed, "samples", trial) as generator:
        towers, curve, best_step = _trained(parts, config, generator, bar)
    with torch.no_grad():
        shift = float(_log_mean_exp(_stats(towers, *parts.train)))
        rows = len(parts.test[0]) // TEST_BATCHES
        batches = [
            tuple(side[first : first + rows] for side in parts.test)
            for first in range(0, rows * TEST_BATCHES, rows)
        ]
        stats = [_stats(towers, x, z) for x, z in batches]
        values = {name: [_value(name, each, shift) for each in stats] for name in BOUNDS}
        validation = _stats(towers, *parts.validation)
        train = [side[:rows] for side in parts.train]
        seen = Evidence(
            train_value=_value("dv", _stats(towers, *train), shift),
            test_value=fmean(values["dv"]),
            curve=tuple(curve),
            trace=(),
            zero_gradients=0.0,
            nonfinite_gradients=0.0,
            score_spread=min(float(each.positives.std()) for each in stats),
            best_batch=best_step,
        )
    return {
        "values": values,
        "validation": {name: _value(name, validation, shift) for name in BOUNDS},
        "evidence": asdict(seen),
    }


def _trained(
    parts: _Parts, config: SampleConfig, generator: torch.Generator, bar: Progress
) -> tuple[nn.ModuleList, list[float], int]:
    """Return the towers of the best validation value, the values seen, and its step."""
    x, z = parts.train
    towers = nn.ModuleList(
        new_tower(tuple(side.shape[1:]), config.units, config.width) for side in parts.train
    ).to(x.device)
    averaged = copy.deepcopy(towers).eval().requires_grad_(False)
    best: tuple[float, int, nn.ModuleList] | None = None
    optimizer = torch.optim.AdamW(
        towers.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    curve = []
    size = min(config.batch_size, len(x))
    order = torch.empty(0, dtype=torch.long)
    for step in range(config.steps):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        indices, order = order[:size].to(x.device), order[size:]
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        (-_objective(_stats(towers, x[indices], z[indices]))).backward()
        optimizer.step()
        _average_(averaged, towers, min(config.averaging, (1 + step) / (10 + step)))
        bar.advance(1)
        if (step + 1) % CHECK_EVERY and step + 1 < config.steps:
            continue
        with torch.no_grad():
            value = float(_objective(_stats(averaged, *parts.validation)))
        curve.append(value)
        if math.isfinite(value) and (best is None or value > best[0]):
            best = value, step, copy.deepcopy(averaged)
    if best is None:
        raise FloatingPointError(
            "sample_information: no validation value was finite; try a lower learning_rate"
        )
    return best[2], curve, best[1]


def _objective(stats: CriticStats) -> Tensor:
    return (functional.dv(stats=stats) + functional.infonce(stats=stats)) / 2


def _stats(towers: nn.ModuleList, x: Tensor, z: Tensor) -> CriticStats:
    side, locations = features(towers[0](x), towers[1](z))
    return functional.critic_stats(side, locations, which=("dv", "smile"), tau=TAU)


def _value(name: str, stats: CriticStats, shift: float) -> float:
    """Return a bound in nats; nwj of scores lowered by shift, plus 1, as its optimum has them."""
    if name == "nwj":
        ratio = math.exp(float(_log_mean_exp(stats)) - shift)
        return float(stats.positives.mean()) - shift + 1 - ratio
    bound: Tensor = getattr(functional, name)(stats=stats, **{"smile": {"tau": TAU}}.get(name, {}))
    return float(bound)


def _log_mean_exp(stats: CriticStats) -> Tensor:
    """Return the log of the mean of exp(T) over the pairs i != j."""
    return stats.positives.mean() - functional.dv(stats=stats)


@torch.no_grad()
def _average_(averaged: nn.Module, trained: nn.Module, decay: float) -> None:
    states = zip(averaged.state_dict().values(), trained.state_dict().values(), strict=True)
    for old, new in states:
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _split(x: Tensor, z: Tensor, seed: int, config: SampleConfig, device: torch.device) -> _Parts:
    """Split at random; what makes vectors normal is fitted to the training half."""
    with seeded(seed, "samples", "split") as generator:
        order = torch.randperm(len(x), generator=generator)
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    fitted, checked = train[int(VALIDATION * len(train)) :], train[: int(VALIDATION * len(train))]
    sides = [_prepared(side, train, config).to(device) for side in (x, z)]
    one, two, three = (
        (sides[0][indices], sides[1][indices]) for indices in (fitted, checked, test)
    )
    return _Parts(one, two, three)


def _prepared(rows: Tensor, train: Tensor, config: SampleConfig) -> Tensor:
    if rows.dtype == torch.uint8:
        rows = rows.float() / 255
    if rows.ndim == 4 and rows.shape[1] in (1, 3):
        return rows.float()
    flat = rows.flatten(1).double()
    if config.normal_scores:
        return _normal_scores(flat, flat[train]).float()
    mean, spread = flat[train].mean(0), flat[train].std(0)
    return ((flat - mean) / spread.where(spread > 0, 1.0)).float()


def _normal_scores(rows: Tensor, known: Tensor) -> Tensor:
    """Return normal quantiles of each coordinate's rank among the known rows."""
    ordered = known.sort(0).values.T.contiguous()
    values = rows.T.contiguous()
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    share = (0.5 * (below + upto) + 0.5) / (len(known) + 1)
    found: Tensor = torch.special.ndtri(share).T
    return found


def _doubts(
    estimate: Estimate, bound: str, evidence: tuple[Evidence, ...], parts: _Parts
) -> tuple[Flag, ...]:
    rows = len(parts.test[0]) // TEST_BATCHES
    found = (
        flags.near_log_n("information", estimate.mean, bound=bound, n=rows),
        flags.negative("information", estimate),
        flags.critic_gap("information", estimate, evidence),
        flags.collapsed_critic("information", evidence),
        _few_rows(len(parts.test[0])),
        flags.one_trial([estimate]),
    )
    return tuple(flag for flag in found if flag is not None)


def _few_rows(test: int) -> Flag | None:
    if test >= FEW_ROWS:
        return None
    return Flag(
        "few_samples",
        f"{test} rows test a critic that as many trained, wanted {FEW_ROWS} at least: it learns too "
        "little, and the interval is too narrow.",
    )


def _rows(name: str, given: Sample) -> Tensor:
    rows = torch.as_tensor(given)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.ndim < 2 or not rows[:1].numel() or rows.is_complex():
        raise ValueError(
            f"sample_information: {name} has shape {tuple(rows.shape)} and dtype {rows.dtype}, "
            "wanted (N, ...) of real numbers"
        )
    if rows.is_floating_point() and not bool(rows.isfinite().all()):
        raise ValueError(f"sample_information: {name} has NaN or infinite values, wanted finite")
    return rows.detach()


def _check_pair(x: Tensor, z: Tensor) -> None:
    if len(x) != len(z):
        raise ValueError(
            f"sample_information: x has {len(x)} rows and z {len(z)}, wanted as many: row i of z "
            "belongs to row i of x"
        )
    if len(x) < 100:
        raise ValueError(f"sample_information: x has {len(x)} rows, wanted 100 or more")


def _check_options(bounds: Sequence[str], trials: int) -> None:
    for name in bounds:
        if name not in BOUNDS:
            close = difflib.get_close_matches(str(name), BOUNDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"sample_information: bounds has {name!r}, wanted some of {BOUNDS}{hint}"
            )
    if not bounds or isinstance(bounds, str):
        raise ValueError(
            f"sample_information: bounds is {bounds!r}, wanted one of {BOUNDS} or more"
        )
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"sample_information: trials is {trials!r}, wanted an integer, 1 or more")
