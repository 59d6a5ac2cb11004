"""The public functions: bounds on mutual information and the updates of an attack.

Arguments are checked here, then the back end is chosen (backends/registry.py). Inputs that are not
contiguous are copied once.
"""

from wcmi_fast.functional.bounds import (
    CriticStats,
    critic_stats,
    dv,
    fenchel_dual,
    infonce,
    jsd,
    mine,
    nwj,
    smile,
)
from wcmi_fast.functional.ema import EMAState
from wcmi_fast.functional.steps import keep_best_, l2_step_, linf_start_, linf_step_
from wcmi_fast.functional.tail import critic_tail

__all__ = [
    "CriticStats",
    "EMAState",
    "critic_stats",
    "critic_tail",
    "dv",
    "fenchel_dual",
    "infonce",
    "jsd",
    "keep_best_",
    "l2_step_",
    "linf_start_",
    "linf_step_",
    "mine",
    "nwj",
    "smile",
]
