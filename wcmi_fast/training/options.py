"""The options of `wcmi-fast train`, by task (spec section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wcmi_fast.attacks import PGD
from wcmi_fast.training.augmentation import Augmentation
from wcmi_fast.training.config import CriticGrad, HeadKind, OptimizerName
from wcmi_fast.training.schedule import Schedule
from wcmi_fast.training.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every task has.

    Attributes are documented by the strings below them, which the command line shows.
    """

    data: str = "fashion_mnist"
    """mnist, fashion_mnist, cifar10, svhn, mnist5k; an .npz file of x_train, y_train, x_test and
    y_test; or a folder of train/CLASS/ and test/CLASS/ with images."""
    train_images: int = 60_000
    """Training images, at most."""
    test_images: int = 1000
    """Test images for the accuracies, at most."""
    crop_padding: int = 0
    """Pixels of zeros around a training image, of which a part of its size is cut out at random."""
    flip: bool = False
    """Swap left and right of training images, each with probability 1/2."""
    jitter: float = 0.0
    """Multiply brightness, contrast and saturation of training images by random factors from
    1 - jitter to 1 + jitter."""
    rotation: float = 0.0
    """Rotate training images by a random angle of at most so many degrees."""
    eps: float = 0.1
    """Radius of the attack, in units of pixels from 0 to 1."""
    steps: int = 10
    """Steps of the attack in training."""
    step_size: float | None = None
    """Length of such a step, in units of pixels; None is 2.5 eps / steps."""
    random_start: bool = False
    """Start attacks in training at random within eps, instead of at the image."""
    test_steps: int = 10
    """Steps of the attack on the test images, each of 2.5 eps / test_steps."""
    eps_warmup: float = 0.4
    """Part of training over which eps and step size grow linearly to their value."""
    free: int = 0
    """So many replays of every batch, in each of which one backward pass moves the weights and the
    images; 0 attacks each batch in steps instead. Divide epochs by it for equal time."""
    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 64
    """Images per batch; an incomplete last batch is left out."""
    optimizer: OptimizerName = "adam"
    """adam, or sgd with Nesterov's momentum."""
    learning_rate: float = 2e-3
    """The optimiser's learning rate, times what the schedule says."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Times the weights, is added to their gradients."""
    schedule: Schedule = "one_cycle"
    """one_cycle rises over a fifth of training, then falls along a cosine to 0; linear falls to 0;
    steps is divided by 10 after each quarter; constant."""
    amp: bool = False
    """Compute convolutions and products in bfloat16; `wcmi-fast info` says where it pays."""
    compile: bool = False
    """Let torch.compile fuse a step (not attacks); it needs a C++ compiler."""
    seed: int = 0
    """Decides weights, order of the data, augmentation, dropout and random starts."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""
    checkpoint_every: int = 500
    """Batches between checkpoints; there is one after every epoch, too."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the folder tensorboard."""
    sync_batch_norm: bool = False
    """On several processes, normalise by the statistics of the whole batch."""

    def attack(self) -> PGD:
        """Return the attack of training."""
        return _pgd(self.eps, self.steps, self.step_size, random_start=self.random_start)

    def augmentation(self) -> Augmentation | None:
        """Return how training images are changed before they are attacked."""
        found = Augmentation(
            crop_padding=self.crop_padding,
            flip=self.flip,
            jitter=self.jitter,
            rotation=self.rotation,
        )
        return None if found == Augmentation() else found

    def test_attack(self) -> PGD:
        """Return the attack on the test images."""
        return _pgd(self.eps, self.test_steps, None, name="test_steps")


@dataclass(frozen=True, kw_only=True)
class EncoderTask(Task):
    """Train an encoder without labels, for I - beta RV (spec section 3)."""

    beta: float = 1.0
    """Weight of the vulnerability: 1 is worst-case information, 0 plain information."""
    bound: str = "dv"
    """Bound on information: one of wcmi_fast.training.objective.BOUNDS."""
    critic_grad: CriticGrad = "full"
    """Attack through both sides of the critic (full), or the encoder only, as the authors do."""
    critic_refresh: int = 1
    """With encoder_only, recompute the image side every so many attack steps; 1 is exact."""
    shared_critic: bool = False
    """Let the critic see images through the encoder's first convolutions, for beta 0 or 1."""
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted from images inside the encoder and the critic; None is 0."""
    std: tuple[float, ...] | None = None
    """Of each channel, which what is left is divided by; None is 1."""
    units: int = 64
    """Size U of the critic's features."""
    grad_clip: float = 1.0
    """Largest norm of a step's gradient."""
    averaging: float = 0.99
    """Decay of the running average of the weights; 0 takes the last weights."""
    stop_on_overfitting: bool = False
    """End training where a finer attack takes twice what the attack of training does."""


@dataclass(frozen=True, kw_only=True)
class Supervised(Task):
    """What heads and classifiers have in common."""

    robust: bool = False
    """Train on attacked images."""
    held_out: int = 0
    """So many training images are held out and attacked after every epoch; 0 holds out none."""
    held_out_steps: int = 10
    """Steps of the attack on them."""
    early_stop: bool = False
    """Keep the weights of the epoch of the highest accuracy on attacked held-out images."""
    stop_on_overfitting: bool = False
    """End training when that accuracy falls below half of its best."""

    def watch(self) -> Watch | None:
        """Return what to hold out, and how to attack it."""
        if not self.held_out:
            if self.early_stop or self.stop_on_overfitting:
                name = "early_stop" if self.early_stop else "stop_on_overfitting"
                raise ValueError(f"train: {name} needs held_out images, wanted held_out 1 or more")
            return None
        return Watch(
            rows=self.held_out,
            attack=_pgd(self.eps, self.held_out_steps, None, name="held_out_steps"),
            keep_best=self.early_stop,
            stop=self.stop_on_overfitting,
        )


@dataclass(frozen=True, kw_only=True)
class HeadTask(Supervised):
    """Train a classification head on a frozen encoder (spec section 5)."""

    encoder: Path
    """Run folder of an encoder, or its encoder.safetensors."""
    kind: HeadKind = "mlp"
    """mlp or linear."""
    batch_size: int = 128
    """Images per batch; an incomplete last batch is left out."""
    learning_rate: float = 1e-3
    """The optimiser's learning rate, times what the schedule says."""
    schedule: Schedule = "linear"
    """one_cycle rises over a fifth of training, then falls along a cosine to 0; linear falls to 0;
    steps is divided by 10 after each quarter; constant."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTask(Supervised):
    """Train a supervised classifier, standard or adversarially (spec section 5)."""

    network: str = "baseline_h"
    """One of wcmi_fast.models.NAMES."""
    mean: tuple[float, ...] | None = None
    """Of each channel, subtracted from images inside the network; None is 0."""
    std: tuple[float, ...] | None = None
    """Of each channel, which what is left is divided by; None is 1."""
    batch_size: int = 128
    """Images per batch; an incomplete last batch is left out."""


TASKS: dict[str, type[Task]] = {
    "encoder": EncoderTask,
    "head": HeadTask,
    "classifier": ClassifierTask,
}


def _pgd(
    eps: float,
    steps: int,
    step_size: float | None,
    *,
    name: str = "steps",
    random_start: bool = False,
) -> PGD:
    if steps < 1:
        raise ValueError(f"train: {name} is {steps}, wanted 1 or more")
    # An eps of 0 allows no step of 0.
    size = step_size or 2.5 * eps / steps or 1.0
    return PGD(eps=eps, step_size=size, steps=steps, random_start=random_start)
