"""The processes of a run: which images are whose, what they agree on, what each draws."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
# Signals, sentences and states go between the hosts, whatever the device.
HOST = torch.device("cpu")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the context; one alone does not.

    Gloo joins the hosts, and NCCL the GPUs, of which each process takes that of its LOCAL_RANK.

    Args:
        device: where to compute, such as cpu or cuda.

    Raises:
        ValueError, RuntimeError: as torch.distributed.init_process_group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def explained() -> Iterator[None]:
    """Say of a failure on several processes whose it is, and how to go on.

    Raises:
        RuntimeError: as in the context.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1:
            raise
        raise RuntimeError(
            f"rank {rank()} of {count()} failed, or lost another that did. What was saved stays: "
            f"the same command with --out goes on there. The error: {error}"
        ) from error


def count() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def warn(sentence: str) -> None:
    """Warn of what every process has seen, once: in the first one, for the caller's caller."""
    if is_first():
        warnings.warn(sentence, stacklevel=3)


def check_batch(owner: str, batch_size: int) -> None:
    """Raise unless a batch can be cut into equal parts, one for each process, with negatives.

    Raises:
        ValueError: it cannot.
    """
    if count() > 1 and (batch_size % count() or batch_size < 2 * count()):
        raise ValueError(
            f"{owner}: batch_size is {batch_size} on {count()} processes, wanted a multiple of "
            f"{count()} with 2 images or more for each"
        )


def own(indices: Tensor) -> Tensor:
    """Return this process's part of a batch's indices (B,): (B / count,)."""
    return indices.chunk(count())[rank()]


def part_of(images: Tensor) -> tuple[int, int] | None:
    """Return where own images (n, ...) begin in the whole batch, and its size; None if alone."""
    if count() == 1:
        return None
    return rank() * len(images), count() * len(images)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Draw other numbers than the other processes from torch's global generator, as dropout does.

    After it the generator is again the same everywhere, so that one checkpoint serves all.
    """
    if count() == 1:
        yield
        return
    shared = int(torch.randint(2**62, ()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shared + rank())
        yield


def from_first(work: Callable[[], Result]) -> Result:
    """Do work in the first process and return its result in all.

    Raises:
        RuntimeError: in the others, with what the first one raised.
    """
    if count() == 1:
        return work()
    if not is_first():
        received: Result = _received()
        return received
    try:
        result = work()
    except Exception as error:
        dist.broadcast_object_list([None, str(error)], 0, device=HOST)
        raise
    dist.broadcast_object_list([result, None], 0, device=HOST)
    return result


def _received() -> Any:
    found: list[Any] = [None, None]
    dist.broadcast_object_list(found, 0, device=HOST)
    result, error = found
    if error is not None:
        raise RuntimeError(f"rank 0 failed: {error}")
    return result


def highest(number: int) -> int:
    """Return the highest number of all processes."""
    if count() == 1:
        return number
    found = torch.tensor(number, device=HOST)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def means(*values: Tensor) -> list[float]:
    """Return the means over the processes of scalars; the host waits for the device once."""
    found = torch.stack([value.detach() for value in values])
    if count() > 1:
        dist.all_reduce(found)
    return [value / count() for value in found.tolist()]


def wait() -> None:
    """Wait until all processes are here."""
    highest(0)
