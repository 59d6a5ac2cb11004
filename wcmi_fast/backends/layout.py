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


def written(x: Tensor, target: Tensor) -> None:
    """Bring what a kernel wrote to `target` into x, and autograd's notice."""
    if target is not x:
        x.copy_(target)
    elif not x.is_inference():
        # Else autograd would not see that a tensor saved for a backward pass has changed.
        torch.autograd.graph.increment_version(x)
