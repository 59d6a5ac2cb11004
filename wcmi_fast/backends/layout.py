"""Memory layouts for kernels that run over flat memory, element by element."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """Return x if its elements fill one block of memory, else a contiguous copy."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """Return x with the memory layout of `like`, which is dense: itself, or one copy."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
