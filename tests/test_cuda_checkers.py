"""The checkers of the CUDA emulation against planted bugs: which of them finds which."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from cuda_emulation import build, control, planted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
]

RUN = "import runpy; runpy.run_module('cuda_emulation.planted', run_name='__main__')"
SEEDS = (0, 1, 2, 3)
# Keeps what a bug writes out of bounds in a buffer of numpy's.
MARGIN = 4096

# The checkers that find a bug: wrong results under some seed, a sentence of the emulation's own,
# AddressSanitizer with UBSan, ThreadSanitizer.
FOUND_BY = {
    "Sum:MissingBarrier": {"values", "tsan"},
    "Sum:MissingSecondBarrier": {"tsan"},
    "Sum:OffByOne": {"values", "asan"},
    "Sum:WrongShuffleMask": {"values", "emulation"},
    "Sum:WrongShuffleOffset": {"values"},
    "Sum:ShuffleFromOutside": {"values", "emulation"},
    "Sum:ShuffleInBranch": {"values", "emulation"},
    "Sum:DivergentBarrier": {"values", "emulation", "tsan"},
    "Sum:TwoBarriers": {"values", "emulation"},
    "Sum:EarlyReturn": {"values", "emulation"},
    "Sum:ShortShared": {"values", "emulation", "asan"},
    "Sum:UnwrittenShared": {"values"},
    "Sum:MuchShared": {"values", "emulation"},
    "Sum:ManyThreads": {"values", "emulation"},
    "Transpose:MissingBarrier": {"values", "tsan"},
    "Transpose:MissingMask": {"asan"},
    "Transpose:OffByOne": {"values", "asan"},
    "Transpose:ShortShared": {"values", "emulation", "asan"},
    "Blocks:MissingBarrier": {"values", "tsan"},
    "Blocks:PlainAdd": {"tsan"},
    "Blocks:ShortShared": {"asan"},
    "Threads:PlainAdd": {"tsan"},
    "Reverse:MissingSyncwarp": {"values", "tsan"},
    "Last:MissingFence": {"tsan"},
    "Copy:Misaligned": {"values", "emulation", "asan"},
}
CORRECT = [f"{kernel}:None" for kernel in planted.KERNELS]


@cache
def binary(flavour: str) -> Path:
    return build.link(flavour, "planted.so", [Path("planted.cu")], build.HERE)


def outcomes(case: str) -> list[tuple[bool, str]]:
    """Return for every seed whether the results are right, and the emulation's sentence."""
    path = str(binary("plain"))
    results = []
    for seed in SEEDS:
        control.controls(path).wcmi_emulation_set_seed(seed)
        results.append(planted.run(path, *case.split(":"), MARGIN))
    return results


def found_by_asan(case: str) -> bool:
    done = build.run_sanitized("asan", RUN, case, path=binary("asan"))
    assert (done.returncode != 0) == (
        "ERROR: Addr" in done.stderr or "runtime error" in done.stderr
    )
    return done.returncode != 0


@cache
def found_by_tsan() -> set[str]:
    """Return the cases with a data race. In one process, which takes a second to start."""
    done = build.run_sanitized(
        "tsan", RUN, *CORRECT, *FOUND_BY, path=binary("tsan"),
        TSAN_OPTIONS="report_thread_leaks=0:exitcode=0:symbolize=0:suppress_equal_addresses=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    case, *reports = re.split(r"^case (.*)\n", done.stderr, flags=re.MULTILINE)
    assert case == ""
    return {
        case
        for case, report in zip(reports[::2], reports[1::2], strict=True)
        if "WARNING: ThreadSanitizer: data race" in report
    }


@pytest.mark.parametrize("case", CORRECT)
def test_no_checker_finds_fault_with_correct_kernels(case: str) -> None:
    assert outcomes(case) == [(True, "")] * len(SEEDS)
    assert not found_by_asan(case)
    assert case not in found_by_tsan()


@pytest.mark.parametrize("case", FOUND_BY)
def test_every_bug_is_found(case: str) -> None:
    results = outcomes(case)
    found = set()
    if not all(right for right, _ in results):
        found.add("values")
    if any(sentence for _, sentence in results):
        found.add("emulation")
    if found_by_asan(case):
        found.add("asan")
    if case in found_by_tsan():
        found.add("tsan")
    assert found == FOUND_BY[case]
