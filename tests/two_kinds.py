"""A data set of bright and dark images, which any network can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_two_kinds(path: Path, *, train: int, test: int) -> Path:
    """Write so many images (8, 8), uint8, of either kind in turn, as an .npz file."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 80, (count, 8, 8))
        arrays[f"x_{part}"] = (noise + 150 * labels[:, None, None]).astype(np.uint8)
        arrays[f"y_{part}"] = labels
    np.savez(path, **arrays)
    return path
