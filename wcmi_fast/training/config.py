"""Settings of the trainer; each has the unit, the default and the meaning beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wcmi_fast.attacks import PGD
from wcmi_fast.training.augmentation import Augmentation
from wcmi_fast.training.schedule import Schedule
from wcmi_fast.training.watch import Watch

CriticGrad = Literal["encoder_only", "full"]
HeadKind = Literal["mlp", "linear"]
OptimizerName = Literal["adam", "sgd"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every kind of training has.

    Args:
        attack: perturbs every batch before its step; None trains on clean images.
        augmentation: changes every batch at random before it is attacked, never held-out images;
            None changes nothing.
        eps_warmup: fraction of training over which eps and step size grow linearly to their value.
        free: with so many replays of every batch, one backward pass serves a step of the weights
            and one of the images, and perturbations go on from batch to batch; eps and step_size
            are the attack's, its steps are not made. 0 attacks before each step instead. The passes
            over the data are as many replays longer: divide epochs by it for equal time.
        epochs: passes over the data.
        batch_size: images per batch; an incomplete last batch is left out.
        optimizer: "adam", or "sgd" with Nesterov's momentum.
        learning_rate: the optimiser's, times what the schedule says.
        momentum: of "sgd".
        weight_decay: times the weights, is added to their gradients.
        schedule: of the learning rate; see `schedule.factor`.
        amp: convolutions and products in bfloat16, in attacks and steps; weights stay as they are.
        compile: let torch.compile fuse the forward and backward pass of a step (not of attacks,
            whose weights are folded anew for every batch).
        sync_batch_norm: on several processes, normalise by the statistics of the whole batch
            instead of each process's part of it.

    Raises:
        ValueError: a field out of its range.
    """

    attack: PGD | None
    augmentation: Augmentation | None = None
    eps_warmup: float = 0.4
    free: int = 0
    epochs: int = 4
    batch_size: int = 128
    optimizer: OptimizerName = "adam"
    learning_rate: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "one_cycle"
    amp: bool = False
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"{owner}: optimizer is {self.optimizer!r}, wanted 'adam' or 'sgd'")
        if isinstance(self.free, bool) or not isinstance(self.free, int) or self.free < 0:
            raise ValueError(f"{owner}: free is {self.free!r}, wanted an integer, 0 or more")
        if self.free and (self.attack is None or self.attack.norm != "linf"):
            raise ValueError(
                f"{owner}: free is {self.free} and attack is {self.attack}, wanted one of norm linf"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{owner}: momentum is {self.momentum}, wanted 0 or more, below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"{owner}: weight_decay is {self.weight_decay}, wanted a finite number, 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(TrainingConfig):
    """How to train an encoder by information (spec section 3).

    Args:
        attack: perturbs every batch before its step; None maximises plain information.
        beta: weight of the vulnerability in the objective I - beta RV, 0 or more: 1 is the
            worst-case information, 0 the plain one. In between, and above, each of the two terms
            has a critic of its own: it always ascends, while a beta above 1 has the encoder lower
            the plain information.
        bound: name of the bound to maximise, one of `wcmi_fast.training.objective.BOUNDS`.
        critic_grad: "full" attacks through both sides of the critic, as algorithm 1 is printed;
            "encoder_only" drops the gradient of the image side, as the authors' code does.
        critic_refresh: with "encoder_only", the image side is recomputed every so many attack
            steps; 1 is exact, 0 keeps the clean batch's.
        shared_critic: the critic sees images through the encoder's first convolutions, as in Hjelm
            et al., instead of through its own; for beta 0 or 1.
        mean, std: of each channel; the encoder, and the critic on the side of images, begin with
            (x - mean) / std; None is 0 and 1.
        dim: size D of the representation.
        units: size U of the critic's features (2048 in the paper).
        grad_clip: largest norm of a step's gradient, over all weights.
        averaging: decay of the running average of the weights that is returned; 0 returns the last
            weights.
        stop_on_overfitting: end the stage where training has learned to defeat its attack
            (`wcmi_fast.training.strength.Probe`), instead of warning only.
    """

    beta: float = 1.0
    bound: str = "dv"
    critic_grad: CriticGrad = "full"
    critic_refresh: int = 1
    shared_critic: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dim: int = 64
    units: int = 64
    epochs: int = 8
    batch_size: int = 64
    grad_clip: float = 1.0
    averaging: float = 0.99
    stop_on_overfitting: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise ValueError(
                f"EncoderConfig: beta is {self.beta}, wanted a finite number, 0 or more"
            )
        if self.shared_critic and self.beta not in (0, 1):
            raise ValueError(
                f"EncoderConfig: beta is {self.beta} with shared_critic, wanted 0 or 1, because "
                "the critics of two terms ascend by other weights than the encoder"
            )
        if self.free and (self.beta != 1 or self.critic_grad != "full"):
            raise ValueError(
                f"EncoderConfig: free is {self.free}, beta {self.beta} and critic_grad "
                f"{self.critic_grad!r}, wanted beta 1 and 'full', which one backward pass serves"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig(TrainingConfig):
    """How to train a classification head on a frozen encoder (spec section 5).

    Args:
        attack: perturbs every batch before its step (a robust head); None trains a standard head.
        kind: "mlp" or "linear".
        watch: holds out training images and attacks them after every epoch; None does not.
    """

    kind: HeadKind = "mlp"
    watch: Watch | None = None
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(TrainingConfig):
    """How to train a supervised classifier, its logits being the representation (spec section 5).

    Args:
        attack: perturbs every batch before its step (adversarial training); None trains on clean
            images. One step of 1.25 eps from a random start is fast adversarial training.
        watch: holds out training images and attacks them after every epoch; None does not.
    """

    watch: Watch | None = None
