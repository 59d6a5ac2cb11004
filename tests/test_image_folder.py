"""Folders of images, as torchvision's ImageFolder has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from wcmi_fast import datasets
from wcmi_fast.cli import main

CLASSES = ("bird", "cat", "dog")


def picture(seed: int, width: int = 10, height: int = 8, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def written(folder: Path, mode: str = "RGB", test: str = "test", classes: int = 3) -> Path:
    """Write four training and two test images of each class, some of them deeper down."""
    for part, count in (("train", 4), (test, 2)):
        for k, name in enumerate(CLASSES[:classes]):
            for i in range(count):
                file = folder / part / name / ("deeper" if i == 1 else ".") / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(100 * len(part) + 10 * k + i, mode=mode).save(file)
    return folder


def as_rows(images: list[np.ndarray], labels: list[int]) -> set[tuple[bytes, int]]:
    return {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)}


def test_images_and_classes_are_torchvisions(tmp_path: Path) -> None:
    found = datasets.load(written(tmp_path))
    assert (found.x_train.shape, found.x_train.dtype) == ((12, 3, 8, 10), torch.uint8)
    assert (found.x_test.shape, found.y_test.dtype) == ((6, 3, 8, 10), torch.int64)
    for part, x, y in (
        ("train", found.x_train, found.y_train),
        ("test", found.x_test, found.y_test),
    ):
        theirs = ImageFolder(str(tmp_path / part))
        wanted = as_rows([np.asarray(image) for image, _ in theirs], theirs.targets)
        assert as_rows([row.permute(1, 2, 0).numpy() for row in x], y.tolist()) == wanted


def test_the_order_mixes_classes_and_is_always_the_same(tmp_path: Path) -> None:
    first, again = (datasets.load(written(tmp_path)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.y_train.tolist() != sorted(first.y_train.tolist())


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    folder = written(tmp_path, mode="L")
    found = datasets.load(folder)
    assert found.x_train.shape == (12, 1, 8, 10)
    given = np.asarray(Image.open(folder / "test" / "cat" / "0.png"))
    assert any(np.array_equal(row[0].numpy(), given) for row in found.x_test)
    # One image with colours gives all of them three.
    picture(0).save(folder / "test" / "dog" / "0.png")
    assert datasets.load(folder).x_train.shape == (12, 3, 8, 10)


def test_val_serves_where_there_is_no_test(tmp_path: Path) -> None:
    assert len(datasets.load(written(tmp_path, test="val")).x_test) == 6
    written(tmp_path, classes=3, test="test")
    (tmp_path / "test" / "cat" / "0.png").unlink()
    assert len(datasets.load(str(tmp_path)).x_test) == 5


@pytest.mark.slow
def test_train_and_measure_take_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written(tmp_path / "birds").parent)
    small = ["--epochs", "1", "--batch-size", "4", "--steps", "1"]
    main(["train", "classifier", "--data", "birds", *small, "--out", "c"])
    assert json.loads(Path("c", "results.json").read_text())["test_images"] == 6
    network = ["--model", "baseline_h", "--checkpoint", "c/classifier.safetensors"]
    small += ["--trials", "1", "--units", "4", "--batch-size", "3", "--eps", "0.1"]
    main(["measure", "--data", "birds", *network, *small, "--out", "m"])
    assert json.loads(Path("m", "report.json").read_text())["classes"] == 3


# Bad input


def another_size(folder: Path) -> None:
    picture(0, 9).save(folder / "train" / "dog" / "2.png")
    picture(0, 11).save(folder / "test" / "bird" / "0.png")


def wide(folder: Path) -> None:
    pixels = np.zeros((8, 10), dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "test" / "cat" / "0.png")


def text(folder: Path) -> None:
    (folder / "train" / "cat" / "3.png").write_text("no image")


def truncated(folder: Path) -> None:
    file = folder / "test" / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:-60])


def emptied(folder: Path) -> None:
    for name in ("0.png", "deeper/1.png"):
        (folder / "test" / "cat" / name).unlink()
    (folder / "test" / "cat" / "readme.txt").touch()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (another_size, r"train/dog/2\.png has 9x8 pixels .* wanted 10x8, as .*train/bird/0\.png"),
        (wide, r"test/cat/0\.png has pixels of mode I;16, wanted 8 bits per channel"),
        (text, r"train/cat/3\.png cannot be read as an image: "),
        (truncated, r"test/cat/0\.png cannot be read as an image: "),
        (emptied, r"test/cat has no images, wanted files that end in \.jpg, \.jpeg, \.png"),
        (lambda d: (d / "train" / "eel").mkdir(), "train/eel has no images, wanted files"),
    ],
)
def test_images_that_do_not_fit(
    broken: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    broken(written(tmp_path))
    with pytest.raises(ValueError, match=f"^load: .*{sentence}"):
        datasets.load(tmp_path)


def test_classes_of_one_part_only(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "cat")
    with pytest.raises(ValueError, match=r"in its train folder only \(cat\), wanted the same"):
        datasets.load(tmp_path)
    (tmp_path / "cat").rename(tmp_path / "test" / "cat")
    for i in range(7):
        file = tmp_path / "test" / f"eel{i}" / "0.png"
        file.parent.mkdir()
        picture(i).save(file)
    with pytest.raises(
        ValueError, match=r"test folder only \(eel0, eel1, eel2, eel3, eel4 and 2 more"
    ):
        datasets.load(tmp_path)


def test_folders_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no folder train, wanted train and test \(or"):
        datasets.load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="train has no folders, wanted one of images per"):
        datasets.load(tmp_path)
    written(tmp_path, test="validation")
    with pytest.raises(FileNotFoundError, match="has no folder test or val, wanted train and test"):
        datasets.load(tmp_path)
    with pytest.raises(ValueError, match="or a folder that is there"):
        datasets.load(tmp_path / "none")
