"""WCMI_FAST_SIMD: each level in its own process, and values that are wrong or not supported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import binary

from wcmi_fast.backends import cpu

ALL_LEVELS = ("base", "avx2", "avx512")
AVAILABLE = binary().levels() if binary() else []

# The checks of the other files, at the level that the environment names and no other.
CHECKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from oracle import (
    DTYPES, EXPONENTIAL, VARIANTS, assert_same_bits, check_bound, limits, plain_linf_start,
    plain_linf_step
)
from test_l2_step import check_step
from wcmi_fast import functional
from wcmi_fast.backends import cpu

torch.manual_seed(0)
for dtype in DTYPES:
    for n, p, u in ((2, 1, 1), (15, 2, 7), (17, 3, 64), (33, 49, 7), (65, 2, 5)):
        for scale in (0.3, 10.0):
            z, h = ((scale * torch.randn(n, *rest)).to(dtype) for rest in ((u,), (p, u)))
            for variant in VARIANTS:
                if variant in EXPONENTIAL and scale > 1:
                    continue
                for kept in (0, 4 << 20):
                    with limits(3 * 16 * p * 8, kept, tile_rows=16):
                        check_bound(variant, z, h, impl="cpu")
    for size in (1, 7, 16, 33, 129, 40000):
        x, origin = torch.rand(2, size).to(dtype)
        grad = torch.randn(size).to(dtype)
        grad[::5] = torch.nan
        wanted = plain_linf_step(x, grad, origin, 8 / 255, 1 / 3, (0.1, 0.9))
        functional.linf_step_(x, grad, origin, eps=8 / 255, step_size=1 / 3, clip=(0.1, 0.9))
        assert_same_bits(x, wanted)
        wanted = plain_linf_start(origin, 8 / 255, 3, (0.1, 0.9))
        functional.linf_start_(x, origin, eps=8 / 255, seed=3, clip=(0.1, 0.9))
        assert_same_bits(x, wanted)
        check_step(x[None].clone(), grad.nan_to_num()[None], origin[None], 0.5, 0.1)
print(*cpu.simd_levels()[1:], "checked")
"""


def run_python(code: str, simd: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WCMI_FAST_SIMD": simd}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ALL_LEVELS)
def test_level(name: str) -> None:
    if name not in AVAILABLE:
        pytest.skip(f"this processor or build has the levels {AVAILABLE}")
    done = run_python(CHECKS.format(tests=str(Path(__file__).parent)), name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{name} checked"


def test_the_best_level_is_the_default() -> None:
    code = "import os; os.environ.pop('WCMI_FAST_SIMD')\nfrom wcmi_fast.backends import cpu\n"
    done = run_python(code + "print(cpu.simd_levels())", "base")
    assert done.stdout.strip() == str((AVAILABLE, AVAILABLE[-1])), done.stderr


CALLS = """
import torch, wcmi_fast
from wcmi_fast import functional
x = torch.rand(4, 3)
print("imported")
for call in (lambda: functional.dv(x, x),
             lambda: functional.dv(x, x, impl="reference"),
             lambda: functional.linf_step_(x, x, x, eps=0.1, step_size=0.1)):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("value", ["AVX2", ""])
def test_a_wrong_value_is_an_error_at_the_call_and_not_at_the_import(value: str) -> None:
    done = run_python(CALLS, value)
    assert done.returncode == 0, done.stderr
    sentence = f"WCMI_FAST_SIMD is {value!r}, wanted one of this machine's levels {AVAILABLE}"
    assert done.stdout.splitlines() == ["imported"] + 3 * [sentence]


def test_a_level_that_this_machine_has_not_is_an_error_that_names_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OldProcessor:
        def levels(self) -> list[str]:
            return ["base"]

        def set_level(self, name: str) -> None:
            pytest.fail(f"set_level({name!r}) was called")

    monkeypatch.setenv("WCMI_FAST_SIMD", "avx512")
    wanted = "WCMI_FAST_SIMD is 'avx512', wanted one of this machine's levels ['base']"
    assert cpu._select_level(OldProcessor()) == wanted


def test_the_binary_refuses_an_unknown_level_and_keeps_its_own() -> None:
    before = binary().level()
    with pytest.raises(ValueError, match="unknown SIMD level sse9"):
        binary().set_level("sse9")
    assert binary().level() == before
