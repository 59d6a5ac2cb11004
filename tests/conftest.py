"""What every test file shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A subprocess must find the installed package, as this process does, and not the checkout's folder
# without binaries in the current directory.
os.environ["PYTHONSAFEPATH"] = "1"

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


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
