"""What needs a GPU, run without one: the checks of test_gpu.py on the emulated and interpreted back
ends, and gpu_check.sh with its scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import gpu_sanitize
import gpu_speed
import pytest
import test_gpu
import torch
from cuda_emulation import build
from gpu_on_cpu import INTERPRETED, emulated
from test_gpu import Place

from wcmi_fast.backends import registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="with a GPU, benchmarks/gpu_check.sh runs test_gpu.py itself",
    ),
]

every_place = pytest.mark.parametrize("place", [emulated, INTERPRETED], indirect=True)
# A GPU runs all of them; one tells a typo.
every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
every_operator = pytest.mark.parametrize("operator", test_gpu.OPERATIONS)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param, "cpu")


# ---- test_gpu.py --------------------------------------------------------------------------------


@every_place
@every_dtype
@pytest.mark.parametrize("name", test_gpu.CHECKS)
def test_values(name: str, dtype: torch.dtype, place: Place) -> None:
    test_gpu.skip_if_unsupported(place.impl, name, dtype)
    test_gpu.CHECKS[name](place, dtype)


@every_place
@every_operator
def test_how_operators_run(operator: str, place: Place) -> None:
    test_gpu.skip_if_unsupported(place.impl, operator, torch.float32)
    test_gpu.check_determinism(operator, place, torch.float16)
    test_gpu.check_stream(operator, place, torch.float32)
    test_gpu.check_no_waiting(operator, place, torch.float32)
    test_gpu.check_other_device(operator, place, "cpu")


@every_place
def test_sizes_and_the_whole(place: Place) -> None:
    test_gpu.check_many_elements(place, 2**11 + 11)
    test_gpu.check_many_features(place, 16, 10, 64)
    test_gpu.check_tf32(place)
    test_gpu.check_compiled(place)
    test_gpu.check_errors(place)


def test_an_attack_and_the_autotuned_case() -> None:
    test_gpu.check_attack_as_a_graph("cpu")
    test_gpu.check_autotuned(Place(INTERPRETED, "cpu"))


def test_dispatch_as_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for impl in test_gpu.IMPLS:
        present = registry.BACKENDS[impl]._replace(missing=None)
        monkeypatch.setitem(registry.BACKENDS, impl, present)
    test_gpu.check_dispatch()


# What pytest does with test_gpu.py on a GPU, up to the device.
PLUGIN = """
import torch
seen = torch.cuda.is_available
torch.cuda.is_available = lambda: True
import test_gpu
torch.cuda.is_available = seen
from gpu_on_cpu import EMULATED, INTERPRETED
from wcmi_fast.backends import registry

NAMES = {"cuda": EMULATED, "triton": INTERPRETED}
test_gpu.DEVICE = "cpu"
test_gpu.gpu = lambda impl: test_gpu.Place(NAMES[impl], "cpu")
torch.cuda.mem_get_info = lambda: (1 << 30, 1 << 30)
torch.cuda.get_device_capability = lambda device: (9, 0)
for impl in NAMES:
    registry.BACKENDS[impl] = registry.BACKENDS[impl]._replace(missing=None)
"""


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_the_tests_of_a_gpu_themselves(tmp_path: Path) -> None:
    (tmp_path / "as_on_a_gpu.py").write_text(PLUGIN)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "as_on_a_gpu"),
            *("-k", "not float32 and not bfloat16", "-p", "no:cacheprovider", test_gpu.__file__),
        ],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"^SKIPPED .*: (.*)", done.stdout, re.MULTILINE)) == {
        "cuda_emulated has no kernel for critic_tail",
        "triton_interpreted has no kernels for float64",
        "needs 24 GiB of GPU memory, 1 are free",
        "needs two GPUs",
    }


def test_what_is_asked_of_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake device: which names torch.cuda must have, and when they are called."""
    cuda = fake_cuda(monkeypatch)
    place = Place("cuda", "cuda:0")
    with test_gpu.late_side_stream(place):
        cuda.append("work")
    with pytest.raises(KeyError), test_gpu.no_waiting(place):
        raise KeyError
    assert cuda == [
        *("Stream cuda:0", "current_stream cuda:0", "side waits", "stream", "_sleep 100000000"),
        *("work", "current waits", "set_sync_debug_mode error", "set_sync_debug_mode 0"),
    ]


class FakeStream:
    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: FakeStream) -> None:
        assert other.name != self.name
        self.said.append(f"{self.name} waits")


class FakeEvent:
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def record(self) -> None:
        self.said.append("record")

    def synchronize(self) -> None:
        self.said.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.5


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what is used of torch.cuda, which must have it, by what says that it was called."""
    said: list[str] = []

    def says(name: str, result: Any = None) -> None:
        def call(*arguments: Any, **_: Any) -> Any:
            said.append(" ".join([name, *map(str, arguments)]))
            return result

        monkeypatch.setattr(torch.cuda, name, call)

    says("Stream", FakeStream("side", said))
    says("current_stream", FakeStream("current", said))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: said.append("stream") or nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(said))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    for name in ("_sleep", "set_sync_debug_mode", "synchronize", "reset_peak_memory_stats"):
        says(name)
    says("memory_allocated", 1000)
    says("max_memory_allocated", 1500)
    return said


# ---- gpu_sanitize.py ----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [emulated, INTERPRETED])
def test_what_the_sanitizer_runs(impl: str) -> None:
    ran = set()
    for operator, operation, operands in gpu_sanitize.cases():
        if operator in registry.BACKENDS[impl].operators:
            gpu_sanitize.check(operation, impl, "cpu", torch.float16, operands)
            ran.add(operator)
    assert ran | {"dv_value"} == set(registry.BACKENDS[impl].operators)


def test_the_sanitizer_script_finds_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_sanitize.py", "--cpu"])
    assert gpu_sanitize.main() == 0
    assert "calls of cpu agree with the reference" in capsys.readouterr().out
    monkeypatch.setitem(registry.BACKENDS["cpu"].kernels, "l2_step_", lambda *_: None)
    with pytest.raises(AssertionError, match=r"cpu torch\.float32: error"):
        gpu_sanitize.main()


# ---- gpu_speed.py -------------------------------------------------------------------------------


def speed(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: int) -> tuple[int, Any, str]:
    """Run gpu_speed.py --cpu here; return its exit code, JSON and Markdown."""
    arguments = ["--cpu", "--out", str(folder), "--seconds", str(seconds)]
    monkeypatch.setattr("sys.argv", ["gpu_speed.py", *arguments])
    code = gpu_speed.main()
    found = json.loads((folder / "speed.json").read_text())
    return code, found, (folder / "speed.md").read_text()


def test_speed_of_every_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, page = speed(tmp_path, monkeypatch, 300)
    assert code == 0
    assert found["left_out"] == []
    operators = {case["op"].partition(",")[0] for case in found["cases"]}
    steps = {"linf_step_", "linf_start_", "l2_step_", "keep_best_"}
    assert operators == {"critic_stats", "score_stats", "critic_tail", "attack", *steps}
    rates = found["roofline"]
    for case in found["cases"]:
        counts = {len(samples) for samples in case["samples"].values()}
        assert len(counts) == 1
        assert counts.pop() >= 5
        assert case["seconds"].keys() == case["samples"].keys()
        least = max(
            case["bytes"] / rates["bandwidth"], case["flops"] / min(rates["flops"].values())
        )
        assert 0 <= case["roofline_seconds"] <= least
        assert f"| {case['op']} | {case['sizes']}, {case['kind']} |" in page
    assert "compiled" in found["cases"][0]["seconds"]
    assert {case["kind"] for case in found["sweep"]} == {"bf16", "fp32 high", "fp32 highest"}
    assert "The limit in registry.TABLE is 2^23.0." in page


def test_a_wrong_value_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in gpu_speed.cases(False) if case.name in ("l2_step_", "keep_best_")]
    monkeypatch.setattr(gpu_speed, "cases", lambda is_gpu: cases)
    monkeypatch.setattr(gpu_speed, "sweep_cases", lambda is_gpu: [])
    monkeypatch.setitem(registry.BACKENDS["cpu"].kernels, "l2_step_", lambda *_: None)
    code, found, page = speed(tmp_path, monkeypatch, 300)
    assert code == 1
    assert [case.get("op") for case in found["cases"]] == [None, "keep_best_, all better", None]
    assert "- l2_step_: AssertionError: result 0: error" in page


def test_no_time_leaves_all_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, page = speed(tmp_path, monkeypatch, 0)
    assert code == 0
    assert found["cases"] == found["sweep"] == []
    assert len(found["left_out"]) == len(gpu_speed.cases(False) + gpu_speed.sweep_cases(False))
    assert "Left out when the time was spent: linf_step_ fp32 high, " in page


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, flush = fake_cuda(monkeypatch), torch.zeros(4)
    sample = partial(gpu_speed._sample_on_gpu, flush, lambda: cuda.append("call"))
    assert sample(False) == sample(True) == 2.5e-3
    measured = ["record", "call", "record", "wait"]
    assert cuda == ["_sleep 4000000", *measured, "synchronize", *measured]
    assert (flush == 1).all()


def test_the_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    assert gpu_speed.peak_memory(lambda: cuda.append("call"), torch.device("cuda", 0)) == 500
    assert cuda == [
        *("call", "synchronize", "reset_peak_memory_stats cuda:0", "memory_allocated cuda:0"),
        *("call", "synchronize", "max_memory_allocated cuda:0"),
    ]


def test_rounds_rotate_the_order() -> None:
    ran: list[str] = []
    variants = {name: (lambda name=name: ran.append(name)) for name in "abc"}

    def sample(call: gpu_speed.Call) -> float:
        call()
        return float("abc".index(ran[-1]))

    times = gpu_speed.interleaved(variants, sample, seconds=0)
    assert times == {"a": [0.0] * 5, "b": [1.0] * 5, "c": [2.0] * 5}
    assert "".join(ran[-15:]) == "abcbcacababcbca"


def test_a_line_of_the_table() -> None:
    machine = gpu_speed.machine_of(cpu=True)._replace(impls=("cuda", "triton"))
    result = {
        "op": "linf_step_",
        "sizes": "2x3",
        "kind": "bf16",
        "seconds": {"cuda": 4e-6, "triton": 2e-6, "eager": 6e-6, "compiled": 3e-6},
        "roofline_seconds": 1e-6,
        "peak_bytes": {"cuda": 2**20, "eager": None},
    }
    line = gpu_speed.row_of(result, machine)
    times = "cuda 4.0 us; triton 2.0 us; eager 6.0 us; compiled 3.0 us"
    share, peak = "50% of 1.0 us", "cuda 1.0"
    assert line == ["linf_step_", "2x3, bf16", times, "triton", "3.00", "1.50", share, peak]


def test_the_sweep_tells_up_to_where_cuda_is_faster() -> None:
    machine = gpu_speed.machine_of(cpu=True)._replace(impls=("cuda", "triton"))
    results = [
        {"sizes": f"N={n}", "kind": "bf16", "flops": 8 * 2**k, "seconds": {"cuda": c, "triton": t}}
        for n, k, c, t in ((1, 18, 1e-5, 4e-5), (2, 20, 2e-5, 4e-5), (3, 24, 9e-5, 4e-5))
    ]
    text = gpu_speed.sweep_text(results, machine)
    assert "| 2^20.0 | N=2, bf16 | 20.0 us | 40.0 us | 2.00 |" in text
    assert "cuda was not the slower one: bf16 2^20.0." in text


# ---- gpu_check.sh -------------------------------------------------------------------------------

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.sh"
STEPS = ("machine", "build", "info", "tests", "speed", "sanitizer", "quickstart")

# In place of Python: what each step of gpu_check.sh asks of it.
PYTHON = r"""#!/usr/bin/env bash
[ -z "$FAKE_FAILS" ] || case "$*" in *$FAKE_FAILS*) echo "planted"; exit 3 ;; esac
value_of() { while [ "$1" != "$2" ]; do set -- "$1" "${@:3}"; done; echo "$3"; }
case "$*" in
  *find_spec*) case "$*" in *"'$FAKE_ABSENT'"*) exit 1 ;; esac ;;
  *is_available*get_device*|*get_device_capability*) echo 90 ;;
  *"pip install"*) mkdir -p "$(value_of --target "$@")/wcmi_fast" ;;
  *"-m pytest"*)
    [ -z "$FAKE_LONG" ] || head -c 300000 /dev/zero | tr '\0' x
    echo; echo "7 passed" ;;
  *"wcmi_fast info"*) echo "back end cuda ready: a"; echo "back end triton  ready: b" ;;
  *gpu_speed.py*) echo "| a | b |" > "$(value_of --out "$@")/speed.md" ;;
  *quickstart*) to=$(value_of --out "$@")/quickstart-1; mkdir -p "$to"; echo {} > "$to/results.json"
esac
"""
SANITIZER = """#!/usr/bin/env bash
case "$*" in *$FAKE_RACE*) echo "RACECHECK SUMMARY: 1 hazard"; exit 9 ;; esac
"""
SAYS = "#!/usr/bin/env bash\necho 'A GPU'\n"


def check_script(out: Path, **environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the script; return its exit code, and each step's result and last line."""
    done = subprocess.run(
        [SCRIPT, "--out", out, *(["--quick"] if environment.pop("quick", "") else [])],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    page = (out / "summary.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    found = {line[0]: (line[1], line[3]) for line in lines if line and line[0] in STEPS}
    assert tuple(found) == STEPS, done.stdout + done.stderr
    assert sum(file.stat().st_size for file in out.iterdir()) < 10_000_000
    return done.returncode, found


def machine(folder: Path, **programs: str) -> dict[str, str]:
    """Make programs of these texts; return the environment in which they are found."""
    texts = {"fake_python": PYTHON, "compute-sanitizer": SANITIZER, "nvidia-smi": SAYS,
             "nvcc": SAYS, **programs}  # fmt: skip
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    fakes = {"FAKE_FAILS": "", "FAKE_ABSENT": "no", "FAKE_LONG": "", "FAKE_RACE": "none"}
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "fake_python", **fakes}


def test_check_where_all_is_well(tmp_path: Path) -> None:
    code, found = check_script(tmp_path / "out", **{**machine(tmp_path / "bin"), "FAKE_LONG": "1"})
    assert {step: result for step, (result, _) in found.items()} == dict.fromkeys(STEPS, "ok")
    assert code == 0
    assert found["build"][1] == "built by pip for 90-real"
    assert found["tests"][1] == "7 passed"
    assert found["sanitizer"][1] == "memcheck clean; racecheck clean; synccheck clean"
    assert "| a | b |" in (tmp_path / "out" / "summary.md").read_text()
    log = (tmp_path / "out" / "tests.log").read_bytes()
    assert len(log) <= 200_000
    assert log.endswith(b"7 passed\n")


@pytest.mark.parametrize(
    ("planted", "failing"),
    [
        ("pip install", {"build": "nothing builds; Triton's kernels need no build"}),
        ("wcmi_fast info", {"info": "planted"}),
        ("-m pytest", {"tests": "planted"}),
        ("gpu_speed.py", {"speed": "planted"}),
        ("gpu_sanitize.py", {"sanitizer": "planted"}),
        ("quickstart", {"quickstart": "planted"}),
    ],
)
def test_a_step_that_fails_stops_no_other(
    planted: str, failing: dict[str, str], tmp_path: Path
) -> None:
    programs = machine(tmp_path / "bin", cmake="#!/usr/bin/env bash\nexit 1\n")
    code, found = check_script(tmp_path / "out", **{**programs, "FAKE_FAILS": planted})
    assert code == 1
    said = {step: note for step, (result, note) in found.items() if result.startswith("failed")}
    assert said == failing
    assert {result for step, (result, _) in found.items() if step not in failing} == {"ok"}


def test_wheels_and_a_relative_folder(tmp_path: Path) -> None:
    (tmp_path / "whl").mkdir()
    (tmp_path / "whl" / "a-1-py3-none-any.whl").touch()
    done = subprocess.run(
        [SCRIPT, "--quick", "--wheels", "whl", "--out", "here"],
        env={**os.environ, **machine(tmp_path / "bin")}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "here" / "summary.md").read_text()
    assert re.search(r"^\| install_wheels \| ok \| \d+ s \| 1 wheels \|$", page, re.MULTILINE)


def test_cmake_builds_where_pip_cannot(tmp_path: Path) -> None:
    programs = machine(tmp_path / "bin", cmake=SAYS)
    code, found = check_script(tmp_path / "out", **{**programs, "FAKE_FAILS": "pip install"})
    assert code == 0
    assert found["build"] == ("ok", "built by cmake for 90-real, as pip could not")


def test_a_finding_of_the_sanitizer_fails(tmp_path: Path) -> None:
    programs = {**machine(tmp_path / "bin"), "FAKE_RACE": "racecheck"}
    code, found = check_script(tmp_path / "out", **programs)
    assert code == 1
    result, note = found["sanitizer"]
    assert result == "failed: exit code 1"
    assert note == "memcheck clean; racecheck failed (9); synccheck clean"
    assert "1 hazard" in (tmp_path / "out" / "sanitizer.log").read_text()


def test_a_gpu_that_torch_does_not_see_is_a_failure(tmp_path: Path) -> None:
    programs = {**machine(tmp_path / "bin"), "FAKE_FAILS": "is_available())"}
    code, found = check_script(tmp_path / "out", **programs, quick="1")
    assert code == 1
    assert found["machine"][1] == "nvidia-smi shows A GPU, but torch sees no GPU"
    assert found["build"][0] == "skipped"
    assert found["speed"] == ("no GPU", "gpu_speed.py ran with --cpu")


def test_what_is_not_installed_is_named_and_fails_nothing(tmp_path: Path) -> None:
    programs = {**machine(tmp_path / "bin"), "FAKE_ABSENT": "hypothesis"}
    code, found = check_script(tmp_path / "out", **programs)
    assert code == 0
    assert found["tests"] == ("not installed", "Python finds no module hypothesis")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out"], "--out names no folder"),
        (["--fast"], "the argument is '--fast'"),
    ],
)
def test_bad_arguments(arguments: list[str], sentence: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_check.sh: {sentence}, wanted [--out FOLDER]")


def test_check_without_a_gpu(tmp_path: Path) -> None:
    code, found = check_script(tmp_path, quick="1", OMP_NUM_THREADS="1")
    results = {step: result for step, (result, _) in found.items()}
    assert results == {**dict.fromkeys(STEPS, "no GPU"), "build": "skipped"}
    assert code == 0
    assert "tests collected" in found["tests"][1]
    assert json.loads((tmp_path / "speed.json").read_text())["cases"]
    assert "## Speed on CPU, tiny sizes" in (tmp_path / "summary.md").read_text()
