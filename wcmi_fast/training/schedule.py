"""Learning rates over training, as parts of the first or highest one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["one_cycle", "linear", "constant", "steps"]
PEAK = 0.2


def factor(schedule: Schedule, done: float) -> float:
    """Return the part of the learning rate that applies when a part of training is done.

    Args:
        schedule: "one_cycle" rises to 1 over a fifth of training and falls along a cosine to 0;
            "linear" falls from 1 to 0; "constant" is 1; "steps" is divided by 10 after each
            quarter, as the paper's 200 epochs are every 50.
        done: from 0 to 1.
    """
    return _FACTORS[schedule](done)


def _one_cycle(done: float) -> float:
    if done < PEAK:
        return max(done / PEAK, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - PEAK) / (1 - PEAK)))


def _steps(done: float) -> float:
    return float(10.0 ** -int(4 * done))


_FACTORS: dict[Schedule, Callable[[float], float]] = {
    "one_cycle": _one_cycle,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "steps": _steps,
}
