"""The choice of a back end, what happens where a binary is missing, and how lean the import is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from wcmi_fast import functional
from wcmi_fast.backends import registry
from wcmi_fast.backends.backend import Case

STEP = {"eps": 0.1, "step_size": 0.05}


def run_python(code: str) -> str:
    """Run code in a fresh interpreter; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def case(device: str, **sizes: int) -> Case:
    return Case(device, torch.device(device), torch.float32, **sizes)


# ---- the choice ---------------------------------------------------------------------------------


def test_none_takes_the_best_there_is() -> None:
    for operator in ("critic_stats", "linf_step_"):
        assert registry.choose("f", operator, case("cpu"), None) == "cpu"
        assert registry.choose("f", operator, case("meta"), None) == "reference"
        assert registry.choose("f", operator, case("cpu"), "reference") == "reference"


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
    message = "critic_tail: impl='cuda' cannot be honoured: wcmi_fast has no cuda kernel for it"
    with pytest.raises(RuntimeError, match=message):
        functional.critic_tail(x, x, x[:, 0], x @ x.t(), x[:, 0], x, impl="cuda")


@pytest.mark.parametrize(("impl", "device"), [("cuda", "cpu"), ("cpu", "meta")])
def test_impl_of_another_device_says_so(impl: str, device: str) -> None:
    x = torch.rand(4, 3, device=device)
    message = f"linf_step_: impl='{impl}' cannot be honoured: .* does not run on {device} tensors"
    with pytest.raises(RuntimeError, match=message):
        functional.linf_step_(x, x, x, **STEP, impl=impl)


def test_the_table_lists_the_kernels_that_are_registered() -> None:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ours = [name.partition("::")[2] for name in names if name.startswith("wcmi_fast::")]
    listed = registry.BACKENDS["cpu"].operators
    assert {next(op for op in listed if name.startswith(op)) for name in ours} == set(listed)


# ---- the table for GPUs -------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose CUDA tensors both GPU back ends could run."""
    for name in ("cuda", "triton"):
        present = registry.BACKENDS[name]._replace(missing=None)
        monkeypatch.setitem(registry.BACKENDS, name, present)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_told", set())


def best(operator: str, **sizes: int) -> str:
    return registry.choose("f", operator, case("cuda", **sizes), None)


@pytest.mark.usefixtures("gpu")
def test_small_products_are_cudas_and_large_ones_tritons() -> None:
    assert best("critic_stats", units=64, products=2**23) == "cuda"
    assert best("critic_stats", units=64, products=2**23 + 1) == "triton"
    assert best("critic_stats", units=257, products=2**10) == "triton"
    assert best("critic_tail", units=64, products=1) == "triton"
    assert best("linf_step_") == best("dv_value") == "cuda"


@pytest.mark.usefixtures("gpu")
def test_float64_is_cudas_or_the_references() -> None:
    double = case("cuda", units=64, products=2**30)._replace(dtype=torch.float64)
    assert registry.choose("f", "critic_stats", double, None) == "cuda"
    too_wide = double._replace(units=129)
    assert registry.choose("f", "critic_stats", too_wide, None) == "reference"
    assert registry.choose("f", "critic_tail", double, None) == "reference"


@pytest.mark.usefixtures("gpu")
def test_the_table_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE, "cuda", dict(registry.TABLE["cuda"]))
    registry.prefer("cuda", "linf_step_", "triton", "cuda")
    assert best("linf_step_") == "triton"
    assert registry.explain("cuda", "linf_step_") == "triton, else cuda, else reference"
    registry.prefer("cuda", "linf_step_")
    assert best("linf_step_") == "reference"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tpu", "linf_step_", "cpu"), "device_type is 'tpu', wanted one of"),
        (("cuda", "step", "cuda"), "operator is 'step', wanted one of"),
        (("cuda", "linf_step_", "tpu"), "backend is 'tpu', wanted one of"),
    ],
)
def test_an_override_that_makes_no_sense(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"prefer: {sentence}"):
        registry.prefer(*arguments)


@pytest.mark.usefixtures("gpu")
def test_one_sentence_tells_that_the_preferred_back_end_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = registry.BACKENDS["cuda"]._replace(missing="its binary is missing; build it")
    monkeypatch.setitem(registry.BACKENDS, "cuda", missing)
    assert best("linf_step_") == best("linf_step_") == "triton"
    assert caplog.messages == [
        "linf_step_: uses triton, because cuda cannot: its binary is missing; build it"
    ]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("impl", "capability", "sentence"),
    [
        ("cuda", (7, 0), "it is compiled for compute capability 7.5 and newer, not 7.0"),
        ("triton", (7, 5), "it needs compute capability 8.0 or newer, not 7.5"),
    ],
)
def test_an_old_gpu_is_one_sentence(
    impl: str, capability: tuple[int, int], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(RuntimeError, match=f"f: impl='{impl}' cannot be honoured: {sentence}"):
        registry.choose("f", "linf_step_", case("cuda"), impl)


@pytest.mark.usefixtures("gpu")
def test_too_many_units_are_one_sentence() -> None:
    sentence = "its kernel takes U up to 256 in torch.float32, not 300"
    with pytest.raises(RuntimeError, match=f"impl='cuda' cannot be honoured: {sentence}"):
        registry.choose("dv", "critic_stats", case("cuda", units=300), "cuda")


def test_triton_takes_no_float64() -> None:
    double = case("cuda")._replace(dtype=torch.float64)
    reason = registry.why_not("triton", "linf_step_", double)
    assert reason == "its kernels take float32, bfloat16 and float16, not torch.float64"


def test_without_triton_its_reason_says_how_to_get_it() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, wcmi_fast\n"
        "from wcmi_fast.backends import registry\n"
        "x = torch.rand(4, 3)\n"
        "print(registry.BACKENDS['triton'].missing, wcmi_fast.functional.dv(x, x).isfinite())"
    )
    assert run_python(code).strip() == (
        "triton is not installed; `pip install triton` installs it on Linux tensor(True)"
    )


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
        "print(x.tolist(), registry.choose('dv', 'critic_stats', registry.case_of(z), None))"
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
    code = HIDE.format(binary="_cuda") + "print(registry.BACKENDS['cuda'].missing)"
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
        # The processor's time: other tests run at the same time.
        "start = time.process_time()\n"
        "import wcmi_fast\n"
        "print(time.process_time() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) <= 0.2
