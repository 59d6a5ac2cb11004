"""The main job: the paper's method on 5,000 real digits, in minutes on a CPU."""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Data, load_mnist5k
from wcmi_fast.diagnosis import versions
from wcmi_fast.experiments.report import Pictures, check_packages, write_report
from wcmi_fast.files import write_file
from wcmi_fast.functional.steps import check_budget
from wcmi_fast.information import CriticConfig, Estimate, evaluate_critic, train_critic
from wcmi_fast.information.saliency import saliency
from wcmi_fast.models.folding import folded
from wcmi_fast.theory import adversarial_accuracy_upper_bound
from wcmi_fast.training.config import EncoderConfig, HeadConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy, classification_loss, represent
from wcmi_fast.training.objective import Critic
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.supervised import train_head

REPRESENTATIONS = ("standard", "worst-case")
HEADS = ("standard", "robust")
CLASSES = 10
FULL_BUDGET = 6.0
TRAIN_IMAGES, TEST_IMAGES = 4000, 1000
EVALUATION_BATCH = 125

# Seconds per batch on two cores of the machine of docs/quickstart.md, only for the progress bar.
SECONDS = {
    "encoder-standard": 0.055,
    "encoder-worst-case": 0.22,
    "head-standard": 0.008,
    "head-robust": 0.4,
    "accuracy": 0.7,
    "information": 0.2,
}


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train, attack and measure a standard and a worst-case representation of MNIST digits.

    Args:
        seed: decides the split of the data, the weights and the order of the batches.
        eps: radius of the attack, in units of pixels from 0 to 1, for training and testing.
        budget: minutes that the job may take on two cores; epochs are cut in proportion, and below
            one minute images too. The same budget always means the same work.
        device: where the tensors live, such as "cpu" or "cuda".
    """

    seed: int = 0
    eps: float = 0.2
    budget: float = FULL_BUDGET
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_budget("quickstart", self.eps, 1.0, (0.0, 1.0))
        if not 0 < self.budget < math.inf:
            raise ValueError(f"quickstart: budget is {self.budget}, wanted minutes > 0")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All the work of one quickstart, as its seed, eps and budget decide it."""

    train_images: int
    test_images: int
    evaluation: PGD
    encoders: dict[str, EncoderConfig]
    heads: dict[str, HeadConfig]
    critic: CriticConfig
    critic_attack: PGD


def plan(job: Quickstart) -> Plan:
    """Return the work that fits the job's budget."""
    scale = min(1.0, job.budget / FULL_BUDGET)
    # Below a minute fewer epochs do not help: they are one already.
    images = min(1.0, job.budget)

    def epochs(full: int) -> int:
        return max(1, round(full * scale))

    # Training attacks take fewer and longer steps than the test's; random starts keep an encoder
    # from learning to defeat one particular path (docs/quickstart.md).
    attack = PGD(eps=job.eps, step_size=0.7 * job.eps or 1.0, steps=3, random_start=True)
    encoder = EncoderConfig(attack=None, epochs=epochs(5), batch_size=32)
    standard = HeadConfig(attack=None, epochs=epochs(10))
    robust = HeadConfig(
        attack=PGD(eps=job.eps, step_size=0.4 * job.eps or 1.0, steps=5),
        epochs=epochs(2),
        learning_rate=3e-3,
    )
    return Plan(
        train_images=max(400, round(TRAIN_IMAGES * images)),
        test_images=max(200, round(TEST_IMAGES * images)),
        evaluation=PGD(eps=job.eps, step_size=job.eps / 3 or 1.0, steps=10),
        encoders={"standard": encoder, "worst-case": replace(encoder, attack=attack)},
        heads={"standard": standard, "robust": robust},
        critic=CriticConfig(epochs=epochs(2), batch_size=100),
        critic_attack=replace(attack, steps=2),
    )


def run(
    job: Quickstart,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Run a quickstart in a folder, or what is missing of one that was interrupted there.

    Args:
        job: the settings; those of an interrupted run must be the same (see `interrupted`).
        folder: gets config.toml, metrics.jsonl, checkpoints/, results.json and report.html.
        say: called with the name of each stage.
        advance: called with the nominal seconds of each piece of work done (see `nominal_seconds`).

    Returns:
        The content of results.json.

    Raises:
        ValueError: settings out of range.
        ModuleNotFoundError: a package of the extra `demo` is missing.
        OSError: the folder cannot be written to, or the disk is full.
        CheckpointError: a checkpoint in the folder cannot be read or does not fit.
        FloatingPointError: training diverged.
    """
    start = time.monotonic()
    check_packages()  # now rather than after minutes of training
    out = RunFolder(folder)
    here = _Context(job, plan(job), out, say, advance)
    write_file(folder / "config.toml", tomli_w.dumps(configuration(job)))
    data = _data(job, here.work)
    trained = {name: _train(here, name, data) for name in REPRESENTATIONS}
    accuracies = [
        _accuracy(here, name, head, trained[name], data)
        for name in REPRESENTATIONS
        for head in HEADS
    ]
    information = {name: _information(here, name, trained[name], data) for name in REPRESENTATIONS}
    results = {
        "settings": _settings(here),
        "accuracy": accuracies,
        "information": information,
        "command": _command(job),
        "seconds": time.monotonic() - start,
    }
    say("report")
    write_file(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_report(folder / "report.html", results, out.metrics(), _pictures(here, trained, data))
    return results


def configuration(job: Quickstart) -> dict[str, Any]:
    """Return all settings and versions of a job, as config.toml holds them."""
    work = asdict(plan(job), dict_factory=_without_none)
    return {"job": asdict(job), "work": work, "versions": versions()}


def interrupted(folder: Path) -> Quickstart:
    """Return the settings of the run in a folder, to go on with.

    Raises:
        ValueError: the folder holds no config.toml of a quickstart.
    """
    try:
        settings = tomllib.loads((folder / "config.toml").read_text())["job"]
        return Quickstart(**settings)
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"quickstart: resume is {folder}, wanted the folder of an earlier quickstart: {error}"
        ) from error


def nominal_seconds(job: Quickstart, folder: Path) -> float:
    """Return about how long what is missing takes on two cores of the authors' machine."""
    work, out = plan(job), RunFolder(folder)
    total = 0.0
    for name, config in work.encoders.items():
        epochs = config.epochs - out.epochs_done(f"encoder-{name}")
        total += epochs * (work.train_images // config.batch_size) * SECONDS[f"encoder-{name}"]
        for kind, head in work.heads.items():
            stage = f"head-{name}-{kind}"
            epochs = head.epochs - out.epochs_done(stage)
            total += epochs * (work.train_images // head.batch_size) * SECONDS[f"head-{kind}"]
            if out.stage_result(f"accuracy-{name}-{kind}") is None:
                total += math.ceil(work.test_images / EVALUATION_BATCH) * SECONDS["accuracy"]
        if out.stage_result(f"information-{name}") is None:
            total += _critic_batches(work) * SECONDS["information"]
    return total


@dataclass(frozen=True)
class _Context:
    job: Quickstart
    work: Plan
    out: RunFolder
    say: Callable[[str], None]
    advance: Callable[[float], None]

    def stage(self, name: str, kind: str) -> Callable[[], None]:
        """Announce a stage; return what to call after each of its batches."""
        self.say(name)
        return lambda: self.advance(SECONDS[kind])


@dataclass(frozen=True)
class _Trained:
    encoder: nn.Module
    critic: Critic
    heads: dict[str, nn.Module]


def _data(job: Quickstart, work: Plan) -> Data:
    # Shuffled and stratified: the first images of each part are balanced but for chance.
    data = load_mnist5k(job.seed, test_size=TEST_IMAGES)
    x_train, y_train, x_test, y_test = (part.to(job.device) for part in data)
    train, test = work.train_images, work.test_images
    return Data(x_train[:train], y_train[:train], x_test[:test], y_test[:test])


def _train(here: _Context, name: str, data: Data) -> _Trained:
    stage = f"encoder-{name}"
    advance = here.stage(stage, stage)
    encoder, critic = train_encoder(
        here.work.encoders[name],
        data.x_train,
        seed=here.job.seed,
        stage=stage,
        run=here.out,
        on_batch=lambda values: advance(),
    )
    heads = {kind: _train_head(here, name, kind, encoder, data) for kind in HEADS}
    return _Trained(encoder, critic, heads)


def _train_head(here: _Context, name: str, kind: str, encoder: nn.Module, data: Data) -> nn.Module:
    stage = f"head-{name}-{kind}"
    advance = here.stage(stage, f"head-{kind}")
    return train_head(
        here.work.heads[kind],
        encoder,
        data.x_train,
        data.y_train,
        classes=CLASSES,
        seed=here.job.seed,
        stage=stage,
        run=here.out,
        on_batch=lambda values: advance(),
    )


def _accuracy(
    here: _Context, name: str, kind: str, trained: _Trained, data: Data
) -> dict[str, Any]:
    stage = f"accuracy-{name}-{kind}"
    known = here.out.stage_result(stage)
    if known is not None:
        return known
    on_batch = here.stage(stage, "accuracy")
    head = trained.heads[kind]
    natural = accuracy(trained.encoder, head, data.x_test, data.y_test, attack=None)
    adversarial = accuracy(
        trained.encoder,
        head,
        data.x_test,
        data.y_test,
        attack=here.work.evaluation,
        batch_size=EVALUATION_BATCH,
        on_batch=on_batch,
    )
    row = {"representation": name, "head": kind, "natural": natural, "adversarial": adversarial}
    here.out.finish_stage(stage, row)
    return row


def _information(here: _Context, name: str, trained: _Trained, data: Data) -> dict[str, Any]:
    stage = f"information-{name}"
    known = here.out.stage_result(stage)
    if known is not None:
        return known
    on_batch = here.stage(stage, "information")
    normal = _term(here, trained, data, None, None, on_batch)
    worst = _term(here, trained, data, here.work.critic_attack, here.work.evaluation, on_batch)
    found = {
        "information": asdict(normal),
        "worst_case": asdict(worst),
        "vulnerability": asdict(normal.minus(worst)),
        "accuracy_bound": adversarial_accuracy_upper_bound(worst.mean, CLASSES),
        "critic_grad": here.work.critic.critic_grad,
    }
    here.out.finish_stage(stage, found)
    return found


def _term(
    here: _Context,
    trained: _Trained,
    data: Data,
    training: PGD | None,
    testing: PGD | None,
    on_batch: Callable[[], None],
) -> Estimate:
    """Estimate one term of RV by a critic of its own, which begins with the encoder's."""
    critic = train_critic(
        trained.encoder,
        data.x_train,
        here.work.critic,
        attack=training,
        seed=here.job.seed,
        start=trained.critic,
        stage="normal" if training is None else "worst",
        on_batch=on_batch,
    ).critic
    found = evaluate_critic(
        trained.encoder,
        critic,
        data.x_test,
        here.work.critic,
        attack=testing,
        on_batch=on_batch,
    )
    return Estimate.of([found.values])


def _pictures(here: _Context, trained: dict[str, _Trained], data: Data) -> Pictures:
    labels = data.y_test.tolist()
    chosen = [labels.index(digit) for digit in range(CLASSES) if digit in labels]
    x, y = data.x_test[chosen], data.y_test[chosen]
    attacked, predictions, maps = {}, {}, {}
    for name, parts in trained.items():
        encoder, head = folded(parts.encoder), folded(parts.heads["robust"])
        x_adv = here.work.evaluation.attack(classification_loss(encoder, head, y), x)
        attacked[name] = x_adv.cpu()
        predictions[name] = head(represent(encoder, x_adv)).argmax(1).tolist()
        maps[name] = saliency(parts.encoder, parts.critic, x).cpu()
    return Pictures(y.tolist(), x.cpu(), attacked, predictions, maps)


def _command(job: Quickstart) -> str:
    return (
        f"wcmi-fast quickstart --seed {job.seed} --eps {job.eps} --budget {job.budget}"
        f" --device {job.device}"
    )


def _settings(here: _Context) -> dict[str, Any]:
    job, work = here.job, here.work
    return {
        "data": "mnist5k",
        "seed": job.seed,
        "eps": job.eps,
        "step_size": work.evaluation.step_size,
        "steps": work.evaluation.steps,
        "budget_minutes": job.budget,
        "train_images": work.train_images,
        "test_images": work.test_images,
        "bound": work.encoders["standard"].bound,
        "training_critic_grad": work.encoders["worst-case"].critic_grad,
        "critic_grad": work.critic.critic_grad,
        "estimate_batch_size": work.critic.batch_size,
        **versions(),
    }


def _critic_batches(work: Plan) -> float:
    batches = work.train_images // work.critic.batch_size * work.critic.epochs
    return 2 * (batches + work.test_images // work.critic.batch_size)


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # TOML has no null: a setting that is not there is left out.
    return {key: value for key, value in items if value is not None}
