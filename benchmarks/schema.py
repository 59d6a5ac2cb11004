"""What every benchmark puts in pytest-benchmark's `extra_info`, and reading it back, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, TypeVar

import msgspec

Kind = TypeVar("Kind")
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ratio of two variants: the median and the 95 % interval; what it must reach, if anything.

    `better="lower"` reads ours / theirs, with a target that is a ceiling; `"higher"` reads
    theirs / ours, a speed-up, with a target that is a floor.
    """

    low: Positive
    median: Positive
    high: Positive
    better: Literal["lower", "higher"] = "lower"
    target: Positive | None = None

    @property
    def met(self) -> bool:
        """Whether the median reaches the target, if there is one."""
        if self.target is None:
            return True
        return self.median <= self.target if self.better == "lower" else self.median >= self.target


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a figure comes from; `timing.environment()` fills it."""

    threads: int
    simd: str
    cpu: str
    blas: str
    versions: dict[str, str]
    commit: str
    date: str
    command: str


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One case of one operator; numbers are by variant, of which `ours` is one, ratios by name.

    seconds: median of one call. gflop_per_s, gb_per_s: empty where they mean nothing. peak_bytes:
    extra resident memory; `peak_target` is the ceiling of ours.
    """

    op: str
    case: dict[str, int | str]
    seconds: dict[str, Positive]
    ratios: dict[str, Ratio]
    gflop_per_s: dict[str, float] = {}
    gb_per_s: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    peak_target: int | None = None
    environment: Environment

    @property
    def name(self) -> str:
        """The case's name in a baseline: the operator, its sizes and the threads."""
        sizes = " ".join(f"{key}={value}" for key, value in self.case.items())
        return f"{self.op} {sizes} threads={self.environment.threads}"


def extra_info(
    op: str,
    case: Mapping[str, int | str],
    times: Mapping[str, Sequence[float]],
    *,
    ratios: Mapping[str, Ratio],
    environment: Environment,
    flop: float | None = None,
    traffic: float | None = None,
    peak_bytes: Mapping[str, int] | None = None,
    peak_target: int | None = None,
) -> dict[str, Any]:
    """Return `extra_info` of a case from what `timing.interleaved` measured.

    flop, traffic: the operations and the bytes that one call needs at least, whatever the variant:
    a variant that does more gets a lower rate.
    """
    seconds = {name: median(samples) for name, samples in times.items()}

    def rates(amount: float | None) -> dict[str, float]:
        return {} if amount is None else {k: amount / s / 1e9 for k, s in seconds.items()}

    record = Record(
        op=op,
        case=dict(case),
        seconds=seconds,
        ratios=dict(ratios),
        gflop_per_s=rates(flop),
        gb_per_s=rates(traffic),
        peak_bytes=dict(peak_bytes or {}),
        peak_target=peak_target,
        environment=environment,
    )
    info: dict[str, Any] = msgspec.to_builtins(record)
    return info


class Cpu(msgspec.Struct):
    """The processor as pytest-benchmark names it."""

    brand_raw: str


class MachineInfo(msgspec.Struct):
    """The machine as pytest-benchmark names it."""

    cpu: Cpu


class Benchmark(msgspec.Struct):
    """One entry of pytest-benchmark's JSON."""

    name: str
    extra_info: Record


class Run(msgspec.Struct):
    """pytest-benchmark's JSON, as far as it is read here."""

    machine_info: MachineInfo
    benchmarks: Annotated[list[Benchmark], msgspec.Meta(min_length=1)]

    @property
    def records(self) -> list[Record]:
        """The cases, in the order in which they ran."""
        return [benchmark.extra_info for benchmark in self.benchmarks]


def read(path: Path, kind: type[Kind]) -> Kind:
    """Decode a JSON file as `kind`.

    Raises:
        ValueError: the file is missing, not JSON or of another form; one sentence names it.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(f"{path} could not be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a file of benchmarks: {error}") from error
