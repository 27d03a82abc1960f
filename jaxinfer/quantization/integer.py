"""Exact integer products: int8 operands, int32 sums, in the forms that the CPU's integer path accepts.

What was measured on two cores with AVX-512 VNNI (JAX 0.12) and decides the forms:

- An int8 product in canonical row-major layout is 3–4 times as fast as the float32 one (128×384×1536: 0.37 ms against
  1.6; 1024×1536×384: 1.6 against 6.1). Transposed operands, one row or one column fall off that path.
- One row of 4096 by 4096×4096: 78 ms as it is; 2.0 padded to two rows; 0.9 as four columns behind the transposed
  weights, which are then read once as they lie; float32 takes 2.3, or 1.5 with its weights transposed.
- int8 convolutions are 1.8–4 times as fast as float32's for many channels (56×56×64, 14×14×256), half as fast for
  three.
- A depthwise int8 convolution takes 5–40 ms where shifted multiply-adds take 0.1–0.35, in int32 as in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

# The most entries of a sum that an int32 holds whatever they are: 2³¹ / (128 · 128), less one.
LONGEST_SUM = (1 << 17) - 1
# How many columns a single one is padded to: fewer fall off the fast path.
_COLUMNS = 4

DotForm = Literal["rows", "columns"]


def dot(x: Any, w: Any, form: DotForm = "rows") -> jax.Array:
    """x @ w, exactly.

    Args:
        x: int8[m, k].
        w: int8[k, n], k at most :data:`LONGEST_SUM`.
        form: ``"rows"``: as it is, a single row or column padded to two. ``"columns"``: as (wᵀ xᵀ)ᵀ, with xᵀ padded to
            four columns; for few rows, and weights that lie transposed.

    Returns:
        int32[m, n].
    """
    _check(x, w, w.shape[0])
    m, n = x.shape[0], w.shape[1]
    if form == "columns":
        wide = _padded(lax.transpose(x, (1, 0)), 1, max(m, _COLUMNS))
        tall = _padded(lax.transpose(w, (1, 0)), 0, max(n, 2))
        return lax.transpose(_dot(tall, wide)[:n, :m], (1, 0))
    return _dot(_padded(x, 0, max(m, 2)), _padded(w, 1, max(n, 2)))[:m, :n]


def _dot(x: Any, w: Any) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _padded(x: Any, axis: int, size: int) -> Any:
    missing = size - x.shape[axis]
    return x if not missing else jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def convolution(x: Any, w: Any, params: Mapping[str, Any], zero: Any = 0) -> jax.Array:
    """A convolution, exactly.

    Args:
        x: int8, the image.
        w: int8, the kernel.
        params: of the convolution as JAX has them.
        zero: the code that stands for what lies beyond the edges and between dilated entries.

    Returns:
        int32.
    """
    numbers = params["dimension_numbers"]
    _check(x, w, w.size // w.shape[numbers.rhs_spec[0]])
    return lax.conv_general_dilated(
        with_edges(x, params, zero),
        w,
        params["window_strides"],
        [(0, 0)] * len(params["window_strides"]),
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        feature_group_count=params["feature_group_count"],
        preferred_element_type=jnp.int32,
    )


def depthwise(x: Any, w: Any, params: Mapping[str, Any], zero: Any = 0) -> jax.Array:
    """A convolution of each channel with a kernel of its own, as shifted multiply-adds. See :func:`convolution`.

    Works on codes, in int32, and on floating-point numbers as well.
    """
    numbers = params["dimension_numbers"]
    if x.dtype == jnp.int8:
        _check(x, w, w.size // w.shape[numbers.rhs_spec[0]])
    rank = x.ndim - 2
    image = lax.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = lax.transpose(w, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    plain = {**params, "dimension_numbers": lax.ConvDimensionNumbers((0, rank + 1, *range(1, rank + 1)), (), ())}
    image = with_edges(image, plain, zero)
    wide = jnp.int32 if x.dtype == jnp.int8 else x.dtype
    strides, holes = params["window_strides"], params["rhs_dilation"]
    spans = [h * (k - 1) + 1 for h, k in zip(holes, kernel.shape)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(image.shape[1:-1], spans, strides)]
    total: Any = None
    for at in _positions(kernel.shape[:rank]):
        start = [a * h for a, h in zip(at, holes)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, sizes, strides)]
        part = lax.slice(image, (0, *start, 0), (image.shape[0], *stop, image.shape[-1]), (1, *strides, 1))
        term = part.astype(wide) * kernel[(*at, 0)].astype(wide)
        total = term if total is None else total + term
    spec = numbers.out_spec
    return lax.transpose(total, [_plain_axis(spec, a, rank) for a in range(rank + 2)])


def is_depthwise(node: Any) -> bool:
    """Whether a convolution has a kernel of its own for each channel, and one output for each."""
    params = node.params
    if node.op != "conv_general_dilated" or params["batch_group_count"] != 1:
        return False
    numbers = params["dimension_numbers"]
    channels = node.inputs[0].shape[numbers.lhs_spec[1]]
    kernel = node.inputs[1].shape
    return channels > 1 and params["feature_group_count"] == channels == kernel[numbers.rhs_spec[0]]


def is_pointwise(node: Any) -> bool:
    """Whether a convolution is a matrix product at each position."""
    params = node.params
    if node.op != "conv_general_dilated" or params["batch_group_count"] != 1 or params["feature_group_count"] != 1:
        return False
    window = [node.inputs[1].shape[a] for a in params["dimension_numbers"].rhs_spec[2:]]
    plain = all(s == 1 for s in (*window, *params["window_strides"], *params["lhs_dilation"]))
    return plain and all(tuple(p) == (0, 0) for p in params["padding"])


def with_edges(x: Any, params: Mapping[str, Any], zero: Any) -> Any:
    """An image with what a convolution reads beyond its edges and between its entries."""
    spec = params["dimension_numbers"].lhs_spec
    padding = [(0, 0, 0)] * x.ndim
    for axis, (low, high), dilation in zip(spec[2:], params["padding"], params["lhs_dilation"]):
        padding[axis] = (low, high, dilation - 1)
    if all(p == (0, 0, 0) for p in padding):
        return x
    return lax.pad(x, jnp.asarray(zero, x.dtype).reshape(()), padding)


def _plain_axis(spec: Sequence[int], axis: int, rank: int) -> int:
    """Where an axis of the result stands in (batch, *window, channel)."""
    if axis == spec[0]:
        return 0
    return rank + 1 if axis == spec[1] else 1 + list(spec[2:]).index(axis)


def _positions(window: Sequence[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in window:
        found = [(*at, i) for at in found for i in range(size)]
    return found


def _check(x: Any, w: Any, summed: int) -> None:
    if x.dtype != jnp.int8 or w.dtype != jnp.int8:
        raise TypeError(f"integer products take int8 operands, not {x.dtype} and {w.dtype}")
    if summed > LONGEST_SUM:
        raise ValueError(f"a sum of {summed} products of int8 may not fit into int32: {LONGEST_SUM} is the most")
