"""One wheel, built without torch, beside torch 2.13.0 and beside the torch that runs this suite."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_build import build_wheel, copy_of_checkout

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
FILES = (
    "conftest.py",
    "oracle.py",
    "strategies.py",
    "gpu_on_cpu.py",
    "cuda_emulation/__init__.py",
    "cuda_emulation/build.py",
    "cuda_emulation/control.py",
    "test_critic_stats.py",
    "test_linf_step.py",
    "test_linf_start.py",
    "test_l2_step.py",
    "test_keep_best.py",
)
OLD_TORCH = "2.13.0"
# What the operators and their tests need; torchvision, which pins one torch, is not among them.
REQUIREMENTS = ("numpy", "safetensors", "rich", "tyro", "tomli-w")
TEST_REQUIREMENTS = ("pytest", "pytest-timeout", "hypothesis")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = build_wheel(copy_of_checkout(folder / "tree"), folder, WCMI_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout
    return next(folder.glob("*.whl"))


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor another install may be found instead of the wheel.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    words = [str(word) for word in command]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, **options
    )


def new_environment(folder: Path) -> Path:
    """Make an empty virtual environment; return its interpreter."""
    run(sys.executable, "-m", "venv", folder / "venv")
    return folder / "venv" / "bin" / "python"


def check_wheel(python: Path, wheel: Path, folder: Path, torch_version: str) -> None:
    """Install the wheel and run the operators' tests, far from the checkout."""
    # The lent packages may hold this version already, and pip would then install nothing.
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", wheel)
    assert done.returncode == 0, done.stderr
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy2(TESTS / name, folder / name)
    shutil.copy2(TESTS.parent / "pyproject.toml", folder)

    code = "import torch, wcmi_fast._cpu as b; print(torch.__version__, b.__file__)"
    version, binary = run(python, "-c", code, cwd=folder).stdout.split()
    assert version.split("+")[0] == torch_version
    assert Path(binary).is_relative_to(folder / "venv")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".so"))
        in_wheel = hashlib.sha256(archive.read(member)).hexdigest()
    assert hashlib.sha256(Path(binary).read_bytes()).hexdigest() == in_wheel

    tests = (name for name in FILES if name.startswith("test_"))
    # Triton is not part of the wheel: its interpreter is patched for the version of CI alone.
    options = ("-q", "-p", "no:cacheprovider", "-k", "not interpreted")
    done = run(python, "-m", "pytest", *options, *tests, cwd=folder)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 400, done.stdout


def test_wheel_beside_torch_2_13(wheel: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path)
    wanted = (f"torch=={OLD_TORCH}", *REQUIREMENTS, *TEST_REQUIREMENTS)
    done = run(python, "-m", "pip", "install", "-q", *wanted)
    if done.returncode != 0:
        pytest.skip(f"torch {OLD_TORCH} cannot be installed here: {done.stderr[-500:]}")
    check_wheel(python, wheel, tmp_path, OLD_TORCH)


def test_same_wheel_beside_the_torch_of_this_environment(wheel: Path, tmp_path: Path) -> None:
    """CI's environment has the newest torch. Its packages are lent by path, wcmi_fast's is not."""
    python = new_environment(tmp_path)
    (own,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # Behind the new environment's own packages; an editable install's .pth file is not read there.
    (own / "lent.pth").write_text(str(Path(torch.__file__).parent.parent))
    check_wheel(python, wheel, tmp_path, torch.__version__.split("+")[0])
