"""Images in folders of classes, as torchvision's ImageFolder has them, read into tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wcmi_fast.data import Data

PARTS = ("train", "test")
# A folder of the second name serves where there is none of the first.
TEST_NAMES = ("test", "val")
GREY_MODES = ("1", "L", "LA")
# Of more than eight bits; Pillow cuts what is above 255 off.
WIDE_MODES = ("I", "F")
# What Pillow raises for files that are broken in one way or another.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
SHOWN_NAMES = 5

Sample = tuple[Path, int]


def load(folder: Path) -> Data:
    """Read the images of folder/train/CLASS/ and folder/test/CLASS/ (or val) into memory.

    All are decoded and held in memory, as uint8: N * C * H * W bytes. Their order is random, but
    always the same, because ImageFolder's is by class, and a slice would be of few classes. Classes
    are numbered by their names' order. Images are grey (C = 1) if all of them are; else RGB.

    Args:
        folder: holds train, and test or val, each with a folder per class.

    Returns:
        Images (N, C, H, W), uint8, and classes (N,), int64.

    Raises:
        FileNotFoundError: a part, or all of its classes, are not there.
        ValueError: classes that only one part has, or without images; an image that cannot be read,
            has more than 8 bits, or is not of the size of the first one: the first such file is
            named.
    """
    train, test = (_listed(_part(folder, name)) for name in PARTS)
    _check_classes(folder, train, test)
    samples = [[s for found in part.values() for s in found] for part in (train, test)]
    size, channels = _form([file for part in samples for file, _ in part])
    (x_train, y_train), (x_test, y_test) = (_read(part, size, channels) for part in samples)
    return Data(x_train, y_train, x_test, y_test)


def _part(folder: Path, name: str) -> Path:
    names = TEST_NAMES if name == "test" else (name,)
    for each in names:
        if (folder / each).is_dir():
            return folder / each
    raise FileNotFoundError(
        f"load: {folder} has no folder {' or '.join(names)}, wanted train and test (or val), each "
        "with a folder of images per class"
    )


def _listed(part: Path) -> dict[str, list[Sample]]:
    """Return each class's files with its number, in torchvision's order."""
    from torchvision.datasets import folder

    try:
        names, numbers = folder.find_classes(part)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"load: {part} has no folders, wanted one of images per class"
        ) from error
    every = folder.make_dataset(part, numbers, extensions=folder.IMG_EXTENSIONS, allow_empty=True)
    found: dict[str, list[Sample]] = {name: [] for name in names}
    for file, number in every:
        found[names[number]].append((Path(file), number))
    for name, files in found.items():
        if not files:
            raise ValueError(
                f"load: {part / name} has no images, wanted files that end in "
                f"{', '.join(folder.IMG_EXTENSIONS)}"
            )
    return found


def _check_classes(folder: Path, train: Iterable[str], test: Iterable[str]) -> None:
    for part, only in (("train", set(train) - set(test)), ("test", set(test) - set(train))):
        if only:
            shown = ", ".join(sorted(only)[:SHOWN_NAMES])
            more = f" and {len(only) - SHOWN_NAMES} more" if len(only) > SHOWN_NAMES else ""
            raise ValueError(
                f"load: {folder} has classes in its {part} folder only ({shown}{more}), wanted "
                "the same in both"
            )


def _form(files: Sequence[Path]) -> tuple[tuple[int, int], int]:
    """Return the images' width and height and the number of channels, from the files' heads."""
    wanted, grey = None, True
    for file in files:
        size, mode = _head(file)
        wanted = wanted or size
        if size != wanted:
            raise ValueError(
                f"load: {file} has {size[0]}x{size[1]} pixels (width x height), wanted "
                f"{wanted[0]}x{wanted[1]}, as {files[0]} has"
            )
        if mode.startswith(WIDE_MODES):
            raise ValueError(f"load: {file} has pixels of mode {mode}, wanted 8 bits per channel")
        grey = grey and mode in GREY_MODES
    return wanted or (0, 0), 1 if grey else 3


def _head(file: Path) -> tuple[tuple[int, int], str]:
    try:
        with Image.open(file) as image:
            return image.size, image.mode
    except UNREADABLE as error:
        raise _unreadable(file, error) from error


def _read(samples: Sequence[Sample], size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    width, height = size
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    x = torch.empty(len(samples), channels, height, width, dtype=torch.uint8)
    for row, at in enumerate(order.tolist()):
        x[row] = _pixels(samples[at][0], channels)
    return x, torch.tensor([number for _, number in samples])[order]


def _pixels(file: Path, channels: int) -> Tensor:
    """Return an image's (C, H, W)."""
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except UNREADABLE as error:
        raise _unreadable(file, error) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"load: {file} cannot be read as an image: {error}")
