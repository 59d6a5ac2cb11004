"""Large results in large pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wcmi_fast.backends import memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize(("mib", "advised"), [(40, True), (1, False)])
def test_large_blocks_alone_are_advised(mib: int, advised: bool) -> None:
    if not SETTING.exists():
        pytest.skip("this system has no transparent large pages")
    block = memory.empty((mib << 18,), torch.empty(0))
    assert block.nbytes == mib << 20
    assert ("hg" in flags_of(block.data_ptr() + block.nbytes // 2)) == advised


def test_dtype_device_and_shape_are_as_asked() -> None:
    block = memory.empty((5000, 2000), torch.empty(0, dtype=torch.float64))
    assert (block.shape, block.dtype) == ((5000, 2000), torch.float64)
    assert block.fill_(1.0).sum() == 1e7
    assert memory.empty((5000, 2000), torch.empty(0, device="meta")).device.type == "meta"


def test_without_the_call_blocks_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", None)
    assert memory.empty((10 << 20,), torch.empty(0)).shape == (10 << 20,)
