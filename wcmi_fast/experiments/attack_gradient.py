"""How much vulnerability the authors' attack misses, against the printed one (spec section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.experiments import classifiers
from wcmi_fast.experiments.classifiers import KINDS, Classifiers
from wcmi_fast.experiments.reproduction import Results, Say
from wcmi_fast.information.critic import CriticConfig, evaluate_critic, train_critic
from wcmi_fast.information.results import CAVEAT, Estimate
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.objective import Critic
from wcmi_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

NAME = "attack-gradient"
GRADIENTS: tuple[CriticGrad, ...] = ("encoder_only", "full")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Attack critics through the encoder only, as the authors do, and through both sides."""

    classifiers: Classifiers = field(
        default_factory=lambda: Classifiers(epochs=2, train_images=10_000, steps=5)
    )
    """The standard and the robust model, and the data; their logits are the representation."""
    eps: float = 0.1
    """Radius of the attacks, in units of pixels from 0 to 1."""
    steps: tuple[int, ...] = (1, 7, 20, 50)
    """Numbers of steps of the test attacks; each step is 2.5 eps / steps long."""
    training_steps: int = 4
    """Attack steps while a worst-case critic is trained, from the clean images."""
    trials: int = 2
    """Critics trained per term, gradient and model."""
    units: int = 64
    """Size U of the critics' features."""
    epochs: int = 2
    """Passes of a critic over its training images; a worst-case critic begins as the normal one."""
    batch_size: int = 64
    """Images per batch of an estimate; its value depends on it."""
    learning_rate: float = 3e-3
    """Adam's, for the critics, lowered along a cosine to 0."""
    train_images: int = 3072
    """Images that critics are trained on, at most."""
    test_images: int = 192
    """Images that the attacks are tested on, at most."""
    seed: int = 0
    """Decides the critics' weights, the order of their data and the random starts."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError(
                f"{NAME}: steps is {self.steps}, wanted different numbers of steps, 1 or more"
            )
        if self.trials < 1:
            raise ValueError(f"{NAME}: trials is {self.trials}, wanted 1 or more")


class Cell(NamedTuple):
    """One worst-case information: of which model, by which critic, under which attack."""

    model: str
    trained: CriticGrad
    tested: CriticGrad
    random_start: bool
    steps: int


def cells(job: Job) -> Iterator[Cell]:
    """Iterate over all that is measured."""
    parts = (KINDS, GRADIENTS, GRADIENTS, (False, True), sorted(job.steps))
    return (Cell(*each) for each in product(*parts))


def run(job: Job, folder: RunFolder, say: Say) -> Results:
    """Train models and critics, and attack; every trial, critic and attack is a stage."""
    data = classifiers.load(job.classifiers)
    models = classifiers.trained(job.classifiers, data, folder, say)
    x_train = Feed(data.x_train[: job.train_images], "cpu")
    x_test = Feed(data.x_test[: job.test_images], "cpu")
    information: dict[str, list[Sequence[float]]] = {kind: [] for kind in KINDS}
    worst: dict[Cell, list[Sequence[float]]] = {cell: [] for cell in cells(job)}
    for kind, trial in product(KINDS, range(job.trials)):
        say(f"{kind} model, trial {trial + 1} of {job.trials}")
        critics = _Critics(job, models[kind], x_train, x_test, folder, f"{kind}-{trial}")
        information[kind].append(critics.information())
        for cell in (cell for cell in worst if cell.model == kind):
            worst[cell].append(critics.worst_case(cell, say))
    return summary(
        {kind: Estimate.of(values) for kind, values in information.items()},
        {cell: Estimate.of(values) for cell, values in worst.items()},
    )


class _Critics:
    """The critics of one model and trial, each trained when a stage first needs it."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        x_train: Feed,
        x_test: Feed,
        folder: RunFolder,
        stage: str,
    ) -> None:
        self._job, self._model, self._folder, self._stage = job, model, folder, stage
        self._x_train, self._x_test = x_train, x_test
        self._normal = cache(lambda: self._train(folder, "normal", "full", None, None))
        self._worst = cache(self._train_worst)

    def information(self) -> Sequence[float]:
        def work() -> Mapping[str, Any]:
            found = evaluate_critic(
                self._model, self._normal(), self._x_test, self._config("full"), attack=None
            )
            return {"values": found.values}

        values: Sequence[float] = self._folder.stage(f"{self._stage}-information", work)["values"]
        return values

    def worst_case(self, cell: Cell, say: Say) -> Sequence[float]:
        def work() -> Mapping[str, Any]:
            critic = self._worst(cell.trained)
            say(f"{self._stage}: critic for {cell.trained}, {cell.steps} steps of {cell.tested}")
            found = evaluate_critic(
                self._model,
                critic,
                self._x_test,
                self._config(cell.tested),
                attack=_attack(self._job, cell.steps, random_start=cell.random_start),
                seed=self._job.seed,
            )
            return {"values": found.values}

        start = "random" if cell.random_start else "clean"
        name = f"{self._stage}-{cell.trained}-{cell.tested}-{cell.steps}-{start}"
        values: Sequence[float] = self._folder.stage(name, work)["values"]
        return values

    def _train_worst(self, gradient: CriticGrad) -> Critic:
        # The stage's name is a part of the seed. With one name, in folders of their own, both
        # gradients' critics see the same order of the data.
        folder = RunFolder(self._folder.path / f"critics-{gradient}")
        attack = _attack(self._job, self._job.training_steps, random_start=False)
        return self._train(folder, "worst", gradient, attack, self._normal())

    def _train(
        self,
        folder: RunFolder,
        term: str,
        gradient: CriticGrad,
        attack: PGD | None,
        start: Critic | None,
    ) -> Critic:
        return train_critic(
            self._model,
            self._x_train,
            self._config(gradient),
            attack=attack,
            seed=self._job.seed,
            start=start,
            stage=f"{self._stage}-{term}",
            run=folder,
        ).critic

    def _config(self, gradient: CriticGrad) -> CriticConfig:
        job = self._job
        return CriticConfig(
            units=job.units,
            epochs=job.epochs,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            critic_grad=gradient,
        )


def _attack(job: Job, steps: int, *, random_start: bool) -> PGD:
    step_size = 2.5 * job.eps / steps or 1.0  # an eps of 0 allows no step of 0
    return PGD(eps=job.eps, step_size=step_size, steps=steps, random_start=random_start)


def summary(information: Mapping[str, Estimate], worst: Mapping[Cell, Estimate]) -> dict[str, Any]:
    """Return the results, plain values, from estimates in nats.

    Args:
        information: I of each model.
        worst: the worst-case I of each cell, of the same trials and batches.

    Returns:
        "information" by model; "rows", one per cell; "critic", what encoder_only misses on the same
        critic; "procedure", what it misses in training and testing together.
    """
    vulnerability = {cell: information[cell.model].minus(found) for cell, found in worst.items()}
    rows = [
        cell._asdict() | {"worst_case": asdict(found), "vulnerability": asdict(vulnerability[cell])}
        for cell, found in worst.items()
    ]
    full = [cell for cell in worst if cell.tested == "full"]
    return {
        "information": {kind: asdict(found) for kind, found in information.items()},
        "rows": rows,
        "critic": [
            _cell_without(cell, "tested")
            | _missed(vulnerability[cell._replace(tested="encoder_only")], vulnerability[cell])
            for cell in full
        ],
        "procedure": [
            _cell_without(cell, "trained", "tested")
            | _missed(
                vulnerability[cell._replace(trained="encoder_only", tested="encoder_only")],
                vulnerability[cell],
            )
            for cell in full
            if cell.trained == "full"
        ],
    }


def _cell_without(cell: Cell, *names: str) -> dict[str, Any]:
    return {name: value for name, value in cell._asdict().items() if name not in names}


def _missed(encoder_only: Estimate, full: Estimate) -> dict[str, Any]:
    """Return the two drops in nats, their difference, and the share found, None of no drop."""
    return {
        "encoder_only": encoder_only.mean,
        "full": full.mean,
        "missed": asdict(full.minus(encoder_only)),
        "share": encoder_only.mean / full.mean if full.mean > 0 else None,
    }


def tables(results: Results) -> RenderableType:
    """Return each model's matrix of critics and attacks, and what the authors' attack misses."""
    from rich.console import Group
    from rich.text import Text

    shown = [_table(results, kind) for kind in KINDS]
    return Group(*shown, Text(paragraph(results)))


def _table(results: Results, kind: str) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{kind} model, I {_interval(results['information'][kind])}; nats (95 % interval)"
    )
    for column in ("critic trained for", "attack", "start"):
        table.add_column(column)
    for column in ("steps", "worst-case I", "RV"):
        table.add_column(column, justify="right")
    before = None
    for row in (row for row in results["rows"] if row["model"] == kind):
        if before not in (None, row["trained"]):
            table.add_section()
        before = row["trained"]
        table.add_row(
            row["trained"],
            row["tested"],
            _start(row),
            str(row["steps"]),
            _interval(row["worst_case"]),
            _interval(row["vulnerability"]),
        )
    return table


def paragraph(results: Results) -> str:
    """Return in words what encoder_only misses, in the longest attacks from the clean images."""
    steps = max(row["steps"] for row in results["rows"])
    parts = [f"Attacks of {steps} steps from the clean images."]
    parts += [_of_model(results, kind, steps) for kind in KINDS]
    return " ".join([*parts, CAVEAT])


def _of_model(results: Results, kind: str, steps: int) -> str:
    wanted = {"model": kind, "random_start": False, "steps": steps}
    procedure = _found(results["procedure"], wanted)
    printed = _found(results["critic"], wanted | {"trained": "full"})
    authors = _found(results["critic"], wanted | {"trained": "encoder_only"})
    return (
        f"{kind.capitalize()} model: on the critic trained for full, encoder_only finds "
        f"{_share(printed)} (RV {printed['encoder_only']:.3f} and {printed['full']:.3f} nats; "
        f"missed {_interval(printed['missed'])}); on the critic trained for encoder_only, "
        f"{_share(authors)} (RV {authors['encoder_only']:.3f} and {authors['full']:.3f} nats; "
        f"missed {_interval(authors['missed'])}). With encoder_only in training and testing, as "
        f"the authors' code has it, RV is {procedure['encoder_only']:.3f} nats; with full in both, "
        f"as printed, {procedure['full']:.3f}: a difference of {_interval(procedure['missed'])}."
    )


def _share(missed: Mapping[str, Any]) -> str:
    if missed["share"] is None:
        return "no share of the drop, because full finds no drop"
    return f"{100 * missed['share']:.1f} % of the drop that full finds"


def _found(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in rows if wanted.items() <= row.items())


def _interval(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{estimate['mean']:.3f} ({low:.3f} to {high:.3f})"


def _start(row: Mapping[str, Any]) -> str:
    return "random" if row["random_start"] else "clean"


def figure(results: Results) -> Figure:
    """Plot worst-case I against steps: a panel per model and critic, a curve per attack."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(9, 7), layout="constrained")
    panels = plot.subplots(len(KINDS), len(GRADIENTS), sharex=True, sharey="row", squeeze=False)
    for (i, kind), (j, trained) in product(enumerate(KINDS), enumerate(GRADIENTS)):
        _panel(panels[i][j], results, kind, trained)
    panels[0][0].legend(fontsize="small")
    return plot


def _panel(axes: Axes, results: Results, kind: str, trained: CriticGrad) -> None:
    axes.set_title(f"{kind} model, critic trained for {trained}", fontsize="medium")
    axes.set_xscale("log")
    steps = sorted({row["steps"] for row in results["rows"]})
    axes.set_xticks(steps, labels=map(str, steps), minor=False)
    axes.minorticks_off()
    axes.set_xlabel("attack steps of 2.5 eps / steps")
    axes.set_ylabel("worst-case I, nats")
    for (colour, tested), random_start in product(
        zip(("C0", "C3"), GRADIENTS, strict=True), (False, True)
    ):
        wanted = {"model": kind, "trained": trained, "tested": tested, "random_start": random_start}
        found = [_found(results["rows"], wanted | {"steps": count}) for count in steps]
        _curve(axes, steps, [row["worst_case"] for row in found], colour, _start(found[0]), tested)
    information = results["information"][kind]["mean"]
    axes.axhline(information, color="0.5", linestyle=":", label="I, no attack")


def _curve(
    axes: Axes,
    steps: Sequence[int],
    estimates: Sequence[Mapping[str, Any]],
    colour: str,
    start: str,
    tested: str,
) -> None:
    means = [estimate["mean"] for estimate in estimates]
    reach = [
        [abs(estimate["interval"][end] - estimate["mean"]) for estimate in estimates]
        for end in (0, 1)
    ]
    axes.errorbar(
        steps,
        means,
        yerr=reach,
        color=colour,
        linestyle="-" if start == "clean" else "--",
        marker="o" if start == "clean" else "s",
        # Open and larger, because the two starts often lie on each other.
        markersize=5 if start == "clean" else 10,
        fillstyle="full" if start == "clean" else "none",
        capsize=3,
        label=f"{tested}, {start} start",
    )
