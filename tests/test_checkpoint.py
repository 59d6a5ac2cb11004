from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Adam

from wcmi_fast.training import checkpoint


def trained(seed: int, width: int = 3) -> tuple[nn.Module, Adam]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    optimizer = Adam(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(5, 2)).square().sum().backward()
        optimizer.step()
    return module, optimizer


def saved(folder: Path) -> Path:
    module, optimizer = trained(0)
    checkpoint.save(folder, checkpoint.pack({"m": module}, optimizer), {"epoch": 7})
    return folder


def test_round_trip_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    module, optimizer = trained(0)
    saved(tmp_path / "c")
    other, other_optimizer = trained(1)
    tensors, meta = checkpoint.load(tmp_path / "c")
    checkpoint.unpack(tensors, {"m": other}, other_optimizer)
    assert meta == {"epoch": 7}
    x = torch.randn(5, 2)
    for m, o in ((module, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(x).pow(3).sum().backward()
        o.step()
    for (name, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    file = saved(tmp_path / "c") / checkpoint.TENSORS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(checkpoint.CheckpointError, match=r"truncated or changed: its sha256 is"):
        checkpoint.load(tmp_path / "c")


def test_one_flipped_bit(tmp_path: Path) -> None:
    file = saved(tmp_path / "c") / checkpoint.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(checkpoint.CheckpointError, match="truncated or changed"):
        checkpoint.load(tmp_path / "c")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    torch.save({"a": torch.ones(1)}, folder / checkpoint.TENSORS)
    with pytest.raises(checkpoint.CheckpointError, match="is a pickle, wanted safetensors"):
        checkpoint.load(folder)
    (folder / checkpoint.TENSORS).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(checkpoint.CheckpointError, match="is a pickle, wanted safetensors"):
        checkpoint.load(folder)


def test_missing_and_foreign(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot be read: .*No such file"):
        checkpoint.load(tmp_path / "nothing")
    folder = saved(tmp_path / "c")
    (folder / checkpoint.META).write_text(json.dumps({"format": "else"}))
    with pytest.raises(checkpoint.CheckpointError, match="is not of format 'wcmi_fast checkpoint"):
        checkpoint.load(folder)
    (folder / checkpoint.META).write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(folder)


def test_another_architecture_changes_nothing(tmp_path: Path) -> None:
    tensors, _ = checkpoint.load(saved(tmp_path / "c"))
    wider, optimizer = trained(1, width=4)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    wanted = r"m\.0\.bias has shape \(3,\), wanted \(4,\): the checkpoint is of another architect"
    with pytest.raises(checkpoint.CheckpointError, match=wanted):
        checkpoint.unpack(tensors, {"m": wider}, optimizer)
    with pytest.raises(checkpoint.CheckpointError, match="has shape none, wanted"):
        checkpoint.unpack(tensors, {"other": wider})
    assert all(torch.equal(before[name], value) for name, value in wider.state_dict().items())
