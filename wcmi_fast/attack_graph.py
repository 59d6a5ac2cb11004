"""One restart of an attack as a CUDA graph: captured once, then replayed on other images."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Captures that are kept, the last used ones; each holds the memory of its loop's intermediates.
KEPT = 8

# The first step compiles and tunes kernels; the others find what waits for the GPU.
WARM_UP_STEPS = 3

# The device type that graphs are captured on.
DEVICE_TYPE = "cuda"

LossFn = Callable[[Tensor], Tensor]


class Best(NamedTuple):
    """The best images so far, and their losses."""

    x: Tensor
    losses: Tensor


# One restart: (origin, x_adv, best so far, steps) -> best. Changes x_adv and the best in place; the
# best stays None where it is not asked for.
Restart = Callable[[Tensor, Tensor, Best | None, int], Best | None]


class Capture(NamedTuple):
    """A captured restart, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    origin: Tensor
    x_adv: Tensor
    best: Best | None

    def run(self, origin: Tensor, starts: Iterable[Tensor]) -> Tensor:
        """Replay one restart from each start; return the images that an attack keeps."""
        self.origin.copy_(origin)
        if self.best is not None:
            self.best.x.copy_(origin)
            self.best.losses.fill_(-math.inf)
        for start in starts:
            self.x_adv.copy_(start)
            self.graph.replay()
        return (self.x_adv if self.best is None else self.best.x).clone()


class _Entry(NamedTuple):
    loss_fn: weakref.ref[LossFn]
    found: Capture | str


_cache: dict[Hashable, _Entry] = {}
_logged: set[tuple[object, str]] = set()
_logger = logging.getLogger("wcmi_fast")


def capture(
    restart: Restart,
    loss_fn: LossFn,
    settings: Hashable,
    origin: Tensor,
    start: Tensor,
    *,
    steps: int,
) -> Capture | None:
    """Return the restart as a graph, captured now or by an earlier call; None where it cannot be.

    Captures are found again by loss_fn (the object), settings, the stream, and the layout, dtype
    and device of the images. Why one cannot be made is logged once for each reason and function.

    Args:
        restart: the program; it must not keep loss_fn alive beyond the call.
        loss_fn: what the restart calls.
        settings: what else the restart depends on.
        origin, start: images for the warm-up; not changed.
        steps: of a restart.
    """
    found = _found(restart, loss_fn, settings, origin, start, steps)
    if isinstance(found, Capture):
        return found
    _log(loss_fn, found)
    return None


def _found(
    restart: Restart,
    loss_fn: LossFn,
    settings: Hashable,
    origin: Tensor,
    start: Tensor,
    steps: int,
) -> Capture | str:
    """Return the capture from the cache, or a new one; else why it is impossible."""
    if origin.device.type != DEVICE_TYPE:
        return f"x is on {origin.device}, not on a GPU"
    stream = torch.cuda.current_stream(origin.device)
    layout = (origin.shape, origin.stride(), origin.dtype, origin.device)
    key = (id(loss_fn), settings, layout, stream)
    entry = _cache.pop(key, None)
    if entry is None:
        # An id is used again once its object is gone: then the entry must be gone too.
        forget = _cache.pop
        try:
            reference = weakref.ref(loss_fn, lambda _: forget(key, None))
        except TypeError:
            return f"a {type(loss_fn).__name__} as loss_fn has no weak references"
        entry = _Entry(reference, _try_to_capture(restart, origin, start, steps))
    _cache[key] = entry
    while len(_cache) > KEPT:
        del _cache[next(iter(_cache))]
    return entry.found


def _try_to_capture(restart: Restart, origin: Tensor, start: Tensor, steps: int) -> Capture | str:
    # A replay's random numbers are to be those that the plain loop would draw.
    with torch.random.fork_rng(devices=[origin.device]), torch.cuda.device(origin.device):
        stream = torch.cuda.Stream(origin.device)
        origin, x_adv = origin.clone(), start.clone()
        try:
            best = _warm_up(restart, origin, x_adv, stream, steps)
        except _WaitsForTheGPUError as error:
            return str(error)
        # The warm-up's belong to its stream.
        best = None if best is None else Best(best.x.clone(), best.losses.clone())
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its stream the current one, without the outer context.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                restart(origin, x_adv, best, steps)
        except RuntimeError as error:
            return f"the capture failed: {_first_line(error.__context__ or error)}"
    return Capture(graph, origin, x_adv, best)


def _warm_up(
    restart: Restart, origin: Tensor, x_adv: Tensor, stream: torch.cuda.Stream, steps: int
) -> Best | None:
    """Run some steps on a side stream, as a capture needs it; return a best to write to."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        best = restart(origin, x_adv, None, 1)
        with _waiting_forbidden():
            restart(origin, x_adv, best, min(steps, WARM_UP_STEPS - 1))
    current.wait_stream(stream)
    return best


class _WaitsForTheGPUError(Exception):
    """A loop that synchronises with the GPU, or copies from or to memory that is not pinned."""


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Raise where the host waits for the GPU: found in a capture, it would break the capture."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise _WaitsForTheGPUError("loss_fn waits for the GPU, as .item() does") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _log(loss_fn: LossFn, reason: str) -> None:
    # Closures of one function count as one: a trainer makes a new one for every batch.
    function = getattr(loss_fn, "__code__", type(loss_fn))
    if (function, reason) not in _logged:
        _logged.add((function, reason))
        _logger.warning(
            "PGD.attack: cuda_graph=True cannot be honoured, the plain loop runs: %s", reason
        )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
