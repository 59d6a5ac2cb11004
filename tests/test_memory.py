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


def test_large_blocks_are_advised() -> None:
    if not SETTING.exists():
        pytest.skip("this system has no transparent large pages")
    block = memory.empty((40 << 18,), torch.empty(0))
    assert block.nbytes == 40 << 20
    assert "hg" in flags_of(block.data_ptr() + block.nbytes // 2)


def test_small_blocks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their pages may be what is left of a large block, whose advice they keep.
    def never(*given: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(memory, "_madvise", never)
    assert memory.empty((1 << 18,), torch.empty(0)).nbytes == 1 << 20
    with pytest.raises(AssertionError):
        memory.empty((40 << 18,), torch.empty(0))


def test_dtype_device_and_shape_are_as_asked() -> None:
    block = memory.empty((5000, 2000), torch.empty(0, dtype=torch.float64))
    assert (block.shape, block.dtype) == ((5000, 2000), torch.float64)
    assert block.fill_(1.0).sum() == 1e7
    assert memory.empty((5000, 2000), torch.empty(0, device="meta")).device.type == "meta"


def test_without_the_call_blocks_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", None)
    assert memory.empty((10 << 20,), torch.empty(0)).shape == (10 << 20,)
