"""Measure and train adversarially robust representations by worst-case mutual information."""

from wcmi_fast import functional
from wcmi_fast.attacks import PGD

__version__ = "0.1.0"

__all__ = ["PGD", "__version__", "functional"]
