"""Convolutions and products with known weights, and what follows them, each one operation.

Both compute min(max(conv(x, w) + bias + addend, low), high), channels last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxinfer import _jax
from jaxinfer.native.primitive import kernel_primitive

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Window(NamedTuple):
    """How a two-dimensional window moves over images.

    Attributes:
        strides: from one position to the next, in pixels, along both axes.
        padding: pixels of zeros before and after the image along both axes.
        dilation: from one pixel of the window to the next, along both axes.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)


class Tail(NamedTuple):
    """What becomes of the sums.

    Attributes:
        bias: [features], or None for none. Of packed weights [features rounded up to whole panels].
        addend: an array of the shape of the result, or None for none.
        low: least value of the result; a NaN stays one.
        high: greatest value of the result.
        pool: sizes of pools of neighbouring pixels, of each of which the largest is kept; what fills none is dropped.
            There is no addend then, and depthwise convolutions have none.
    """

    bias: Any = None
    addend: Any = None
    low: float = -math.inf
    high: float = math.inf
    pool: tuple[int, int] = (1, 1)


_EVERYWHERE, _AS_THEY_ARE = Window(), Tail()


def pack(weights: Any, panel: int) -> Any:
    """Weights[a, b, k, c] as panels[c / panel, a, b, k, panel], the last one filled up with zeros."""
    rows, columns, depth, features = weights.shape
    panels = -(-features // panel)
    filled = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, panels * panel - features)))
    return jnp.transpose(filled.reshape(rows, columns, depth, panels, panel), (3, 0, 1, 2, 4))


def unpacked(panels: Any, features: int) -> Any:
    """The inverse of :func:`pack`."""
    count, rows, columns, depth, panel = panels.shape
    return jnp.transpose(panels, (1, 2, 3, 0, 4)).reshape(rows, columns, depth, count * panel)[..., :features]


def packed_convolution(
    x: Any, weights: Any, features: int, window: Window = _EVERYWHERE, tail: Tail = _AS_THEY_ARE
) -> Array:
    """A convolution with packed weights.

    Args:
        x: [images, height, width, k].
        weights: what :func:`pack` makes of w[a, b, k, features].
        features: output channels.
        window: how the window moves.
        tail: what becomes of the sums.

    Returns:
        [images, height, width, features] of the result.

    Raises:
        ValueError: if padding is negative, or there are pools and an addend.
    """
    if tail.pool != (1, 1) and tail.addend is not None:
        raise ValueError(f"pool={tail.pool}: nothing can be added to what is pooled")
    return _bind(packed_convolution_p, x, weights, window, tail, features=features, pool=tail.pool)


def depthwise_convolution(x: Any, weights: Any, window: Window = _EVERYWHERE, tail: Tail = _AS_THEY_ARE) -> Array:
    """A convolution of each channel with a window of its own.

    Args:
        x: [images, height, width, c].
        weights: [a, b, c].
        window: how the window moves.
        tail: what becomes of the sums.

    Returns:
        [images, height, width, c] of the result.

    Raises:
        ValueError: if padding is negative, or there are pools.
    """
    if tail.pool != (1, 1):
        raise ValueError(f"pool={tail.pool}: depthwise convolutions are not pooled")
    return _bind(depthwise_convolution_p, x, weights, window, tail)


def _bind(primitive: Any, x: Any, weights: Any, window: Window, tail: Tail, **params: Any) -> Array:
    if any(pixels < 0 for both in window.padding for pixels in both):
        raise ValueError(f"padding={window.padding}: kernels take no negative padding; cut the images before")
    terms = [term for term in (tail.bias, tail.addend) if term is not None]
    has = (tail.bias is not None, tail.addend is not None)
    return primitive.bind(x, weights, *terms, window=window, has=has, low=tail.low, high=tail.high, **params)


# -- the same in JAX's own operations ---------------------------------------------------------------------------------


def _plain_packed(x: Any, weights: Any, *terms: Any, window: Window, features: int, pool: Any, **tail: Any) -> Any:
    result = _with_tail(_convolved(x, unpacked(weights, features), window), terms, **tail)
    if pool == (1, 1):
        return result
    sizes = (1, *pool, 1)
    return lax.reduce_window(result, -jnp.inf, lax.max, sizes, sizes, "VALID")


def _plain_depthwise(x: Any, weights: Any, *terms: Any, window: Window, **tail: Any) -> Any:
    return _with_tail(_convolved(x, weights[:, :, None], window, groups=weights.shape[-1]), terms, **tail)


def _convolved(x: Any, weights: Any, window: Window, groups: int = 1) -> Any:
    return lax.conv_general_dilated(
        x,
        weights,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def _with_tail(sums: Any, terms: Sequence[Any], has: tuple[bool, bool], low: float, high: float) -> Any:
    if has[0]:
        sums = sums + terms[0][: sums.shape[-1]]
    if has[1]:
        sums = sums + terms[-1]
    sums = sums if low == -math.inf else jnp.maximum(sums, low)
    return sums if high == math.inf else jnp.minimum(sums, high)


# -- primitives -------------------------------------------------------------------------------------------------------


def _kernel(target: str) -> Callable[..., Any]:
    def kernel(ctx: Any, operands: Any, *, window: Window, has: Any, low: Any, high: Any, **params: Any) -> Any:
        pool = params.get("pool")
        numbers = [*window.strides, *(before for before, _ in window.padding), *window.dilation]
        return jax.ffi.ffi_lowering(target)(
            ctx,
            *operands,
            window=np.array(numbers, np.int64),
            has=np.array(has, np.int64),
            clamp=np.array([low, high], np.float32),
            **({} if pool is None else {"pool": np.array(pool, np.int64)}),
        )

    return kernel


def _abstract(plain: Callable[..., Any]) -> Callable[..., Any]:
    def abstract(*avals: Any, **params: Any) -> Any:
        shape = jax.eval_shape(functools.partial(plain, **params), *map(_jax.to_struct, avals))
        return jax.core.ShapedArray(shape.shape, shape.dtype)

    return abstract


packed_convolution_p, depthwise_convolution_p = (
    kernel_primitive(name, plain, _abstract(plain), _kernel(target))
    for name, plain, target in (
        ("packed_convolution", _plain_packed, "jaxinfer_convolution"),
        ("depthwise_convolution", _plain_depthwise, "jaxinfer_depthwise"),
    )
)
