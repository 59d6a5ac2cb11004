"""Training classifiers, and heads on frozen encoders, by cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wcmi_fast.data import Feed, fed
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.parallel import averaging, synchronised_
from wcmi_fast.models import LinearHead, MLPHead
from wcmi_fast.models.folding import folded
from wcmi_fast.training.augmentation import augmented
from wcmi_fast.training.config import ClassifierConfig, HeadConfig
from wcmi_fast.training.evaluation import accuracy, classification_loss, represent
from wcmi_fast.training.free import Perturbation
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import OnBatch, Stage, Values, ignore, run_stage, watched_by
from wcmi_fast.training.steps import (
    attacked,
    autocast,
    new_optimizer,
    ramp,
    set_learning_rate,
    stepped,
)
from wcmi_fast.training.watch import Watch, Watched


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
    on_batch: OnBatch = ignore,
) -> nn.Module:
    """Train a head on a frozen encoder by cross-entropy, on attacked images if robust.

    A standard head computes the features of all images once, unless they are augmented. The
    encoder's weights get no gradient.

    Args:
        config: the settings; its attack makes the head robust.
        encoder: images -> representations (N, D); used in eval mode and not changed.
        x: images (N, C, H, W), float32 in [0, 1], on the device to train on; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        classes: number of classes.
        seed: decides weights, dropout and order of the data.
        stage: name under which checkpoints and metrics go.
        run: folder of the run; an interrupted stage goes on after its last checkpoint.
        on_batch: told after every batch what it reports, by name.

    Returns:
        The head, in eval mode.

    Raises:
        FloatingPointError: the loss is not finite; the message names stage, epoch and batch.
        CheckpointError: a checkpoint in `run` cannot be read or does not fit.
    """
    fixed, x, y = folded(encoder), fed(x), fed(y)
    with seeded(seed, stage, "weights"):
        build: type[nn.Module] = MLPHead if config.kind == "mlp" else LinearHead
        head = build(represent(fixed, x[:1]).shape[1], classes).to(x.device)
    return _fit(_Fit("train_head", config, fixed, head, x, y), seed, stage, run, on_batch)


def train_classifier(
    config: ClassifierConfig,
    model: nn.Module,
    x: Tensor | Feed,
    y: Tensor | Feed,
    *,
    seed: int,
    stage: str,
    run: RunFolder,
    on_batch: OnBatch = ignore,
) -> nn.Module:
    """Train a classifier by cross-entropy, on attacked images if its config has an attack.

    Args:
        config: the settings; its attack makes this adversarial training.
        model: images (N, C, H, W) -> logits (N, K); trained in place.
        x: images (N, C, H, W), float32 in [0, 1], on the device to train on; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        seed: decides dropout, the attack's starts and the order of the data; not the first weights.
        stage: name under which checkpoints and metrics go.
        run: folder of the run; an interrupted stage goes on after its last checkpoint.
        on_batch: told after every batch what it reports, by name.

    Returns:
        The model, in eval mode, without gradient.

    Raises:
        FloatingPointError: the loss is not finite; the message names stage, epoch and batch.
        CheckpointError: a checkpoint in `run` cannot be read or does not fit.
    """
    x, y = fed(x), fed(y)
    model = model.to(x.device).to(memory_format=torch.channels_last)
    fit = _Fit("train_classifier", config, nn.Identity(), model, x, y)
    return _fit(fit, seed, stage, run, on_batch)


@dataclass(frozen=True)
class _Fit:
    """What is fitted: images x through a fixed encoder and a trained model to the logits of y."""

    owner: str
    config: HeadConfig | ClassifierConfig
    encoder: nn.Module
    model: nn.Module
    x: Feed
    y: Feed


def _fit(fit: _Fit, seed: int, stage: str, run: RunFolder, on_batch: OnBatch) -> nn.Module:
    config, model = fit.config, fit.model
    rows = _trained_rows(fit.owner, config.watch, len(fit.x), config.batch_size)
    optimizer = new_optimizer(config, model.parameters())
    watched = None if config.watch is None else _watched(fit, config.watch, stage)
    perturbation = Perturbation.of(fit.owner, config, fit.x)
    features_of, forward = _features_of(fit), stepped(config, model)
    if config.sync_batch_norm:
        synchronised_(model)
    logits_of = averaging([model], lambda features: forward(features))

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> Values:
        labels = fit.y[indices]
        set_learning_rate(optimizer, config, done)

        def step(features: Tensor) -> Values:
            model.train()
            with autocast(config, fit.x.device):
                logits = logits_of(features)
                loss = cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            right = (logits.argmax(1) == labels).float().mean()
            return dict(
                zip(("loss_nats", "training_accuracy"), ranks.means(loss, right), strict=True)
            )

        if perturbation is not None:
            part = ramp(done, config.eps_warmup)
            clean = augmented(config.augmentation, fit.x[indices], generator)
            return perturbation.replay(lambda x: step(fit.encoder(x)), clean, part)
        return step(features_of(indices, done, generator))

    modules = {"model": model, "watched": watched, "perturbation": perturbation}
    run_stage(
        Stage(
            owner=fit.owner,
            name=stage,
            seed=seed,
            rows=rows,
            epochs=config.epochs,
            batch_size=config.batch_size,
            modules={name: module for name, module in modules.items() if module is not None},
            optimizer=optimizer,
            train_batch=train_batch,
            on_batch=on_batch,
            **watched_by(watched),
        ),
        run,
    )
    return (watched.result() if watched else model).eval().requires_grad_(False)


def _features_of(fit: _Fit) -> Callable[[Tensor, float, torch.Generator], Tensor]:
    """Return what a step is made on: of indices (B,), the part of training done, a generator."""
    config = fit.config
    if config.attack is None and config.augmentation is None:
        fixed = isinstance(fit.encoder, nn.Identity)
        features = fit.x if fixed else fed(represent(fit.encoder, fit.x))
        return lambda indices, done, generator: features[indices]

    def changed(indices: Tensor, done: float, generator: torch.Generator) -> Tensor:
        images = augmented(config.augmentation, fit.x[indices], generator)
        with autocast(config, images.device):
            if config.attack is not None:
                loss_fn = classification_loss(fit.encoder, folded(fit.model), fit.y[indices])
                part = ramp(done, config.eps_warmup)
                images = attacked(config.attack, loss_fn, images, part, generator)
            return represent(fit.encoder, images)

    return changed


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


def _watched(fit: _Fit, watch: Watch, stage: str) -> Watched:
    """Return what looks at the last rows after every epoch."""
    held = slice(len(fit.x) - watch.rows, len(fit.x))

    def measure() -> float:
        return ranks.from_first(
            lambda: accuracy(fit.encoder, fit.model, fit.x[held], fit.y[held], attack=watch.attack)
        )

    return Watched(watch, fit.model, measure, fit.owner, stage).to(fit.x.device)
