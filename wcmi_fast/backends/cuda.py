"""CUDA C++ kernels. Compiled for real targets; no GPU has run them yet (README, table).

Every function takes the binary first, so that tests can run the same sources compiled for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wcmi_fast._ops import accumulation_dtype, asked
from wcmi_fast.backends.backend import Backend, Case, operators_of
from wcmi_fast.backends.binary import DTYPES, load
from wcmi_fast.backends.layout import dense, laid_out_as, written

# Vectors that csrc/cuda/critic_stats.cu keeps in shared memory have at most so many units.
MAX_UNITS, MAX_UNITS_FLOAT64 = 256, 128

# The oldest compute capability that CMakeLists.txt compiles for.
OLDEST = (7, 5)

_binary, MISSING = load(
    "_cuda",
    "with nvcc in PATH reinstall by `WCMI_FAST_CUDA=1 pip install --force-reinstall --no-deps .`",
)


def _place(x: Tensor) -> tuple[int, int]:
    """Return x's device and its current stream; of a CPU tensor, in the tests' emulation, zeros."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def critic_stats_fwd(
    binary: Any, z: Tensor, h: Tensor, which: int, tau: float, keep_scores: bool
) -> tuple[Tensor, Tensor]:
    """Reduce T to the positives and the statistics asked for in one launch; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    stats = torch.empty((1 + len(asked(which)), n, p), dtype=dtype, device=z.device)
    binary.critic_stats_fwd(
        DTYPES[z.dtype], z.data_ptr(), h.data_ptr(), n, p, u, which, tau, stats.data_ptr(),
        *_place(z),
    )  # fmt: skip
    return stats, stats.new_empty(0)


def critic_stats_bwd(
    binary: Any,
    dstats: list[Tensor],
    z: Tensor,
    h: Tensor,
    lse: Tensor,
    scores: Tensor,
    which: int,
    need_dz: bool,
    need_dh: bool,
) -> tuple[Tensor, Tensor]:
    """Turn gradients of the statistics into dz and dh; see _ops.py."""
    n, p, u = h.shape
    dtype = accumulation_dtype(z.dtype)
    dz = z.new_empty(z.shape if need_dz else (0,))
    dh = h.new_empty(h.shape if need_dh else (0,))
    d = torch.stack([part.to(dtype) for part in dstats])
    parts = binary.critic_stats_bwd_parts(n, p) if need_dz else 0
    workspace = z.new_empty(parts * n * u, dtype=dtype)
    binary.critic_stats_bwd(
        DTYPES[z.dtype], d.data_ptr(), z.data_ptr(), h.data_ptr(), lse.data_ptr(), n, p, u, which,
        dz.data_ptr() if need_dz else 0, dh.data_ptr() if need_dh else 0, workspace.data_ptr(),
        *_place(z),
    )  # fmt: skip
    return dz, dh


def dv_value(
    binary: Any, positives: Tensor, lse: Tensor, zero_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Return dv and its gradient in lse; see _ops.py."""
    n, p = lse.shape
    value, dlse = lse.new_empty(()), torch.empty_like(lse)
    binary.dv_value(
        DTYPES[lse.dtype], positives.data_ptr(), lse.data_ptr(), n, p, zero_diagonal,
        value.data_ptr(), dlse.data_ptr(), *_place(lse),
    )  # fmt: skip
    return value, dlse


def score_stats_fwd(binary: Any, scores: Tensor, which: int, tau: float) -> Tensor:
    """Reduce given scores to the positives and the statistics asked for; see _ops.py."""
    n, _, p = scores.shape
    shape, dtype = (1 + len(asked(which)), n, p), accumulation_dtype(scores.dtype)
    stats = scores.new_empty(shape, dtype=dtype)
    binary.score_stats_fwd(
        DTYPES[scores.dtype], scores.data_ptr(), n, p, which, tau, stats.data_ptr(), *_place(scores)
    )
    return stats


def score_stats_bwd(
    binary: Any, dstats: list[Tensor], scores: Tensor, lse: Tensor, which: int
) -> Tensor:
    """Turn gradients of the statistics into that of the scores; see _ops.py."""
    n, _, p = scores.shape
    d = torch.stack([part.to(accumulation_dtype(scores.dtype)) for part in dstats])
    dscores = torch.empty_like(scores)
    binary.score_stats_bwd(
        DTYPES[scores.dtype], d.data_ptr(), scores.data_ptr(), lse.data_ptr(), n, p, which,
        dscores.data_ptr(), *_place(scores),
    )  # fmt: skip
    return dscores


def linf_step_(
    binary: Any,
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    lo: float,
    hi: float,
) -> None:
    """Make one projected sign step in place; see kernels.h."""
    target = dense(x)
    grad, origin = laid_out_as(grad, target), laid_out_as(origin, target)
    binary.linf_step(
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), x.numel(),
        eps, step_size, lo, hi, *_place(x),
    )  # fmt: skip
    written(x, target)


def linf_start_(
    binary: Any, x: Tensor, origin: Tensor, eps: float, seed: int, lo: float, hi: float
) -> None:
    """Write a random start; in index order, so that the memory format changes nothing."""
    target = x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    origin = origin.contiguous()
    binary.linf_start(
        DTYPES[x.dtype], target.data_ptr(), origin.data_ptr(), x.numel(), eps, seed, lo, hi,
        *_place(x),
    )  # fmt: skip
    written(x, target)


def l2_step_(
    binary: Any,
    x: Tensor,
    grad: Tensor,
    origin: Tensor,
    eps: float,
    step_size: float,
    lo: float,
    hi: float,
) -> None:
    """Make one projected step along the normalised gradient in place; see kernels.h."""
    target = dense(x)
    grad, origin = laid_out_as(grad, target), laid_out_as(origin, target)
    rows = len(x)
    binary.l2_step(
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), rows,
        x.numel() // max(rows, 1), eps, step_size, lo, hi, *_place(x),
    )  # fmt: skip
    written(x, target)


def keep_best_(binary: Any, best_x: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> None:
    """Keep the rows of greater value; see kernels.h."""
    target, target_value = dense(best_x), best_value.contiguous()
    x, value = laid_out_as(x, target), value.contiguous()
    rows = value.numel()
    binary.keep_best(
        DTYPES[value.dtype], target.data_ptr(), target_value.data_ptr(), x.data_ptr(),
        value.data_ptr(), rows, x.nbytes // max(rows, 1), *_place(best_x),
    )  # fmt: skip
    written(best_x, target)
    written(best_value, target_value)


def kernels_of(binary: Any) -> dict[str, Callable[..., Any]]:
    """Return the operators' kernels in one binary."""
    functions: tuple[Callable[..., Any], ...] = (
        critic_stats_fwd, critic_stats_bwd, dv_value, score_stats_fwd, score_stats_bwd,
        linf_step_, linf_start_, l2_step_, keep_best_,
    )  # fmt: skip
    return {function.__name__: partial(function, binary) for function in functions}


def unsupported(operator: str, case: Case) -> str | None:
    """Return why the kernels cannot run an operator in this case; None if they can."""
    most = MAX_UNITS_FLOAT64 if case.dtype == torch.float64 else MAX_UNITS
    if operator == "critic_stats" and case.units > most:
        return f"its kernel takes U up to {most} in {case.dtype}, not {case.units}"
    if case.device_type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(case.device)
    if capability < OLDEST:
        oldest, found = (".".join(map(str, version)) for version in (OLDEST, capability))
        return f"it is compiled for compute capability {oldest} and newer, not {found}"
    return None


KERNELS = kernels_of(_binary)
BACKEND = Backend("cuda", operators_of(KERNELS), KERNELS, MISSING, unsupported)
