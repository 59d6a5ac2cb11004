"""What the binaries hold and need, and how setup.py builds them.

The slow tests build a copy of the source checkout, which they leave clean.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import wcmi_fast

PACKAGE = Path(wcmi_fast.__file__).parent
BINARIES = sorted(PACKAGE.glob("*.so"))
CHECKOUT = Path(__file__).parent.parent
LEVELS = ("avx2", "avx512")
x86_only = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason=f"{os.uname().machine} builds the base level only"
)


def tool(*command: object) -> str:
    """Run a binutils tool; skip where there is none."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


# ---- no torch in a binary -----------------------------------------------------------------------


def torch_symbols(path: Path) -> list[str]:
    """List the dynamic symbols, defined or wanted, that name torch, c10 or at::."""
    pattern = re.compile(r"\b(torch|c10|at|caffe2)::|\bTHP|aoti_torch")
    return [line for line in tool("nm", "-DC", path).splitlines() if pattern.search(line)]


def needed_libraries(path: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", path))


def test_the_cpu_binary_is_among_those_checked() -> None:
    assert any(path.name.startswith("_cpu.") for path in BINARIES)


@pytest.mark.parametrize("path", BINARIES, ids=lambda path: path.name)
def test_no_binary_knows_torch(path: Path) -> None:
    assert torch_symbols(path) == []
    assert [name for name in needed_libraries(path) if re.search("torch|c10", name)] == []


def test_the_checkers_see_torch_in_torchs_own_libraries() -> None:
    libraries = Path(torch.__file__).parent / "lib"
    assert torch_symbols(libraries / "libc10.so")
    assert torch_symbols(libraries / "libshm.so")
    assert "libc10.so" in needed_libraries(libraries / "libshm.so")


# ---- builds from a copy of the checkout ---------------------------------------------------------


def copy_of_checkout(to: Path) -> Path:
    """Copy what a build reads; skip where the tests do not lie in a checkout."""
    if not (CHECKOUT / "setup.py").is_file() or not (CHECKOUT / "csrc").is_dir():
        pytest.skip(f"{CHECKOUT} is no source checkout")
    to.mkdir(parents=True)
    for path in CHECKOUT.iterdir():
        if path.name in ("csrc", "wcmi_fast"):
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(path, to / path.name, ignore=ignore)
        elif path.is_file():
            shutil.copy2(path, to)
    return to


def isolation() -> list[str]:
    """Use the build tools that are here; without them pip fetches them, as a user's pip does."""
    modules = ("setuptools", "pybind11")
    here = all(importlib.util.find_spec(name) for name in modules)
    here = here and all(shutil.which(name) for name in ("cmake", "ninja"))
    return ["--no-build-isolation"] if here else []


def build_wheel(tree: Path, to: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build one wheel; stdout also has what the build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *isolation(), "-w", str(to)]
    return subprocess.run(
        [*command, str(tree)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def wheel_binaries(folder: Path) -> list[str]:
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    return sorted(name.split("/")[1].split(".")[0] for name in names if name.endswith(".so"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The CPU binary's object files by source name, built under hostile CXXFLAGS."""
    folder = tmp_path_factory.mktemp("objects")
    tree = copy_of_checkout(folder / "tree")
    done = build_wheel(tree, folder, WCMI_FAST_CUDA="0", CXXFLAGS="-march=native -mavx2 -mfma")
    assert done.returncode == 0, done.stdout
    assert wheel_binaries(folder) == ["_cpu"]
    return {path.name.split(".")[0]: path for path in (tree / "build").rglob("*.o")}


# VEX and EVEX instructions are written with a leading v (of SSE's and the generic ones only verr
# and verw have it), mask instructions with a leading k, and BMI's and the like by these names.
BEYOND_BASELINE = re.compile(
    r"v(?!err|erw)\w+|k(add|and|andn|mov|not|or|ortest|shift|test|unpck|xnor|xor)\w*"
    r"|andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|[lt]zcnt|popcnt"
)


def instructions_beyond_baseline(path: Path) -> list[str]:
    """List the disassembled lines that a plain x86-64 processor cannot run."""
    found = []
    for line in tool("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        words = line.partition(":\t")[2].split()
        wide = re.search(r"%[yz]mm\d|%k[0-7]", line)
        if words and (wide or BEYOND_BASELINE.fullmatch(words[0])):
            found.append(line)
    return found


OPERATORS = ("critic_stats", "critic_tail", "linf_step", "linf_start", "l2_step", "keep_best")
BASE_OBJECTS = (*(f"{operator}_base" for operator in OPERATORS), "bind_cpu", "simd_level")


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize("name", BASE_OBJECTS)
def test_base_objects_run_on_every_processor(objects: dict[str, Path], name: str) -> None:
    assert instructions_beyond_baseline(objects[name]) == []


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("operator", ["critic_stats", "linf_step"])
def test_the_checker_sees_the_other_levels(
    objects: dict[str, Path], operator: str, level: str
) -> None:
    found = instructions_beyond_baseline(objects[f"{operator}_{level}"])
    register = {"avx2": "%ymm", "avx512": "%zmm"}[level]
    assert sum(register in line for line in found) > 20


def weak_symbols(path: Path) -> list[str]:
    """List the symbols that a linker may take from any of the files that define them."""
    lines = tool("nm", "-C", "--defined-only", path).splitlines()
    parts = [line.split(maxsplit=2) for line in lines]
    return [part[2] for part in parts if len(part) == 3 and part[1] in "WVuwv"]


@x86_only
@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", *LEVELS])
@pytest.mark.parametrize("operator", OPERATORS)
def test_levels_share_no_symbol(objects: dict[str, Path], operator: str, level: str) -> None:
    """A weak std:: function from an AVX-512 file could replace the baseline's copy."""
    foreign = [
        s for s in weak_symbols(objects[f"{operator}_{level}"]) if f"wcmi::{level}::" not in s
    ]
    assert foreign == []


@x86_only
@pytest.mark.slow
def test_the_checker_sees_weak_symbols(objects: dict[str, Path]) -> None:
    assert any(symbol.startswith("std::") for symbol in weak_symbols(objects["bind_cpu"]))


@pytest.mark.slow
def test_a_second_build_does_not_trust_the_first_ones_cache(tmp_path: Path) -> None:
    """As `pip install '.[demo]'` and then `pip install '.[test]'` do: each has its own ninja."""
    tree = copy_of_checkout(tmp_path / "tree")
    assert build_wheel(tree, tmp_path, WCMI_FAST_CUDA="0").returncode == 0
    (cache,) = (tree / "build").rglob("CMakeCache.txt")
    stale, count = re.subn(r"(CMAKE_MAKE_PROGRAM:\w+)=.*", r"\1=/gone/ninja", cache.read_text())
    assert count == 1
    cache.write_text(stale)
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout


# ---- WCMI_FAST_CUDA -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_choice_of_cuda_is_one_sentence(tmp_path: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="bogus")
    assert done.returncode != 0
    assert "setup.py: WCMI_FAST_CUDA is 'bogus', wanted one of ('auto', '0', '1')" in done.stdout


@pytest.mark.slow
def test_the_cuda_sources_compile_where_nvcc_is(tmp_path: Path) -> None:
    """With `auto` a source that does not compile is only a warning."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is not installed")
    tree = copy_of_checkout(tmp_path / "tree")
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="1")
    assert done.returncode == 0, done.stdout
    assert wheel_binaries(tmp_path) == ["_cpu", "_cuda"]
    (path,) = (tree / "build").rglob("lib.*/wcmi_fast/_cuda*.so")
    assert torch_symbols(path) == []
    if not torch.cuda.is_available():
        check_launch_without_a_driver(path)


def check_launch_without_a_driver(path: Path) -> None:
    """The binary loads, and a launch is one sentence."""
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('_cuda', {str(path)!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "try:\n"
        "    module.linf_step(0, 0, 0, 0, 4, 0.1, 0.1, 0.0, 1.0, 0, 0)\n"
        "except RuntimeError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "linf_step_: the CUDA launch on device 0 failed: no NVIDIA driver"
    )
    assert "(error 35)" in done.stdout


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> Path:
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho this nvcc is broken >&2\nexit 1\n")
    script.chmod(0o755)
    return script


@pytest.mark.slow
def test_cuda_auto_warns_of_a_broken_nvcc_and_goes_on(tmp_path: Path, broken_nvcc: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="auto", CUDACXX=str(broken_nvcc))
    assert done.returncode == 0, done.stdout
    assert 'building extension "wcmi_fast._cuda" failed: CMake target _cuda' in done.stdout
    assert wheel_binaries(tmp_path) == ["_cpu"]


@pytest.mark.slow
def test_cuda_1_makes_a_broken_nvcc_fatal(tmp_path: Path, broken_nvcc: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="1", CUDACXX=str(broken_nvcc))
    assert done.returncode != 0
    assert "CMake target _cuda" in done.stdout
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_cuda_1_without_any_nvcc_says_where_it_was_sought(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "cc", "gcc", "as", "ld", "sh", "make", "ar"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    tree = copy_of_checkout(tmp_path / "tree")
    nowhere = {"CUDACXX": "", "CUDA_HOME": str(tmp_path), "PATH": str(tools)}
    done = build_wheel(tree, tmp_path, WCMI_FAST_CUDA="1", **nowhere)
    assert done.returncode != 0
    assert "nvcc was not found in CUDACXX, CUDA_HOME/bin or PATH" in done.stdout
