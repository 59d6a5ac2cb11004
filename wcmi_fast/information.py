"""Information, worst-case information and vulnerability of a representation (spec section 3)."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from wcmi_fast import functional
from wcmi_fast.attacks import PGD
from wcmi_fast.data import batches, fed
from wcmi_fast.models.folding import folded
from wcmi_fast.theory import adversarial_accuracy_upper_bound
from wcmi_fast.training.config import CriticGrad
from wcmi_fast.training.loop import (
    Critic,
    information_loss,
    new_critic,
    represent,
    seeded,
    starts_generator,
)

CAVEAT = (
    "These are estimates and not certificates. The Donsker-Varadhan value bounds the information"
    " from below for fixed perturbed images, the attack bounds the minimum over perturbations from"
    " above, and for a deterministic continuous encoder the true information is infinite: what is"
    " measured is what a critic of this size finds in a sample of this size."
)


@dataclass(frozen=True)
class Estimate:
    """Mean of a bound over equal test batches, in nats, with its standard error."""

    mean: float
    standard_error: float
    batches: tuple[float, ...]

    @staticmethod
    def of(values: list[float]) -> Estimate:
        """Summarise one value per batch; the standard error is NaN for a single batch."""
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return Estimate(statistics.fmean(values), spread / math.sqrt(len(values)), tuple(values))


@dataclass(frozen=True)
class Vulnerability:
    """What `representation_vulnerability` found; nats, means over equal test batches."""

    information: Estimate
    worst_case: Estimate
    vulnerability: Estimate
    accuracy_bound: float
    critic_grad: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How to train the critics of an estimate (supplement, algorithm 2).

    Args:
        units: size U of the critic's features.
        epochs: passes over the training images.
        batch_size: images per batch, in training and in testing; the value depends on it.
        learning_rate: Adam's, lowered along a cosine to 0.
        critic_grad: "full" attacks through both sides of the critic, as algorithm 1 is printed;
            "encoder_only" as the authors' code does, which finds weaker perturbations.
    """

    units: int = 64
    epochs: int = 4
    batch_size: int = 100
    learning_rate: float = 1e-3
    critic_grad: CriticGrad = "full"


def train_critic(
    encoder: nn.Module,
    x: Tensor,
    config: CriticConfig,
    *,
    attack: PGD | None,
    seed: int,
    start: Critic | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Critic:
    """Train a critic for a fixed encoder by ascent on the Donsker-Varadhan value of its batches.

    The critic of the best batch value is kept, as algorithm 2 says.

    Args:
        encoder: images -> representations (N, D); used in eval mode and not changed.
        x: training images (N, C, H, W), float32 in [0, 1].
        config: the settings.
        attack: lowers each batch's value before the step; None for plain information.
        seed: decides weights and order of the data.
        start: critic to begin with, such as the one an encoder was trained with; it is copied.
            None begins with a new one of config.units.
        on_batch: called after every batch.

    Returns:
        The critic, in eval mode, batch norms folded.

    Raises:
        ValueError: fewer images than one batch.
    """
    fixed = folded(encoder)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    images_of, clean = fed(x), fed(represent(fixed, x))
    per_epoch = len(x) // config.batch_size
    best, best_value = None, -math.inf
    with seeded(seed, "critic", attack) as generator:
        if start is None:
            critic = new_critic(clean.shape[1], config.units, shape).to(x.device)
        else:
            critic = _trainable(start)
        weights = [p for side in critic.modules().values() for p in side.parameters()]
        optimizer = Adam(weights, lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * per_epoch)
        for _ in range(config.epochs):
            for indices in batches(len(x), config.batch_size, generator):
                images, features = images_of[indices], clean[indices]
                if attack is not None:
                    starts = starts_generator(generator, images.device)
                    images = attack_information(
                        fixed, critic, images, attack, config.critic_grad, starts
                    )
                    features = represent(fixed, images)
                value = functional.dv(critic.global_(features), critic.local(images))
                found = value.item()
                if found > best_value:
                    best, best_value = _snapshot(critic), found
                optimizer.zero_grad(set_to_none=True)
                (-value).backward()
                optimizer.step()
                schedule.step()
                on_batch()
    return _snapshot(critic) if best is None else best


def attack_information(
    encoder: nn.Module,
    critic: Critic,
    x: Tensor,
    attack: PGD,
    critic_grad: CriticGrad,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the batch x perturbed so that its Donsker-Varadhan value is low (algorithm 1).

    Args and errors as for `PGD.attack` and `information_loss`; the critic's weights are fixed.
    """
    loss_fn = information_loss(encoder, _snapshot(critic), functional.dv, critic_grad)
    return attack.attack(loss_fn, x, generator=generator)


@torch.no_grad()
def evaluate_critic(
    encoder: nn.Module,
    critic: Critic,
    x: Tensor,
    config: CriticConfig,
    *,
    attack: PGD | None,
    on_batch: Callable[[], None] = lambda: None,
) -> Estimate:
    """Return the mean Donsker-Varadhan value over equal batches, each attacked if asked.

    Args:
        encoder: images -> representations (N, D); used in eval mode and not changed.
        critic: as `train_critic` returns it.
        x: test images (N, C, H, W), float32 in [0, 1]; an incomplete last batch is left out.
        config: the settings.
        attack: lowers each batch's value; None for plain information.
        on_batch: called after every batch.

    Raises:
        ValueError: fewer images than one batch.
    """
    fixed = folded(encoder)
    values, images_of = [], fed(x)
    for indices in batches(len(x), config.batch_size):
        images = images_of[indices]
        if attack is not None:
            images = attack_information(fixed, critic, images, attack, config.critic_grad)
        values.append(functional.dv(critic.global_(fixed(images)), critic.local(images)).item())
        on_batch()
    return Estimate.of(values)


def representation_vulnerability(
    encoder: nn.Module,
    x_train: Tensor,
    x_test: Tensor,
    *,
    attack: PGD,
    classes: int,
    training_attack: PGD | None = None,
    start: Critic | None = None,
    config: CriticConfig | None = None,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Vulnerability:
    """Estimate I, worst-case I and RV of an encoder, each term with its own critic.

    RV_eps(g) = I(X; g(X)) - min I(X'; g(X')); its standard error is that of the paired differences
    of the test batches. Read `CAVEAT` before you quote the numbers.

    Args:
        encoder: images -> representations (N, D); used in eval mode and not changed.
        x_train: images (N, C, H, W), float32 in [0, 1], for the critics.
        x_test: images for the estimate.
        attack: the perturbations allowed, and how to look for the worst.
        classes: number of classes, for the bound of theorem 3.4.
        training_attack: a cheaper attack for training the worst-case critic; None is `attack`.
        start: critic that both critics begin with (each a copy), such as the one the encoder was
            trained with; any critic gives a lower bound, a trained one a better one sooner.
        config: the settings of the critics.
        seed: decides the critics' weights and the order of the data.
        on_batch: called after every batch.

    Returns:
        Nats throughout; the bound is on adversarial accuracy, in [0, 1].

    Raises:
        ValueError: fewer images than one batch, or images outside the attack's clip.

    Source: Zhu et al. 2020, supplement B, algorithm 2; theorem 3.4.
    """
    config = config or CriticConfig()
    estimates = []
    for training, testing in ((None, None), (training_attack or attack, attack)):
        critic = train_critic(
            encoder, x_train, config, attack=training, seed=seed, start=start, on_batch=on_batch
        )
        estimates.append(
            evaluate_critic(encoder, critic, x_test, config, attack=testing, on_batch=on_batch)
        )
    normal, worst = estimates
    differences = [a - b for a, b in zip(normal.batches, worst.batches, strict=True)]
    bound = adversarial_accuracy_upper_bound(worst.mean, classes)
    return Vulnerability(normal, worst, Estimate.of(differences), bound, config.critic_grad)


def _trainable(critic: Critic) -> Critic:
    sides = [copy.deepcopy(side).train().requires_grad_(True) for side in critic.modules().values()]
    return Critic(*sides)


def _snapshot(critic: Critic) -> Critic:
    return Critic(folded(critic.global_), folded(critic.local))
