"""The public functions: bounds on mutual information and the updates of an attack.

Arguments are checked here, then the back end is chosen (backends/registry.py). Inputs that are not
contiguous are copied once.
"""

from wcmi_fast.functional.bounds import dv
from wcmi_fast.functional.steps import linf_step_

__all__ = ["dv", "linf_step_"]
