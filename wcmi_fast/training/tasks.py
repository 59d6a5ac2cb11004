"""What `wcmi-fast train` does: an encoder, a head on one, or a classifier, into a folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from wcmi_fast import datasets, models
from wcmi_fast.data import Data, Feed
from wcmi_fast.diagnosis import revision, versions
from wcmi_fast.distributed import ranks
from wcmi_fast.files import write_file
from wcmi_fast.models.loading import read_state
from wcmi_fast.progress import Progress
from wcmi_fast.training.board import writer
from wcmi_fast.training.checkpoint import save_weights
from wcmi_fast.training.config import (
    ClassifierConfig,
    EncoderConfig,
    HeadConfig,
    TrainingConfig,
)
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.evaluation import accuracy, interval
from wcmi_fast.training.objective import BOUNDS
from wcmi_fast.training.options import (
    TASKS,
    ClassifierTask,
    EncoderTask,
    HeadTask,
    Supervised,
    Task,
)
from wcmi_fast.training.run_folder import SETTINGS, RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import OnBatch, Values
from wcmi_fast.training.supervised import train_classifier, train_head

CONFIG, RESULTS, BOARD = "config.toml", "results.json", "tensorboard"
ENCODER, CLASSIFIER = "encoder.safetensors", "classifier.safetensors"
EVALUATION_BATCH = 125
Work = Callable[[RunFolder, Progress], dict[str, Any]]


def train(task: Task, folder: Path, progress: Progress, data: Data | None = None) -> dict[str, Any]:
    """Do a task into a folder: config.toml, metrics.jsonl, weights and results.json.

    On several processes all do the task, and the first one writes (docs/scaling.md).

    Args:
        task: what to train.
        folder: an interrupted run of the same task goes on there.
        progress: told what is done, in batches.
        data: what task.data names, where it is loaded already.

    Returns:
        The content of results.json.

    Raises:
        ValueError: settings that do not fit; the folder holds another task, or other settings.
        StoppedError: SIGINT or SIGTERM within `signals.finishing_steps`; all is saved.
        FloatingPointError, CheckpointError, OSError: as the trainer.
    """
    name = next(name for name, kind in TASKS.items() if type(task) is kind)
    _check(task)
    data = _cut(datasets.load(task.data) if data is None else data, task)
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
    if not 0 <= task.eps <= 1:
        raise ValueError(
            f"train: eps is {task.eps}, wanted 0 to 1, as pixels are; of 255 grey values that is "
            f"{task.eps / 255:.4f}"
        )
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


def _shared(task: Task, config: type[TrainingConfig]) -> dict[str, Any]:
    """Return the options that a config has by the same names."""
    names = {each.name for each in fields(config)} & {each.name for each in fields(task)}
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
        **_shared(task, EncoderConfig),
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
        watch=task.watch(),
        **_shared(task, HeadConfig),
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
        **_shared(task, ClassifierConfig),
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
        **{f"{name}_accuracy": share for name, share in shares.items()},
        **{f"{name}_interval": interval(share, len(x)) for name, share in shares.items()},
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
