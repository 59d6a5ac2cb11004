"""Drives CMake: builds wcmi_fast/_cpu and, where nvcc is found, wcmi_fast/_cuda.

WCMI_FAST_CUDA=auto (default) builds csrc/cuda when nvcc is found and warns if that fails;
1 makes a failure fatal; 0 skips it. CMakeLists.txt and csrc/cpu/kernels.cmake hold every source and
flag.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "0", "1")


def cuda_choice() -> str:
    """Return WCMI_FAST_CUDA, checked."""
    choice = os.environ.get("WCMI_FAST_CUDA", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"setup.py: WCMI_FAST_CUDA is {choice!r}, wanted one of {CHOICES}")
    return choice


def find_nvcc() -> str | None:
    """Return nvcc's path: CUDACXX, CUDA_HOME/bin or PATH; None if there is none."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX"), f"{cuda_home}/bin/nvcc", "nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cmake_build(target: str, output: Path, scratch: Path, definitions: list[str]) -> None:
    """Configure and build one CMake target into the folder `output`."""
    import pybind11

    configure = [
        "cmake",
        # An earlier pip's cache names a ninja and a pybind11 in a folder that is gone.
        "--fresh",
        f"-S{ROOT}",
        f"-B{scratch}",
        "-GNinja",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DWCMI_FAST_OUTPUT={output}",
        *definitions,
    ]
    try:
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(scratch), "--target", target], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        # The one kind of error that setuptools turns into a warning for an optional extension.
        raise CompileError(f"CMake target {target}: {error}") from error


class CMakeBuild(build_ext):
    """Build each extension as the CMake target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        """Build `wcmi_fast._cpu` or `wcmi_fast._cuda`."""
        target = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        scratch = Path(self.build_temp).resolve() / target
        if target == "_cpu":
            cmake_build(target, output, scratch, [])
            return
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError(
                "WCMI_FAST_CUDA=1, but nvcc was not found in CUDACXX, CUDA_HOME/bin or PATH"
            )
        cmake_build(
            target, output, scratch, ["-DWCMI_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        )


class RevisionBuild(build_py):
    """Write the git revision into the package, where there is one."""

    def run(self) -> None:
        """Build, then write wcmi_fast/revision.txt beside the modules."""
        super().run()
        if self.editable_mode:
            return
        try:
            found = subprocess.run(
                # The hash alone, without a tag's name.
                ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            return
        (Path(self.build_lib) / "wcmi_fast" / "revision.txt").write_text(found)


def extensions() -> list[Extension]:
    """List the extensions to build; `auto` makes CUDA optional (setuptools warns and goes on)."""
    cpu = Extension("wcmi_fast._cpu", sources=[])
    choice = cuda_choice()
    if choice == "0" or (choice == "auto" and find_nvcc() is None):
        return [cpu]
    return [cpu, Extension("wcmi_fast._cuda", sources=[], optional=choice == "auto")]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "build_py": RevisionBuild})
