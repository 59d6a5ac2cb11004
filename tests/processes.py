"""Running a function on several gloo processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function of a module in so many processes; return their results, or errors, in order.

    One process is without a group. One without a result gives None.
    """
    # The server imports once what takes seconds (the optimisers import the last); then it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wcmi_fast.training.encoder", "torch._dynamo"])
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(Path(folder), rank, count, function, args))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
            process.kill()
        files = [Path(folder) / f"result-{rank}" for rank in range(count)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def _work(
    folder: Path, rank: int, count: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    try:
        result = function(*args)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    torch.save(result, folder / f"result-{rank}")
    if count > 1:
        dist.destroy_process_group()
