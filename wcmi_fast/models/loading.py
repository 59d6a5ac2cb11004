"""Models by name, and weights from files of several layouts (docs/studies.md lists them).

A file's names are brought to ours in three steps: what surrounds the weights goes (``{"model":
...}``, ``module.``), then what surrounds the network (an attacker, a wrapped encoder, critics),
then the network's own names are replaced by ours.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from wcmi_fast.models.classifiers import CLASSIFIERS, NAMES

State = dict[str, Tensor]
MEAN, STD = "normalise.mean", "normalise.std"
# Under which a saved dictionary holds the weights beside the epoch, the optimiser and so on.
HOLDERS = ("model", "state_dict", "model_state_dict", "net")
# More names than this are shown by the part that they belong to.
SHOWN_NAMES = 12


def load(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Sequential:
    """Build a classifier by its name, with the weights of a file if one is given.

    Layouts of files: our own, kuangliu/pytorch-cifar, MadryLab/robustness, and the authors' code.
    Of checkpoints with critics or a second head, those are left out: "baseline_h" with classes=64
    takes the encoder alone. A normaliser in the file takes the place of mean and std; a file
    without one, as those of kuangliu, needs the values that its network was trained with.

    Args:
        name: one of `NAMES`.
        checkpoint: a safetensors file, or one of `torch.save` that holds nothing but tensors and
            plain values; None leaves random weights.
        input_shape: (C, H, W) of one image.
        classes: number K of classes.
        mean: of each channel, subtracted from images in [0, 1]; None is 0. See `CIFAR10_MEAN`.
        std: of each channel, divided by; None is 1.
        device: where the model is wanted.

    Returns:
        The model in eval mode: images (N, C, H, W), float32 in [0, 1], to logits (N, K).

    Raises:
        TypeError, ValueError: an unknown name; sizes that are not positive integers; a file that
            is no checkpoint, truncated, a pickle of more than tensors (which is not opened), or of
            another network: every tensor that is missing, left over or of another shape is named.
        FileNotFoundError: no such file.

    Equivalent torch program::

        model = resnet18(input_shape, classes)
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    """
    if name not in CLASSIFIERS:
        close = difflib.get_close_matches(str(name).lower(), NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"load: name is {name!r}, wanted one of {', '.join(NAMES)}{hint}")
    model = CLASSIFIERS[name](input_shape, classes, mean=mean, std=std)
    if checkpoint is not None:
        _fill("load", name, model, Path(checkpoint), TRANSLATIONS.get(name, _unchanged))
    return model.to(device).eval()


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Put the weights of a file into a model, whose names they must have.

    They may be surrounded as in `load`. Where a robustness checkpoint normalises images, the model
    must do so in a layer ``normalise`` with ``mean`` and ``std``, such as
    `wcmi_fast.models.Normalise`, which then gets the file's values.

    Args:
        model: any module; its mode stays as it is.
        checkpoint: as for `load`.

    Raises:
        ValueError, FileNotFoundError: as `load`; the model is then unchanged.

    Equivalent torch program::

        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    """
    _fill("load_weights", type(model).__name__, model, Path(checkpoint), _unchanged)


def read_state(checkpoint: str | Path) -> State:
    """Read the tensors of a safetensors file or of one that `torch.save` wrote, on the CPU.

    No pickle is opened that needs more than tensors and plain values: opening one can run any code.

    Raises:
        ValueError: the file is neither, is truncated, or needs more; it says how to convert it.
        FileNotFoundError: no such file.
    """
    return _read("read_state", Path(checkpoint))


@dataclass(frozen=True)
class _Network:
    """The weights of a file's network, and how it normalises images."""

    weights: State
    normaliser: State = field(default_factory=dict)


def _fill(
    owner: str, name: str, model: nn.Module, path: Path, translate: Callable[[State], State]
) -> None:
    state, wanted = _read(owner, path), model.state_dict()
    if state.keys() != wanted.keys():
        network = _unwrapped(state)
        state = translate(network.weights)
        state |= _normaliser(owner, path, network.normaliser, wanted)
    _check_fit(owner, name, path, state, wanted)
    model.load_state_dict({**wanted, **state})


def _normaliser(
    owner: str, path: Path, found: State, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not found:
        return {}
    if MEAN in wanted and STD in wanted:
        return {key: value.reshape(-1, 1, 1) for key, value in found.items()}
    if not found[MEAN].any() and (found[STD] == 1).all():
        return {}
    mean, std = (found[key].flatten().tolist() for key in (MEAN, STD))
    raise ValueError(
        f"{owner}: {path} normalises images with mean {mean} and std {std}, wanted a model with a "
        "layer normalise that takes them, such as wcmi_fast.models.Normalise, or a file without"
    )


# Reading


def _read(owner: str, path: Path) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: checkpoint is {str(path)!r}, and there is no such file")
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _tensors(owner, path, _of_pickle(owner, path))
    if head[8:9] == b"{":
        return _of_safetensors(owner, path)
    raise ValueError(
        f"{owner}: {path} is neither a safetensors file nor one that torch.save wrote, wanted one "
        "of them"
    )


def _of_safetensors(owner: str, path: Path) -> State:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{owner}: {path} is a truncated or damaged safetensors file: {error}"
        ) from error


def _of_pickle(owner: str, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{owner}: {path} is a pickle of more than tensors and plain values "
            f"({_reason(error)}), and opening such a file can run any code, so it was not opened; "
            "to convert it, run in a sandbox (a container without network or your files): c = "
            'torch.load(OLD, weights_only=False, map_location="cpu"); torch.save({"model": '
            'c["model"]}, NEW), with dill and whatever else it needs installed there'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{owner}: {path} is truncated or damaged: {reason}") from error


def _reason(error: pickle.UnpicklingError) -> str:
    named = re.search(r"GLOBAL [\w.]+", str(error))
    return named.group(0) if named else "it has instructions that torch.load refuses"


def _tensors(owner: str, path: Path, found: Any) -> State:
    """Return the weights that a saved object holds."""
    for holder in HOLDERS:
        if isinstance(found, Mapping) and isinstance(found.get(holder), Mapping):
            found = found[holder]
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        shown = list(found)[:5] if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f"{owner}: {path} holds {shown}, wanted a state dict, or one under "
            f"{', '.join(map(repr, HOLDERS))}"
        )
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}


# What surrounds the network


def _unwrapped(state: State) -> _Network:
    while state and all(key.startswith("module.") for key in state):
        state = _under(state, "module.")
    normaliser = {}
    for ours, theirs in ((MEAN, "new_mean"), (STD, "new_std")):
        for holder in ("attacker.normalize.", "normalizer."):
            if holder + theirs in state:
                normaliser[ours] = state[holder + theirs]
    # robustness saves its network twice; the authors' form of it only below the attacker.
    for holder in ("model.", "attacker.model."):
        inner = _under(state, holder)
        if normaliser and inner:
            return _Network(_without_critics(inner), normaliser)
    return _Network(_without_critics(state))


def _without_critics(state: State) -> State:
    """Return encoder and head of the authors' estimators and encoders, or the state as it is."""
    encoder = _under(state, "encoder.enc.")
    if not encoder:
        return state
    head = {f"base_cla.{key}": value for key, value in _under(state, "classifier.").items()}
    return {**encoder, **head}


def _under(state: State, prefix: str) -> State:
    return {key[len(prefix) :]: t for key, t in state.items() if key.startswith(prefix)}


# The network's own names


def _unchanged(state: State) -> State:
    return state


def _renamed(rules: Mapping[str, str]) -> Callable[[State], State]:
    """Return a translation by regular expressions, of which the first that matches is used."""
    compiled = [(re.compile(pattern), ours) for pattern, ours in rules.items()]

    def rename(key: str) -> str:
        for pattern, ours in compiled:
            if pattern.search(key):
                return pattern.sub(ours, key)
        return key

    return lambda state: {rename(key): value for key, value in state.items()}


RESNET = _renamed({r"\.shortcut\.": ".downsample.", r"^linear\.": "fc."})

BASELINE = _renamed(
    {
        r"^base_cla\.layer0\.(?=[02]\.)": "head.layers.",
        r"^base_cla\.layer1\.0\.": "head.layers.4.",
        r"^base_cla\.layer0\.": "head.linear.",
        r"^(base_enc\.)?layer0\.0\.": "convolutions.0.",
        r"^(base_enc\.)?layer0\.1\.": "convolutions.1.",
        r"^(base_enc\.)?layer1\.0\.": "convolutions.3.",
        r"^(base_enc\.)?layer1\.1\.": "convolutions.4.",
        r"^(base_enc\.)?layer2\.0\.": "convolutions.6.",
        r"^(base_enc\.)?layer2\.1\.": "convolutions.7.",
        r"^(base_enc\.)?layer4\.": "hidden.",
        r"^(base_enc\.)?layer5\.": "output.",
    }
)


def _encoder(state: State) -> State:
    return {key: t for key, t in BASELINE(state).items() if not key.startswith("head.")}


_DENSE_LAYER = re.compile(r"^dense(\d)\.(\d+)\.(bn|conv)(\d)\.")
_DENSE_OTHERS = _renamed(
    {
        r"^conv1\.": "conv0.",
        r"^trans(\d)\.bn\.": r"transition\1.norm.",
        r"^trans(\d)\.conv\.": r"transition\1.conv.",
        r"^bn\.": "norm5.",
        r"^linear\.": "classifier.",
    }
)
# Channels that come into each dense block, and that each of its layers adds.
DENSE_INPUTS, DENSE_GROWTH = {1: 64, 2: 128, 3: 256, 4: 512}, 32


def _densenet(state: State) -> State:
    """Rename kuangliu's tensors, and put their channels into torchvision's order.

    Their layers put new channels before the older ones, torchvision's after them.
    """
    if not any(_DENSE_LAYER.match(key) for key in state):
        return state
    return _DENSE_OTHERS(
        {_DENSE_LAYER.sub(_dense_name, key): _reordered(key, t) for key, t in state.items()}
    )


def _dense_name(found: re.Match[str]) -> str:
    block, layer, kind, number = found.groups()
    kind = "norm" if kind == "bn" else kind
    return f"denseblock{block}.denselayer{int(layer) + 1}.{kind}{number}."


def _reordered(key: str, tensor: Tensor) -> Tensor:
    block, axis = _concatenation(key)
    if block is None or tensor.ndim <= axis:
        return tensor
    inputs, channels = DENSE_INPUTS[block], tensor.shape[axis]
    added = range(0, channels - inputs, DENSE_GROWTH)
    layers = (range(first, first + DENSE_GROWTH) for first in reversed(added))
    order = [*range(channels - inputs, channels), *chain.from_iterable(layers)]
    return tensor.index_select(axis, torch.tensor(order))


def _concatenation(key: str) -> tuple[int | None, int]:
    """Return the dense block whose concatenated channels a tensor has, and along which axis."""
    layer = _DENSE_LAYER.match(key)
    if layer is not None and layer[4] == "1":
        return int(layer[1]), 0 if layer[3] == "bn" else 1
    transition = re.match(r"^trans(\d)\.(bn|conv)\.", key)
    if transition is not None:
        return int(transition[1]), 0 if transition[2] == "bn" else 1
    if key.startswith("bn."):
        return 4, 0
    return (4, 1) if key == "linear.weight" else (None, 0)


TRANSLATIONS: dict[str, Callable[[State], State]] = {
    "resnet18": RESNET,
    "resnet50": RESNET,
    "densenet121": _densenet,
    "baseline_h": _encoder,
    "baseline_h_mlp": BASELINE,
    "baseline_h_linear": BASELINE,
}


# What does not fit


def _check_fit(
    owner: str, name: str, path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    missing = [key for key in wanted if key not in state and not _optional(key)]
    left_over = [key for key in state if key not in wanted]
    other = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    shapes = [f"{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}" for k in other]
    few = len(other) <= SHOWN_NAMES
    faults = [
        f"{what} {listed}"
        for what, listed in (
            ("it lacks", _listed(missing)),
            ("it has besides", _listed(left_over)),
            ("of another shape are", "; ".join(shapes) if few else _listed(other)),
        )
        if listed
    ]
    if faults:
        hint = _hint(other, state, wanted)
        raise ValueError(f"{owner}: {path} does not fit {name}: {', and '.join(faults)}{hint}")


def _optional(key: str) -> bool:
    # Old files have no count of batches, and only robustness's have a normaliser.
    return key in (MEAN, STD) or key.endswith(".num_batches_tracked")


def _listed(keys: Sequence[str]) -> str:
    """Name all keys; many of them by the part they belong to."""
    if len(keys) <= SHOWN_NAMES:
        return ", ".join(keys)
    parts: dict[str, int] = {}
    for key in keys:
        part = key.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part}.* ({count} tensors)" for part, count in parts.items())


def _hint(other: Iterable[str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Say which number of classes the file has, if that is all that differs."""
    last = list(wanted)[-1].rpartition(".")[0]
    weight = f"{last}.weight"
    if weight in state and {key.rpartition(".")[0] for key in other} == {last}:
        return f"; its last layer has {len(state[weight])} outputs: was classes meant to be that?"
    return ""
