"""Batch norm folded into the layer before it: the module of eval mode, in fewer passes."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


def folded(module: nn.Module) -> nn.Module:
    """Return a frozen copy of a module in eval mode, with its batch norms folded away.

    The copy computes what ``module.eval()`` computes, up to rounding, with weights that need no
    gradient, faster: an attack evaluates fixed weights many times. It is a snapshot: make a new one
    when the weights have changed. Batch norms are folded where they directly follow a convolution
    or a linear layer in an ``nn.Sequential``; dropout, an identity in eval mode, is removed.

    Args:
        module: any module; it is not changed.
    """
    with torch.inference_mode(False), torch.no_grad():
        snapshot = copy.deepcopy(module).eval().requires_grad_(False)
        for part in snapshot.modules():
            if isinstance(part, nn.Sequential):
                _fold_sequence(part)
    return snapshot.to(memory_format=torch.channels_last)


def _fold_sequence(sequence: nn.Sequential) -> None:
    layers: list[nn.Module] = []
    for layer in sequence:
        last = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(last, nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(last, layer)
        elif isinstance(layer, nn.BatchNorm1d) and isinstance(last, nn.Linear):
            layers[-1] = fuse_linear_bn_eval(last, layer)
        elif not isinstance(layer, nn.Dropout):
            layers.append(layer)
    sequence._modules.clear()
    sequence._modules.update({str(i): layer for i, layer in enumerate(layers)})
