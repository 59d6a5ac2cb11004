"""The kernels of csrc/cuda under every checker of the emulation, as they are and with bugs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import build
from cuda_emulation.mutants import ASAN, EMULATION, MUTANTS, TSAN, VALUES, Mutant, apply

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

RUN = "import runpy; runpy.run_module('cuda_emulation.kernel_cases', run_name='__main__')"
FLAVOURS = {VALUES: "plain", EMULATION: "plain", ASAN: "asan", TSAN: "tsan"}
# ThreadSanitizer looks at the order that barriers give: one of the threads' orders shows a race.
SEEDS = {"plain": "0,1,2,3", "asan": "0,1", "tsan": "0"}


def run(flavour: str, root: Path, cases: str, to: Path) -> subprocess.CompletedProcess[str]:
    path = build.build(flavour, root)
    return build.run_sanitized(flavour, RUN, cases, SEEDS[flavour], str(to), path=path)


@cache
def right_results() -> dict[str, np.ndarray]:
    """Return what the kernels, as they are, give under every seed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.npz"
        done = run("plain", build.CSRC, "all", path)
        assert done.returncode == 0, done.stderr
        with np.load(path) as results:
            return dict(results)


def same_results(found: np.ndarray, wanted: np.ndarray) -> bool:
    wide = (x.astype(np.float64) for x in (found, wanted))
    return np.allclose(*wide, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_order_of_threads_and_blocks_changes_no_bit() -> None:
    results = right_results()
    assert len(results) > 100
    for name, result in results.items():
        first = results["seed 0" + name[len("seed 0") :]]
        assert result.tobytes() == first.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_the_kernels_pass_under_sanitizers(flavour: str, tmp_path: Path) -> None:
    done = run(flavour, build.CSRC, "all", tmp_path / "results.npz")
    assert done.returncode == 0, done.stderr


def found_by(checker: str, mutant: Mutant, root: Path, to: Path) -> bool:
    done = run(FLAVOURS[checker], root, mutant.cases, to)
    match checker:
        case "values":
            assert done.returncode == 0, done.stderr
            with np.load(to) as results:
                pairs = [(results[name], right_results()[name]) for name in results]
            return not all(same_results(*pair) for pair in pairs)
        case "emulation":
            return re.search(r"RuntimeError: .* at cuda/\w+\.cuh?:\d", done.stderr) is not None
        case "asan":
            return "ERROR: AddressSanitizer" in done.stderr or "runtime error" in done.stderr
        case _:
            return "WARNING: ThreadSanitizer: data race" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.description)
def test_a_bug_is_found(mutant: Mutant, tmp_path: Path) -> None:
    root = apply(mutant, tmp_path)
    missed = [
        checker
        for checker in mutant.found_by
        if not found_by(checker, mutant, root, tmp_path / f"{checker}.npz")
    ]
    assert missed == []


def test_every_mutant_still_fits_the_sources(tmp_path: Path) -> None:
    for k, mutant in enumerate(MUTANTS):
        apply(mutant, tmp_path / str(k))
