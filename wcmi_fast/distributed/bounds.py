"""Bounds over the batch of all processes, each of which holds the images of its own.

A process has z (n, U) and h (n, P, U) of its n images. It gathers z of all N, and streams the
columns of T that are its own: T[i, j, p] for every i, and its own j. What the columns of all
processes give for each row is merged, so that every process has the statistics of all N x N pairs,
and applies the bound that one process would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus

from wcmi_fast import reference
from wcmi_fast.distributed import ranks
from wcmi_fast.functional.bounds import CriticStats, critic_stats

LOGS, SUMS = ("lse", "clamped_lse"), ("softplus", "sum", "square")


def global_critic_stats(
    z: Tensor, h: Tensor, *, which: str, tau: float | None = None
) -> CriticStats:
    """Return `critic_stats` of the batch of all processes; give it to a bound as ``stats=``.

    Every process must call it at the same time, with as many images. The bound is then the same
    number everywhere. Its gradients are those of the one global bound: complete for own z and h,
    while a weight's gradient is the sum over the processes.

    Args:
        z: (n, U) float32, float64, bfloat16 or float16; critic features of own representations.
        h: (n, P, U) or (n, U), z's dtype and device; critic features of own images.
        which: as for `critic_stats`, one name.
        tau: smile's; wanted if and only if which is "smile".

    Returns:
        Statistics (N, P) each, N = n times the number of processes; once differentiable.

    Raises:
        ValueError, TypeError: as `critic_stats`, n taking the place of N.
        RuntimeError: a process is gone.

    Equivalent torch program on one process: ``critic_stats(z, h, which=which, tau=tau)`` of what
    all processes have, one after another.

    Source: spec section 2.
    """
    if ranks.count() == 1:
        return critic_stats(z, h, which=which, tau=tau)
    blocks = [critic_stats(rows, h, which=which, tau=tau) for rows in gathered(z).split(len(z))]
    positives = blocks[ranks.rank()].positives
    blocks = [
        stats if i == ranks.rank() else _with_its_diagonal(stats) for i, stats in enumerate(blocks)
    ]
    return _merged(blocks, positives)


def gathered(z: Tensor) -> Tensor:
    """Return the rows (n, U) of all processes, (N, U), in their order; once differentiable.

    Args:
        z: of the same shape in every process.
    """
    rows: Tensor = z if ranks.count() == 1 else _Gathered.apply(z)
    return rows


def over_ranks(name: str, bound: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a bound of z and h that is taken over the batch of all processes.

    Args:
        name: a key of `wcmi_fast.training.objective.BOUNDS`, which says what bound needs.
        bound: takes ``stats=``.
    """
    if ranks.count() == 1:
        return bound
    which = name.removeprefix("fenchel_").removesuffix("_authors")
    tau = bound.keywords.get("tau") if isinstance(bound, partial) else None
    return lambda z, h: bound(stats=global_critic_stats(z, h, which=which, tau=tau))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(ranks.count())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> Tensor:
        # Gloo has no reduce_scatter before torch 2.7.
        d = d.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d)
        return d.chunk(ranks.count())[ranks.rank()]


def _with_its_diagonal(stats: CriticStats) -> CriticStats:
    """Count the pairs i = j of a block as negatives: its rows are of other images."""
    T, tau = stats.positives, stats.tau
    found: dict[str, Tensor] = {}
    if stats.lse is not None:
        found["lse"] = reference.logsumexp(torch.stack([stats.lse, T]), 0)
    if stats.softplus is not None:
        found["softplus"] = stats.softplus + softplus(T)
    if stats.clamped_lse is not None and tau is not None:
        found["clamped_lse"] = torch.logaddexp(stats.clamped_lse, T.detach().clamp(-tau, tau))
    if stats.sum is not None:
        found["sum"] = stats.sum + T
    if stats.square is not None:
        found["square"] = stats.square + 0.5 * (T.abs() + 1) ** 2
    return CriticStats(T, **found, tau=tau)


def _merged(blocks: list[CriticStats], positives: Tensor) -> CriticStats:
    """Merge the blocks of own columns with those of the other processes."""
    n, rank = len(positives), ranks.rank()
    names = [name for name in (*LOGS, *SUMS) if getattr(blocks[0], name) is not None]
    own = {name: torch.cat([getattr(stats, name) for stats in blocks]) for name in names}
    # Everybody else adds zeros to the positives.
    own["positives"] = pad(positives, (0, 0, rank * n, (ranks.count() - 1 - rank) * n))
    logs = [name for name in LOGS if name in own]
    sums = [name for name in (*SUMS, "positives") if name in own]
    empty = own["positives"].new_empty((0, *own["positives"].shape))
    merged_logs, merged_sums = _Merged.apply(
        torch.stack([own[name] for name in logs]) if logs else empty,
        torch.stack([own[name] for name in sums]),
    )
    found = dict(zip(logs, merged_logs, strict=True)) | dict(zip(sums, merged_sums, strict=True))
    if "clamped_lse" in found:
        found["clamped_lse"] = found["clamped_lse"].detach()
    return CriticStats(**found, tau=blocks[0].tau)


class _Merged(torch.autograd.Function):
    """Log-sum-exps (L, N, P) and sums (S, N, P) of every process to those of all.

    The result is the same everywhere, and so is its gradient: none is exchanged.
    """

    @staticmethod
    def forward(ctx: Any, logs: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        highest = logs.clone()
        if len(logs):
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        # A row of -inf alone has no maximum to subtract.
        highest.masked_fill_(highest.isinf(), 0.0)
        totals = torch.cat([(logs - highest).exp(), sums])
        dist.all_reduce(totals)
        merged = totals[: len(logs)].log() + highest
        ctx.save_for_backward((logs - merged).exp().masked_fill(logs == -torch.inf, 0.0))
        return merged, totals[len(logs) :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogs: Tensor, dsums: Tensor) -> tuple[Tensor, Tensor]:
        (shares,) = ctx.saved_tensors
        return dlogs * shares, dsums
