"""Settings of the trainer; each has the unit, the default and the meaning beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wcmi_fast.attacks import PGD
from wcmi_fast.training.schedule import Schedule
from wcmi_fast.training.watch import Watch

CriticGrad = Literal["encoder_only", "full"]
HeadKind = Literal["mlp", "linear"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How to train an encoder by information (spec section 3).

    Args:
        attack: perturbs every batch before its step; None maximises plain information.
        beta: weight of the vulnerability in the objective I - beta RV, 0 or more: 1 is the
            worst-case information, 0 the plain one. In between, and above, each of the two terms
            has a critic of its own: it always ascends, while a beta above 1 has the encoder lower
            the plain information.
        bound: name of the bound to maximise, one of `wcmi_fast.training.loop.BOUNDS`.
        critic_grad: "full" attacks through both sides of the critic, as algorithm 1 is printed;
            "encoder_only" drops the gradient of the image side, as the authors' code does.
        critic_refresh: with "encoder_only", the image side is recomputed every so many attack
            steps; 1 is exact, 0 keeps the clean batch's.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        dim: size D of the representation.
        units: size U of the critic's features (2048 in the paper).
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        learning_rate: Adam's, times what the schedule says.
        schedule: of the learning rate; see `schedule.factor`.
        grad_clip: largest norm of a step's gradient, over all weights.
        averaging: decay of the running average of the weights that is returned; 0 returns the last
            weights.
    """

    attack: PGD | None
    beta: float = 1.0
    bound: str = "dv"
    critic_grad: CriticGrad = "full"
    critic_refresh: int = 1
    eps_warmup: float = 0.4
    dim: int = 64
    units: int = 64
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-3
    schedule: Schedule = "one_cycle"
    grad_clip: float = 1.0
    averaging: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(
                f"EncoderConfig: beta is {self.beta}, wanted a finite number, 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How to train a classification head on a frozen encoder (spec section 5).

    Args:
        attack: perturbs every batch before its step (a robust head); None trains a standard head.
        kind: "mlp" or "linear".
        watch: holds out training images and attacks them after every epoch; None does not.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        learning_rate: Adam's, times what the schedule says.
        schedule: of the learning rate; see `schedule.factor`.
    """

    attack: PGD | None
    kind: HeadKind = "mlp"
    watch: Watch | None = None
    eps_warmup: float = 0.4
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How to train a supervised classifier, its logits being the representation (spec section 5).

    Args:
        attack: perturbs every batch before its step (adversarial training); None trains on clean
            images. One step of 1.25 eps from a random start is fast adversarial training.
        watch: holds out training images and attacks them after every epoch; None does not.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        learning_rate: Adam's, times what the schedule says.
        schedule: of the learning rate; see `schedule.factor`.
    """

    attack: PGD | None
    watch: Watch | None = None
    eps_warmup: float = 0.4
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: Schedule = "one_cycle"
