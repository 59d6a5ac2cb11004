"""What works on this machine, and why something else does not."""

from __future__ import annotations

import platform

import torch

import wcmi_fast
from wcmi_fast.backends import cpu, registry


def lines() -> list[tuple[str, str]]:
    """Return the diagnosis as (what, finding) pairs."""
    levels, level = cpu.simd_levels()
    simd = cpu.BAD_LEVEL or f"{level} of {', '.join(levels) or 'none'} (WCMI_FAST_SIMD forces one)"
    return [
        ("wcmi_fast", wcmi_fast.__version__),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch", torch.__version__),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"),
        ("SIMD level", simd),
        *((f"back end {name}", _state(name)) for name in registry.IMPLS),
        *(
            (f"{operator} on {device_type}", registry.explain(device_type, operator))
            for device_type, operators in registry.TABLE.items()
            for operator in operators
        ),
    ]


def versions() -> dict[str, str | int]:
    """Return what a result depends on beside its settings."""
    levels, level = cpu.simd_levels()
    return {
        "wcmi_fast": wcmi_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "simd": level if levels else "none",
        "threads": torch.get_num_threads(),
    }


def _state(backend: str) -> str:
    if backend == registry.REFERENCE:
        return "ready: plain torch, every device"
    known = registry.BACKENDS[backend]
    if known.missing is not None:
        return f"missing: {known.missing}"
    operators = ", ".join(known.operators)
    if known.device_type == "cuda" and not torch.cuda.is_available():
        return f"installed ({operators}), but torch sees no GPU"
    return f"ready: {operators}"
