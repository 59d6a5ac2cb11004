"""Loading a compiled module, and what its integer codes mean."""

from __future__ import annotations

import importlib
from typing import Any

import torch

# The enum DType of csrc/kernels.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def load(name: str, remedy: str) -> tuple[Any, str | None]:
    """Import wcmi_fast.<name>; return it and None, or None and the sentence why it is missing.

    torch is imported above, before any binary, so that both share one OpenMP runtime.
    """
    try:
        return importlib.import_module(f"wcmi_fast.{name}"), None
    except ImportError as error:
        return None, f"its binary wcmi_fast.{name} does not load ({error}); {remedy}"
