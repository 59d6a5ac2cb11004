"""What the bound and a step of training cost on several gloo processes, and a model for GPUs.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py          # measure: 1, 2 and 4 processes
    python benchmarks/scaling.py --model                    # compute: 8, 64 and 1024 GPUs

Prints tables in Markdown. Before it times, it compares values with those of one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wcmi_fast import PGD, functional
from wcmi_fast.distributed import global_critic_stats, ranks
from wcmi_fast.training.config import EncoderConfig
from wcmi_fast.training.encoder import train_encoder
from wcmi_fast.training.run_folder import RunFolder

COUNTS = (1, 2, 4)
# N, U, P: the default of training, the same with a larger batch, and the paper's on 28 x 28 images.
SIZES = ((64, 64, 49), (512, 64, 49), (128, 2048, 49))
REPETITIONS, STEPS = 15, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="compute the model instead")
    if parser.parse_args().model:
        print_model()
        return
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print_bounds()
    print_steps()
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


# ---- measured -----------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Count calls, bytes and seconds of the collectives that Python starts."""
    found = {"calls": 0.0, "bytes": 0.0, "seconds": 0.0}
    originals: dict[str, Callable[..., Any]] = {
        "all_reduce": dist.all_reduce,
        "all_gather": dist.all_gather,
    }

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensors: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = call(tensors, *args, **kwargs)
            found["seconds"] += time.perf_counter() - begin
            found["calls"] += 1
            each = [tensors] if isinstance(tensors, Tensor) else tensors
            found["bytes"] += sum(tensor.nbytes for tensor in each)
            return result

        return wrapped

    for name, call in originals.items():
        setattr(dist, name, counting(call))
    try:
        yield found
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)


def bound(n: int, u: int, p: int) -> dict[str, float]:
    """Time the value and the gradients of dv over a batch of n, of which each rank has a part."""
    generator = torch.Generator().manual_seed(0)
    whole_z = torch.randn(n, u, generator=generator) / u**0.5
    whole_h = torch.randn(n, p, u, generator=generator)
    z, h = (ranks.own(x).clone().requires_grad_() for x in (whole_z, whole_h))

    def once() -> Tensor:
        value = functional.dv(stats=global_critic_stats(z, h, which="dv"))
        torch.autograd.grad(value, (z, h))
        return value.detach()

    torch.testing.assert_close(once(), functional.dv(whole_z, whole_h))
    seconds, exchanging = [], []
    for _ in range(REPETITIONS):
        ranks.wait()
        with counted() as found:
            begin = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - begin)
        exchanging.append(found["seconds"])
    return {**found, "seconds": median(seconds), "exchanging": median(exchanging)}


def steps() -> dict[str, float]:
    """Time steps of training an encoder with the default settings, on random 28 x 28 images."""
    x = torch.rand(64 * STEPS, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    attack = PGD(eps=0.1, step_size=0.025, steps=10)
    config = EncoderConfig(attack=attack, epochs=1, eps_warmup=0.0)
    ends: list[float] = []
    with TemporaryDirectory() as folder, counted() as found:
        train_encoder(
            config,
            x,
            seed=0,
            stage="encoder",
            run=RunFolder(Path(folder)),
            on_batch=lambda values: ends.append(time.perf_counter()),
        )
    seconds = [after - before for before, after in pairwise(ends)]
    return {
        "calls": found["calls"] / STEPS,
        "bytes": found["bytes"] / STEPS,
        "seconds": median(seconds),
        "exchanging": found["seconds"] / STEPS,
    }


def print_bounds() -> None:
    print("| N, U, P | ranks | ms | of it in collectives | collectives | KiB of them |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        for count in COUNTS:
            print(f"| {', '.join(map(str, size))} | {count} | {row(on_ranks(count, bound, *size))}")


def print_steps() -> None:
    print("\n| training step, N = 64 | ranks | ms | of it in collectives | collectives | KiB |")
    print("|---|---|---|---|---|---|")
    for count in COUNTS:
        print(f"| attack of 10 steps | {count} | {row(on_ranks(count, steps))}")


def row(found: dict[str, float]) -> str:
    return (
        f"{1e3 * found['seconds']:.1f} | {1e3 * found['exchanging']:.1f} | {found['calls']:.0f} | "
        f"{found['bytes'] / 1024:.0f} |"
    )


def on_ranks(count: int, function: Callable[..., dict[str, float]], *args: int) -> dict[str, float]:
    """Call a function in so many processes; return the first one's result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wcmi_fast.training.encoder", "torch._dynamo"])
    with TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(target=work, args=(folder, rank, count, results, function, args))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        found: dict[str, float] = results.get()
        for process in processes:
            process.join()
    return found


def work(folder: str, rank: int, count: int, results: Any, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
        )
    found = function(*args)
    if rank == 0:
        results.put(found)
    if count > 1:
        dist.destroy_process_group()


# ---- the model ----------------------------------------------------------------------------------

# The paper's critic on 32 x 32 images.
UNITS, LOCATIONS = 2048, 64
# Operations of one image through encoder and critic, forward, from the layers' sizes.
ENCODER_CONVOLUTIONS = 256 * 64 * 48 + 64 * 128 * 1024 + 16 * 256 * 2048
CRITIC_CONVOLUTIONS = 256 * 64 * 48 + 64 * 128 * 1024
FORWARD = 2 * (
    ENCODER_CONVOLUTIONS
    + 4096 * 1024
    + 1024 * 64
    + CRITIC_CONVOLUTIONS
    + LOCATIONS * (2 * 128 * UNITS + UNITS**2)
)
# Assumed, not measured: operations per second that a GPU reaches; bytes per second and GPU that a
# ring reaches within a machine of 8 and between machines; seconds for each collective to begin, and
# for the kernels of each block of T to be launched.
RATE = 100e12
NETWORKS = {8: (200e9, 30e-6), 64: (25e9, 80e-6), 1024: (25e9, 300e-6)}
COLLECTIVES, LAUNCHES = 4, 40e-6


def print_model() -> None:
    """Print what one step of an attack would cost, with as many images for each GPU, or in all."""
    print("| GPUs | N | images each | networks, ms | bound, ms | exchange, ms | MB sent by each |")
    print("|---|---|---|---|---|---|---|")
    for n_of in (lambda count: 128 * count, lambda count: 8192):
        for count, (bandwidth, latency) in NETWORKS.items():
            n, images = n_of(count), n_of(count) // count
            # Backward to the images costs as much as forward.
            networks = 2 * FORWARD * images / RATE
            # T is computed twice, and has two gradients.
            bound = 8 * n * images * LOCATIONS * UNITS / RATE + count * LAUNCHES
            sent = sent_by_rank(n, UNITS, LOCATIONS, count)
            exchange = sent / bandwidth + COLLECTIVES * latency
            times = " | ".join(f"{1e3 * t:.2f}" for t in (networks, bound, exchange))
            print(f"| {count} | {n} | {images} | {times} | {sent / 1e6:.0f} |")


def sent_by_rank(n: int, u: int, p: int, count: int) -> float:
    """Return the bytes that a rank sends in a ring for dv's value and gradient in float32."""
    gathered, reduced = n * u, n * u + 3 * n * p
    return 4 * (count - 1) / count * (gathered + 2 * reduced)


if __name__ == "__main__":
    main()
