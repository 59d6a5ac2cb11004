"""What a measurement takes as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from wcmi_fast import datasets
from wcmi_fast.data import Data
from wcmi_fast.information.source import Samples, samples


def images(n: int) -> Tensor:
    """Image i has the value i / n everywhere."""
    return (torch.arange(n) / n).view(n, 1, 1, 1).expand(n, 1, 4, 4).clone()


def numbers(x: Tensor, n: int) -> list[int]:
    """Return which of images(n) these are."""
    return (x.flatten(1)[:, 0] * n).round().int().tolist()


LABELS = torch.arange(40) % 4


def test_labelled_images_are_split_in_halves_by_class() -> None:
    found = samples("f", (images(40), LABELS), seed=0)
    train, test = numbers(found.x_train, 40), numbers(found.x_test, 40)
    assert sorted(train + test) == list(range(40))
    assert found.y_train is not None
    assert found.y_test is not None
    assert found.y_train.tolist() == [i % 4 for i in train]
    assert found.y_test.tolist() == [i % 4 for i in test]
    assert found.y_train.bincount().tolist() == [5] * 4
    assert found.name == "tensors"
    assert not found.unequal_batches


def test_the_split_is_decided_by_the_seed() -> None:
    one, same, other = (numbers(samples("f", images(40), seed).x_test, 40) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_images_alone_have_no_labels() -> None:
    found = samples("f", images(40), seed=0)
    assert found.y_train is None
    assert found.y_test is None
    both = numbers(found.x_train, 40) + numbers(found.x_test, 40)
    assert sorted(both) == list(range(40))
    assert len(found.x_test) == 20


def test_training_and_test_images_are_not_split() -> None:
    found = samples("f", (images(40), images(20)), seed=0)
    assert numbers(found.x_train, 40) == list(range(40))
    assert numbers(found.x_test, 20) == list(range(20))


@pytest.mark.parametrize("batch", [10, 16])
def test_a_loader_is_read(batch: int) -> None:
    loader = DataLoader(TensorDataset(images(40), LABELS), batch_size=batch)
    found = samples("f", loader, seed=0)
    assert found.unequal_batches == (batch == 16)
    assert found.y_test is not None
    assert found.y_test.tolist() == [i % 4 for i in numbers(found.x_test, 40)]
    assert len(found.x_train) + len(found.x_test) == 40
    assert found.name == "loader"


def test_a_loader_of_images_alone() -> None:
    found = samples("f", (images(40)[i : i + 8] for i in range(0, 40, 8)), seed=0)
    assert found.y_train is None
    assert len(found.x_train) == 20


def test_arrays_and_doubles_are_taken_as_tensors() -> None:
    pair = (images(40).double().numpy(), LABELS.numpy().astype(np.int32))
    found, wanted = samples("f", pair, seed=0), samples("f", (images(40), LABELS), seed=0)
    assert found.x_train.dtype == torch.float32
    assert torch.equal(found.x_train, wanted.x_train)
    assert found.y_train is not None
    assert wanted.y_train is not None
    assert torch.equal(found.y_train, wanted.y_train)


def test_an_npz_file(tmp_path: Path) -> None:
    bytes_ = (images(40) * 255).byte()
    file = tmp_path / "some.npz"
    y = LABELS.numpy()
    np.savez(file, x_train=bytes_, y_train=y, x_test=bytes_[:20], y_test=y[:20])
    for given in (file, str(file)):
        found = samples("f", given, seed=0)
        assert torch.equal(found.x_train, bytes_)
        assert torch.equal(found.x_test, bytes_[:20])
        assert found.name == str(file)


def test_a_name(data_dir: Path) -> None:
    found = samples("f", "fashion_mnist", seed=0)
    assert torch.equal(found.x_test, datasets.load("fashion_mnist").x_test)
    assert found.name == "fashion_mnist"


def test_data_are_taken_as_they_are() -> None:
    data = Data(images(40), LABELS, images(20), LABELS[:20])
    found = samples("f", data, seed=0)
    assert numbers(found.x_train, 40) == list(range(40))
    assert numbers(found.x_test, 20) == list(range(20))
    assert found.y_train is not None
    assert found.y_test is not None
    assert found.y_train.tolist() == LABELS.tolist()
    assert found.y_test.tolist() == LABELS[:20].tolist()


def test_images_are_drawn_in_random_order_with_their_labels() -> None:
    found = samples("f", Data(images(40), LABELS, images(40), LABELS), seed=0)
    one, same, other = (found.drawn(10, 12, seed) for seed in (0, 0, 1))
    assert len(one.x_train) == 10
    assert len(one.x_test) == 12
    test = numbers(one.x_test, 40)
    assert test != sorted(test)
    assert max(test) > 20  # of all, not of the first
    assert len(set(test)) == 12
    assert one.y_test is not None
    assert one.y_test.tolist() == [i % 4 for i in test]
    assert one.y_train is not None
    train = numbers(one.x_train, 40)
    assert one.y_train.tolist() == [i % 4 for i in train]
    assert train != sorted(train)
    assert torch.equal(one.x_test, same.x_test)
    assert not torch.equal(one.x_test, other.x_test)
    assert sorted(numbers(found.drawn(None, None, 0).x_test, 40)) == list(range(40))


def test_the_first_images_with_their_labels() -> None:
    found = Samples(images(40), LABELS, images(40), None, "x", False).first(3, None)
    assert numbers(found.x_train, 40) == [0, 1, 2]
    assert found.y_train is not None
    assert found.y_train.tolist() == [0, 1, 2]
    assert len(found.x_test) == 40
    assert found.y_test is None


NAN = images(40)
NAN[3, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("data", "kind", "sentence"),
    [
        (3, TypeError, "data is a int, wanted a data set's name"),
        ((images(4),) * 3, TypeError, "data is 3 tensors, wanted a pair"),
        ([{"x": 1}], TypeError, "data is a list that yields no batches of tensors"),
        ([], TypeError, "data is a list that yields no batches of tensors"),
        (images(40)[:, 0], ValueError, r"shape \(40, 4, 4\) and dtype torch.float32, wanted \(N"),
        (LABELS, ValueError, r"images of shape \(40,\) and dtype torch.int64"),
        (images(40).long(), ValueError, "dtype torch.int64, wanted"),
        (NAN, ValueError, "NaN or infinite values, wanted finite images"),
        (3 * images(40), ValueError, r"range from 0.0 to 2.92\d+, wanted values in \[0, 1\]"),
        (-images(40), ValueError, r"range from -0.97\d+ to -?0.0"),
        ((images(40), LABELS[:7]), ValueError, r"labels of shape \(7,\) .* wanted \(40,\)"),
        ((images(40), LABELS.float()), ValueError, "dtype torch.float32, wanted"),
        ((images(40), -LABELS), ValueError, "integers from 0 on"),
        ((images(40), images(9)[:, :, :2]), ValueError, r"\(1, 4, 4\), torch.float32, and test"),
        ((images(40), (images(9) * 255).byte()), ValueError, "torch.uint8, wanted the same"),
        (images(1), ValueError, "data has 1 images, wanted some to train and some to test"),
        ("fashion_mnits", ValueError, "did you mean 'fashion_mnist'"),
    ],
)
def test_data_that_cannot_be_measured(data: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        samples("f", data, seed=0)


def test_vectors_have_no_limits() -> None:
    x = 5 * torch.randn(40, 3)
    assert samples("f", (x, x[:10]), seed=0).x_train is not None
