"""What every test file shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, also in subprocesses: tests run side by side, and threads that wait for
# each other on the same cores take several times as long. Tests of threads ask for theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# A subprocess must find the installed package, as this process does, and not the checkout's folder
# without binaries in the current directory.
os.environ["PYTHONSAFEPATH"] = "1"

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on all cores, a file in one process; `pytest -n 0` does not."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    able = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if whole and able and config.option.numprocesses is None:
        config.option.numprocesses = os.cpu_count()
        config.option.dist = "loadfile"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real images that WCMI_FAST_DATA names."""
    folder = os.environ.get("WCMI_FAST_DATA")
    if not folder:
        pytest.skip("WCMI_FAST_DATA names no folder of real images")
    return Path(folder)
