"""Accuracy under attack on held-out images after every epoch: the best weights, and overfitting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wcmi_fast.attacks import PGD
from wcmi_fast.distributed import ranks

# Catastrophic overfitting takes nearly all of the accuracy under attack within an epoch or two.
LOST_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What to hold out, and how to attack it after every epoch.

    Args:
        rows: so many of the last training images are held out, 1 or more.
        attack: a few steps are enough to see that one-step training was defeated.
        keep_best: return the weights of the epoch of the highest accuracy under attack (the paper's
            early stopping), instead of the last epoch's.
        stop: end the stage where `Watched.overfits` is seen, instead of warning only.

    Raises:
        ValueError: rows is less than 1.
    """

    rows: int
    attack: PGD
    keep_best: bool = False
    stop: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise ValueError(f"Watch: rows is {self.rows!r}, wanted an integer, 1 or more")


class Watched(nn.Module):
    """The best weights so far; a module, so that checkpoints hold it.

    Args:
        watch: the settings.
        model: what is trained.
        measure: returns the accuracy under attack on the held-out images, in [0, 1].
        owner, stage: for the warning.
    """

    best: Tensor
    ended: Tensor

    def __init__(
        self, watch: Watch, model: nn.Module, measure: Callable[[], float], owner: str, stage: str
    ) -> None:
        super().__init__()
        self.kept = copy.deepcopy(model)
        self.register_buffer("best", torch.tensor(-1.0, dtype=torch.float64))
        self.register_buffer("ended", torch.tensor(False))
        self._watch, self._model, self._measure = watch, [model], measure
        self._where = f"{owner}: stage {stage!r}"

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Measure, keep the weights if they are the best, and warn of overfitting."""
        found, best = self._measure(), float(self.best)
        if found > best:
            self.best.fill_(found)
            self.kept.load_state_dict(self._model[0].state_dict())
        elif self.overfits(found):
            self.ended.fill_(self._watch.stop)
            ranks.warn(
                f"{self._where}: accuracy under attack on held-out images fell from "
                f"{100 * best:.1f} to {100 * found:.1f} % in epoch {epoch}, the sign of "
                "catastrophic overfitting to a short attack; try more steps, a random start or a "
                "smaller step_size"
            )
        return {"held_out_adversarial_accuracy": found}

    def overfits(self, found: float) -> bool:
        """Whether an accuracy is so far below the best that a short attack was learned by heart."""
        return found < LOST_SHARE * float(self.best)

    def result(self) -> nn.Module:
        """Return the model to use: the best, or the last."""
        return self.kept if self._watch.keep_best else self._model[0]
