"""Winograd's minimal filtering F(m, 3), nested over any number of spatial dimensions.

Reference: Lavin & Gray, "Fast algorithms for convolutional neural networks" (2015), section 4.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class _Transform(NamedTuple):
    """One-dimensional Winograd F(m, 3): y = At [(G g) * (Bt d)] for a tile d of m + 2 inputs, g of 3 weights."""

    bt: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    at: tuple[tuple[float, ...], ...]


# Interpolation at 0, ±1, for m = 4 also ±2, and at infinity.
_TRANSFORMS = {
    2: _Transform(
        bt=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        g=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        at=((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: _Transform(
        bt=(
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        g=(
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        at=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}


def _combine(row: Sequence[float], arrays: Sequence[Array]) -> Array:
    """sum_i row[i] arrays[i], leaving out the zeros."""
    terms = [a if f == 1 else a * jnp.asarray(f, a.dtype) for f, a in zip(row, arrays, strict=True) if f]
    return functools.reduce(lax.add, terms)


def winograd_kernel(kernel: Array, m: int) -> Array:
    """The kernel in the transformed domain of F(m, 3) in every spatial dimension.

    Args:
      kernel: [3, ..., 3, c, k].
      m: outputs per tile and dimension, 2 or 4.

    Returns:
      [(m + 2) ** d, c, k] for d spatial dimensions.
    """
    for axis in range(kernel.ndim - 2):
        parts = [lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
        kernel = jnp.stack([_combine(row, parts) for row in _TRANSFORMS[m].g], axis)
    return kernel.reshape(-1, *kernel.shape[-2:])


def winograd_product(
    x: Array, transformed: Array, m: int, padding: Sequence[tuple[int, int]], precision: Any = None
) -> Array:
    """A stride-1, undilated convolution with a window of three in each of d spatial dimensions.

    Tiles of m + 2 inputs per dimension overlap by two; each gives m ** d outputs from (m + 2) ** d products instead
    of (3 m) ** d. A non-finite input spreads over its tile.

    Args:
      x: [n, *space, c].
      transformed: [(m + 2) ** d, c, k], from `winograd_kernel`.
      m: outputs per tile and dimension, 2 or 4.
      padding: non-negative (low, high) per spatial dimension.
      precision: of the product in the transformed domain.

    Returns:
      [n, *(space + low + high - 2), k].
    """
    space = x.ndim - 2
    bt, _, at = _TRANSFORMS[m]
    size = [n + lo + hi - 2 for n, (lo, hi) in zip(x.shape[1:-1], padding, strict=True)]
    tiles = [-(-n // m) for n in size]
    # F(4, 3) combines up to four terms per dimension: done for all dimensions in one fusion, they multiply.
    stage = lax.optimization_barrier if m > 2 else lambda a: a

    # Filled up to whole tiles; what that adds is cut off again at the end.
    edges = [(lo, t * m + 2 - n - lo, 0) for t, n, (lo, _) in zip(tiles, x.shape[1:-1], padding, strict=True)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    tile = lax.optimization_barrier(padded)
    for axis in range(space):
        at_axis = tile.ndim - 1 - space + axis
        parts = [lax.slice_in_dim(tile, i, i + (tiles[axis] - 1) * m + 1, m, at_axis) for i in range(m + 2)]
        tile = jnp.stack([_combine(row, parts) for row in bt])
        if axis < space - 1:
            tile = stage(tile)
    # Each dimension put its transformed axis in front: the last one is outermost.
    domain = tuple(reversed(range(space)))
    weights = transformed.reshape(*(m + 2,) * space, *transformed.shape[-2:])
    weights = lax.transpose(weights, (*domain, space, space + 1)).reshape(transformed.shape)
    product = lax.dot_general(
        tile.reshape(transformed.shape[0], -1, x.shape[-1]),
        weights,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
    )
    out = lax.optimization_barrier(product).reshape(*(m + 2,) * space, x.shape[0], *tiles, weights.shape[-1])
    for axis in reversed(range(space)):
        # The outermost transformed axis belongs to `axis`; its outputs go right behind the tile index.
        parts = [lax.index_in_dim(out, i, 0, keepdims=False) for i in range(m + 2)]
        behind = parts[0].ndim - 1 - space + axis + 1
        out = jnp.stack([_combine(row, parts) for row in at], behind)
        out = out.reshape(*parts[0].shape[: behind - 1], tiles[axis] * m, *parts[0].shape[behind:])
        if axis:
            out = stage(out)
    return lax.slice(out, (0,) * out.ndim, (x.shape[0], *size, out.shape[-1]))
