"""The running mean that MINE's gradient is divided by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class EMAState:
    """An exponential moving average of mean exp(T) over batches, per location, in log space.

    Scores of any size are safe: exp(T) itself is never formed. The first batch sets the average.

    Args:
        decay: share of the past, in [0, 1); 0 makes `mine` the same as `dv`.

    Attributes:
        log_mean: (P,) log of the average, None before the first batch.

    Raises:
        ValueError: a decay outside [0, 1).

    Source: Belghazi et al. 2018, section 3.2.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMAState: decay is {decay}, wanted a number in [0, 1)")
        self.decay = float(decay)
        self.log_mean: Tensor | None = None

    def update(self, function: str, log_mean: Tensor) -> Tensor:
        """Take in a batch's log mean exp(T) (P,) for `function`; return the new average's log."""
        if self.log_mean is None or self.decay == 0.0:
            self.log_mean = log_mean.clone()
            return self.log_mean
        past = self.log_mean
        if past.dtype != log_mean.dtype:
            raise TypeError(
                f"{function}: ema_state has dtype {past.dtype}, wanted the statistics', "
                f"{log_mean.dtype}"
            )
        if past.device != log_mean.device:
            raise ValueError(
                f"{function}: ema_state is on {past.device}, wanted the inputs', {log_mean.device}"
            )
        if past.shape != log_mean.shape:
            raise ValueError(
                f"{function}: ema_state has P = {len(past)}, "
                f"wanted the inputs', P = {len(log_mean)}"
            )
        self.log_mean = torch.logaddexp(
            past + math.log(self.decay), log_mean + math.log1p(-self.decay)
        )
        return self.log_mean

    def state_dict(self) -> dict[str, Any]:
        """Return decay and log_mean, for torch.save."""
        return {"decay": self.decay, "log_mean": self.log_mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: other keys than those of `state_dict`.
        """
        if state.keys() != {"decay", "log_mean"}:
            raise ValueError(
                f"EMAState.load_state_dict: state has keys {sorted(state)}, "
                "wanted ['decay', 'log_mean']"
            )
        self.decay = EMAState(state["decay"]).decay
        self.log_mean = None if state["log_mean"] is None else state["log_mean"].clone()
