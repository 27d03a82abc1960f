"""Drawings of sparse matrices."""

from __future__ import annotations

from typing import Any

import numpy as np


def plot_pattern(
    rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int], groups: np.ndarray, title: str, axes: Any = None
) -> Any:
    """Draws the entries of a matrix, those of one group in one colour.

    Args:
        rows, cols: the entries.
        shape: of the matrix.
        groups: the group of each entry.
        title: above the drawing.
        axes: Matplotlib axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.figure(figsize=(5, 5)).subplots()
    side = 300.0 / max(1, *shape)
    axes.scatter(cols, rows, c=groups, cmap="tab20", s=max(0.2, side**2), marker="s", linewidths=0)
    axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5), aspect="equal", title=title)
    axes.set(xlabel="inputs", ylabel="outputs")
    return axes
