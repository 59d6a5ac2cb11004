"""What the paper proves, as functions (spec section 4); docs/theory.md has the proofs.

The modules `finite` (lemma 3.3, finite spaces by enumeration) and `components` (lemma C.1) are
imported by name.
"""

from wcmi_fast.theory.bounds import (
    adversarial_accuracy_upper_bound,
    adversarial_risk_lower_bound,
    fano_conditional_entropy,
    fano_error_lower_bound,
)
from wcmi_fast.theory.entropy import binary_entropy, binary_entropy_derivative
from wcmi_fast.theory.gaussian import GaussianMixture
from wcmi_fast.theory.transport import WorstCaseTransport, worst_case_transport

__all__ = [
    "GaussianMixture",
    "WorstCaseTransport",
    "adversarial_accuracy_upper_bound",
    "adversarial_risk_lower_bound",
    "binary_entropy",
    "binary_entropy_derivative",
    "fano_conditional_entropy",
    "fano_error_lower_bound",
    "worst_case_transport",
]
