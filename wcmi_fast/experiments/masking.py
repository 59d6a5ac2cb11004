"""What the authors' masking slip does to trained critics' values (spec section 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import chain, product
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from wcmi_fast import functional
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Data, Feed, batches
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.critic import (
    CriticConfig,
    attack_information,
    batch_bound,
    evaluate_critic,
    train_critic,
)
from wcmi_fast.information.results import CAVEAT, Estimate
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.objective import Critic
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

NAME = "masking"
BOUNDS = ("dv", "dv_authors")
TERMS = ("information", "worst_case", "vulnerability")
LABELS = {"information": "I", "worst_case": "worst-case I", "vulnerability": "RV"}
COLOURS = {"dv": "C0", "dv_authors": "C3"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Compare dv with the authors' masking, which adds a score of 0 for every image of a batch."""

    classifiers: Classifiers = field(
        default_factory=lambda: Classifiers(epochs=2, train_images=10_000, steps=5)
    )
    """The standard and the robust model, and the data; their logits are the representation."""
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    """Images per batch, in training a critic and in testing it."""
    eps: float = 0.1
    """Radius of the attacks, in units of pixels from 0 to 1."""
    steps: int = 4
    """Steps of the test attacks, of 2.5 eps / steps."""
    training_steps: int = 2
    """Attack steps while a worst-case critic is trained."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic, or through the encoder only, as the authors do."""
    trials: int = 2
    """Critics trained per term, bound, batch size and model."""
    units: int = 64
    """Size U of the critics' features."""
    updates: int = 50
    """Batches that a normal critic is trained on, about."""
    worst_updates: int = 14
    """Batches that a worst-case critic, which begins as the normal one, is trained on, about."""
    learning_rate: float = 3e-3
    """Adam's, for the critics, lowered along a cosine to 0."""
    train_images: int = 10_000
    """Images that critics are trained on, at most."""
    test_images: int = 256
    """Images for the values; two batches if they are more."""
    offsets: tuple[float, ...] = (-10.0, -8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
    """Constants c, in nats, that are added to the scores of the trained critics."""
    seed: int = 0
    """Decides the critics' weights and the order of their data."""

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or min(sizes) < 2 or len(set(sizes)) < len(sizes):
            raise ValueError(f"{NAME}: batch_sizes is {sizes}, wanted different sizes, 2 or more")
        if not self.offsets:
            raise ValueError(f"{NAME}: offsets is {self.offsets}, wanted one number or more")
        for name in ("trials", "updates", "worst_updates", "test_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{NAME}: {name} is {getattr(self, name)}, wanted 1 or more")


class Case(NamedTuple):
    """The critics of one model and batch size that were trained with one bound."""

    model: str
    batch_size: int
    trained: str


def cases(job: Job) -> Iterator[Case]:
    """Iterate over all critics, a trial's."""
    return (Case(*each) for each in product(KINDS, sorted(job.batch_sizes), BOUNDS))


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train models and critics, and evaluate them with both maskings, stage by stage."""
    data = classifiers.load(job.classifiers)
    models = classifiers.trained(job.classifiers, data, folder, say)
    rows = []
    for case in cases(job):
        say(
            f"{case.model} model, batches of {case.batch_size}, critics trained with {case.trained}"
        )
        critics = _Critics(job, case, models[case.model], data, folder)
        rows.append(case._asdict() | row([critics.trial(trial) for trial in range(job.trials)]))
    sizes = sorted(job.batch_sizes)
    whole = [_whole(rows, kind, size) for kind, size in product(KINDS, sizes)]
    return {"offsets": sorted(job.offsets), "rows": rows, "whole": whole}


class _Critics:
    """The critics of one case, each trained when a stage first needs it."""

    def __init__(
        self, job: Job, case: Case, model: nn.Module, data: Data, folder: RunFolder
    ) -> None:
        self._job, self._case, self._model, self._folder = job, case, model, folder
        # Two batches are the fewest that have an interval.
        count = max(job.test_images, 2 * case.batch_size)
        self._x_train, self._x_test = data.x_train, Feed(data.x_test[:count], "cpu")
        self._config = CriticConfig(
            bound=case.trained,
            units=job.units,
            batch_size=case.batch_size,
            learning_rate=job.learning_rate,
            critic_grad=job.critic_grad,
        )
        self._normal, self._worst = cache(self._train_normal), cache(self._train_worst)

    def trial(self, trial: int) -> Mapping[str, Any]:
        """Return the values of a trial: "information", and "worst_case" by the attack's bound."""
        case = self._case
        name = f"{case.model}-{case.batch_size}-{case.trained}-{trial}"
        clean = self._folder.stage(f"{name}-information", lambda: self._clean(trial))
        attacked = {
            bound: self._folder.stage(f"{name}-{bound}", partial(self._attacked, trial, bound))
            for bound in BOUNDS
        }
        return {"information": clean, "worst_case": attacked}

    def _clean(self, trial: int) -> Mapping[str, Any]:
        critic = self._normal(trial)
        normalisers, shifted = profile(
            self._model, critic, self._x_test, self._config, sorted(self._job.offsets)
        )
        return self._both(critic, self._x_test) | {
            "log_normaliser": normalisers,
            "shifted": shifted,
        }

    def _attacked(self, trial: int, bound: str) -> Mapping[str, Any]:
        critic, config = self._worst(trial), replace(self._config, bound=bound)
        attack = _attack(self._job, self._job.steps)
        images = [
            attack_information(self._model, critic, self._x_test[indices], attack, config)
            for indices in batches(len(self._x_test), config.batch_size)
        ]
        return self._both(critic, torch.cat(images))

    def _both(self, critic: Critic, x: Tensor | Feed) -> dict[str, Any]:
        """Return the values of equal batches with both maskings, in nats."""
        configs = {bound: replace(self._config, bound=bound) for bound in BOUNDS}
        return {
            bound: evaluate_critic(self._model, critic, x, config, attack=None).values
            for bound, config in configs.items()
        }

    def _train_normal(self, trial: int) -> Critic:
        return self._train(trial, "normal", self._job.updates, None, None)

    def _train_worst(self, trial: int) -> Critic:
        attack = _attack(self._job, self._job.training_steps)
        return self._train(trial, "worst", self._job.worst_updates, attack, self._normal(trial))

    def _train(
        self, trial: int, term: str, updates: int, attack: PGD | None, start: Critic | None
    ) -> Critic:
        case, wanted = self._case, updates * self._case.batch_size
        x = self._x_train[: min(self._job.train_images, wanted)]
        # The stage's name is a part of the seed. With one name, in folders of their own, both
        # bounds' critics have the same first weights and order of the data.
        return train_critic(
            self._model,
            Feed(x, "cpu"),
            replace(self._config, epochs=max(1, round(wanted / len(x)))),
            attack=attack,
            seed=self._job.seed,
            start=start,
            stage=f"{case.model}-{case.batch_size}-{term}-{trial}",
            run=RunFolder(self._folder.path / f"critics-{case.trained}"),
        ).critic


def _attack(job: Job, steps: int) -> PGD:
    return PGD(eps=job.eps, step_size=2.5 * job.eps / steps or 1.0, steps=steps)


@torch.no_grad()
def profile(
    model: nn.Module,
    critic: Critic,
    x: Feed,
    config: CriticConfig,
    offsets: Sequence[float],
) -> tuple[list[float], dict[str, list[list[float]]]]:
    """Return a critic's normalisers, and its values when a constant is added to its scores.

    Args:
        model: images -> representations (N, D).
        critic: as `train_critic` returns it.
        x: images, cut into equal batches.
        config: the size of the batches.
        offsets: the constants c, in nats.

    Returns:
        The log of the mean of exp(T[i, j, p]) over the pairs i != j of each batch, averaged over p;
        and, for both maskings, offsets x batches of values in nats.
    """
    normalisers: list[float] = []
    shifted: dict[str, list[list[float]]] = {bound: [[] for _ in offsets] for bound in BOUNDS}
    for indices in batches(len(x), config.batch_size):
        images = x[indices]
        z, h = critic.global_(model(images)), critic.local(images)
        positives = (z[:, None] * h).sum(2).mean()
        normalisers.append(float(positives - functional.dv(z, h)))
        ones = torch.ones_like(z[:, :1])
        for k, offset in enumerate(offsets):
            pair = (torch.cat([z, ones], 1), nn.functional.pad(h, (0, 1), value=offset))
            for bound, values in shifted.items():
                values[k].append(float(batch_bound(replace(config, bound=bound), None)(*pair)))
    return normalisers, shifted


def row(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is reported of one case.

    Args:
        trials: for each trial the values of equal batches, in nats: "information" by bound, with
            "log_normaliser" and "shifted" of `profile`; "worst_case" by the attack's bound, then
            by the value's.

    Returns:
        "values": I, worst-case I and RV by bound, the attack's and the value's being the same;
        "slip": dv_authors - dv of the same critics and images, those attacked under dv;
        "attack": by how much dv's attack leaves less of dv's value than the one with the slip;
        "log_normaliser"; "shifted", the change of the mean value by bound and offset.
    """
    clean = {bound: Estimate.of([t["information"][bound] for t in trials]) for bound in BOUNDS}
    attacked = {
        (attack, value): Estimate.of([t["worst_case"][attack][value] for t in trials])
        for attack, value in product(BOUNDS, BOUNDS)
    }
    same = {bound: _terms(clean[bound], attacked["dv", bound]) for bound in BOUNDS}
    matched = {bound: _terms(clean[bound], attacked[bound, bound]) for bound in BOUNDS}
    return {
        "values": {bound: _plain(terms) for bound, terms in matched.items()},
        "slip": _plain(_difference(same["dv_authors"], same["dv"])),
        "attack": asdict(attacked["dv_authors", "dv"].minus(attacked["dv", "dv"])),
        "log_normaliser": asdict(Estimate.of([t["information"]["log_normaliser"] for t in trials])),
        "shifted": {bound: _changes(trials, clean[bound], bound) for bound in BOUNDS},
    }


def _terms(normal: Estimate, worst: Estimate) -> dict[str, Estimate]:
    return dict(zip(TERMS, (normal, worst, normal.minus(worst)), strict=True))


def _difference(
    first: Mapping[str, Estimate], second: Mapping[str, Estimate]
) -> dict[str, Estimate]:
    return {term: first[term].minus(second[term]) for term in TERMS}


def _plain(terms: Mapping[str, Estimate]) -> dict[str, Any]:
    return {term: asdict(estimate) for term, estimate in terms.items()}


def _changes(trials: Sequence[Mapping[str, Any]], base: Estimate, bound: str) -> list[float]:
    by_offset = zip(*(trial["information"]["shifted"][bound] for trial in trials), strict=True)
    return [fmean(chain.from_iterable(values)) - base.mean for values in by_offset]


def _whole(rows: Sequence[Mapping[str, Any]], kind: str, size: int) -> dict[str, Any]:
    """Return dv_authors - dv where each is trained, attacked and evaluated with throughout."""
    dv, authors = (
        {
            term: Estimate.of(plain["batches"])
            for term, plain in _of(rows, kind, size, bound)["values"][bound].items()
        }
        for bound in BOUNDS
    )
    return {"model": kind, "batch_size": size, **_plain(_difference(authors, dv))}


def _of(rows: Sequence[Mapping[str, Any]], kind: str, size: int, trained: str) -> Mapping[str, Any]:
    wanted = Case(kind, size, trained)._asdict()
    return next(each for each in rows if wanted.items() <= each.items())


def tables(results: Results) -> RenderableType:
    """Return values, slips and whole influences per batch size, and what they come to."""
    from rich.console import Group
    from rich.text import Text

    shown = [
        make(results, kind) for kind in KINDS for make in (_values_table, _slip_table, _whole_table)
    ]
    return Group(*shown, Text(paragraph(results)))


def _values_table(results: Results, kind: str) -> Table:
    columns = ("critics", *LABELS.values(), "log mean\nexp T")
    table = _table(f"{kind} model, dv, nats (95 % interval)", *columns)
    for each in _rows_of(results, kind):
        terms = [_interval(each["values"]["dv"][term], 3) for term in TERMS]
        normaliser = f"{each['log_normaliser']['mean']:.2f}"
        table.add_row(str(each["batch_size"]), each["trained"], *terms, normaliser)
    return table


def _slip_table(results: Results, kind: str) -> Table:
    columns = ("critics", *(f"slip in {label}" for label in LABELS.values()), "attack's slip")
    table = _table(f"{kind} model, the same critics: dv_authors - dv, nats", *columns)
    for each in _rows_of(results, kind):
        estimates = (*(each["slip"][term] for term in TERMS), each["attack"])
        shown = [_interval(estimate, 4, between="\n") for estimate in estimates]
        table.add_row(str(each["batch_size"]), each["trained"], *shown)
    return table


def _whole_table(results: Results, kind: str) -> Table:
    columns = [f"change of {label}" for label in LABELS.values()]
    table = _table(f"{kind} model, the slip in training, attack and value, nats", *columns)
    for each in (each for each in results["whole"] if each["model"] == kind):
        table.add_row(str(each["batch_size"]), *(_interval(each[term], 3) for term in TERMS))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("N", justify="right")
    for column in columns:
        table.add_column(column, justify="left" if column == "critics" else "right")
    return table


def _rows_of(results: Results, kind: str) -> list[Mapping[str, Any]]:
    return [each for each in results["rows"] if each["model"] == kind]


def paragraph(results: Results) -> str:
    """Return in words whether the slip matters, and what an offset does."""
    return " ".join([_of_slips(results), _of_training(results), _of_offsets(results), CAVEAT])


def _of_slips(results: Results) -> str:
    smallest, largest = (
        choose(each["batch_size"] for each in results["rows"]) for choose in (min, max)
    )
    slips = {
        size: {term: _largest(results, size, term) for term in TERMS}
        for size in (smallest, largest)
    }
    parts = [
        f"at batches of {size} by at most {found['information']:.4f} nats in I, "
        f"{found['worst_case']:.4f} in worst-case I and {found['vulnerability']:.4f} in RV"
        f"{_share(results, size)}"
        for size, found in slips.items()
    ]
    return (
        "The same trained critics evaluated with and without the slip differ "
        f"{', and '.join(parts)}."
    )


def _largest(results: Results, size: int, term: str) -> float:
    rows = [each for each in results["rows"] if each["batch_size"] == size]
    slips: list[float] = [each["slip"][term]["mean"] for each in rows]
    return max(map(abs, slips))


def _share(results: Results, size: int) -> str:
    """Return in words how large a part of RV the slip in RV is at most."""
    rows = [each for each in results["rows"] if each["batch_size"] == size]
    pairs = [(each["slip"], each["values"]["dv"]) for each in rows]
    found = [(slip["vulnerability"]["mean"], dv["vulnerability"]["mean"]) for slip, dv in pairs]
    shares = [abs(slip) / rv for slip, rv in found if rv > 0]
    return f" ({100 * max(shares):.1f} % of it, at most)" if shares else ""


def _of_training(results: Results) -> str:
    whole = results["whole"]
    worst = max(whole, key=lambda each: abs(each["vulnerability"]["mean"]))
    dv = _of(results["rows"], worst["model"], worst["batch_size"], "dv")
    rv = dv["values"]["dv"]["vulnerability"]["mean"]
    means = [
        fmean(r["log_normaliser"]["mean"] for r in results["rows"] if r["trained"] == bound)
        for bound in BOUNDS
    ]
    return (
        f"With the slip in training, attack and value RV changes most in the {worst['model']} "
        f"model at batches of {worst['batch_size']}: by {_interval(worst['vulnerability'], 3)} "
        f"nats of {rv:.3f}; {sum(_excludes_0(each['vulnerability']) for each in whole)} of "
        f"{len(whole)} such intervals exclude 0. The mean of exp(T) over the negative pairs, on "
        f"which the slip depends, is exp({means[0]:.2f}) for critics trained with dv and "
        f"exp({means[1]:.2f}) for those trained with the slip (geometric means)."
    )


def _of_offsets(results: Results) -> str:
    offsets = results["offsets"]
    low, high = offsets.index(min(offsets)), offsets.index(max(offsets))
    dv, authors = ([each["shifted"][bound] for each in results["rows"]] for bound in BOUNDS)
    drops = [changes[low] for changes in authors]
    return (
        f"A constant added to all scores, from {min(offsets):g} to {max(offsets):g} nats, changes "
        f"dv by at most {max(abs(change) for changes in dv for change in changes):.1e} nats. The "
        f"value with the slip changes by {min(drops):.3f} to {max(drops):.3f} nats at "
        f"{min(offsets):g}, and by at most {max(abs(c[high]) for c in authors):.4f} at "
        f"{max(offsets):g}."
    )


def _excludes_0(estimate: Mapping[str, Any]) -> bool:
    low, high = estimate["interval"]
    return bool(low > 0 or high < 0)


def _interval(estimate: Mapping[str, Any], digits: int, *, between: str = " ") -> str:
    low, high = estimate["interval"]
    return f"{estimate['mean']:.{digits}f}{between}({low:.{digits}f}, {high:.{digits}f})"


def figure(results: Results) -> Figure:
    """Plot per model the slip and the values against batch size, and the values' offsets."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(14, 8), layout="constrained")
    panels = plot.subplots(len(KINDS), 3, squeeze=False)
    for line, kind in zip(panels, KINDS, strict=True):
        rows = _rows_of(results, kind)
        _slip_panel(line[0], kind, rows)
        _values_panel(line[1], kind, rows)
        _offsets_panel(line[2], kind, rows, results["offsets"])
    return plot


def _slip_panel(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(f"{kind} model, the same critic")
    axes.set_yscale("log")
    axes.set_ylabel("dv - dv_authors, nats")
    for bound, term in product(BOUNDS, TERMS[:2]):
        of_bound = [each for each in rows if each["trained"] == bound]
        axes.plot(
            [each["batch_size"] for each in of_bound],
            [-each["slip"][term]["mean"] for each in of_bound],
            color=COLOURS[bound],
            linestyle="-" if term == "information" else "--",
            marker="o",
            label=f"{LABELS[term]}, trained with {bound}",
        )
    sizes = sorted({each["batch_size"] for each in rows})
    axes.plot(
        sizes,
        [math.log1p(1 / (size - 1)) for size in sizes],
        color="0.5",
        linestyle=":",
        label="constant critic 0",
    )
    _finish(axes, rows)


def _values_panel(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(f"{kind} model, trained, attacked and evaluated")
    axes.set_ylabel("nats")
    styles = dict(zip(TERMS, ("-", "--", ":"), strict=True))
    for bound, (term, style) in product(BOUNDS, styles.items()):
        of_bound = [each for each in rows if each["trained"] == bound]
        found = [each["values"][bound][term] for each in of_bound]
        axes.errorbar(
            [each["batch_size"] for each in of_bound],
            [estimate["mean"] for estimate in found],
            yerr=[[abs(e["interval"][end] - e["mean"]) for e in found] for end in (0, 1)],
            color=COLOURS[bound],
            linestyle=style,
            marker="o",
            capsize=3,
            label=f"{LABELS[term]}, {bound}",
        )
    _finish(axes, rows)


def _finish(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    sizes = sorted({each["batch_size"] for each in rows})
    axes.set_xscale("log")
    axes.set_xticks(sizes, labels=map(str, sizes))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_xlabel("batch size N")
    axes.legend(fontsize="x-small", framealpha=0.5)


def _offsets_panel(
    axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]], offsets: Sequence[float]
) -> None:
    axes.set_title(f"{kind} model, critics trained with dv")
    axes.set_xlabel("constant added to all scores, nats")
    axes.set_ylabel("change of the value of I, nats")
    of_dv = [each for each in rows if each["trained"] == "dv"]
    for k, each in enumerate(of_dv):
        label = f"dv_authors, N = {each['batch_size']}"
        colour = str(0.75 * k / len(of_dv))
        axes.plot(offsets, each["shifted"]["dv_authors"], color=colour, marker=".", label=label)
    axes.plot(offsets, of_dv[-1]["shifted"]["dv"], color="C0", linestyle="--", label="dv")
    axes.legend(fontsize="small")
