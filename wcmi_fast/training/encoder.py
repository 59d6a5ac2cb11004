"""Training an encoder and its critics by information."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcmi_fast.data import Feed, fed
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.bounds import over_ranks
from wcmi_fast.distributed.parallel import averaging, synchronised_
from wcmi_fast.models import BaselineH, baseline_h
from wcmi_fast.training.augmentation import augmented
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.free import Perturbation
from wcmi_fast.training.objective import (
    BOUNDS,
    WORST,
    Bound,
    Critic,
    ascended,
    attacked_bound,
    attackers_loss,
    modules_of,
    new_critic,
    share_convolutions_,
    weights_of_terms,
)
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded
from wcmi_fast.training.stage import OnBatch, Stage, Values, ignore, run_stage, watched_by
from wcmi_fast.training.steps import (
    attacked,
    autocast,
    average_,
    new_optimizer,
    ramp,
    scaled,
    set_learning_rate,
    stepped,
)
from wcmi_fast.training.strength import Probe, strength


def new_encoder(config: EncoderConfig, input_shape: tuple[int, int, int]) -> nn.Module:
    """Build the untrained encoder that a config describes."""
    if config.mean is None and config.std is None:
        return BaselineH(input_shape, dim=config.dim)
    return baseline_h(input_shape, config.dim, mean=config.mean, std=config.std)


def _built(
    config: EncoderConfig,
    shape: tuple[int, int, int],
    terms: Iterable[str],
    device: torch.device,
) -> tuple[nn.Module, dict[str, Critic]]:
    encoder = new_encoder(config, shape)
    critics = {
        term: new_critic(config.dim, config.units, shape, config.mean, config.std) for term in terms
    }
    if config.shared_critic:
        for critic in critics.values():
            share_convolutions_(critic, encoder)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    return encoder, {term: critic.to(device) for term, critic in critics.items()}


def _values(
    config: EncoderConfig,
    encoder: nn.Module,
    critics: Mapping[str, Critic],
    bounds: Mapping[str, Bound],
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return images by term -> the terms' values, whose gradients in the encoder are weighted."""
    weights_of = weights_of_terms(config)
    encode = stepped(config, encoder)
    sides = {
        term: (stepped(config, critic.global_), stepped(config, critic.local))
        for term, critic in critics.items()
    }

    def value(term: str, images: Tensor) -> Tensor:
        z = encode(images)
        if weights_of[term] != 1:
            # The encoder ascends by the term's weight; its critic always ascends fully.
            z.register_hook(lambda dz: weights_of[term] * dz)
        global_, local = sides[term]
        return bounds[term](global_(z), local(images))

    return lambda images: {term: value(term, images[term]) for term in weights_of}


def _step(
    config: EncoderConfig,
    values_of: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    weights: Sequence[nn.Parameter],
    optimizer: Optimizer,
    images: Mapping[str, Tensor],
) -> Values:
    """Ascend by one step on images by term; return the values that it found."""
    device = next(iter(images.values())).device
    with autocast(config, device):
        values = values_of(images)
    optimizer.zero_grad(set_to_none=True)
    # A weight's gradient of the one global bound is the sum over the ranks, not their average.
    stacked = torch.stack(tuple(values.values()))
    (-ranks.count() * stacked.sum()).backward()
    nn.utils.clip_grad_norm_(weights, config.grad_clip)
    optimizer.step()
    found = dict(zip(values, stacked.tolist(), strict=True))
    weights_of = weights_of_terms(config)
    objective = sum(weights_of[term] * value for term, value in found.items())
    return {"bound_nats": objective, **{f"{term}_nats": v for term, v in found.items()}}


def _attack(
    config: EncoderConfig,
    encoder: nn.Module,
    critic: Critic,
    clean: Tensor,
    part: float,
    generator: torch.Generator,
) -> Tensor:
    """Attack a batch with the critic, at a part of the radius."""
    if config.attack is None:
        return clean
    name = attacked_bound(config)
    loss_fn = attackers_loss(config, over_ranks(name, BOUNDS[name]), encoder, critic)
    with autocast(config, clean.device):
        return attacked(config.attack, loss_fn, clean, part, generator)


def _probe(
    config: EncoderConfig, encoder: nn.Module, critic: Critic, images: Tensor, stage: str
) -> Probe | None:
    """Return what measures the attack on some images after every epoch."""
    attack = config.attack
    if attack is None:
        return None

    def measured(epoch: int) -> Values:
        now = scaled(attack, ramp(epoch / config.epochs, config.eps_warmup))
        with autocast(config, images.device):
            return ranks.from_first(lambda: strength(config, now, encoder, critic, images))

    where = f"train_encoder: stage {stage!r}"
    return Probe(measured, stop=config.stop_on_overfitting, where=where).to(images.device)


def train_encoder(
    config: EncoderConfig,
    x: Tensor | Feed,
    *,
    seed: int,
    stage: str,
    run: RunFolder,
    on_batch: OnBatch = ignore,
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
        on_batch: told after every batch what it reports, by name.

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
    weights_of = weights_of_terms(config)
    with seeded(seed, stage, "weights"):
        encoder, critics = _built(config, shape, weights_of, x.device)
    trained = {"encoder": encoder, **modules_of(critics)}
    if config.sync_batch_norm:
        trained = {name: synchronised_(module) for name, module in trained.items()}
    averaged = {f"averaged_{name}": copy.deepcopy(module) for name, module in trained.items()}
    weights = list(dict.fromkeys(p for module in trained.values() for p in module.parameters()))
    optimizer = new_optimizer(config, weights)
    ascending = {term: ascended(config.bound, critic.locations) for term, critic in critics.items()}
    bounds = {term: over_ranks(config.bound, bound) for term, bound in ascending.items()}
    perturbation = Perturbation.of("train_encoder", config, x)
    per_epoch = len(x) // config.batch_size

    values_of = averaging(trained.values(), _values(config, encoder, critics, bounds))
    step = partial(_step, config, values_of, weights, optimizer)

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> Values:
        clean = augmented(config.augmentation, x[indices], generator)
        part = ramp(done, config.eps_warmup)
        set_learning_rate(optimizer, config, done)
        if perturbation is not None:
            reported = perturbation.replay(lambda images: step({WORST: images}), clean, part)
        else:
            images = dict.fromkeys(weights_of, clean)
            if WORST in images:
                images[WORST] = _attack(config, encoder, critics[WORST], clean, part, generator)
            reported = step(images)
        number = round(done * config.epochs * per_epoch)
        decay = min(config.averaging, (1 + number) / (10 + number))
        average_(averaged.values(), trained.values(), decay if config.averaging else 0.0)
        return reported

    probe = None
    if WORST in critics:
        probe = _probe(config, encoder, critics[WORST], x[: config.batch_size], stage)
    states = {f"{term}_bound": bound for term, bound in ascending.items()}
    further = {"perturbation": perturbation, "probe": probe, **states}
    modules = {
        **trained,
        **averaged,
        **{name: part for name, part in further.items() if isinstance(part, nn.Module)},
    }
    run_stage(
        Stage(
            owner="train_encoder",
            name=stage,
            seed=seed,
            rows=len(x),
            epochs=config.epochs,
            batch_size=config.batch_size,
            modules=modules,
            optimizer=optimizer,
            train_batch=train_batch,
            on_batch=on_batch,
            **watched_by(probe),
        ),
        run,
    )
    result = {name: module.eval().requires_grad_(False) for name, module in averaged.items()}
    return result["averaged_encoder"], Critic(
        result["averaged_global_critic"], result["averaged_local_critic"]
    )
