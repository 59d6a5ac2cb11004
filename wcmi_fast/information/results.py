"""What a measurement returns: estimates with their errors, evidence, flags, and the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

CAVEAT = (
    "These are estimates and not certificates. The Donsker-Varadhan value bounds the information"
    " from below for fixed perturbed images, the attack bounds the minimum over perturbations from"
    " above, and for a deterministic continuous encoder the true information is infinite: what is"
    " measured is what a critic of this size finds in a sample of this size."
)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A quantity in nats, from critics trained anew (trials) and equal test batches.

    Attributes:
        mean: over trials and batches.
        standard_error: of the trials' means; of the batches where there is one trial; NaN for one
            batch of one trial.
        interval: 95 % interval (low, high), see `Estimate.of`; NaN for one batch.
        batches: the values, trials x batches. Every trial has the same test batches.
    """

    mean: float
    standard_error: float
    interval: tuple[float, float]
    batches: tuple[tuple[float, ...], ...]

    @property
    def trials(self) -> tuple[float, ...]:
        """Return the mean of each trial."""
        return tuple(statistics.fmean(row) for row in self.batches)

    @property
    def bits(self) -> float:
        """Return the mean in bits."""
        return self.mean / math.log(2)

    @staticmethod
    def of(values: Sequence[Sequence[float]]) -> Estimate:
        """Summarise values of trials x batches.

        Two things make the mean uncertain: how the critics were trained (the trials differ) and
        which images were drawn for testing (the batches differ). The interval adds both, each in
        quadrature: Student's interval of the trials' means, and a bootstrap of the batches, each
        averaged over trials (bias corrected and accelerated, 2,000 resamples, fixed seed), widened
        as Student's interval is wider than the normal one, without which it covers 84 % instead of
        95 % for 5 batches. A value of a pair, such as RV, is a difference batch by batch, so its
        bootstrap is a paired one. The interval covers what the mean would be for other test images
        and critics trained anew on the same images; not the distance to the true information.

        Args:
            values: nats, trials x batches.

        Raises:
            ValueError: no values, rows of different lengths, NaN or infinite values.
        """
        rows = tuple(tuple(map(float, row)) for row in values)
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            sizes = [len(row) for row in rows]
            raise ValueError(f"Estimate.of: values has rows of {sizes}, wanted trials x batches")
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ValueError("Estimate.of: values has NaN or infinite ones, wanted finite nats")
        trials = [statistics.fmean(row) for row in rows]
        columns = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        mean = statistics.fmean(trials)
        spread = trials if len(trials) > 1 else columns
        low, high = _batch_errors(columns, mean)
        trial = _trial_error(trials)
        interval = (mean - math.hypot(low, trial), mean + math.hypot(high, trial))
        return Estimate(mean, _standard_error(spread), interval, rows)

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference, paired batch by batch."""
        pairs = zip(self.batches, other.batches, strict=True)
        return Estimate.of([[a - b for a, b in zip(*rows, strict=True)] for rows in pairs])


def plain(value: Any) -> Any:
    """Return what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _trial_error(trials: Sequence[float]) -> float:
    """Return half of Student's interval; one trial says nothing of this error, and adds none."""
    return _student(len(trials)) * _standard_error(trials) if len(trials) > 1 else 0.0


def _student(count: int) -> float:
    """Return how many standard errors of so many values reach to the interval's end."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, count - 1))


def _batch_errors(columns: Sequence[float], mean: float) -> tuple[float, float]:
    """Return how far the bootstrap's interval reaches below and above the mean."""
    if len(columns) < 2:
        return math.nan, math.nan
    # Of values that differ by their rounding the bootstrap would make NaN.
    if max(columns) - min(columns) <= 1e-12 * max(map(abs, columns)):
        return 0.0, 0.0
    import numpy as np
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(columns),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    # Hesterberg (2015), expanded intervals: resamples are as narrow as sqrt((n - 1) / n) standard
    # errors, and know no uncertainty of their own width.
    count = len(columns)
    widened = _student(count) / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    widened *= math.sqrt(count / (count - 1))
    return widened * (mean - float(interval.low)), widened * (float(interval.high) - mean)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one trained critic and the attack on it showed, for the flags.

    Attributes:
        train_value: nats on training batches, attacked as the test batches are.
        test_value: nats on the test batches.
        curve: mean value of each epoch's training batches, in nats.
        trace: value after each attack step, mean over test batches, in nats: first the clean
            images' (or the random start's), last the result's; empty without an attack.
        zero_gradients: share of the attacked images, over all steps, whose gradient is all zero.
        nonfinite_gradients: share of the gradients' elements that are NaN or infinite.
        score_spread: standard deviation of the critic's scores of a test batch's pairs, without
            the part that belongs to one side alone: the smallest of the batches.
        best_batch: number of the training batch whose critic was kept, counted from 0.
    """

    train_value: float
    test_value: float
    curve: tuple[float, ...]
    trace: tuple[float, ...]
    zero_gradients: float
    nonfinite_gradients: float
    score_spread: float
    best_batch: int

    @staticmethod
    def of(found: Mapping[str, Any]) -> Evidence:
        """Return evidence from JSON, where tuples are lists."""
        curve, trace = tuple(found["curve"]), tuple(found["trace"])
        return Evidence(**{**found, "curve": curve, "trace": trace})


@dataclass(frozen=True)
class Flag:
    """A reason to doubt the numbers.

    Attributes:
        name: such as "near_log_n"; the heading in docs/measuring.md.
        sentence: what was seen, with its numbers.
    """

    name: str
    sentence: str

    @property
    def docs(self) -> str:
        """Return where it is explained."""
        return f"docs/measuring.md#{self.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured of a representation; prints as a table.

    Attributes:
        information: I(X; g(X)), or None if not asked for.
        worst_case: the least I(X'; g(X')) that the attack found, or None.
        vulnerability: RV_eps(g), information minus worst_case, paired; or None.
        classes: number of classes, or None without labels.
        accuracy_bound: theorem 3.4's bound on adversarial accuracy, in [0, 1], from the mean of
            worst_case; None without classes.
        accuracy_bound_interval: the same from the ends of worst_case's interval.
        natural_accuracy: measured, in [0, 1]; None without labels and a head.
        adversarial_accuracy: measured under the same budget, steps and step size.
        flags: reasons to doubt the numbers; empty if none was seen.
        evidence: of each trial, for "information" and "worst_case".
        settings: all that the numbers depend on, and versions; plain values.
        seconds: time that the measurement took.
        caveat: what the numbers are not.
    """

    information: Estimate | None
    worst_case: Estimate | None
    vulnerability: Estimate | None
    classes: int | None
    accuracy_bound: float | None
    accuracy_bound_interval: tuple[float, float] | None
    natural_accuracy: float | None
    adversarial_accuracy: float | None
    flags: tuple[Flag, ...]
    evidence: Mapping[str, tuple[Evidence, ...]]
    settings: Mapping[str, Any]
    seconds: float
    caveat: str = field(default=CAVEAT)

    def estimates(self) -> dict[str, Estimate]:
        """Return what was measured, by name."""
        named = {
            "information": self.information,
            "worst_case": self.worst_case,
            "vulnerability": self.vulnerability,
        }
        return {name: estimate for name, estimate in named.items() if estimate is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings, as report.json holds them; NaN is None."""
        found: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, estimate in self.estimates().items():
            more = {"bits": estimate.bits, "trials": estimate.trials}
            found[name] = asdict(estimate) | more
        found["flags"] = [asdict(flag) | {"docs": flag.docs} for flag in self.flags]
        found["evidence"] = {
            term: [asdict(each) for each in seen] for term, seen in self.evidence.items()
        }
        strict: dict[str, Any] = plain(found)
        return strict

    def __rich__(self) -> RenderableType:
        """Return the tables that a terminal shows."""
        from wcmi_fast.information.report import tables

        return tables(self)

    def __str__(self) -> str:
        """Return the tables as text."""
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self) -> Figure:
        """Return a figure: estimates with intervals, the attack's path, the critics' curves.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from wcmi_fast.information.report import figure

        return figure(self)

    def save(self, path: str | Path) -> None:
        """Write report.json, report.html and report.png into a folder, each whole or not at all.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
            ModuleNotFoundError: matplotlib or jinja2 is not installed.
        """
        from wcmi_fast.information.report import save

        save(self, Path(path))
