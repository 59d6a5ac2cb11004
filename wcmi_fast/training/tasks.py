"""What `wcmi-fast train` trains: an encoder, a head on one, or a classifier (spec section 5)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from wcmi_fast import datasets, models
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Data, Feed
from wcmi_fast.diagnosis import revision, versions
from wcmi_fast.distributed import ranks
from wcmi_fast.files import write_file
from wcmi_fast.models.loading import read_state
from wcmi_fast.progress import Progress
from wcmi_fast.training.augmentation import Augmentation
from wcmi_fast.training.board import writer
from wcmi_fast.training.checkpoint import save_weights
from wcmi_fast.training.config import (
    ClassifierConfig,
    CriticGrad,
    EncoderConfig,
    HeadConfig,
    HeadKind,
    OptimizerName,
    TrainingConfig,
)
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy
from wcmi_fast.training.objective import BOUNDS
from wcmi_fast.training.run_folder import SETTINGS, RunFolder
from wcmi_fast.training.schedule import Schedule
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import OnBatch, Values
from wcmi_fast.training.supervised import train_classifier, train_head
from wcmi_fast.training.watch import Watch

CONFIG, RESULTS, BOARD = "config.toml", "results.json", "tensorboard"
ENCODER, CLASSIFIER = "encoder.safetensors", "classifier.safetensors"
EVALUATION_BATCH = 125
Work = Callable[[RunFolder, Progress], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every task has.

    Attributes are documented by the strings below them, which the command line shows.
    """

    data: str = "fashion_mnist"
    """mnist, fashion_mnist, cifar10, svhn, mnist5k; an .npz file of x_train, y_train, x_test and
    y_test; or a folder of train/CLASS/ and test/CLASS/ with images."""
    train_images: int = 60_000
    """Training images, at most."""
    test_images: int = 1000
    """Test images for the accuracies, at most."""
    crop_padding: int = 0
    """Pixels of zeros around a training image, of which a part of its size is cut out at random."""
    flip: bool = False
    """Swap left and right of training images, each with probability 1/2."""
    jitter: float = 0.0
    """Multiply brightness, contrast and saturation of training images by random factors from
    1 - jitter to 1 + jitter."""
    rotation: float = 0.0
    """Rotate training images by a random angle of at most so many degrees."""
    eps: float = 0.1
    """Radius of the attack, in units of pixels from 0 to 1."""
    steps: int = 10
    """Steps of the attack in training."""
    step_size: float | None = None
    """Length of such a step, in units of pixels; None is 2.5 eps / steps."""
    random_start: bool = False
    """Start attacks in training at random within eps, instead of at the image."""
    test_steps: int = 10
    """Steps of the attack on the test images, each of 2.5 eps / test_steps."""
    eps_warmup: float = 0.4
    """Part of training over which eps and step size grow linearly to their value."""
    free: int = 0
    """So many replays of every batch, in each of which one backward pass moves the weights and the
    images; 0 attacks each batch in steps instead. Divide epochs by it for equal time."""
    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 64
    """Images per batch; an incomplete last batch is left out."""
    optimizer: OptimizerName = "adam"
    """adam, or sgd with Nesterov's momentum."""
    learning_rate: float = 2e-3
    """The optimiser's learning rate, times what the schedule says."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Times the weights, is added to their gradients."""
    schedule: Schedule = "one_cycle"
    """one_cycle rises over a fifth of training, then falls along a cosine to 0; linear falls to 0;
    steps is divided by 10 after each quarter; constant."""
    amp: bool = False
    """Compute convolutions and products in bfloat16; `wcmi-fast info` says where it pays."""
    compile: bool = False
    """Let torch.compile fuse a step (not attacks); it needs a C++ compiler, and takes a minute."""
    seed: int = 0
    """Decides weights, order of the data, augmentation, dropout and random starts."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""
    checkpoint_every: int = 500
    """Batches between checkpoints; there is one after every epoch, too."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the folder tensorboard."""
    sync_batch_norm: bool = False
    """On several processes, normalise by the statistics of the whole batch."""

    def attack(self) -> PGD:
        """Return the attack of training."""
        return _pgd(self.eps, self.steps, self.step_size, random_start=self.random_start)

    def augmentation(self) -> Augmentation | None:
        """Return how training images are changed before they are attacked."""
        found = Augmentation(
            crop_padding=self.crop_padding,
            flip=self.flip,
            jitter=self.jitter,
            rotation=self.rotation,
        )
        return None if found == Augmentation() else found

    def test_attack(self) -> PGD:
        """Return the attack on the test images."""
        return _pgd(self.eps, self.test_steps, None, name="test_steps")


@dataclass(frozen=True, kw_only=True)
class EncoderTask(Task):
    """Train an encoder without labels, for I - beta RV (spec section 3)."""

    beta: float = 1.0
    """Weight of the vulnerability: 1 is worst-case information, 0 plain information."""
    bound: str = "dv"
    """Bound on information: one of wcmi_fast.training.objective.BOUNDS."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic (full), or the encoder only, as the authors do."""
    critic_refresh: int = 1
    """With encoder_only, recompute the image side every so many attack steps; 1 is exact."""
    shared_critic: bool = False
    """Let the critic see images through the encoder's first convolutions, for beta 0 or 1."""
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted from images inside the encoder and the critic; None is 0."""
    std: tuple[float, ...] | None = None
    """Of each channel, which what is left is divided by; None is 1."""
    units: int = 64
    """Size U of the critic's features."""
    grad_clip: float = 1.0
    """Largest norm of a step's gradient."""
    averaging: float = 0.99
    """Decay of the running average of the weights; 0 takes the last weights."""


@dataclass(frozen=True, kw_only=True)
class Supervised(Task):
    """What heads and classifiers have in common."""

    robust: bool = False
    """Train on attacked images."""
    held_out: int = 0
    """So many training images are held out and attacked after every epoch; 0 holds out none."""
    held_out_steps: int = 10
    """Steps of the attack on them."""
    early_stop: bool = False
    """Keep the weights of the epoch of the highest accuracy on attacked held-out images."""
    stop_on_overfitting: bool = False
    """End training when that accuracy falls below half of its best."""

    def watch(self) -> Watch | None:
        """Return what to hold out, and how to attack it."""
        if not self.held_out:
            if self.early_stop or self.stop_on_overfitting:
                name = "early_stop" if self.early_stop else "stop_on_overfitting"
                raise ValueError(f"train: {name} needs held_out images, wanted held_out 1 or more")
            return None
        return Watch(
            rows=self.held_out,
            attack=_pgd(self.eps, self.held_out_steps, None, name="held_out_steps"),
            keep_best=self.early_stop,
            stop=self.stop_on_overfitting,
        )


@dataclass(frozen=True, kw_only=True)
class HeadTask(Supervised):
    """Train a classification head on a frozen encoder (spec section 5)."""

    encoder: Path
    """Run folder of an encoder, or its encoder.safetensors."""
    kind: HeadKind = "mlp"
    """mlp or linear."""
    batch_size: int = 128
    """Images per batch; an incomplete last batch is left out."""
    learning_rate: float = 1e-3
    """The optimiser's learning rate, times what the schedule says."""
    schedule: Schedule = "linear"
    """one_cycle rises over a fifth of training, then falls along a cosine to 0; linear falls to 0;
    steps is divided by 10 after each quarter; constant."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTask(Supervised):
    """Train a supervised classifier, standard or adversarially (spec section 5)."""

    network: str = "baseline_h"
    """One of wcmi_fast.models.NAMES."""
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted from images inside the network; None is 0."""
    std: tuple[float, ...] | None = None
    """Of each channel, which what is left is divided by; None is 1."""
    batch_size: int = 128
    """Images per batch; an incomplete last batch is left out."""


TASKS: dict[str, type[Task]] = {
    "encoder": EncoderTask,
    "head": HeadTask,
    "classifier": ClassifierTask,
}


def train(task: Task, folder: Path, progress: Progress) -> dict[str, Any]:
    """Do a task into a folder: config.toml, metrics.jsonl, weights and results.json.

    On several processes all do the task, and the first one writes (docs/scaling.md).

    Args:
        task: what to train.
        folder: an interrupted run of the same task goes on there.
        progress: told what is done, in batches.

    Returns:
        The content of results.json.

    Raises:
        ValueError: settings that do not fit; the folder holds another task, or other settings.
        StoppedError: SIGINT or SIGTERM within `signals.finishing_steps`; all is saved.
        FloatingPointError, CheckpointError, OSError: as the trainer.
    """
    name = next(name for name, kind in TASKS.items() if type(task) is kind)
    _check(task)
    data = _cut(datasets.load(task.data), task)
    _check_rows(task, len(data.x_train))
    work = _WORK[name](task, data)  # raises for what does not fit, before the folder is claimed
    boarded = task.tensorboard and ranks.is_first()
    written = writer(folder / BOARD) if boarded else lambda record: None
    run = RunFolder(folder, every=task.checkpoint_every, on_record=written)
    settings = json.loads(json.dumps(asdict(task), default=str))
    run.claim("train", {"task": name, **settings})
    known = {key: value for key, value in settings.items() if value is not None}
    about = {**versions(), "revision": revision()}
    config = tomli_w.dumps({name: known, "versions": about})
    ranks.from_first(lambda: write_file(folder / CONFIG, config))
    results = {"task": name, **work(run, progress)}
    ranks.from_first(lambda: write_file(folder / RESULTS, json.dumps(results, indent=1) + "\n"))
    return results


def batches_of(task: Task, data_rows: int) -> int:
    """Return the number of training batches, for a progress bar.

    Raises:
        ValueError: settings that do not fit.
    """
    _check(task)
    held = task.held_out if isinstance(task, Supervised) else 0
    return (min(task.train_images, data_rows) - held) // task.batch_size * task.epochs


def told(progress: Progress) -> OnBatch:
    """Return what tells a progress bar of a batch, and the newest values with it."""

    def on_batch(values: Values) -> None:
        progress.advance(1)
        progress.note("  ".join(f"{name} {value:.3f}" for name, value in values.items()))

    return on_batch


def _check(task: Task) -> None:
    for name in ("train_images", "test_images", "checkpoint_every", "epochs", "batch_size"):
        value = getattr(task, name)
        if value < 1:
            raise ValueError(f"train: {name} is {value}, wanted 1 or more")
    ranks.check_batch("train", task.batch_size)
    task.attack()
    task.test_attack()


def _check_rows(task: Task, rows: int) -> None:
    held = task.held_out if isinstance(task, Supervised) else 0
    if held < 0:
        raise ValueError(f"train: held_out is {held}, wanted 0 or more")
    if rows - held < task.batch_size:
        raise ValueError(
            f"train: batch_size is {task.batch_size}, and {rows} training images with {held} held "
            f"out leave {max(rows - held, 0)}, wanted a batch or more"
        )


def _common(task: Task) -> dict[str, Any]:
    """Return the options that `TrainingConfig` has by the same names."""
    names = {each.name for each in fields(TrainingConfig)} & {each.name for each in fields(Task)}
    return {name: getattr(task, name) for name in sorted(names)}


def _encoder(task: EncoderTask, data: Data) -> Work:
    if task.bound not in BOUNDS:
        close = difflib.get_close_matches(task.bound, BOUNDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"train: bound is {task.bound!r}, wanted one of {', '.join(BOUNDS)}{hint}")
    shape = _shape(data)
    config = EncoderConfig(
        attack=task.attack(),
        augmentation=task.augmentation(),
        beta=task.beta,
        bound=task.bound,
        critic_grad=task.critic_grad,
        critic_refresh=task.critic_refresh,
        shared_critic=task.shared_critic,
        mean=task.mean,
        std=task.std,
        units=task.units,
        grad_clip=task.grad_clip,
        averaging=task.averaging,
        **_common(task),
    )
    whole = models.baseline_h(shape, classes=config.dim, mean=task.mean, std=task.std)

    def work(run: RunFolder, progress: Progress) -> dict[str, Any]:
        encoder, critic = train_encoder(
            config,
            Feed(data.x_train, task.device),
            seed=task.seed,
            stage="encoder",
            run=run,
            on_batch=told(progress),
        )
        whole.load_state_dict({**whole.state_dict(), **encoder.state_dict()})
        sides = {f"{name}.safetensors": side for name, side in critic.modules().items()}
        for file, module in {ENCODER: whole, **sides}.items():
            ranks.from_first(partial(save_weights, run.path / file, module))
        return {"bound_nats": run.metrics()[-1]["bound_nats"]}

    return work


def _head(task: HeadTask, data: Data) -> Work:
    shape, classes = _shape(data), _classes(data)
    encoder = _loaded_encoder(task.encoder, shape).to(task.device)
    whole = models.load(f"baseline_h_{task.kind}", input_shape=shape, classes=classes)
    config = HeadConfig(
        attack=task.attack() if task.robust else None,
        augmentation=task.augmentation(),
        kind=task.kind,
        watch=task.watch(),
        **_common(task),
    )

    def work(run: RunFolder, progress: Progress) -> dict[str, Any]:
        head = train_head(
            config,
            encoder,
            Feed(data.x_train, task.device),
            Feed(data.y_train, task.device),
            classes=classes,
            seed=task.seed,
            stage="head",
            run=run,
            on_batch=told(progress),
        )
        parts = {f"head.{name}": value for name, value in head.state_dict().items()}
        whole.load_state_dict({**encoder.state_dict(), **parts})
        return ranks.from_first(lambda: _evaluated(task, whole, data, run))

    return work


def _classifier(task: ClassifierTask, data: Data) -> Work:
    config = ClassifierConfig(
        attack=task.attack() if task.robust else None,
        augmentation=task.augmentation(),
        watch=task.watch(),
        **_common(task),
    )
    with seeded(task.seed, "classifier", "weights"):
        model = models.load(
            task.network,
            input_shape=_shape(data),
            classes=_classes(data),
            mean=task.mean,
            std=task.std,
        )

    def work(run: RunFolder, progress: Progress) -> dict[str, Any]:
        trained = train_classifier(
            config,
            model.requires_grad_(True),
            Feed(data.x_train, task.device),
            Feed(data.y_train, task.device),
            seed=task.seed,
            stage="classifier",
            run=run,
            on_batch=told(progress),
        )
        return ranks.from_first(lambda: _evaluated(task, trained, data, run))

    return work


_WORK: dict[str, Callable[[Any, Data], Work]] = {
    "encoder": _encoder,
    "head": _head,
    "classifier": _classifier,
}


def _evaluated(task: Task, model: nn.Module, data: Data, run: RunFolder) -> dict[str, Any]:
    """Save a classifier, and return its accuracies on the test images."""
    save_weights(run.path / CLASSIFIER, model)
    x, y = Feed(data.x_test, task.device), Feed(data.y_test, task.device)
    shares = {
        name: accuracy(
            model.to(task.device),
            nn.Identity(),
            x,
            y,
            attack=attack,
            batch_size=min(EVALUATION_BATCH, len(x)),
        )
        for name, attack in (("natural", None), ("adversarial", task.test_attack()))
    }
    return {
        "natural_accuracy": shares["natural"],
        "adversarial_accuracy": shares["adversarial"],
        "test_images": len(x),
        "test_attack": asdict(task.test_attack()),
    }


def _loaded_encoder(given: Path, shape: tuple[int, int, int]) -> nn.Module:
    """Return the encoder of a run, or of a file."""
    if given.is_dir():
        holds = _held_by(given)
        if holds != "a finished encoder run":
            raise ValueError(
                f"train: encoder is {given}, which holds {holds}, wanted the folder of a finished "
                "encoder run"
            )
        given = given / ENCODER
    dim = read_state(given)["output.bias"].shape[0]
    return models.load("baseline_h", given, input_shape=shape, classes=dim)


def _held_by(folder: Path) -> str:
    file = folder / SETTINGS
    task = json.loads(file.read_text()).get("task") if file.is_file() else None
    if task == "encoder":
        finished = (folder / ENCODER).is_file()
        return "a finished encoder run" if finished else "an encoder run that is not finished"
    return f"a {task} run" if task in TASKS else "no run"


def _pgd(
    eps: float,
    steps: int,
    step_size: float | None,
    *,
    name: str = "steps",
    random_start: bool = False,
) -> PGD:
    if steps < 1:
        raise ValueError(f"train: {name} is {steps}, wanted 1 or more")
    # An eps of 0 allows no step of 0.
    size = step_size or 2.5 * eps / steps or 1.0
    return PGD(eps=eps, step_size=size, steps=steps, random_start=random_start)


def _cut(data: Data, task: Task) -> Data:
    return Data(
        data.x_train[: task.train_images],
        data.y_train[: task.train_images],
        data.x_test[: task.test_images],
        data.y_test[: task.test_images],
    )


def _shape(data: Data) -> tuple[int, int, int]:
    if data.x_train.ndim != 4:
        raise ValueError(
            f"train: data has rows of shape {tuple(data.x_train.shape[1:])}, wanted images"
        )
    return (data.x_train.shape[1], data.x_train.shape[2], data.x_train.shape[3])


def _classes(data: Data) -> int:
    return int(torch.cat([data.y_train, data.y_test]).max()) + 1
