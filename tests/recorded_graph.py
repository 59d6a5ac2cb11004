"""CUDA graphs emulated on a CPU: operators are recorded, and run again on the same storages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from synchronisation import WaitsError, waiting_forbidden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wcmi_fast import attack_graph


@dataclass
class Operator:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def tensors(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs, self.result))

    def run_again(self) -> None:
        again = self.func(*self.args, **self.kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in _tensors((self.args, self.kwargs))}
        for old, new in zip(_tensors(self.result), _tensors(again), strict=True):
            # Views, and what is changed in place, are up to date.
            if old.untyped_storage().data_ptr() not in inputs:
                old.copy_(new)


class Graph:
    """In place of torch.cuda.CUDAGraph; keeps every tensor, as a graph keeps its pool."""

    def __init__(self) -> None:
        self.operators: list[Operator] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operator in self.operators:
            operator.run_again()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.graph.operators.append(Operator(func, args, kwargs or {}, result))
        return result


class Stream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@dataclass
class Cuda:
    """What the emulated torch.cuda has seen."""

    graphs: list[Graph] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    sync_debug: ExitStack = field(default_factory=ExitStack)
    stream: Any = None

    def __post_init__(self) -> None:
        self.stream = Stream("main", self.events)

    def new_stream(self, device: object) -> Stream:
        return Stream("side", self.events)

    def new_graph(self) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capturing(self, graph: Graph, stream: Stream) -> Iterator[None]:
        """As torch.cuda.graph: a failed capture raises another error, and the stream stays."""
        before, self.stream = self.stream, stream
        self.events.append(f"captures on {stream.name}")
        try:
            with waiting_forbidden(), _Recorder(graph):
                yield
        except WaitsError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.stream = before

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.events.append(f"sync debug mode {mode}")
        if mode == "error":
            self.sync_debug.enter_context(waiting_forbidden())
        else:
            self.sync_debug.close()


@contextmanager
def _no_device(device: object) -> Iterator[None]:
    yield


def emulate(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Make attack_graph capture loops on CPU tensors."""
    cuda = Cuda()
    monkeypatch.setattr(attack_graph, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(attack_graph, "_cache", {})
    stubs = {
        "CUDAGraph": cuda.new_graph,
        "graph": lambda graph, *, stream: cuda.capturing(graph, stream),
        "Stream": cuda.new_stream,
        "stream": cuda.on_stream,
        "current_stream": lambda device=None: cuda.stream,
        "device": _no_device,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": cuda.set_sync_debug_mode,
        "get_rng_state": lambda device: None,
        "set_rng_state": lambda state, device: None,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return cuda


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
