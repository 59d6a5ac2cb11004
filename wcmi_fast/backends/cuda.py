"""CUDA C++ kernels. Compiled for real targets; no GPU has run them yet (README, table)."""

from __future__ import annotations

import torch
from torch import Tensor

from wcmi_fast._ops import LIBRARY
from wcmi_fast.backends.binary import DTYPES, load
from wcmi_fast.backends.layout import dense, laid_out_as

OPERATORS: tuple[str, ...] = ("linf_step_",)

_binary, MISSING = load(
    "_cuda",
    "with nvcc in PATH reinstall by `WCMI_FAST_CUDA=1 pip install --force-reinstall --no-deps .`",
)


def linf_step_(
    x: Tensor, grad: Tensor, origin: Tensor, eps: float, step_size: float, lo: float, hi: float
) -> None:
    """Make one projected sign step in place, on x's device and its current stream."""
    target = dense(x)
    grad, origin = laid_out_as(grad, target), laid_out_as(origin, target)
    _binary.linf_step(
        DTYPES[x.dtype], target.data_ptr(), grad.data_ptr(), origin.data_ptr(), x.numel(),
        eps, step_size, lo, hi, x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if target is not x:
        x.copy_(target)
    elif not x.is_inference():
        # Else autograd would not see that a tensor saved for a backward pass has changed.
        torch.autograd.graph.increment_version(x)


if _binary is not None:
    LIBRARY.impl("linf_step_", linf_step_, "CUDA")
