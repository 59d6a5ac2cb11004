"""Free adversarial training: one backward pass serves the weights and the perturbation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.data import Feed
from wcmi_fast.distributed import ranks
from wcmi_fast.functional.steps import linf_step_
from wcmi_fast.training.config import TrainingConfig
from wcmi_fast.training.stage import Values
from wcmi_fast.training.steps import scaled


class Perturbation(nn.Module):
    """The perturbation of a batch, which goes on from batch to batch; a checkpoint holds it.

    Args:
        attack: eps and step_size of a replay; its steps do not matter.
        replays: steps made on every batch.
        shape: (B, C, H, W) of a batch.

    Source: Shafahi et al. 2019, algorithm 1.
    """

    delta: Tensor

    def __init__(self, attack: PGD, replays: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._attack, self._replays = attack, replays
        self.register_buffer("delta", torch.zeros(shape))

    @classmethod
    def of(cls, owner: str, config: TrainingConfig, x: Feed) -> Perturbation | None:
        """Return a perturbation for batches of x if the config wants replays.

        Raises:
            ValueError: there are several processes; a checkpoint has one perturbation.
        """
        if config.attack is None or not config.free:
            return None
        if ranks.count() > 1:
            raise ValueError(
                f"{owner}: free is {config.free} on {ranks.count()} processes, wanted one process"
            )
        return cls(config.attack, config.free, (config.batch_size, *x.shape[1:])).to(x.device)

    def replay(self, step: Callable[[Tensor], Values], clean: Tensor, part: float) -> Values:
        """Make the steps of a batch: each trains the weights and moves the images.

        Args:
            step: trains on images (B, C, H, W), and runs a backward pass that reaches them.
            clean: the batch.
            part: of eps and step size.

        Returns:
            What the last step reports.
        """
        attack = scaled(self._attack, part)
        eps, size, clip = attack.eps, attack.step_size, attack.clip
        images = torch.empty_like(clean)
        # Into the ball of today's eps, and into clip.
        linf_step_(
            images.copy_(clean + self.delta),
            torch.zeros_like(clean),
            clean,
            eps=eps,
            step_size=size,
            clip=clip,
        )
        for _ in range(self._replays):
            images.requires_grad_()
            values = step(images)
            grad, images = images.grad, images.detach()
            if grad is None:
                raise ValueError("Perturbation.replay: step leaves no gradient on its images")
            linf_step_(images, grad, clean, eps=eps, step_size=size, clip=clip)
        self.delta.copy_(images - clean)
        return values
