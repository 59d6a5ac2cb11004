"""Gradients averaged over the processes, and batch statistics of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from wcmi_fast.distributed import ranks
from wcmi_fast.distributed.bounds import gathered

Forward = TypeVar("Forward", bound=Callable[..., Any])
Module = TypeVar("Module", bound=nn.Module)


class _Forward(nn.Module):
    """A function as the forward pass of the weights that it uses."""

    def __init__(self, modules: Iterable[nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        # Weights alone: DistributedDataParallel would overwrite buffers by those of the first rank.
        self._weights = nn.ParameterList(p for module in modules for p in module.parameters())
        self._function = function

    def forward(self, *given: Any) -> Any:
        return self._function(*given)


def averaging(modules: Iterable[nn.Module], forward: Forward) -> Forward:
    """Return a forward pass whose backward averages the modules' gradients over the processes.

    That is torch's DistributedDataParallel around all of the forward pass, so that a step may use a
    module twice and still be one pass to it. Statistics of batch norms are left to
    `share_statistics_`.

    Args:
        modules: all that the pass trains.
        forward: called once between backward passes.
    """
    if ranks.count() == 1:
        return forward
    return DistributedDataParallel(_Forward(modules, forward))  # type: ignore[return-value]


@torch.no_grad()
def share_statistics_(modules: Iterable[nn.Module]) -> None:
    """Average the running statistics of batch norms over the processes, in place.

    Their batches being of one size, the means and the unbiased variances stay unbiased.
    """
    if ranks.count() == 1:
        return
    found = [
        norm.get_buffer(name)
        for module in modules
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats and not _is_global(norm)
        for name in ("running_mean", "running_var")
    ]
    if not found:
        return
    flat = torch.cat(found)
    dist.all_reduce(flat)
    flat /= ranks.count()
    for buffer, value in zip(found, flat.split([len(buffer) for buffer in found]), strict=True):
        buffer.copy_(value)


class _GlobalBatchNorm1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if self.training else super().forward(x)


GLOBAL: dict[type, type] = {
    nn.BatchNorm1d: _GlobalBatchNorm1d,
    nn.BatchNorm2d: _GlobalBatchNorm2d,
}


def synchronised_(module: Module) -> Module:
    """Let batch norms use the batch of all processes in train mode, in place; alone, do nothing.

    The same as torch's SyncBatchNorm, which refuses CPU tensors, for batches of one size.

    Args:
        module: all of its parts that are exactly BatchNorm1d or BatchNorm2d are changed.
    """
    if ranks.count() > 1:
        for part in module.modules():
            # As torch's lazy modules become what they are: weights, hooks and names stay.
            part.__class__ = GLOBAL.get(type(part), type(part))
    return module


def _is_global(norm: nn.Module) -> bool:
    return type(norm) in GLOBAL.values()


def _normalised(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    dims = [dim for dim in range(x.dim()) if dim != 1]
    own_mean, own_variance = x.mean(dims), x.var(dims, correction=0)
    means, variances = (
        gathered(torch.stack([own_mean, own_variance])).unflatten(0, (-1, 2)).unbind(1)
    )
    mean = means.mean(0)
    # Within the processes, and between them.
    variance = variances.mean(0) + means.var(0, correction=0)
    if norm.track_running_stats:
        _update_running(norm, mean.detach(), variance.detach(), x.numel() // x.shape[1])
    view = [1, -1, *[1] * (x.dim() - 2)]
    scale = torch.rsqrt(variance + norm.eps)
    if norm.affine:
        scale = scale * norm.weight
    found: Tensor = (x - mean.view(view)) * scale.view(view)
    return found + norm.bias.view(view) if norm.affine else found


@torch.no_grad()
def _update_running(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor, own_count: int
) -> None:
    batches, total = norm.get_buffer("num_batches_tracked"), own_count * ranks.count()
    batches += 1
    momentum = 1 / batches.item() if norm.momentum is None else norm.momentum
    norm.get_buffer("running_mean").lerp_(mean, momentum)
    norm.get_buffer("running_var").lerp_(variance * (total / (total - 1)), momentum)
