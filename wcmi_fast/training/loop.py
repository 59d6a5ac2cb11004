"""The trainer: encoders by a bound on information, and heads on frozen encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from wcmi_fast import functional
from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed, fed
from wcmi_fast.functional.bounds import MEASURES
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.models import BaselineH, GlobalCritic, LinearHead, LocalCritic, MLPHead
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import ClassifierConfig, CriticGrad, EncoderConfig, HeadConfig
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.schedule import factor
from wcmi_fast.training.seeds import seeded, starts_generator
from wcmi_fast.training.stage import Stage, run_stage
from wcmi_fast.training.watch import Watch, Watched

Bound = Callable[[Tensor, Tensor], Tensor]
# Indices (B,), the part of training that is done and the epoch's generator -> representations.
BatchFeatures = Callable[[Tensor, float, torch.Generator], Tensor]
BOUNDS: dict[str, Callable[..., Tensor]] = {
    "dv": functional.dv,
    "dv_authors": partial(functional.dv, diagonal="zero"),
    "infonce": functional.infonce,
    "nwj": functional.nwj,
    "smile": partial(functional.smile, tau=5.0),
    "mine": functional.mine,
    "jsd": functional.jsd,
    **{f"fenchel_{name}": partial(functional.fenchel_dual, measure=name) for name in MEASURES},
}


# The terms of the objective.
PLAIN, WORST = "information", "worst_case"


@dataclass(frozen=True)
class Critic:
    """Both sides of T[i, j, p] = <global_(g(x_i)), local(x_j)_p>."""

    global_: nn.Module
    local: nn.Module

    def to(self, device: torch.device) -> Critic:
        """Return both sides on a device."""
        return Critic(self.global_.to(device), self.local.to(device))

    def modules(self) -> dict[str, nn.Module]:
        """Return both sides by name."""
        return {"global_critic": self.global_, "local_critic": self.local}


def information_loss(
    encoder: nn.Module,
    critic: Critic,
    bound: Bound,
    critic_grad: CriticGrad,
    critic_refresh: int = 1,
) -> Callable[[Tensor], Tensor]:
    """Return the attacker's loss x -> -bound, in nats, for one run of an attack.

    See `EncoderConfig` for critic_grad and critic_refresh. A new one is needed for every batch:
    it keeps the image side of the critic between refreshes.
    """
    if critic_grad == "full":
        return lambda x: -bound(critic.global_(encoder(x)), critic.local(x))
    kept: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        step = len(kept)
        stale = step == 0 or (critic_refresh > 0 and step % critic_refresh == 0)
        with torch.no_grad():
            kept.append(critic.local(x) if stale else kept[-1])
        return -bound(critic.global_(encoder(x)), kept[-1])

    return loss


def scaled(attack: PGD, factor: float) -> PGD:
    """Return the attack with eps and step size multiplied by a factor."""
    # A factor of 0 makes eps 0, where the step size does not matter but must not be 0.
    return replace(attack, eps=attack.eps * factor, step_size=attack.step_size * (factor or 1.0))


def new_encoder(config: EncoderConfig, input_shape: tuple[int, int, int]) -> nn.Module:
    """Build the untrained encoder that a config describes."""
    return BaselineH(input_shape, dim=config.dim)


def new_critic(dim: int, units: int, input_shape: tuple[int, int, int]) -> Critic:
    """Build an untrained critic of U = units for representations of size dim."""
    local = LocalCritic(input_shape, units=units).to(memory_format=torch.channels_last)
    return Critic(GlobalCritic(dim, units=units), local)


def train_encoder(
    config: EncoderConfig,
    x: Tensor | Feed,
    *,
    seed: int,
    stage: str,
    run: RunFolder,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[nn.Module, Critic]:
    """Train an encoder and its critic to maximise I - beta RV, by default worst-case information.

    Each step attacks the batch with the modules in eval mode, then trains on it in train mode
    (supplement, algorithm 2). RV being the difference of plain and worst-case information, the
    objective is ``(1 - beta) I + beta worst-case I``; a term of weight 0 is not computed.

    Args:
        config: the settings.
        x: images (N, C, H, W), float32 in [0, 1], on the device to train on; or a `Feed`.
        seed: decides weights and order of the data.
        stage: name under which checkpoints and metrics go.
        run: folder of the run; an interrupted stage goes on after its last checkpoint.
        on_batch: called after every batch.

    Returns:
        The encoder and the critic, in eval mode; of two critics that of attacked images.

    Raises:
        ValueError: config.bound is none of `BOUNDS`.
        FloatingPointError: the objective is not finite; the message names stage, epoch and batch.
        CheckpointError: a checkpoint in `run` cannot be read or does not fit.

    Source: Zhu et al. 2020, section 4; spec section 3.
    """
    x = fed(x)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    weights_of = _weights_of_terms(config)
    with seeded(seed, stage, "weights"):
        encoder = new_encoder(config, shape).to(x.device).to(memory_format=torch.channels_last)
        critics = {term: new_critic(config.dim, config.units, shape) for term in weights_of}
    critics = {term: critic.to(x.device) for term, critic in critics.items()}
    trained = {"encoder": encoder, **_modules_of(critics)}
    averaged = {f"averaged_{name}": copy.deepcopy(module) for name, module in trained.items()}
    weights = [p for module in trained.values() for p in module.parameters()]
    optimizer = Adam(weights, lr=config.learning_rate, fused=True)
    bounds = {term: _bound(config.bound) for term in weights_of}
    per_epoch = len(x) // config.batch_size

    def attacked(attack: PGD, images: Tensor, done: float, generator: torch.Generator) -> Tensor:
        ramped = scaled(attack, _ramp(done, config.eps_warmup))
        critic = critics[WORST]
        frozen_critic = Critic(folded(critic.global_), folded(critic.local))
        loss_fn = information_loss(
            folded(encoder),
            frozen_critic,
            BOUNDS["dv" if config.bound == "mine" else config.bound],
            config.critic_grad,
            config.critic_refresh,
        )
        starts = starts_generator(generator, images.device)
        return ramped.attack(loss_fn, images, generator=starts)

    def value_of(term: str, images: Tensor) -> Tensor:
        z = encoder(images)
        if weights_of[term] != 1:
            # The encoder ascends by the term's weight; its critic always ascends fully.
            z.register_hook(lambda dz: weights_of[term] * dz)
        return bounds[term](critics[term].global_(z), critics[term].local(images))

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        clean = x[indices]
        images = dict.fromkeys(weights_of, clean)
        if WORST in images and config.attack is not None:
            images[WORST] = attacked(config.attack, clean, done, generator)
        _set_learning_rate(optimizer, config.learning_rate * factor(config.schedule, done))
        values = {term: value_of(term, images[term]) for term in weights_of}
        optimizer.zero_grad(set_to_none=True)
        (-sum(values.values(), torch.zeros((), device=clean.device))).backward()
        nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        step = round(done * config.epochs * per_epoch)
        decay = min(config.averaging, (1 + step) / (10 + step))
        _average_(averaged.values(), trained.values(), decay if config.averaging else 0.0)
        return sum(weights_of[term] * value.item() for term, value in values.items())

    run_stage(
        Stage(
            owner="train_encoder",
            name=stage,
            seed=seed,
            rows=len(x),
            epochs=config.epochs,
            batch_size=config.batch_size,
            metric="bound_nats",
            modules={**trained, **averaged},
            optimizer=optimizer,
            train_batch=train_batch,
            on_batch=on_batch,
        ),
        run,
    )
    result = {name: module.eval().requires_grad_(False) for name, module in averaged.items()}
    return result["averaged_encoder"], Critic(
        result["averaged_global_critic"], result["averaged_local_critic"]
    )


def _weights_of_terms(config: EncoderConfig) -> dict[str, float]:
    """Return the weights in the objective of the terms that are computed."""
    if config.attack is None:
        return {PLAIN: 1.0}
    weights = {WORST: config.beta, PLAIN: 1 - config.beta}
    return {term: weight for term, weight in weights.items() if weight}


def _modules_of(critics: Mapping[str, Critic]) -> dict[str, nn.Module]:
    """Return the critics' sides by name; those of a second critic are called plain."""
    first, *others = critics.values()
    named = first.modules()
    for other in others:
        named |= {f"plain_{name}": side for name, side in other.modules().items()}
    return named


def _bound(name: str) -> Bound:
    if name not in BOUNDS:
        raise ValueError(f"train_encoder: bound is {name!r}, wanted one of {tuple(BOUNDS)}")
    return partial(BOUNDS[name], ema_state=EMAState()) if name == "mine" else BOUNDS[name]


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
    optimizer = Adam(head.parameters(), lr=config.learning_rate, fused=True)
    watched = _watched(config.watch, head, "train_head", stage, fixed, x, y)
    if config.attack is None:
        batch_features = _clean_features(fixed, x)
    else:
        batch_features = _attacked_features(config.attack, config.eps_warmup, fixed, head, x, y)

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        _set_learning_rate(optimizer, config.learning_rate * factor(config.schedule, done))
        features = batch_features(indices, done, generator)
        loss = cross_entropy(head.train()(features), y[indices])
        return _descend(optimizer, loss)

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
    optimizer = Adam(model.parameters(), lr=config.learning_rate, fused=True)
    watched = _watched(config.watch, model, "train_classifier", stage, None, x, y)

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        images, labels = x[indices], y[indices]
        if config.attack is not None:
            attack = scaled(config.attack, _ramp(done, config.eps_warmup))
            loss_fn = classification_loss(folded(model), nn.Identity(), labels)
            starts = starts_generator(generator, images.device)
            images = attack.attack(loss_fn, images, generator=starts)
        _set_learning_rate(optimizer, config.learning_rate * factor(config.schedule, done))
        loss = cross_entropy(model.train()(images), labels)
        return _descend(optimizer, loss)

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


def _descend(optimizer: Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


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
        return accuracy(before, head, x[held], y[held], attack=watch.attack)

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
        ramped = scaled(attack, _ramp(done, eps_warmup))
        clean = x[indices]
        starts = starts_generator(generator, clean.device)
        x_adv = ramped.attack(loss_fn, clean, generator=starts)
        return represent(encoder, x_adv)

    return batch_features


def run_epochs(
    run: RunFolder | None,
    stage: str,
    seed: int,
    epochs: int,
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    train_epoch: Callable[[int, torch.Generator], dict[str, float]],
) -> None:
    """Run the epochs that a stage still lacks, with a checkpoint after each if there is a folder.

    Every epoch has its own seed, so that a resumed run is the uninterrupted one, bit for bit.
    """
    start = 0 if run is None else run.restore_epoch(stage, modules, optimizer)
    for epoch in range(start, epochs):
        with seeded(seed, stage, epoch) as generator:
            metrics = train_epoch(epoch, generator)
        if run is not None:
            run.save_epoch(stage, epoch + 1, modules, optimizer, metrics)


def classification_loss(
    encoder: nn.Module, head: nn.Module, labels: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the attacker's loss x -> cross-entropy per image (N,), in nats."""
    return lambda x: cross_entropy(head(encoder(x)), labels, reduction="none")


@torch.no_grad()
def represent(encoder: nn.Module, x: Tensor | Feed, *, batch_size: int = 500) -> Tensor:
    """Return the representations (N, D) of images, without gradient."""
    return torch.cat([encoder(part) for part in x.split(batch_size)])


def accuracy(
    encoder: nn.Module,
    head: nn.Module,
    x: Tensor | Feed,
    y: Tensor | Feed,
    *,
    attack: PGD | None,
    batch_size: int = 125,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the share of images classified correctly, in [0, 1], under an attack if one is given.

    Args:
        encoder: images -> representations; evaluated in eval mode.
        head: representations -> logits; evaluated in eval mode.
        x: images (N, C, H, W), float32 in [0, 1], on the encoder's device; or a `Feed`.
        y: labels (N,), int64, on the same device; or a `Feed`.
        attack: maximises each image's cross-entropy; None for natural accuracy.
        batch_size: images per batch; does not affect the result.
        on_batch: called after every batch.
    """
    encoder, head = folded(encoder), folded(head)
    correct = 0
    for clean, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        images = clean
        if attack is not None:
            images = attack.attack(classification_loss(encoder, head, labels), images)
        predicted = head(represent(encoder, images)).argmax(1)
        correct += int((predicted == labels).sum())
        on_batch()
    return correct / len(x)


def _ramp(done: float, warmup: float) -> float:
    return min(1.0, done / warmup) if warmup > 0 else 1.0


def _set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


@torch.no_grad()
def _average_(averaged: Iterable[nn.Module], trained: Iterable[nn.Module], decay: float) -> None:
    for slow, fast in zip(averaged, trained, strict=True):
        states = zip(slow.state_dict().values(), fast.state_dict().values(), strict=True)
        for old, new in states:
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)
