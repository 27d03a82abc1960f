"""Winograd's minimal filtering F(m, 3), nested over any number of spatial dimensions.

Reference: Lavin & Gray, "Fast algorithms for convolutional neural networks" (2015), section 4.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class _Transform(NamedTuple):
    """One-dimensional Winograd F(m, 3): y = At [(G g) * (Bt d)] for a tile d of m + 2 inputs, g of 3 weights."""

    bt: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    at: tuple[tuple[float, ...], ...]


def _interpolating(points: Sequence[float]) -> _Transform:
    """F(m, 3) by interpolation at zero, at plus and minus each of the given points, and at infinity.

    With M(x) = x prod (x^2 - p^2): the rows of Bt are the coefficients of M(x) / (x - q) for each point q, then of
    M(x); those of G are (1, q, q^2) / M'(q), then (0, 0, 1); the columns of At are the powers of q.
    """
    nodes = [0.0, *(sign * p for p in points for sign in (1, -1))]
    size = len(nodes) + 1

    def product(roots: Sequence[float]) -> list[float]:
        coefficients = [1.0]
        for root in roots:
            shifted = [0.0, *coefficients]
            coefficients = [high - root * low for high, low in zip(shifted, [*coefficients, 0.0], strict=True)]
        return [*coefficients, *[0.0] * (size - len(coefficients))]

    others = [[p for p in nodes if p != q] for q in nodes]
    slopes = [math.prod(q - p for p in rest) for q, rest in zip(nodes, others, strict=True)]
    return _Transform(
        bt=(*(tuple(product(rest)) for rest in others), tuple(product(nodes))),
        g=(*((1 / s, q / s, q * q / s) for q, s in zip(nodes, slopes, strict=True)), (0.0, 0.0, 1.0)),
        at=tuple((*(q**i for q in nodes), float(i == size - 3)) for i in range(size - 2)),
    )


# The usual points for F(4, 3), 1 and 2, lose ten times a convolution's rounding error; 3/4 and 3/2, as exact in binary,
# lose three. (Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution", 2020.)
_TRANSFORMS = {2: _interpolating((1.0,)), 4: _interpolating((0.75, 1.5))}


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
      [(m + 2) ** d, c, k] for d spatial dimensions, the last of which varies slowest: the order in which
      `winograd_product` makes its tiles, so that neither operand of the product is ever copied.
    """
    for axis in range(kernel.ndim - 2):
        parts = [lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
        kernel = jnp.stack([_combine(row, parts) for row in _TRANSFORMS[m].g])
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
    product = lax.dot_general(
        tile.reshape(transformed.shape[0], -1, x.shape[-1]),
        transformed,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
    )
    out = lax.optimization_barrier(product).reshape(*(m + 2,) * space, x.shape[0], *tiles, transformed.shape[-1])
    for axis in reversed(range(space)):
        # The dimension transformed last is in front; its outputs go right behind its tile index.
        parts = [lax.index_in_dim(out, i, 0, keepdims=False) for i in range(m + 2)]
        behind = parts[0].ndim - 1 - space + axis + 1
        out = jnp.stack([_combine(row, parts) for row in at], behind)
        out = out.reshape(*parts[0].shape[: behind - 1], tiles[axis] * m, *parts[0].shape[behind:])
        if axis:
            out = stage(out)
    return lax.slice(out, (0,) * out.ndim, (x.shape[0], *size, out.shape[-1]))
