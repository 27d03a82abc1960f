"""Drawings of sparse matrices, and of the passes that they are read from."""

from __future__ import annotations

from typing import Any

import numpy as np


def plot_pattern(
    rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int], groups: np.ndarray, title: str, axes: Any = None
) -> Any:
    """Draws the entries of a matrix, those of one group in one colour; twenty colours are used in turn.

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
    axes.scatter(cols, rows, c=_colors(groups), s=max(0.2, side**2), marker="s", linewidths=0)
    axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5), aspect="equal", title=title)
    axes.set(xlabel="inputs", ylabel="outputs")
    return axes


def plot_coloring(
    rows: np.ndarray,
    cols: np.ndarray,
    shape: tuple[int, int],
    groups: np.ndarray,
    columns_of: np.ndarray,
    rows_of: np.ndarray,
    title: str,
    axes: Any = None,
) -> Any:
    """Draws the colouring of a matrix: columns and rows as stripes in the colours of their groups, entries on them.

    An entry with the colour of neither stripe it lies on is read off its mirror image.

    Args:
        rows, cols, shape, groups, title, axes: as in :func:`plot_pattern`.
        columns_of: the group of each column, -1 for none.
        rows_of: the group of each row, -1 for none.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
    """
    axes = plot_pattern(rows, cols, shape, groups, title, axes)
    for stripe, numbers in ((axes.axvspan, columns_of), (axes.axhspan, rows_of)):
        for i in np.flatnonzero(numbers >= 0):
            stripe(i - 0.5, i + 0.5, color=_colors(numbers[i]), alpha=0.3, linewidth=0, zorder=0)
    return axes


def _colors(groups: Any) -> np.ndarray:
    """Ten strong colours, then their ten light ones, which the palette has in turn."""
    from matplotlib import colormaps

    strong, light = np.arange(0, 20, 2), np.arange(1, 20, 2)
    return colormaps["tab20"](np.concatenate([strong, light])[np.asarray(groups) % 20])
