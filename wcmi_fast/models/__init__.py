"""The networks of the paper: encoders, both sides of the critic, and heads (spec section 5)."""

from wcmi_fast.models.critics import GlobalCritic, LocalCritic, OneByOneBlock, VectorCritic
from wcmi_fast.models.dot_critic import DotCritic, FrozenCritic
from wcmi_fast.models.encoders import BaselineH
from wcmi_fast.models.heads import LinearHead, MLPHead

__all__ = [
    "BaselineH",
    "DotCritic",
    "FrozenCritic",
    "GlobalCritic",
    "LinearHead",
    "LocalCritic",
    "MLPHead",
    "OneByOneBlock",
    "VectorCritic",
]
