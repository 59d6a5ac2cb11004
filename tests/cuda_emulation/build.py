"""Builds csrc/cuda and its bindings by g++ on scheduler.cpp, and keeps what it built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"wcmi_cuda_emulation_{os.getuid()}"
JOBS = 2
KEPT_SECONDS = 2 * 24 * 3600

FLAGS = ("-std=c++17", "-O2", "-g1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
TSAN = ("-fsanitize=thread", "-Wno-tsan")
# "count" has ThreadSanitizer's calls, but not its library: traffic.cpp receives them.
KERNEL_FLAGS = {
    "plain": ("-fsanitize=alignment,bounds",),
    "asan": ASAN,
    "tsan": TSAN,
    "count": TSAN,
}
LINK_FLAGS = {"plain": (), "asan": ASAN, "tsan": TSAN, "count": ()}
SCHEDULER_FLAGS = {"plain": (), "asan": ("-DWCMI_ASAN",), "tsan": ("-DWCMI_TSAN",), "count": ()}


def cuda_headers() -> Path | None:
    """Return the folder of CUDA's own headers, found as the nvcc that runs."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [Path(home) / "include" for home in homes if home]
    return next((f for f in folders if (f / "cuda_fp16.h").is_file()), None)


def why_not() -> str | None:
    """Return the sentence why nothing can be built here, or None."""
    if os.uname().machine != "x86_64":
        return f"the CUDA emulation switches stacks of x86_64, this machine is {os.uname().machine}"
    if shutil.which("g++") is None:
        return "the CUDA emulation needs g++, which is not in PATH"
    if cuda_headers() is None:
        return "the CUDA emulation needs CUDA's headers, found neither by CUDA_HOME nor by nvcc"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA emulation needs pybind11, which is not installed"
    if not (CSRC / "bind_cuda.cpp").is_file():
        return f"the CUDA emulation needs a source checkout, which {CSRC.parent} is not"
    return None


@functools.cache
def _compiler() -> str:
    command = ["g++", "-v"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _digest(words: Iterable[str], files: Iterable[Path]) -> str:
    state = hashlib.sha256(repr([_compiler(), *words]).encode())
    for path in files:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:24]


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed in {directory}:\n{done.stderr}")


def _make(target: Path, command: list[str], directory: Path) -> Path:
    """Run a command that writes its -o; others find the whole file or none."""
    if target.exists():
        target.touch()
    else:
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / target.name
            _run([*command, "-o", str(made)], directory)
            made.replace(target)
    return target


@functools.cache
def _forget_unused() -> None:
    """Remove what no build has asked for in days: mutants leave much behind."""
    for path in CACHE.glob("**/*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < time.time() - KEPT_SECONDS:
                path.unlink()


def _compile(source: Path, directory: Path, flags: tuple[str, ...]) -> Path:
    """Compile a source by its path in the directory, which is how errors will name it."""
    headers = sorted([*HERE.glob("*.h"), *directory.glob("**/*.h"), *directory.glob("**/*.cuh")])
    digest = _digest([str(source), *flags], [*headers, directory / source])
    command = ["g++", *FLAGS, *flags, *_includes(), "-x", "c++", "-c", str(source)]
    return _make(CACHE / f"{source.stem}-{digest}.o", command, directory)


def _includes() -> list[str]:
    import pybind11

    folders = (HERE, cuda_headers(), pybind11.get_include(), sysconfig.get_paths()["include"])
    return [f"-I{folders[0]}", *(f"-isystem{folder}" for folder in folders[1:])]


def link(flavour: str, name: str, sources: list[Path], directory: Path) -> Path:
    """Compile the sources, *.cu under the flavour's sanitizer, and link them with the scheduler."""
    if reason := why_not():
        raise RuntimeError(reason)
    _forget_unused()
    kernel_flags, link_flags = KERNEL_FLAGS[flavour], LINK_FLAGS[flavour]
    jobs = [(s, directory, kernel_flags if s.suffix == ".cu" else ()) for s in sources]
    jobs.append((Path("scheduler.cpp"), HERE, SCHEDULER_FLAGS[flavour]))
    if flavour == "count":
        jobs.append((Path("traffic.cpp"), HERE, ()))
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    folder = CACHE / f"{flavour}-{_digest(link_flags, objects)}"
    folder.mkdir(exist_ok=True)
    command = ["g++", "-shared", "-pthread", *link_flags, *(str(o) for o in objects)]
    return _make(folder / name, command, CACHE)


def build(flavour: str = "plain", root: Path = CSRC) -> Path:
    """Build the module _cuda from a tree of sources; return its path."""
    sources = [
        Path("bind_cuda.cpp"),
        *(Path("cuda") / p.name for p in sorted(root.glob("cuda/*.cu"))),
    ]
    return link(flavour, f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", sources, root)


@functools.cache
def load(flavour: str = "plain", root: Path = CSRC) -> ModuleType:
    """Build the module _cuda and import it."""
    return import_from(build(flavour, root))


def import_from(path: Path) -> ModuleType:
    # pybind11 has one module per name, also of several files.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(
    flavour: str, script: str, *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python script, which finds the module's path in WCMI_EMULATION_MODULE.

    It exits with a code other than 0 after the first error that a sanitizer reports. Let it use
    numpy: torch under a sanitizer is slow to start and fragile.
    """
    module = build(flavour) if path is None else path
    libraries = {"plain": "", "asan": "libasan.so", "tsan": "libtsan.so"}
    wanted = {
        "WCMI_EMULATION_MODULE": str(module),
        "PYTHONPATH": str(HERE.parent),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "report_thread_leaks=0:halt_on_error=1:exitcode=66",
    }
    if library := libraries[flavour]:
        found = subprocess.run(
            ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
        )
        wanted["LD_PRELOAD"] = found.stdout.strip()
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **wanted, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
