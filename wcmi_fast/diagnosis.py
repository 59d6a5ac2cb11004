"""What works on this machine, and why something else does not."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import wcmi_fast
from wcmi_fast.backends import cpu, registry
from wcmi_fast.training.steps import has_bfloat16

# Written when the package is built; see setup.py.
REVISION = "revision.txt"


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
        *_training(),
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


def revision() -> str:
    """Return the git revision of the package, "+" behind it if files differ; "unknown" if none."""
    package = Path(wcmi_fast.__file__).parent
    built = package / REVISION
    if not (package.parent / ".git").exists():
        return built.read_text().strip() if built.is_file() else "unknown"
    git = ("git", "-C", str(package.parent))
    try:
        found, changed = (
            subprocess.run([*git, *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def _training() -> list[tuple[str, str]]:
    products = "has" if has_bfloat16("cpu") else "has no"
    return [
        (
            "train --amp",
            f"off unless asked for: this CPU {products} instructions for products in bfloat16",
        ),
        (
            "train --compile",
            "off unless asked for: it fuses training steps, but most of the time of robust "
            "training goes into attacks, whose weights are folded anew for every batch",
        ),
        ("channels last", "on in training, for images and weights of convolutions"),
        (
            "attacks as CUDA graphs in training",
            "off: a graph reads fixed addresses, and every batch attacks newly folded weights",
        ),
    ]


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
