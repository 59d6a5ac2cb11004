"""CUDA C++ kernels. Compiled for real targets; no GPU has run them yet (README, table)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from wcmi_fast._ops import LIBRARY
from wcmi_fast.backends.cpu import DTYPES, _is_dense, _laid_out_as

OPERATORS = ("linf_step_",)

MISSING: str | None = None
_binary: ModuleType | None = None
try:
    from wcmi_fast import _cuda as _binary
except ImportError as error:
    MISSING = (
        f"its binary wcmi_fast._cuda does not load ({error}); with nvcc in PATH reinstall by"
        " `WCMI_FAST_CUDA=1 pip install --force-reinstall --no-deps .`"
    )


def linf_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected sign step in place, on x's device and its current stream."""
    target = x if _is_dense(x) else x.contiguous()
    grad, origin = _laid_out_as(grad, target), _laid_out_as(origin, target)
    _binary.linf_step(  # type: ignore[union-attr]
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), x.numel(),
        eps, step_size, lo, hi, x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if target is not x:
        x.copy_(target)


if _binary is not None:
    LIBRARY.impl("linf_step_", linf_step_, "CUDA")
