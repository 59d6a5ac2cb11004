"""Measure and train adversarially robust representations by worst-case mutual information."""

from wcmi_fast import functional
from wcmi_fast.attacks import PGD
from wcmi_fast.information.critic import CriticConfig
from wcmi_fast.information.estimate import estimate_information
from wcmi_fast.information.results import Report
from wcmi_fast.information.vulnerability import representation_vulnerability, worst_case_information

__version__ = "0.1.0"

__all__ = [
    "PGD",
    "CriticConfig",
    "Report",
    "__version__",
    "estimate_information",
    "functional",
    "representation_vulnerability",
    "worst_case_information",
]
