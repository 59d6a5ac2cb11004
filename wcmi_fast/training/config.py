"""Settings of the trainer; each has the unit, the default and the meaning beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wcmi_fast.attacks import PGD

CriticGrad = Literal["encoder_only", "full"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How to train an encoder by information (spec section 3).

    Args:
        attack: perturbs every batch before its step; None maximises plain information.
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
        learning_rate: peak of Adam's learning rate, reached after a fifth of training, then
            lowered along a cosine to 0.
        grad_clip: largest norm of a step's gradient, over all weights.
        averaging: decay of the running average of the weights that is returned; 0 returns the last
            weights.
    """

    attack: PGD | None
    bound: str = "dv"
    critic_grad: CriticGrad = "full"
    critic_refresh: int = 1
    eps_warmup: float = 0.4
    dim: int = 64
    units: int = 64
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 2e-3
    grad_clip: float = 1.0
    averaging: float = 0.99


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How to train a classification head on a frozen encoder (spec section 5).

    Args:
        attack: perturbs every batch before its step (a robust head); None trains a standard head.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        learning_rate: Adam's, lowered linearly to 0 over training.
    """

    attack: PGD | None
    eps_warmup: float = 0.4
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How to train a supervised classifier, its logits being the representation (spec section 5).

    Args:
        attack: perturbs every batch before its step (adversarial training); None trains on clean
            images.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        learning_rate: peak of Adam's learning rate, reached after a fifth of training, then
            lowered along a cosine to 0.
    """

    attack: PGD | None
    eps_warmup: float = 0.4
    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 2e-3
