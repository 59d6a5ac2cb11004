"""What the registry knows of a back end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """What the choice of a back end depends on.

    Attributes:
        device_type: of the operator's tensors; here too, since torch makes a string at every look.
        device: of the operator's tensors.
        dtype: of the operator's tensors.
        units: U, for operators with products; else 0.
        products: multiply-adds of the operator's products; else 0.
    """

    device_type: str
    device: torch.device
    dtype: torch.dtype
    units: int = 0
    products: int = 0


class Backend(NamedTuple):
    """One back end.

    Attributes:
        device_type: of the tensors that it runs on.
        operators: what it has kernels for; each is a prefix of schemas in _ops.py.
        kernels: by the schemas' names, functions of the schemas' arguments but impl.
        missing: why it is not installed, and how to get it; None if it is.
        unsupported: returns why it cannot run an operator in a case, None if it can.
    """

    device_type: str
    operators: tuple[str, ...]
    kernels: dict[str, Callable[..., Any]]
    missing: str | None
    unsupported: Callable[[str, Case], str | None]


def operators_of(kernels: dict[str, Callable[..., Any]]) -> tuple[str, ...]:
    """Return the operators that kernels are of: each is a prefix of schemas in _ops.py."""
    names = (name.removesuffix("_fwd").removesuffix("_bwd") for name in kernels)
    return tuple(dict.fromkeys(names))
