"""What a kernel needs to be compiled ahead of time; benchmarks/static_gpu.py compiles every one."""

from __future__ import annotations

from typing import Any, NamedTuple


class Program(NamedTuple):
    """One kernel in one configuration.

    Attributes:
        name: operator, kernel, dtype and configuration, as
            "critic_stats/statistics bf16 64x128x64".
        kernel: the @triton.jit function.
        signature: Triton's type of every argument, as "*bf16", "i64", "fp32" or "constexpr".
        constants: values of the constexpr arguments.
        options: num_warps, num_stages, enable_fp_fusion.
        default: whether the heuristics choose it for some input.
        matrix: whether it multiplies matrices of half types, by tl.dot.
        flops: operations of one tile's products, one step of the innermost loop; 0 without any.
        bytes: read and written by that step.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    default: bool
    matrix: bool
    flops: int
    bytes: int
