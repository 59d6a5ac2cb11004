"""Whether estimates obey what information obeys, on images whose information nobody knows.

Source: Song and Ermon 2020, section 5.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wcmi_fast import datasets
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.results import Estimate
from wcmi_fast.information.sample_critic import SampleConfig
from wcmi_fast.information.samples import sample_information
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

NAME = "self-consistency"
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
INDEPENDENT = "independent"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Check every bound on images: baseline, data processing, additivity, independent images."""

    data: str = "mnist5k"
    """Data set, or the path of an .npz file or a folder of images."""
    images: int = 5000
    """Images, at most; they make half as many pairs of different images."""
    rows: tuple[int, ...] = (0, 4, 7, 14, 28)
    """Upper rows that Y keeps of X in the baseline; all of them, the divisor, are added."""
    checked: tuple[int, ...] = (4, 14)
    """Which of them data processing and additivity are checked at."""
    fewer: int = 3
    """In data processing, the second image that Y adds has so many rows less."""
    bounds: tuple[str, ...] = ("dv", "infonce", "nwj", "smile")
    """Bounds of `wcmi_fast.information.samples.sample_information`."""
    trials: int = 3
    """Critics trained for each estimate."""
    steps: int = 200
    """Updates of a critic."""
    batch_size: int = 128
    """Pairs per update."""
    tolerance: float = 0.1
    """What counts as equal, as a share of the wanted ratio (of 1 where 0 is wanted)."""
    seed: int = 0
    """Decides the pairs, the split into halves, and the critics."""


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Estimate the information of every pair of samples, then compare; see `Experiment`."""
    first, second = halves(job)
    height = first.shape[2]
    _check(job, height)
    found: dict[str, dict[str, Any]] = {}
    for name, pair in pairs(job, first, second).items():
        say(f"{name}: {len(first)} pairs")
        found[name] = folder.stage(name, partial(_estimated, job, pair))
    return {
        "pairs": len(first),
        "estimates": {name: _shown(each) for name, each in found.items()},
        "baseline": {bound: _baseline(found, bound, _kept(job, height)) for bound in job.bounds},
        "checks": [
            {"bound": bound, **check}
            for bound in job.bounds
            for check in checks(job, {n: _estimate(e, bound) for n, e in found.items()}, height)
        ],
    }


def tables(results: Results) -> RenderableType:
    """Return the estimates, and every check's ratio with its verdict."""
    from rich.console import Group
    from rich.text import Text

    return Group(
        _table_of_estimates(results),
        Text(_doubts(results)),
        _table_of_checks(results),
        Text(_paragraph(results)),
    )


def figure(results: Results) -> Figure:
    """Plot the baseline by rows kept, and the ratios of the other checks."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(10, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    for bound, points in results["baseline"].items():
        kept = [point["rows"] for point in points]
        left.errorbar(kept, *_means_and_reach(points), fmt="o-", capsize=3, label=bound)
    left.set(xlabel="upper rows t of X kept", ylabel="I(X; Y(t)) / I(X; X)", title="baseline")
    left.legend(title="bound")
    _draw_ratios(right, results)
    return plot


# ---- the samples --------------------------------------------------------------------------------


def halves(job: Job) -> Pair:
    """Return images (N, C, H, W) and as many others; none occurs twice.

    Raises:
        ValueError: the data are vectors.
    """
    data = datasets.load(job.data)
    images = torch.cat([data.x_train, data.x_test])
    if images.ndim != 4:
        raise ValueError(
            f"self_consistency: data is {job.data!r}, with rows of shape "
            f"{tuple(images.shape[1:])}, wanted images (C, H, W)"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(job.seed))
    count = min(len(images), job.images) // 2
    return images[order[:count]], images[order[count : 2 * count]]


def top(images: Tensor, rows: int) -> Tensor:
    """Return images (N, C, H, W) of which only the upper rows are left, the others being 0."""
    kept = images.clone()
    kept[:, :, rows:] = 0
    return kept


def pairs(job: Job, first: Tensor, second: Tensor) -> dict[str, Pair]:
    """Return what to estimate the information between, by name; t is the rows kept.

    "baseline-t" is (X, Y(t)), Y(t) = top(X, t). "processing-t" is (X, [Y(t), Y(t - fewer)]), of
    which the second part is a function of the first. "additivity-t" is ([X, X'], [Y(t), Y'(t)])
    with other images X'. "independent" is (X, X'). Images in brackets lie one above the other.
    """
    baseline = {f"baseline-{t}": (first, top(first, t)) for t in _kept(job, first.shape[2])}
    processing = {
        f"processing-{t}": (first, _stacked(top(first, t), top(first, t - job.fewer)))
        for t in job.checked
    }
    additivity = {
        f"additivity-{t}": (_stacked(first, second), _stacked(top(first, t), top(second, t)))
        for t in job.checked
    }
    return {**baseline, **processing, **additivity, INDEPENDENT: (first, second)}


def _stacked(upper: Tensor, lower: Tensor) -> Tensor:
    return torch.cat([upper, lower], 2)


def _kept(job: Job, height: int) -> list[int]:
    return sorted({*job.rows, *job.checked, height})


def _check(job: Job, height: int) -> None:
    if bad := [t for t in (*job.rows, *job.checked) if not 0 <= t <= height]:
        raise ValueError(f"self_consistency: rows has {bad[0]}, wanted 0 to the height, {height}")
    if bad := [t for t in job.checked if t < job.fewer]:
        raise ValueError(
            f"self_consistency: checked has {bad[0]}, wanted fewer = {job.fewer} rows or more"
        )


def _estimated(job: Job, pair: Pair) -> dict[str, Any]:
    report = sample_information(
        *pair,
        bounds=job.bounds,
        trials=job.trials,
        seed=job.seed,
        config=SampleConfig(steps=job.steps, batch_size=job.batch_size),
        progress=False,
    )
    values = {bound: estimate.batches for bound, estimate in report.estimates.items()}
    return {"values": values, "flags": [flag.name for flag in report.flags]}


# ---- the checks ---------------------------------------------------------------------------------


def checks(job: Job, found: Mapping[str, Estimate], height: int) -> list[dict[str, Any]]:
    """Hold one bound's estimates against what information obeys.

    Args:
        job: the settings.
        found: the estimate of each of `pairs`.
        height: H of the images.

    Returns:
        For each check: "check", what it compares; "wanted"; "mean" and "interval" of what was found
        (95 %), None if there is no ratio; "verdict": "holds", "fails" or "undecided".
    """
    whole, kept = found[f"baseline-{height}"], _kept(job, height)
    made = []
    if 0 in kept:
        share = ratio(found["baseline-0"], whole)
        made.append(_compared("I(X; Y(0)) / I(X; X)", share, 0.0, job.tolerance))
    steps = [
        ratio(found[f"baseline-{more}"].minus(found[f"baseline-{less}"]), whole)
        for less, more in pairwise(kept)
    ]
    made.append(_monotone(steps, job.tolerance))
    for name, sentence, wanted in (
        ("processing", "I(X; [Y({t}), Y({less})]) / I(X; Y({t}))", 1.0),
        ("additivity", "I([X, X']; [Y({t}), Y'({t})]) / I(X; Y({t}))", 2.0),
    ):
        for t in job.checked:
            found_ratio = ratio(found[f"{name}-{t}"], found[f"baseline-{t}"])
            label = sentence.format(t=t, less=t - job.fewer)
            made.append(_compared(label, found_ratio, wanted, job.tolerance))
    return [*made, _independent(found[INDEPENDENT])]


def ratio(above: Estimate, below: Estimate) -> Estimate | None:
    """Return above / below with its interval, paired trial by trial and batch by batch.

    To first order each pair of values changes the ratio r of the means by (a - r b) / mean(b); r
    plus these changes is what the interval is made of. None where below's mean is not above 0.
    """
    if not below.mean > 0:
        return None
    r = above.mean / below.mean
    rows = zip(above.batches, below.batches, strict=True)
    return Estimate.of(
        [[r + (a - r * b) / below.mean for a, b in zip(*row, strict=True)] for row in rows]
    )


def verdict(interval: tuple[float, float], wanted: float, margin: float) -> str:
    """Tell whether an interval lies within a margin of what is wanted, or wholly outside."""
    low, high = interval
    if wanted - margin <= low and high <= wanted + margin:
        return HOLDS
    outside = high < wanted - margin or low > wanted + margin
    return FAILS if outside else UNDECIDED


def _compared(
    check: str, found: Estimate | None, wanted: float, tolerance: float
) -> dict[str, Any]:
    if found is None:
        return _checked(check, None, f"{wanted:g}", UNDECIDED)
    decided = verdict(found.interval, wanted, tolerance * (wanted or 1.0))
    return _checked(check, found, f"{wanted:g}", decided)


def _monotone(steps: Sequence[Estimate | None], tolerance: float) -> dict[str, Any]:
    """Judge all steps of the baseline; show the one whose interval reaches lowest."""
    check, known = "least step of I(X; Y(t)) / I(X; X)", [step for step in steps if step]
    if len(known) < len(steps) or not known:
        return _checked(check, None, ">= 0", UNDECIDED)
    least = min(known, key=lambda step: step.interval[0])
    if any(step.interval[1] < 0 for step in known):
        return _checked(check, min(known, key=lambda s: s.interval[1]), ">= 0", FAILS)
    return _checked(check, least, ">= 0", HOLDS if least.interval[0] >= -tolerance else UNDECIDED)


def _independent(found: Estimate) -> dict[str, Any]:
    low, high = found.interval
    return _checked("I(X; X'), nats", found, "0", HOLDS if low <= 0 <= high else FAILS)


def _checked(check: str, found: Estimate | None, wanted: str, decided: str) -> dict[str, Any]:
    return {
        "check": check,
        "wanted": wanted,
        "mean": None if found is None else found.mean,
        "interval": None if found is None else list(found.interval),
        "verdict": decided,
    }


def _estimate(found: Mapping[str, Any], bound: str) -> Estimate:
    return Estimate.of(found["values"][bound])


def _baseline(found: Mapping[str, Any], bound: str, kept: Sequence[int]) -> list[dict[str, Any]]:
    whole = _estimate(found[f"baseline-{kept[-1]}"], bound)
    shares = [(t, ratio(_estimate(found[f"baseline-{t}"], bound), whole)) for t in kept]
    return [
        {"rows": t, "mean": share.mean, "interval": list(share.interval)}
        for t, share in shares
        if share is not None
    ]


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    bounds = {bound: _estimate(found, bound) for bound in found["values"]}
    made = {
        bound: {"mean": estimate.mean, "interval": list(estimate.interval)}
        for bound, estimate in bounds.items()
    }
    return {"bounds": made, "flags": found["flags"]}


# ---- what is shown ------------------------------------------------------------------------------


def _table_of_estimates(results: Results) -> RenderableType:
    from rich.table import Table

    settings = results["settings"]
    table = Table(title=f"{settings['data']}, {results['pairs']} pairs, nats (95 % interval)")
    table.add_column("samples", no_wrap=True)
    for bound in settings["bounds"]:
        table.add_column(bound, justify="right")
    for name, found in results["estimates"].items():
        table.add_row(name, *(_cell(found["bounds"][bound], 2) for bound in settings["bounds"]))
    return table


def _doubts(results: Results) -> str:
    """Return which estimates each flag was raised for."""
    flagged: dict[str, list[str]] = {}
    for name, found in results["estimates"].items():
        for flag in found["flags"]:
            flagged.setdefault(flag, []).append(name)
    shown = [f"{flag} ({', '.join(names)})" for flag, names in flagged.items()]
    return f"Flags, see docs/measuring.md: {'; '.join(shown) or 'none'}."


def _table_of_checks(results: Results) -> RenderableType:
    from rich.table import Table

    table = Table(title="What information obeys")
    for column in ("bound", "check", "wanted", "found (95 % interval)", "verdict"):
        table.add_column(column)
    for check in results["checks"]:
        found = "no ratio" if check["mean"] is None else _cell(check, 3)
        table.add_row(check["bound"], check["check"], check["wanted"], found, check["verdict"])
        if check["check"].startswith("I(X; X')"):
            table.add_section()
    return table


def _cell(found: Mapping[str, Any], digits: int) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"


def _paragraph(results: Results) -> str:
    settings = results["settings"]
    counts = {
        bound: [c["verdict"] for c in results["checks"] if c["bound"] == bound]
        for bound in settings["bounds"]
    }
    held = [f"{bound} {each.count(HOLDS)} of {len(each)}" for bound, each in counts.items()]
    return (
        f"Y(t) is the upper t rows of X; X' are other images. A ratio holds if its interval lies "
        f"within {settings['tolerance']:.0%} of what is wanted, fails if it lies wholly outside, "
        "and is undecided otherwise. The baseline's steps hold if no interval reaches below "
        f"-{settings['tolerance']:g}, and fail if one lies wholly below 0. Independent images hold "
        f"if the interval covers 0. Checks that hold: {', '.join(held)}."
    )


def _means_and_reach(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    means = [point["mean"] for point in points]
    below = [point["mean"] - point["interval"][0] for point in points]
    above = [point["interval"][1] - point["mean"] for point in points]
    return means, [below, above]


def _draw_ratios(axes: Any, results: Results) -> None:
    settings = results["settings"]
    bounds = settings["bounds"]
    shown = [c for c in results["checks"] if c["wanted"] in ("1", "2")]
    labels = list(dict.fromkeys(check["check"] for check in shown))
    for number, bound in enumerate(bounds):
        mine = [c for c in shown if c["bound"] == bound and c["mean"] is not None]
        at = [labels.index(c["check"]) + 0.12 * (number - (len(bounds) - 1) / 2) for c in mine]
        means, reach = _means_and_reach(mine)
        axes.errorbar(means, at, xerr=reach, fmt="o", capsize=3)
    for label in labels:
        wanted = float(next(c["wanted"] for c in shown if c["check"] == label))
        row, reach_ = labels.index(label), wanted * settings["tolerance"]
        axes.fill_betweenx([row - 0.4, row + 0.4], wanted - reach_, wanted + reach_, color="0.88")
        axes.plot([wanted, wanted], [row - 0.4, row + 0.4], color="0.5")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ratio (line: wanted; grey: tolerance)", title="data processing, additivity")
