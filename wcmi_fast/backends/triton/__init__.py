"""Triton kernels. They need no compiler at install time; no GPU has run them yet (README, table).

The modules with kernels import triton, and are themselves imported at the first call: `import
wcmi_fast` stays lean, and works where triton is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, util
from typing import Any

import torch

from wcmi_fast.backends.backend import Backend, Case, operators_of

# The module of this folder that has each kernel.
MODULES = {
    "critic_stats_fwd": "critic_stats",
    "critic_stats_bwd": "critic_stats",
    "dv_value": "dv_value",
    "score_stats_fwd": "score_stats",
    "score_stats_bwd": "score_stats",
    "critic_tail_fwd": "critic_tail",
    "critic_tail_bwd": "critic_tail",
    "linf_step_": "linf_step",
    "linf_start_": "linf_start",
    "l2_step_": "l2_step",
    "keep_best_": "keep_best",
}

# The oldest compute capability with matrix products of bfloat16, which Triton compiles for.
OLDEST = (8, 0)

MISSING = (
    None
    if util.find_spec("triton")
    else "triton is not installed; `pip install triton` installs it on Linux"
)


def _call(schema: str, *arguments: Any) -> Any:
    module = import_module(f"{__name__}.{MODULES[schema]}")
    return getattr(module, schema)(*arguments)


def unsupported(operator: str, case: Case) -> str | None:
    """Return why the kernels cannot run an operator in this case; None if they can."""
    if case.dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, not torch.float64"
    if case.device_type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(case.device)
    if capability < OLDEST:
        oldest, found = (".".join(map(str, version)) for version in (OLDEST, capability))
        return f"it needs compute capability {oldest} or newer, not {found}"
    return None


KERNELS: dict[str, Callable[..., Any]] = {schema: partial(_call, schema) for schema in MODULES}
BACKEND = Backend("cuda", operators_of(KERNELS), KERNELS, MISSING, unsupported)
