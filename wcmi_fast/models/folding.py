"""Batch norm folded into the layer before it: the module of eval mode, in fewer passes."""

from __future__ import annotations

import copy

import torch
from torch import nn


def folded(module: nn.Module) -> nn.Module:
    """Return a frozen copy of a module in eval mode, with its batch norms folded away.

    The copy computes what ``module.eval()`` computes, up to rounding, with weights that need no
    gradient, faster: an attack evaluates fixed weights many times. It is a snapshot: make a new one
    when the weights have changed. Batch norms are folded where they directly follow a convolution
    or a linear layer in an ``nn.Sequential``; dropout, an identity in eval mode, is removed. A
    submodule whose attribute ``keep_layers`` is true stays as it is, with all that it holds.

    Args:
        module: any module; it is not changed.
    """
    with torch.inference_mode(False), torch.no_grad():
        snapshot = copy.deepcopy(module).eval().requires_grad_(False)
        kept = _kept(snapshot)
        for part in snapshot.modules():
            if isinstance(part, nn.Sequential) and part not in kept:
                _fold_sequence(part)
        # What is kept may rely on the memory format, as x.view(len(x), -1) does.
        return snapshot if kept else snapshot.to(memory_format=torch.channels_last)


def _kept(module: nn.Module) -> set[nn.Module]:
    roots = [part for part in module.modules() if getattr(part, "keep_layers", False)]
    return {part for root in roots for part in root.modules()}


def _fold_sequence(sequence: nn.Sequential) -> None:
    layers: list[nn.Module] = []
    for layer in sequence:
        last = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(last, nn.Conv2d) and _foldable(layer):
            _fold_into_(last, layer)
        elif isinstance(layer, nn.BatchNorm1d) and isinstance(last, nn.Linear) and _foldable(layer):
            _fold_into_(last, layer)
        elif not isinstance(layer, nn.Dropout):
            layers.append(layer)
    sequence._modules.clear()
    sequence._modules.update({str(i): layer for i, layer in enumerate(layers)})


def _foldable(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return norm.track_running_stats and norm.affine


def _fold_into_(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    # In place on the copy: torch.nn.utils.fusion copies a large layer several times more.
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    if layer.bias is not None:
        shift += layer.bias * scale
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter(shift, requires_grad=False)
