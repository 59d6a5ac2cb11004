"""A model, or one layer of it, as an encoder whose output is (N, D)."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import Tensor, nn

from wcmi_fast.models.folding import folded


class _LayerReachedError(Exception):
    """The wanted layer has been run; what follows it is not needed."""


class Representation(nn.Module):
    """A model's output, or that of its submodule `layer`, flattened to (N, D).

    The hook lives only during a call, and the model is run no further than the layer.

    Args:
        model: images (N, ...) -> anything, or a tensor if layer is None.
        layer: a submodule's name as in ``model.named_modules()``; None for the model's output.

    Attributes:
        keep_layers: whether `folded` must leave the model's layers as they are, because it would
            change what a layer's name stands for, or the values.

    Raises:
        ValueError: the model has no submodule of that name.
    """

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.keep_layers = False
        names = _names(model)
        if layer is not None and layer not in names:
            close = difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[:6]
            hint = f", such as {', '.join(map(repr, close))}" if close else "; it has none"
            raise ValueError(f"layer is {layer!r}, wanted a submodule of the model{hint}")

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the representation (N, D), float32.

        Raises:
            TypeError: it is no tensor of floating point.
            ValueError: the layer was not run, or its result does not have N rows.
        """
        found = self.model(x) if self.layer is None else _layer_output(self.model, self.layer, x)
        what = "model" if self.layer is None else f"layer {self.layer!r}"
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"{what} returned {kind}, wanted a tensor of floating point")
        if found.ndim == 0 or len(found) != len(x):
            raise ValueError(
                f"{what} returned shape {tuple(found.shape)}, wanted ({len(x)}, ...), a row per "
                "image"
            )
        return (found.flatten(1) if found.ndim > 1 else found[:, None]).float()


def frozen_copy(model: nn.Module, layer: str | None, like: Tensor) -> nn.Module:
    """Return a frozen copy in eval mode of a model's (or its layer's) map; the model is untouched.

    Batch norms are folded away where that changes nothing.

    Args:
        model, layer: as for `Representation`.
        like: a few of its inputs, on the device where the copy is wanted.

    Raises:
        TypeError: the model cannot be copied.
        ValueError: as `Representation`.
    """
    plain = _copied(Representation(model, layer)).to(like.device)
    if layer is None and _folds(plain, like):
        return folded(plain)
    plain.keep_layers = True
    return plain


def _copied(representation: Representation) -> Representation:
    model = representation.model
    try:
        return copy.deepcopy(representation).eval().requires_grad_(False)
    except Exception as error:
        raise TypeError(
            f"model is a {type(model).__name__} that copy.deepcopy cannot copy ({error}), wanted "
            "one that it can: the measurement leaves the model itself untouched"
        ) from error


@torch.no_grad()
def _folds(representation: nn.Module, like: Tensor) -> bool:
    """Tell whether a model computes the same with its batch norms folded.

    It does not where its forward takes layers of a sequence by number, or needs a memory format.
    """
    try:
        wanted, found = representation(like), folded(representation)(like)
    except Exception:  # whatever a user's model may raise: what it means is said where it is run
        return False
    if found.shape != wanted.shape:
        return False
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def _layer_output(model: nn.Module, layer: str, x: Tensor) -> Any:
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output)
        raise _LayerReachedError

    handle = model.get_submodule(layer).register_forward_hook(keep)
    try:
        model(x)
    except _LayerReachedError:
        return kept[0]
    finally:
        handle.remove()
    raise ValueError(f"layer {layer!r} was not run by the model's forward, wanted one that is")


@torch.no_grad()
def is_stochastic(encoder: nn.Module, x: Tensor) -> bool:
    """Tell whether an encoder maps the same images to different representations."""
    return not torch.equal(encoder(x), encoder(x))


@torch.enable_grad()
def without_gradient(encoder: nn.Module, x: Tensor) -> float:
    """Return the share of images x (N, ...) at which an encoder's gradient is zero, in [0, 1].

    An attack through both sides of a critic moves such images by the critic's other side alone,
    and nobody would notice.
    """
    x = x.detach().requires_grad_()
    found = encoder(x)
    if not found.requires_grad:
        return 1.0
    (gradient,) = torch.autograd.grad((found * torch.randn_like(found)).sum(), x)
    return float((gradient.flatten(1) == 0).all(1).double().mean())


def batch_norms(model: nn.Module) -> tuple[int, int]:
    """Return how many batch norms are in train mode, and how many have no running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = sum(norm.training and norm.track_running_stats for norm in norms)
    return training, sum(norm.running_mean is None for norm in norms)
