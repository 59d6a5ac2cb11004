"""What a case is, and how it is measured: value first, then variants interleaved in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from schema import Ratio, extra_info
from timing import Call, environment, interleaved, peak_memory, ratio
from torch import Tensor

Program = Callable[..., Tensor]

THREADS = (1, 2)


@dataclass(frozen=True)
class Against:
    """A ratio of two variants: ours / theirs ("lower"), or theirs / ours ("higher")."""

    theirs: str
    better: Literal["lower", "higher"] = "lower"
    target: float | None = None
    ours: str = "ours"

    def of(self, times: Mapping[str, Sequence[float]]) -> Ratio:
        pair = (self.ours, self.theirs) if self.better == "lower" else (self.theirs, self.ours)
        return ratio(times, *pair, better=self.better, target=self.target)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of one operator.

    check: raises AssertionError if a value is not that of the oracle. flop, traffic: operations
    and bytes that one call needs. memory: variants whose peak is measured; ours may take
    `peak_target` bytes, or `peak_share` of those of the first other variant.
    """

    op: str
    sizes: dict[str, int | str]
    variants: dict[str, Call]
    check: Call
    ratios: dict[str, Against] = field(default_factory=dict)
    flop: float | None = None
    traffic: float | None = None
    memory: tuple[str, ...] = ()
    peak_target: int | None = None
    peak_share: float | None = None
    rounds: int = 9


def measure(benchmark: Any, case: Case, threads: int) -> None:
    """Check a case, time its variants at `threads` threads, and record both."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case.check()
        peaks = {name: peak_memory(case.variants[name]) for name in case.memory}
        times = interleaved(case.variants, rounds=case.rounds, warmup=1)
        benchmark.extra_info.update(
            extra_info(
                case.op,
                case.sizes,
                times,
                ratios={name: against.of(times) for name, against in case.ratios.items()},
                environment=environment(),
                flop=case.flop,
                traffic=case.traffic,
                peak_bytes=peaks,
                peak_target=_peak_target(case, peaks),
            )
        )
        # pytest-benchmark's own figures are of ours alone, and come from calls of its own.
        benchmark.pedantic(case.variants["ours"], rounds=3)
    finally:
        torch.set_num_threads(before)


def _peak_target(case: Case, peaks: Mapping[str, int]) -> int | None:
    if case.peak_share is None:
        return case.peak_target
    return int(case.peak_share * next(peak for name, peak in peaks.items() if name != "ours"))


def both_threads(function: Any) -> Any:
    """Run a benchmark on 1 and on 2 threads."""
    return pytest.mark.parametrize("threads", THREADS)(function)


def compiled(program: Program, *args: Tensor) -> Program | None:
    """Return torch.compile of a program, or None where that does not work here."""
    function: Program = torch.compile(program)
    try:
        function(*args)
    except Exception as reason:
        warnings.warn(f"torch.compile does not run here: {reason}", stacklevel=2)
        return None
    return function


def gradients(program: Program, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Return the value of a program and its gradients in the leaves."""
    value = program(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def check_twice(
    ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], tiny: float = 1e-6
) -> None:
    """Check |ours - exact| <= 2 |plain - exact| + tiny, relative to exact, in the 2-norm."""
    for k, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        allowed = 2 * (b.double() - c).norm() + tiny * c.norm()
        error = (a.double() - c).norm()
        assert error <= allowed, f"result {k}: error {error:.2e}, allowed {allowed:.2e}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)
