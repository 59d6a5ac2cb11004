"""The `data` argument of a measurement as training and test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wcmi_fast.data import Data, stratified_split


class Samples(NamedTuple):
    """Images (or vectors) and labels, uint8 or floats in [0, 1]; labels may be None.

    Attributes:
        x_train: images for training critics.
        y_train: their labels (N,), int64, or None.
        x_test: images for the estimate.
        y_test: their labels, or None.
        name: what the data are called in a report.
        unequal_batches: whether a loader gave batches of different sizes.
    """

    x_train: Tensor
    y_train: Tensor | None
    x_test: Tensor
    y_test: Tensor | None
    name: str
    unequal_batches: bool


def samples(owner: str, data: Any, seed: int) -> Samples:
    """Return what a measurement works on.

    Args:
        owner: the public function, for errors.
        data: a data set's name or an .npz file (`wcmi_fast.datasets.load`); a `Data`; a pair
            (images, labels), or (training images, test images); images alone; or an iterable of
            batches, as a DataLoader is, of images or of (images, labels). What is not split yet is
            split in halves, by class where there are labels.
        seed: decides that split.

    Raises:
        TypeError: data is none of these.
        ValueError: lengths that do not fit, NaN, or labels that are no classes.
    """
    if isinstance(data, (str, Path)):
        from wcmi_fast import datasets

        return _of_data(datasets.load(data), str(data))
    if isinstance(data, Data):
        return _of_data(data, "tensors")
    if isinstance(data, Tensor):
        return _split(_checked(owner, data), None, seed, "tensors")
    if isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data):
        return _of_pair(owner, data, seed)
    if isinstance(data, Iterable):
        return _of_loader(owner, data, seed)
    raise TypeError(
        f"{owner}: data is a {type(data).__name__}, wanted a data set's name, a path of an .npz "
        "file, a pair of tensors, or a loader"
    )


def _of_data(data: Data, name: str) -> Samples:
    x_train, y_train, x_test, y_test = data
    return Samples(x_train, y_train, x_test, y_test, name, unequal_batches=False)


def _of_pair(owner: str, data: Sequence[Tensor], seed: int) -> Samples:
    if len(data) != 2:
        raise TypeError(f"{owner}: data has {len(data)} tensors, wanted a pair")
    x, y = _checked(owner, data[0]), data[1]
    if y.ndim > 1 and y.shape[1:] == x.shape[1:] and y.dtype == x.dtype:
        return Samples(x, None, _checked(owner, y), None, "tensors", unequal_batches=False)
    if y.ndim != 1 or y.is_floating_point() or len(y) != len(x):
        images = ", ".join(map(str, x.shape[1:]))
        raise ValueError(
            f"{owner}: data's second tensor has shape {tuple(y.shape)} and dtype {y.dtype}, wanted "
            f"labels ({len(x)},) of integers, or test images (M, {images})"
        )
    return _split(x, y.long(), seed, "tensors")


def _of_loader(owner: str, loader: Iterable[Any], seed: int) -> Samples:
    """Read a loader once; its batches may be of different sizes, ours are not."""
    parts = [part if isinstance(part, (tuple, list)) else (part,) for part in loader]
    if not parts or not all(part and isinstance(part[0], Tensor) for part in parts):
        raise TypeError(
            f"{owner}: data's batches are no tensors, wanted images or (images, labels)"
        )
    x = _checked(owner, torch.cat([part[0] for part in parts]))
    y = torch.cat([part[1] for part in parts]).long() if len(parts[0]) > 1 else None
    unequal = len({len(part[0]) for part in parts}) > 1
    return _split(x, y, seed, "loader")._replace(unequal_batches=unequal)


def _split(x: Tensor, y: Tensor | None, seed: int, name: str) -> Samples:
    """Split in halves, by class where there are labels."""
    generator = torch.Generator().manual_seed(seed)
    if y is None:
        order = torch.randperm(len(x), generator=generator)
        test, train = order.tensor_split(2)
        return Samples(x[train], None, x[test], None, name, unequal_batches=False)
    train, test = stratified_split(y, len(y) // 2, generator)
    return Samples(x[train], y[train], x[test], y[test], name, unequal_batches=False)


def _checked(owner: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(
            f"{owner}: data has images of shape {tuple(x.shape)} and dtype {x.dtype}, wanted "
            "(N, C, H, W) or (N, D), floats or uint8"
        )
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ValueError(f"{owner}: data has NaN or infinite values, wanted finite images")
    return x
