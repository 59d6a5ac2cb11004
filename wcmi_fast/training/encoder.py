"""Training an encoder and its critics by information."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed, fed
from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.bounds import over_ranks
from wcmi_fast.distributed.parallel import averaging, synchronised_
from wcmi_fast.models import BaselineH
from wcmi_fast.models.folding import folded
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.objective import (
    BOUNDS,
    WORST,
    Critic,
    ascended,
    information_loss,
    modules_of,
    new_critic,
    weights_of_terms,
)
from wcmi_fast.training.run_folder import RunFolder
from wcmi_fast.training.seeds import seeded, starts_generator
from wcmi_fast.training.stage import Stage, run_stage
from wcmi_fast.training.steps import average_, new_optimizer, ramp, scaled, set_learning_rate


def new_encoder(config: EncoderConfig, input_shape: tuple[int, int, int]) -> nn.Module:
    """Build the untrained encoder that a config describes."""
    return BaselineH(input_shape, dim=config.dim)


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
    weights_of = weights_of_terms(config)
    with seeded(seed, stage, "weights"):
        encoder = new_encoder(config, shape).to(x.device).to(memory_format=torch.channels_last)
        critics = {term: new_critic(config.dim, config.units, shape) for term in weights_of}
    critics = {term: critic.to(x.device) for term, critic in critics.items()}
    trained = {"encoder": encoder, **modules_of(critics)}
    if config.sync_batch_norm:
        trained = {name: synchronised_(module) for name, module in trained.items()}
    averaged = {f"averaged_{name}": copy.deepcopy(module) for name, module in trained.items()}
    weights = [p for module in trained.values() for p in module.parameters()]
    optimizer = new_optimizer(config, weights)
    bounds = {term: over_ranks(config.bound, ascended(config.bound)) for term in weights_of}
    per_epoch = len(x) // config.batch_size

    def attacked(attack: PGD, images: Tensor, done: float, generator: torch.Generator) -> Tensor:
        ramped = scaled(attack, ramp(done, config.eps_warmup))
        critic = critics[WORST]
        frozen_critic = Critic(folded(critic.global_), folded(critic.local))
        name = "dv" if config.bound == "mine" else config.bound
        loss_fn = information_loss(
            folded(encoder),
            frozen_critic,
            over_ranks(name, BOUNDS[name]),
            config.critic_grad,
            config.critic_refresh,
        )
        starts = starts_generator(generator, images.device)
        part = ranks.part_of(images)
        return ramped.attack(loss_fn, images, generator=starts, part_of=part)

    def value_of(term: str, images: Tensor) -> Tensor:
        z = encoder(images)
        if weights_of[term] != 1:
            # The encoder ascends by the term's weight; its critic always ascends fully.
            z.register_hook(lambda dz: weights_of[term] * dz)
        return bounds[term](critics[term].global_(z), critics[term].local(images))

    values_of = averaging(
        trained.values(), lambda images: {term: value_of(term, images[term]) for term in weights_of}
    )

    def train_batch(indices: Tensor, done: float, generator: torch.Generator) -> float:
        clean = x[indices]
        images = dict.fromkeys(weights_of, clean)
        if WORST in images and config.attack is not None:
            images[WORST] = attacked(config.attack, clean, done, generator)
        set_learning_rate(optimizer, config, done)
        values = values_of(images)
        optimizer.zero_grad(set_to_none=True)
        # A weight's gradient of the one global bound is the sum over the ranks, not their average.
        (-ranks.count() * sum(values.values(), torch.zeros((), device=clean.device))).backward()
        nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        step = round(done * config.epochs * per_epoch)
        decay = min(config.averaging, (1 + step) / (10 + step))
        average_(averaged.values(), trained.values(), decay if config.averaging else 0.0)
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
