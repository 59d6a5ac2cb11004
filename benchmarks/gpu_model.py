"""What is published of GPUs, and what follows from it: occupancy and the least time of operators.

Sources: NVIDIA's CUDA C++ programming guide, table of technical specifications per compute
capability; data sheets of the A100 80GB SXM and the H100 SXM (dense figures).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Multiprocessor(NamedTuple):
    """Limits of a streaming multiprocessor; sizes in bytes."""

    warps: int
    blocks: int
    registers: int
    shared: int
    shared_per_block: int


KIB = 1024
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 65536, 164 * KIB, 163 * KIB),
    90: Multiprocessor(64, 32, 65536, 228 * KIB, 227 * KIB),
    100: Multiprocessor(64, 32, 65536, 228 * KIB, 227 * KIB),
    120: Multiprocessor(48, 24, 65536, 100 * KIB, 99 * KIB),
}

# Shared memory that the driver takes of every block, and what registers are given out by.
RESERVED_SHARED = KIB
REGISTER_UNIT = 256


class Occupancy(NamedTuple):
    """Blocks on a multiprocessor, and the share of its warps that they are."""

    blocks: int
    share: float


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Return how many blocks of a kernel fit on a multiprocessor."""
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // (per_warp * warps),
        limits.shared // (shared + RESERVED_SHARED),
    )
    return Occupancy(blocks, blocks * warps / limits.warps)


class Device(NamedTuple):
    """Bytes and operations per second; `flops` by the type of a product's operands."""

    bandwidth: float
    flops: dict[str, float]
    multiprocessors: int


DEVICES = {
    "A100": Device(2.039e12, {"half": 312e12, "tf32": 156e12, "ieee": 19.5e12}, 108),
    "H100": Device(3.35e12, {"half": 989e12, "tf32": 494e12, "ieee": 67e12}, 132),
}


class Tile(Protocol):
    """What static_gpu.py finds of a kernel with products."""

    @property
    def kernel(self) -> str: ...
    @property
    def flops(self) -> int: ...
    @property
    def bytes(self) -> int: ...


def kind_of(kernel: str) -> str:
    """Return the type of a kernel's products, which its name has."""
    return next((kind for kind in ("ieee", "tf32") if kind in kernel), "half")


def tile_time(name: str, tile: Tile) -> float:
    """Return the least seconds of a tile on one multiprocessor, if all came from memory."""
    device = DEVICES[name]
    seconds = max(tile.flops / device.flops[kind_of(tile.kernel)], tile.bytes / device.bandwidth)
    return seconds * device.multiprocessors


class Work(NamedTuple):
    """An operator's operations, the bytes it must read and write, and the type of its products."""

    flops: int
    bytes: int
    kind: str = "half"


def critic_stats_work(n: int, p: int, u: int, itemsize: int, kind: str) -> Work:
    return Work(2 * n * n * p * u, itemsize * (n * u + n * p * u) + 2 * 4 * n * p, kind)


def backward_work(n: int, p: int, u: int, itemsize: int, kind: str) -> Work:
    """Products for T, dz and dh; z and h are read, dz and dh written, statistics read."""
    features = itemsize * (n * u + n * p * u)
    return Work(6 * n * n * p * u, 2 * features + 3 * 4 * n * p, kind)


def tail_work(rows: int, c: int, u: int, itemsize: int, kind: str) -> Work:
    weights = u * u + 2 * u * c + 2 * u
    return Work(2 * rows * u * (u + 2 * c), itemsize * (rows * (c + u) + weights) + 4 * rows, kind)


# The paper's batch of 128 CIFAR-10 images, 64 locations and 2048 units; and the larger batch of
# the traffic model.
IMAGES = 128 * 3 * 32 * 32
OPERATORS = {
    "critic_stats forward, N=128 P=64 U=2048, bf16": critic_stats_work(128, 64, 2048, 2, "half"),
    "critic_stats forward, N=128 P=64 U=2048, tf32": critic_stats_work(128, 64, 2048, 4, "tf32"),
    "critic_stats forward, N=1024 P=64 U=2048, bf16": critic_stats_work(1024, 64, 2048, 2, "half"),
    "critic_stats backward, N=128 P=64 U=2048, bf16": backward_work(128, 64, 2048, 2, "half"),
    "critic_stats backward, N=128 P=64 U=2048, tf32": backward_work(128, 64, 2048, 4, "tf32"),
    "critic_tail forward, 8192 rows C=128 U=2048, bf16": tail_work(8192, 128, 2048, 2, "half"),
    "linf_step_, 128 x 3 x 32 x 32, fp32": Work(0, 4 * 4 * IMAGES),
    "linf_start_, 128 x 3 x 32 x 32, fp32": Work(0, 2 * 4 * IMAGES),
    "l2_step_, 128 x 3 x 32 x 32, fp32": Work(0, 4 * 4 * IMAGES),
    "keep_best_, all rows better, fp32": Work(0, 2 * 4 * IMAGES),
}


def operator_time(name: str, work: Work) -> float:
    """Return the least seconds of an operator on a device."""
    device = DEVICES[name]
    return max(work.flops / device.flops[work.kind], work.bytes / device.bandwidth)
