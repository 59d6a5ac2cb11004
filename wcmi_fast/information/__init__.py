"""Information, worst-case information and vulnerability of a representation (spec section 3)."""

from wcmi_fast.information.critic import (
    Attack,
    CriticConfig,
    attack_information,
    evaluate_critic,
    train_critic,
)
from wcmi_fast.information.results import CAVEAT, Estimate, Evidence, Flag, Report

__all__ = [
    "CAVEAT",
    "Attack",
    "CriticConfig",
    "Estimate",
    "Evidence",
    "Flag",
    "Report",
    "attack_information",
    "evaluate_critic",
    "train_critic",
]
