"""Checkpoints: a folder of state.safetensors and state.json, whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wcmi_fast.files import write_file, write_folder

FORMAT = "wcmi_fast checkpoint 1"
TENSORS, META = "state.safetensors", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the modules it is loaded into."""


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and meta (JSON) as the checkpoint `folder`, replacing an older one.

    Raises:
        OSError: not writable, or disk full; the older checkpoint is then still there.
    """
    packed = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    header = {"format": FORMAT, "sha256": hashlib.sha256(packed).hexdigest(), "meta": dict(meta)}
    write_folder(folder, {TENSORS: packed, META: json.dumps(header, indent=1).encode()})


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's state as one safetensors file, for `wcmi_fast.models.load` and others.

    Raises:
        OSError: not writable, or disk full; an older file is then still there.
    """
    state = {name: t.detach().contiguous() for name, t in module.state_dict().items()}
    write_file(path, safetensors.torch.save(state))


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the meta of a checkpoint.

    Raises:
        CheckpointError: it is missing, truncated, changed, of another format, or a pickle.
    """
    try:
        packed = (folder / TENSORS).read_bytes()
        header = json.loads((folder / META).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint.load: {folder} cannot be read: {error}") from error
    if packed[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise CheckpointError(
            f"checkpoint.load: {folder / TENSORS} is a pickle, wanted safetensors: "
            "a pickle can run any code, so it is not opened"
        )
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint.load: {folder / META} is not of format {FORMAT!r}")
    found = hashlib.sha256(packed).hexdigest()
    if found != header.get("sha256"):
        raise CheckpointError(
            f"checkpoint.load: {folder / TENSORS} is truncated or changed: its sha256 is "
            f"{found[:12]}..., wanted {str(header.get('sha256'))[:12]}..."
        )
    return safetensors.torch.load(packed), header["meta"]


def pack(modules: Mapping[str, nn.Module], optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """Collect the tensors of named modules, and of an optimiser's state, under flat names."""
    tensors = {
        f"{name}.{key}": value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    states = {} if optimizer is None else optimizer.state_dict()["state"]
    for index, state in states.items():
        tensors |= {f"optimizer.{index}.{key}": value.clone() for key, value in state.items()}
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer | None = None,
) -> None:
    """Put tensors made by `pack` back into modules and optimiser of the same architecture.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape; nothing is changed.
    """
    for name, module in modules.items():
        _check_architecture(name, _under(tensors, name), module)
    for name, module in modules.items():
        module.load_state_dict(_under(tensors, name))
    if optimizer is None:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(tensors, "optimizer").items():
        index, _, field = key.partition(".")
        states.setdefault(int(index), {})[field] = _laid_out_as(weights[int(index)], value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _laid_out_as(weight: Tensor, value: Tensor) -> Tensor:
    # Fused optimisers run over flat memory: a moment must lie in memory as its weight does.
    return torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _check_architecture(name: str, found: dict[str, Tensor], module: nn.Module) -> None:
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    for key in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(key) != shapes.get(key):
            raise CheckpointError(
                f"checkpoint.unpack: {name}.{key} has shape {shapes.get(key, 'none')}, wanted "
                f"{wanted.get(key, 'none')}: the checkpoint is of another architecture"
            )
