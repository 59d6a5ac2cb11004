"""Starting a kernel: on its tensors' device, in the chosen or the fastest configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# Triton's names of dtypes, as in a signature.
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The dtypes and tl.dot's input_precision for them; see dot_precision.
KINDS = (
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.bfloat16, "tf32"),
    (torch.float16, "tf32"),
)

# Streaming multiprocessors of the largest GPUs: below so many programs some of them idle.
PROCESSORS = 132

# Said at every launch: Triton's default is about to change, and it warns where nothing is said.
FUSION = {"enable_fp_fusion": True}

_tuners: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    default: triton.Config,
    configurations: Sequence[triton.Config],
    key: Sequence[str],
) -> None:
    """Run `kernel` in the default configuration; see autotuned() for `configurations` and `key`."""
    arguments = {**FUSION, **arguments}
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    # Triton launches on the current device's current stream.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if autotuned() and device.type == "cuda":
            _tuner(kernel, configurations, key)[grid](**arguments)
        else:
            kernel[grid](**arguments, **default.all_kwargs())


def autotuned() -> bool:
    """Whether kernels are timed in every configuration, once for each value of their keys.

    On request only: it takes seconds, and the choice, hence the order of sums, may differ from one
    run to the next.
    """
    return os.environ.get("WCMI_FAST_AUTOTUNE") == "1"


def _tuner(kernel: Any, configurations: Sequence[triton.Config], key: Sequence[str]) -> Any:
    if kernel.fn not in _tuners:
        # Run many times: what a kernel adds to must be put back before each.
        restored = ["out"] if "out" in kernel.arg_names else []
        tune = triton.autotune(configs=list(configurations), key=list(key), restore_value=restored)
        _tuners[kernel.fn] = tune(kernel)
    return _tuners[kernel.fn]


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input_precision: float32 follows torch's setting, half types are exact."""
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if dtype == torch.float32 and highest else "tf32"


def configuration(
    num_warps: int, num_stages: int, maxnreg: int | None = None, **tiles: int
) -> triton.Config:
    """Return a configuration with these constexpr arguments.

    maxnreg is the limit of registers, without which ptxas may spill for a third or fourth block on
    a processor.
    """
    return triton.Config(tiles, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def all_registers(num_warps: int, num_stages: int, **tiles: int) -> triton.Config:
    """Return a configuration that may take every register a thread can have."""
    return configuration(num_warps, num_stages, maxnreg=255, **tiles)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def signature(
    kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any]
) -> dict[str, str]:
    """Return Triton's type of every argument; what is no pointer and no constant is an int32."""
    known = {**pointers, **dict.fromkeys(constants, "constexpr")}
    return {name: known.get(name, "i32") for name in kernel.arg_names}


def options(configuration: triton.Config) -> dict[str, Any]:
    """Return what a configuration says to the compiler, beside its tiles."""
    named = {name: getattr(configuration, name) for name in ("num_warps", "num_stages", "maxnreg")}
    return {**FUSION, **{name: value for name, value in named.items() if value is not None}}


def program_name(
    dtype: torch.dtype, configuration: triton.Config, precision: str | None = None
) -> str:
    """Return the end of a program's name, as "bf16 128x128x64, 8 warps, 3 stages"."""
    tiles = "x".join(map(str, configuration.kwargs.values()))
    kind = precision if precision and dtype == torch.float32 else TYPE_NAMES[dtype]
    return f"{kind} {tiles}, {configuration.num_warps} warps, {configuration.num_stages} stages"
