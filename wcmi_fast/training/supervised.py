"""Training classifiers, and heads on frozen encoders, by cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed, fed
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.parallel import averaging, synchronised_
from wcmi_fast.models import LinearHead, MLPHead
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import ClassifierConfig, HeadConfig
from wcmi_fast.training.evaluation import accuracy, classification_loss, represent
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded, starts_generator
from wcmi_fast.training.stage import Stage, run_stage
from wcmi_fast.training.steps import descend, new_optimizer, ramp, scaled, set_learning_rate
from wcmi_fast.training.watch import Watch, Watched

# Indices (B,), the part of training that is done and the epoch's generator -> representations.
BatchFeatures = Callable[[Tensor, float, torch.Generator], Tensor]


def train_head(
    config: HeadConfig,
    encoder: nn.Module,
    x: Tensor | Feed,
    y: Tensor | Feed,
    *,
    classes: int,
    seed: int,
    stage: str,
    run: RunFolder,
    on_batch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train a head on a frozen encoder by cross-entropy, on attacked images if robust.

    A standard head computes the features of all images once. The encoder's weights get no gradient.

    Args:
        config: the settings; its attack makes the head robust.
        encoder: images -> representations (N, D); used in eval mode and not changed.
        x: images (N, C, H, W), float32 in [0, 1], on the device to train on; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        classes: number of classes.
        seed: decides weights, dropout and order of the data.
        stage: name under which checkpoints and metrics go.
        run: folder of the run; an interrupted stage goes on after its last epoch.
        on_batch: called after every batch.

    Returns:
        The head, in eval mode.

    Raises:
        FloatingPointError: the loss is not finite; the message names stage, epoch and batch.
        CheckpointError: a checkpoint in `run` cannot be read or does not fit.
    """
    fixed, x, y = folded(encoder), fed(x), fed(y)
    rows = _trained_rows("train_head", config.watch, len(x), config.batch_size)
    with seeded(seed, stage, "weights"):
        build: type[nn.Module] = MLPHead if config.kind == "mlp" else LinearHead
        head = build(represent(fixed, x[:1]).shape[1], classes).to(x.device)
    if config.sync_batch_norm:
        synchronised_(head)
    logits_of = averaging([head], lambda features: head.train()(features))
    optimizer = new_optimizer(config, head.parameters())
    watched = _watched(config.watch, head, "train_head", stage, fixed, x, y)
    if config.attack is None:
        batch_features = _clean_features(fixed, x)
    else:
        batch_features = _attacked_features(config.attack, config.eps_warmup, fixed, head, x, y)

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        set_learning_rate(optimizer, config, done)
        features = batch_features(indices, done, generator)
        loss = cross_entropy(logits_of(features), y[indices])
        return descend(optimizer, loss)

    run_stage(
        Stage(
            owner="train_head",
            name=stage,
            seed=seed,
            rows=rows,
            epochs=config.epochs,
            batch_size=config.batch_size,
            metric="loss_nats",
            modules={"head": head, **_modules_watched(watched)},
            optimizer=optimizer,
            train_batch=train_batch,
            on_batch=on_batch,
            **_hooks(watched),
        ),
        run,
    )
    return (watched.result() if watched else head).eval().requires_grad_(False)


def train_classifier(
    config: ClassifierConfig,
    model: nn.Module,
    x: Tensor | Feed,
    y: Tensor | Feed,
    *,
    seed: int,
    stage: str,
    run: RunFolder,
    on_batch: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train a classifier by cross-entropy, on attacked images if its config has an attack.

    Args:
        config: the settings; its attack makes this adversarial training.
        model: images (N, C, H, W) -> logits (N, K); trained in place.
        x: images (N, C, H, W), float32 in [0, 1], on the device to train on; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        seed: decides dropout, the attack's starts and the order of the data; not the first weights.
        stage: name under which checkpoints and metrics go.
        run: folder of the run; an interrupted stage goes on after its last epoch.
        on_batch: called after every batch.

    Returns:
        The model, in eval mode, without gradient.

    Raises:
        FloatingPointError: the loss is not finite; the message names stage, epoch and batch.
        CheckpointError: a checkpoint in `run` cannot be read or does not fit.
    """
    x, y = fed(x), fed(y)
    rows = _trained_rows("train_classifier", config.watch, len(x), config.batch_size)
    model = model.to(x.device).to(memory_format=torch.channels_last)
    if config.sync_batch_norm:
        synchronised_(model)
    logits_of = averaging([model], lambda images: model.train()(images))
    optimizer = new_optimizer(config, model.parameters())
    watched = _watched(config.watch, model, "train_classifier", stage, None, x, y)

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        images, labels = x[indices], y[indices]
        if config.attack is not None:
            attack = scaled(config.attack, ramp(done, config.eps_warmup))
            loss_fn = classification_loss(folded(model), nn.Identity(), labels)
            starts = starts_generator(generator, images.device)
            part = ranks.part_of(images)
            images = attack.attack(loss_fn, images, generator=starts, part_of=part)
        set_learning_rate(optimizer, config, done)
        loss = cross_entropy(logits_of(images), labels)
        return descend(optimizer, loss)

    run_stage(
        Stage(
            owner="train_classifier",
            name=stage,
            seed=seed,
            rows=rows,
            epochs=config.epochs,
            batch_size=config.batch_size,
            metric="loss_nats",
            modules={"model": model, **_modules_watched(watched)},
            optimizer=optimizer,
            train_batch=train_batch,
            on_batch=on_batch,
            **_hooks(watched),
        ),
        run,
    )
    return (watched.result() if watched else model).eval().requires_grad_(False)


def _trained_rows(owner: str, watch: Watch | None, rows: int, batch_size: int) -> int:
    """Return how many rows are left to train on."""
    if watch is None:
        return rows
    if rows - watch.rows < batch_size:
        raise ValueError(
            f"{owner}: watch.rows is {watch.rows} of {rows} training images, wanted to leave a "
            f"batch of {batch_size} or more"
        )
    return rows - watch.rows


def _watched(
    watch: Watch | None,
    model: nn.Module,
    owner: str,
    stage: str,
    encoder: nn.Module | None,
    x: Feed,
    y: Feed,
) -> Watched | None:
    """Return what looks at the last rows after every epoch, if that is wanted."""
    if watch is None:
        return None
    held = slice(len(x) - watch.rows, len(x))

    def measure() -> float:
        before, head = (model, nn.Identity()) if encoder is None else (encoder, model)
        return ranks.from_first(
            lambda: accuracy(before, head, x[held], y[held], attack=watch.attack)
        )

    return Watched(watch, model, measure, owner, stage).to(x.device)


def _modules_watched(watched: Watched | None) -> dict[str, nn.Module]:
    return {} if watched is None else {"watched": watched}


def _hooks(watched: Watched | None) -> dict[str, Any]:
    if watched is None:
        return {}
    return {"after_epoch": watched.after_epoch, "ended": lambda: bool(watched.ended)}


def _clean_features(encoder: nn.Module, x: Feed) -> BatchFeatures:
    features = fed(represent(encoder, x))
    return lambda indices, done, generator: features[indices]


def _attacked_features(
    attack: PGD, eps_warmup: float, encoder: nn.Module, head: nn.Module, x: Feed, y: Feed
) -> BatchFeatures:
    def batch_features(indices: Tensor, done: float, generator: torch.Generator) -> Tensor:
        loss_fn = classification_loss(encoder, folded(head), y[indices])
        ramped = scaled(attack, ramp(done, eps_warmup))
        clean = x[indices]
        starts = starts_generator(generator, clean.device)
        part = ranks.part_of(clean)
        x_adv = ramped.attack(loss_fn, clean, generator=starts, part_of=part)
        return represent(encoder, x_adv)

    return batch_features
