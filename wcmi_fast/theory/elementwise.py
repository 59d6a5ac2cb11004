"""Functions of numbers, NumPy arrays and tensors alike."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = float | NDArray[Any] | Tensor
Integers = int | NDArray[Any] | Tensor
Same = TypeVar("Same", float, NDArray[Any], Tensor)


def elementwise(function: Callable[..., Tensor], *values: Tensor, like: tuple[Any, ...]) -> Any:
    """Return function(*values) as a tensor if `like` holds one, else an array, else a float."""
    found = function(*values)
    if any(isinstance(value, Tensor) for value in like):
        return found
    if any(isinstance(value, np.ndarray) for value in like):
        return found.numpy()
    return float(found)


def numbers(owner: str, name: str, value: Any, wanted: str) -> Tensor:
    """Return an argument as a tensor of floating point; NaN and what is no number is refused."""
    tensor = _tensor(value)
    if tensor is None or tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{owner}: {name} is {_shown(value)}, wanted {wanted}")
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if bool(tensor.isnan().any()):
        raise ValueError(f"{owner}: {name} {_verb(value)} nan, wanted {wanted}")
    return tensor


def probabilities(owner: str, name: str, value: Any) -> Tensor:
    """Return an argument as a tensor of floating point in [0, 1]."""
    wanted = "a probability in [0, 1]"
    tensor = numbers(owner, name, value, wanted)
    outside = tensor[(tensor < 0) | (tensor > 1)]
    if len(outside):
        raise ValueError(f"{owner}: {name} {_verb(value)} {float(outside[0])}, wanted {wanted}")
    return tensor


def class_counts(owner: str, value: Any, like: Tensor) -> Tensor:
    """Return numbers of classes, integers of 2 or more, as a tensor of the dtype of `like`."""
    tensor = _tensor(value)
    integers = tensor is not None and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    )
    if tensor is None or not integers:
        shown = _shown(value)
        raise TypeError(f"{owner}: classes is {shown}, wanted an integer, 2 or more")
    few = tensor[tensor < 2]
    if len(few):
        raise ValueError(f"{owner}: classes {_verb(value)} {int(few[0])}, wanted 2 or more")
    return tensor.to(like)


def _tensor(value: Any) -> Tensor | None:
    """Return a number, an array or a tensor as a tensor, and None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return torch.tensor(int(value))
    return torch.tensor(float(value), dtype=torch.float64)


def _shown(value: Any) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{'an array' if isinstance(value, np.ndarray) else 'a tensor'} of {value.dtype}"
    return repr(value)


def _verb(value: Any) -> str:
    return "holds" if isinstance(value, (np.ndarray, Tensor)) else "is"
