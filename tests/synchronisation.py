"""torch's sync debug mode, emulated: what would make the host wait for a GPU raises on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Their results' values or shapes are needed on the host; lift_fresh is torch.tensor(...), whose
# data come from it, and the last ones allocate pinned memory.
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.allclose,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten.lift_fresh,
    aten.pin_memory,
    aten._pin_memory,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_, aten.copy}

# On a CPU these reach no operator.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.pin_memory}


class WaitsError(RuntimeError):
    def __init__(self, name: object) -> None:
        super().__init__(f"called a synchronizing CUDA operation: {name}")


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in WAITING:
            raise WaitsError(func)
        if packet in INDEXING and any(
            x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None
        ):
            raise WaitsError(func)
        devices = (
            {x.device for x in tensors} | {kwargs.get("device") or tensors[0].device}
            if packet in COPIES
            else set()
        )
        if len(devices) > 1:
            raise WaitsError(func)
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., object], types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func in METHODS:
            raise WaitsError(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Raise WaitsError where a GPU's host would wait. Back ends' kernels are not looked into."""
    with _Operators(), _Methods():
        yield
