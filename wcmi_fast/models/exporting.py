"""Networks as files for others: a program that torch alone runs, or weights and how to rebuild.

A program (.pt2) is what `torch.export` traces in eval mode. Other than TorchScript it is not
deprecated, and unlike a pickled module it needs none of our classes to be loaded.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wcmi_fast.files import discard, write_file
from wcmi_fast.models.loading import load

PROGRAM, WEIGHTS = ".pt2", ".safetensors"
# In the header of a file of weights, under which the arguments of `load` stand.
HEADER = "wcmi_fast.models.load"
# Batches on which a written file is compared; one image is a case of its own for a tracer.
BATCHES = (1, 5)
# Of the largest value. A program runs the same kernels, so that on one machine they are equal.
TOLERANCE = 1e-5


class Agreement(NamedTuple):
    """Largest differences between a module and what its file computes, over the largest value.

    Attributes:
        outputs: of the outputs.
        gradients: of the gradients with respect to the images.
    """

    outputs: float
    gradients: float


def export(model: nn.Module, path: str | Path, *, input_shape: Sequence[int]) -> Agreement:
    """Write a module as a program that runs with torch alone, and compare what the file computes.

    The program is that of eval mode, with frozen weights, on the CPU, for batches of any size;
    gradients with respect to the images flow through it. Without wcmi_fast it is loaded by::

        model = torch.export.load("classifier.pt2").module()
        del model.train, model.eval  # both would raise; attack libraries call them

    Args:
        model: images (N, C, H, W), float32, to outputs (N, ...); it is not changed.
        path: a new file, whose name ends in .pt2.
        input_shape: (C, H, W) of one image.

    Returns:
        The differences between the file and the model on random images in [0, 1].

    Raises:
        ValueError: another ending. FileExistsError: the file is there.
        OSError: not writable, or disk full; no file is left then.
        RuntimeError: the file computes something else, and is removed. What torch.export raises
            for a module that it cannot trace.

    Equivalent torch program::

        ep = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("N")},))
        torch.export.save(ep, path)
    """
    path = check_new_file("export", path, (PROGRAM,))
    snapshot = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    # Two images: a batch of one would be taken for a constant.
    program = torch.export.export(
        snapshot,
        (torch.zeros(2, *input_shape),),
        dynamic_shapes=({0: torch.export.Dim("N")},),
        strict=False,
    )
    packed = io.BytesIO()
    torch.export.save(program, packed)
    return _write_and_compare("export", path, packed.getvalue(), snapshot, input_shape)


def export_weights(
    model: nn.Module, path: str | Path, *, name: str, input_shape: Sequence[int], classes: int
) -> Agreement:
    """Write a network's weights with the arguments of `load` in the header, and compare.

    Any reader of safetensors opens the file; `load_exported` rebuilds the network.

    Args:
        model: the network that ``load(name, input_shape=input_shape, classes=classes)`` builds.
        path: a new file, whose name ends in .safetensors.
        name, input_shape, classes: as for `load`.

    Returns:
        As `export`.

    Raises:
        As `export`; ValueError also where name and weights do not fit.
    """
    path = check_new_file("export_weights", path, (WEIGHTS,))
    snapshot = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    header = json.dumps({"name": name, "input_shape": list(input_shape), "classes": classes})
    state = {key: value.contiguous() for key, value in snapshot.state_dict().items()}
    packed = safetensors.torch.save(state, metadata={HEADER: header})
    return _write_and_compare("export_weights", path, packed, snapshot, input_shape)


def load_exported(path: str | Path) -> nn.Module:
    """Load what `export` or `export_weights` wrote, on the CPU, with frozen weights.

    Args:
        path: the file; its ending says which of them.

    Returns:
        A module in eval mode. That of a program has no other mode: ``train()`` changes nothing of
        what it computes.

    Raises:
        FileNotFoundError: no such file. ValueError: another ending, or a file that is damaged or
            was not written by them.
    """
    path = Path(path)
    _check_ending("load_exported", path, (PROGRAM, WEIGHTS))
    if not path.is_file():
        raise FileNotFoundError(f"load_exported: path is {path}, and there is no such file")
    module = _program(path) if path.suffix == PROGRAM else _rebuilt(path)
    return module.eval().requires_grad_(False)


def check_new_file(owner: str, path: str | Path, endings: Sequence[str]) -> Path:
    """Return the path of a file to write if it has one of the endings and is not there; else raise.

    Raises:
        ValueError: another ending. FileExistsError: it is there.
    """
    path = Path(path)
    _check_ending(owner, path, endings)
    if path.exists():
        raise FileExistsError(f"{owner}: path is {path}, which is there already, wanted a new file")
    return path


def _check_ending(owner: str, path: Path, endings: Sequence[str]) -> None:
    if path.suffix not in endings:
        raise ValueError(
            f"{owner}: path is {path}, wanted a name that ends in {' or '.join(endings)}"
        )


def _program(path: Path) -> nn.Module:
    try:
        module = torch.export.load(path).module()
    # Of a damaged file, torch raises nearly anything.
    except Exception as error:
        raise ValueError(
            f"load_exported: {path} cannot be read as a program of torch.export: {error}"
        ) from error
    # torch sets methods that raise, so that nobody takes the program for one of training mode. But
    # what attacks a model calls eval(), which changes nothing here.
    for method in ("train", "eval"):
        module.__dict__.pop(method, None)
    return module


def _rebuilt(path: Path) -> nn.Module:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"load_exported: {path} is a truncated or damaged safetensors file: {error}"
        ) from error
    if header is None:
        raise ValueError(
            f"load_exported: {path} has no {HEADER} in its header, wanted a file of export_weights"
        )
    built = json.loads(header)
    return load(built.pop("name"), path, **built)


def _write_and_compare(
    owner: str, path: Path, packed: bytes, model: nn.Module, input_shape: Sequence[int]
) -> Agreement:
    write_file(path, packed)
    try:
        found = _agreement(model, load_exported(path), input_shape)
        # A NaN is no agreement either.
        if not max(found) <= TOLERANCE:
            raise RuntimeError(
                f"{owner}: what {path} computes differs from the model, outputs by "
                f"{found.outputs:.2g} and input gradients by {found.gradients:.2g} of the largest, "
                f"wanted at most {TOLERANCE:g}; the file was removed"
            )
    except BaseException:
        discard(path)
        raise
    return found


def _agreement(model: nn.Module, again: nn.Module, input_shape: Sequence[int]) -> Agreement:
    generator = torch.Generator().manual_seed(0)
    differences = []
    for count in BATCHES:
        x = torch.rand(count, *input_shape, generator=generator)
        pairs = zip(_values(model, x), _values(again, x), strict=True)
        differences.append(torch.stack([_difference(wanted, found) for wanted, found in pairs]))
    outputs, gradients = torch.stack(differences).amax(0).tolist()
    return Agreement(outputs, gradients)


def _values(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the gradient of a smooth function of all of them."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        outputs: Tensor = model(x)
        (gradient,) = torch.autograd.grad(outputs.flatten(1).logsumexp(1).sum(), x)
    return outputs.detach(), gradient


def _difference(wanted: Tensor, found: Tensor) -> Tensor:
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    return (found - wanted).abs().max() / largest
