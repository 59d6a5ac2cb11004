"""The choice of a back end, what happens where a binary is missing, and how lean the import is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from wcmi_fast import functional
from wcmi_fast.backends import registry

STEP = {"eps": 0.1, "step_size": 0.05}


def run_python(code: str) -> str:
    """Run code in a fresh interpreter; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the choice ---------------------------------------------------------------------------------


def test_none_takes_the_best_there_is() -> None:
    for operator in ("critic_stats", "linf_step_"):
        assert registry.choose("f", operator, "cpu", None) == "cpu"
        assert registry.choose("f", operator, "meta", None) == "reference"
        assert registry.choose("f", operator, "cpu", "reference") == "reference"


def test_the_chosen_back_end_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: object) -> None:
        raise RuntimeError("the operator was called")

    operators = type("Operators", (), {"critic_stats_fwd": kernel, "linf_step_": kernel})
    monkeypatch.setattr(torch.ops, "wcmi_fast", operators)
    x = torch.rand(4, 3)
    for impl in (None, "cpu"):
        with pytest.raises(RuntimeError, match="the operator was called"):
            functional.dv(x, x, impl=impl)
        with pytest.raises(RuntimeError, match="the operator was called"):
            functional.linf_step_(x, x, x, **STEP, impl=impl)
    functional.dv(x, x, impl="reference")
    functional.linf_step_(x, x, x, **STEP, impl="reference")


@pytest.mark.parametrize("impl", ["fastest", "CPU", "", "avx2"])
def test_unknown_impl(impl: str) -> None:
    x = torch.rand(4, 3)
    wanted = rf"impl is '{impl}', wanted None or one of \('reference', 'cpu', 'cuda', 'triton'\)"
    with pytest.raises(ValueError, match="dv: " + wanted):
        functional.dv(x, x, impl=impl)
    with pytest.raises(ValueError, match="linf_step_: " + wanted):
        functional.linf_step_(x, x, x, **STEP, impl=impl)


def test_impl_without_a_kernel_for_the_operator_says_so() -> None:
    x = torch.rand(4, 3)
    because = "cannot be honoured: wcmi_fast has no {} kernel for it yet"
    with pytest.raises(RuntimeError, match="dv: impl='cuda' " + because.format("cuda")):
        functional.dv(x, x, impl="cuda")
    with pytest.raises(RuntimeError, match="dv: impl='triton' " + because.format("triton")):
        functional.dv(x, x, impl="triton")
    with pytest.raises(RuntimeError, match="linf_step_: impl='triton' " + because.format("triton")):
        functional.linf_step_(x, x, x, **STEP, impl="triton")


@pytest.mark.parametrize(("impl", "device"), [("cuda", "cpu"), ("cpu", "meta")])
def test_impl_of_another_device_says_so(impl: str, device: str) -> None:
    x = torch.rand(4, 3, device=device)
    message = f"linf_step_: impl='{impl}' cannot be honoured: .* does not run on {device} tensors"
    with pytest.raises(RuntimeError, match=message):
        functional.linf_step_(x, x, x, **STEP, impl=impl)


def test_the_table_lists_the_kernels_that_are_registered() -> None:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ours = [name.partition("::")[2] for name in names if name.startswith("wcmi_fast::")]
    listed = registry.OPERATORS["cpu"]
    assert {next(op for op in listed if name.startswith(op)) for name in ours} == set(listed)


# ---- a missing binary ---------------------------------------------------------------------------

# A meta path finder hides the binary, as an install without a compiler would.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "wcmi_fast.{binary}":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
import torch, wcmi_fast
from wcmi_fast import functional
from wcmi_fast.backends import registry
torch.manual_seed(0)
"""


def test_without_the_cpu_binary_import_works_and_none_falls_back() -> None:
    code = HIDE.format(binary="_cpu") + (
        "z, h = torch.randn(9, 4), torch.randn(9, 3, 4)\n"
        "assert torch.equal(functional.dv(z, h), functional.dv(z, h, impl='reference'))\n"
        "x, g = torch.full((3,), 0.5), torch.tensor([1.0, -1.0, 0.0])\n"
        "functional.linf_step_(x, g, x.clone(), eps=0.25, step_size=0.125)\n"
        "print(x.tolist(), registry.choose('dv', 'critic_stats', 'cpu', None))"
    )
    assert run_python(code).strip() == "[0.625, 0.375, 0.5] reference"


def test_without_the_cpu_binary_an_explicit_impl_says_what_is_missing_and_how_to_get_it() -> None:
    code = HIDE.format(binary="_cpu") + (
        "x = torch.rand(4, 3)\n"
        "for call in (lambda: functional.dv(x, x, impl='cpu'),\n"
        "             lambda: functional.linf_step_(x, x, x, eps=1, step_size=1, impl='cpu')):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(error)"
    )
    for function, line in zip(("dv", "linf_step_"), run_python(code).splitlines(), strict=True):
        assert line.startswith(
            f"{function}: impl='cpu' cannot be honoured: its binary wcmi_fast._cpu"
        )
        assert "hidden by the test" in line
        assert "`pip install --force-reinstall --no-deps .`" in line


def test_without_the_cuda_binary_its_reason_says_how_to_get_it() -> None:
    code = HIDE.format(binary="_cuda") + "print(registry.why_not('cuda', 'linf_step_', 'cuda'))"
    reason = run_python(code)
    assert "its binary wcmi_fast._cuda does not load (hidden by the test)" in reason
    assert "WCMI_FAST_CUDA=1 pip install" in reason


# ---- a lean import ------------------------------------------------------------------------------

HEAVY = ("torchvision", "matplotlib", "triton", "rich", "tyro", "mlxtend", "pandas", "jinja2")


def test_import_adds_no_heavy_module_to_torch() -> None:
    # torch itself may import one of them; only what wcmi_fast adds counts.
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import wcmi_fast\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = {name.partition(".")[0] for name in json.loads(run_python(code))}
    assert "wcmi_fast" in added
    assert added.isdisjoint(HEAVY), added & set(HEAVY)


def test_import_takes_at_most_a_fifth_of_a_second_more_than_torch() -> None:
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import wcmi_fast\n"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) <= 0.2
