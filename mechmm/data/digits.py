"""scikit-learn's real handwritten digits (UCI ML hand-written digits, 1797 images of 8 x 8).

The split is fixed: what `split("test")` returns is never shown to the demo model in training.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images, data.target


@cache
def split(part: str) -> tuple[int, ...]:
    """Indices of the `"train"` (80 %) or `"test"` (20 %) images, stratified, seed 0.

    Raises:
        ValueError: for any other name.
    """
    if part not in ("train", "test"):
        raise ValueError(f"unknown part {part!r}; use 'train' or 'test'")
    labels = _digits()[1]
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return tuple(int(index) for index in (train if part == "train" else test))


def digit_label(index: int) -> str:
    """The digit that image `index` shows, as one character."""
    return str(_digits()[1][index])


def digit_image(index: int) -> Image.Image:
    """Image `index` as an 8 x 8 grey picture, 255 where there is ink."""
    return Image.fromarray((_digits()[0][index] / 16 * 255).astype(np.uint8), "L")


def with_label(label: str, part: str = "train") -> tuple[int, ...]:
    """Indices of the images of one part that show `label`."""
    return tuple(index for index in split(part) if digit_label(index) == label)
