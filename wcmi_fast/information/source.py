"""The `data` argument of a measurement as training and test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wcmi_fast.data import Data, stratified_split


class Samples(NamedTuple):
    """Images (or vectors) and labels, uint8 or float32; labels may be None.

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

    def first(self, train: int | None, test: int | None) -> Samples:
        """Return the first so many training and test images; None is all."""
        return self._replace(
            x_train=self.x_train[:train],
            x_test=self.x_test[:test],
            y_train=None if self.y_train is None else self.y_train[:train],
            y_test=None if self.y_test is None else self.y_test[:test],
        )

    def drawn(self, train: int | None, test: int | None, seed: int) -> Samples:
        """Return so many images in random order, so that sorted data do not give sorted batches."""
        generator = torch.Generator().manual_seed(seed)
        kept_train = torch.randperm(len(self.x_train), generator=generator)[:train]
        kept_test = torch.randperm(len(self.x_test), generator=generator)[:test]
        return self._replace(
            x_train=self.x_train[kept_train],
            x_test=self.x_test[kept_test],
            y_train=None if self.y_train is None else self.y_train[kept_train],
            y_test=None if self.y_test is None else self.y_test[kept_test],
        )


def samples(owner: str, data: Any, seed: int) -> Samples:
    """Return what a measurement works on.

    Args:
        owner: the public function, for errors.
        data: a data set's name, an .npz file or a folder of images (`wcmi_fast.datasets.load`); a
            `Data`; a pair
            (images, labels), or (training images, test images); images alone; or an iterable of
            batches, as a DataLoader is, of images or of (images, labels). Arrays are taken as
            tensors. What is not split yet is split in halves, by class where there are labels.
        seed: decides that split.

    Raises:
        TypeError: data is none of these.
        ValueError: shapes or lengths that do not fit, NaN, or labels that are no classes.
    """
    if isinstance(data, (str, Path)):
        from wcmi_fast import datasets

        return _of_data(owner, datasets.load(data), str(data))
    if isinstance(data, Data):
        return _of_data(owner, data, "tensors")
    data = _tensors(data)
    if isinstance(data, Tensor):
        return _split(owner, _images(owner, data), None, seed, "tensors")
    if isinstance(data, tuple):
        return _of_pair(owner, data, seed)
    if isinstance(data, Iterable):
        return _of_loader(owner, data, seed)
    raise TypeError(
        f"{owner}: data is a {type(data).__name__}, wanted a data set's name, a path of an .npz "
        "file, a pair of tensors, or a loader"
    )


def _tensors(data: Any) -> Any:
    """Return arrays as tensors, and several of them as a tuple of tensors; else data itself."""
    if isinstance(data, np.ndarray):
        return torch.as_tensor(data)
    if not isinstance(data, (tuple, list)) or not data:
        return data
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return data
    return tuple(torch.as_tensor(part) for part in data)


def _of_data(owner: str, data: Data, name: str) -> Samples:
    x_train, x_test = _images(owner, data.x_train), _images(owner, data.x_test)
    _check_alike(owner, x_train, x_test)
    y_train = _labels(owner, data.y_train, len(x_train))
    y_test = _labels(owner, data.y_test, len(x_test))
    return Samples(x_train, y_train, x_test, y_test, name, unequal_batches=False)


def _of_pair(owner: str, data: Sequence[Tensor], seed: int) -> Samples:
    if len(data) != 2:
        raise TypeError(
            f"{owner}: data is {len(data)} tensors, wanted a pair: (images, labels), or (training "
            "images, test images)"
        )
    x, y = _images(owner, data[0]), data[1]
    if y.ndim < 2:
        return _split(owner, x, _labels(owner, y, len(x)), seed, "tensors")
    x_test = _images(owner, y)
    _check_alike(owner, x, x_test)
    return Samples(x, None, x_test, None, "tensors", unequal_batches=False)


def _of_loader(owner: str, loader: Iterable[Any], seed: int) -> Samples:
    """Read a loader once; its batches may be of different sizes, ours are not."""
    parts = [part if isinstance(part, (tuple, list)) else (part,) for part in loader]
    if not parts or not all(part and isinstance(part[0], Tensor) for part in parts):
        raise TypeError(
            f"{owner}: data is a {type(loader).__name__} that yields no batches of tensors, wanted "
            "images or (images, labels)"
        )
    x = _images(owner, torch.cat([part[0] for part in parts]))
    labelled = all(len(part) > 1 and isinstance(part[1], Tensor) for part in parts)
    y = _labels(owner, torch.cat([part[1] for part in parts]), len(x)) if labelled else None
    # The last batch of a loader is smaller wherever its size does not divide the data's.
    unequal = len({len(part[0]) for part in parts}) > 1
    return _split(owner, x, y, seed, "loader")._replace(unequal_batches=unequal)


def _split(owner: str, x: Tensor, y: Tensor | None, seed: int, name: str) -> Samples:
    """Split in halves, by class where there are labels."""
    if len(x) < 2:
        raise ValueError(
            f"{owner}: data has {len(x)} images, wanted some to train and some to test"
        )
    generator = torch.Generator().manual_seed(seed)
    if y is None:
        order = torch.randperm(len(x), generator=generator)
        test, train = order.tensor_split(2)
        return Samples(x[train], None, x[test], None, name, unequal_batches=False)
    train, test = stratified_split(y, len(y) // 2, generator)
    return Samples(x[train], y[train], x[test], y[test], name, unequal_batches=False)


def _images(owner: str, x: Tensor) -> Tensor:
    """Return images on the CPU, as uint8 or float32.

    Raises:
        ValueError: another shape or dtype; NaN or infinite values; images outside [0, 1].
    """
    if x.ndim not in (2, 4) or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise ValueError(
            f"{owner}: data has images of shape {tuple(x.shape)} and dtype {x.dtype}, wanted "
            "(N, C, H, W) or vectors (N, D), floats or uint8"
        )
    x = x.detach().cpu()
    if x.dtype == torch.uint8 or not len(x):
        return x
    low, high = (float(end) for end in torch.aminmax(x))
    if not abs(low) + abs(high) < float("inf"):
        raise ValueError(f"{owner}: data has NaN or infinite values, wanted finite images")
    if x.ndim == 4 and (low < 0 or high > 1):
        raise ValueError(
            f"{owner}: data has images that range from {low} to {high}, wanted values in [0, 1], "
            "or uint8; normalise inside the model"
        )
    return x.float()


def _labels(owner: str, y: Tensor, count: int) -> Tensor:
    fits = y.shape == (count,) and not y.is_floating_point() and not y.is_complex()
    if not fits or y.dtype == torch.bool or bool((y < 0).any()):
        raise ValueError(
            f"{owner}: data has labels of shape {tuple(y.shape)} and dtype {y.dtype}, wanted "
            f"({count},), integers from 0 on"
        )
    return y.detach().cpu().long()


def _check_alike(owner: str, x_train: Tensor, x_test: Tensor) -> None:
    shapes = tuple(x_train.shape[1:]), tuple(x_test.shape[1:])
    if shapes[0] != shapes[1] or x_train.dtype != x_test.dtype:
        raise ValueError(
            f"{owner}: data has training images of shape {shapes[0]}, {x_train.dtype}, and test "
            f"images of shape {shapes[1]}, {x_test.dtype}, wanted the same"
        )
