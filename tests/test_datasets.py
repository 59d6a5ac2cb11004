"""Data sets by name and from .npz files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wcmi_fast import datasets


def arrays(n: int = 6, shape: tuple[int, ...] = (8, 8), **changed: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    found = {
        "x_train": generator.integers(0, 256, (n, *shape), dtype=np.uint8),
        "y_train": np.arange(n) % 3,
        "x_test": generator.integers(0, 256, (n // 2, *shape), dtype=np.uint8),
        "y_test": np.arange(n // 2) % 3,
    }
    return {name: array for name, array in (found | changed).items() if array is not None}


def written(folder: Path, name: str = "some.npz", **changed: Any) -> Path:
    np.savez(folder / name, **arrays(**changed))
    return folder / name


def test_grey_images_get_a_channel(tmp_path: Path) -> None:
    found, given = datasets.load(written(tmp_path)), arrays()
    assert found.x_train.dtype == torch.uint8
    assert np.array_equal(found.x_train.numpy()[:, 0], given["x_train"])
    assert found.y_test.dtype == torch.int64
    assert found.y_test.tolist() == given["y_test"].tolist()


def test_channels_may_be_last_or_first(tmp_path: Path) -> None:
    last = datasets.load(written(tmp_path, shape=(8, 8, 3)))
    first = datasets.load(written(tmp_path, shape=(3, 8, 8)))
    given = arrays(shape=(8, 8, 3))["x_train"]
    assert np.array_equal(last.x_train.numpy(), given.transpose(0, 3, 1, 2))
    assert np.array_equal(first.x_train.numpy(), arrays(shape=(3, 8, 8))["x_train"])


def test_floats_stay_and_vectors_may_be_data(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(6, 5))
    found = datasets.load(written(tmp_path, x_train=x, x_test=x, y_test=np.arange(6) % 3))
    assert found.x_train.dtype == torch.float32
    assert np.allclose(found.x_train.numpy(), x)
    images = np.linspace(0, 1, 6 * 64).reshape(6, 8, 8)
    found = datasets.load(written(tmp_path, x_train=images))
    assert np.allclose(found.x_train[:, 0].numpy(), images)


def test_a_name_is_a_file_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "svhn.npz", n=8)
    assert len(datasets.load("svhn", folder=tmp_path).x_train) == 8
    monkeypatch.setenv("WCMI_FAST_DATA", str(tmp_path))
    assert len(datasets.load("svhn").x_train) == 8


@pytest.mark.parametrize(
    ("name", "maker", "part", "labels"),
    [
        ("svhn", "SVHN", lambda options: options["split"] == "train", "labels"),
        ("mnist", "MNIST", lambda options: options.get("train", True), "targets"),
    ],
)
def test_torchvision_reads_what_lies_there(
    name: str,
    maker: str,
    part: Callable[[dict[str, Any]], bool],
    labels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake:
        def __init__(self, root: str, download: bool, **options: Any) -> None:
            n = 4 if part(options) else 2
            self.data = np.full((n, 3, 8, 8), n, dtype=np.uint8)
            setattr(self, labels, np.arange(n))

    monkeypatch.setattr(f"torchvision.datasets.{maker}", Fake)
    found = datasets.load(name, folder=tmp_path)
    assert found.x_train.shape == (4, 3, 8, 8)
    assert found.x_test.unique().tolist() == [2]
    assert found.y_train.tolist() == [0, 1, 2, 3]


def test_without_a_network_it_says_which_files_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    with pytest.raises(FileNotFoundError, match=r"mnist is not in .* put mnist.npz \(arrays x_tr"):
        datasets.load("mnist", folder=tmp_path)


def test_real_images(data_dir: Path) -> None:
    found = datasets.load("fashion_mnist", folder=data_dir)
    assert found.x_train.shape == (60_000, 1, 28, 28)
    assert torch.bincount(found.y_test).tolist() == [1000] * 10


def test_mnist5k_is_inside_a_package() -> None:
    found = datasets.load("mnist5k")
    assert len(found.x_train) + len(found.x_test) == 5000
    assert torch.bincount(torch.cat([found.y_train, found.y_test])).tolist() == [500] * 10


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"y_train": None}, "has no array y_train, wanted x_train, y_train, x_test, y_test"),
        ({"y_train": np.arange(5)}, "has 6 images in x_train and 5 labels in y_train"),
        ({"y_test": np.arange(3.0)}, "has y_test of shape .* wanted classes"),
        ({"y_test": np.arange(3) - 1}, "has y_test of shape .* integers from 0 on"),
        ({"x_test": np.zeros((3, 9, 9), np.uint8)}, r"\(1, 8, 8\) in x_train and \(1, 9, 9\)"),
        ({"x_train": np.zeros((6, 8, 8), np.int64)}, "has x_train of shape .* dtype torch.int64"),
        ({"y_test": np.array([0, 3, 1])}, "has the label 3 in y_test, and none above 2 in y_train"),
        ({"x_train": np.full((6, 8, 8), 2.0)}, "from 2 to 2 in x_train, wanted images in .0, 1."),
        ({"x_test": np.full((3, 8, 8), -0.1)}, "from -0.1 to -0.1 in x_test, wanted images in"),
        ({"x_test": np.full((3, 8, 8), np.nan)}, "has NaN or infinite values in x_test"),
        ({"x_train": np.full((6, 5), np.inf)}, "has NaN or infinite values in x_train"),
        ({"x_train": np.array([{}] * 6)}, r"cannot be read as an \.npz file"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        datasets.load(written(tmp_path, **changed))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
        datasets.load(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        datasets.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        datasets.load("fashon_mnist")
