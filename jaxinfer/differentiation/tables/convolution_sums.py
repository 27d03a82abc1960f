"""Cotangents of convolutions as sums over the positions of the window, for XLA's CPU backend.

That backend computes a convolution whose window is a whole image, as the gradient of a kernel is, or whose image has
gaps, as the gradient of a strided one has, through its general path; with as many groups as channels it takes up to
several hundred times as long as the sums here, which are read off the definition

    y[n, p, k] = sum_t sum_c x[n, s p + d t - b, c] w[t, c, k].

Which form serves is read off the shapes. Inside, arrays are channels-last: x[n, *space, c], w[*window, c / groups, k]
and y[n, *positions, k].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.graph import Node

# The program grows with the positions of the window, and with the phases of the strides.
_MOST_TAPS = 121
_MOST_PHASES = 64
# Up to this size all products of a window with a cotangent are made at once, else one row of the window at a time.
_MOST_BYTES = 64 << 20
# Up to these many positions XLA's convolution is behind a product with the columns; measured for 128 to 2048 channels.
_FEW_POSITIONS = {"image": 200, "kernel": 64}


class Window(NamedTuple):
    """Where a window stands, one entry for each spatial axis where it is a tuple.

    Attributes:
        taps: its size.
        strides: distance of its places.
        dilation: distance of its positions.
        before: padding before the image.
        depthwise: whether each channel of the image is a group of its own; otherwise there is one group.
        precision: of products.
        dtype: that products are asked for.
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    depthwise: bool
    precision: Any
    dtype: Any


def image_as_sums(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The image's cotangent, or None where XLA's convolution serves as well.

    Args:
        node: the convolution.
        ct: the cotangent of its result.
        x: the image; only its shape is used.
        kernel: the kernel.
    """
    window = _window(node, ct, x, kernel, "image")
    if window is None:
        return None
    x_spec, kernel_spec, out_spec = node.params["dimension_numbers"]
    shape = [x.shape[i] for i in (*x_spec[2:], x_spec[1])]
    ct = lax.transpose(ct, _channels_last(out_spec))
    weights = lax.transpose(kernel, _kernel_last(kernel_spec)).astype(ct.dtype)
    found = (_depthwise_image if window.depthwise else _dense_image)(ct, weights, shape, window)
    return lax.transpose(found, _inverse(_channels_last(x_spec)))


def kernel_as_sums(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The kernel's cotangent, or None where XLA's convolution serves as well.

    Args:
        node: the convolution.
        ct: the cotangent of its result.
        x: the image.
        kernel: the kernel; only its shape is used.
    """
    window = _window(node, ct, x, kernel, "kernel")
    if window is None:
        return None
    x_spec, kernel_spec, out_spec = node.params["dimension_numbers"]
    ct = lax.transpose(ct, _channels_last(out_spec))
    image = lax.transpose(x, _channels_last(x_spec)).astype(ct.dtype)
    found = (_depthwise_kernel if window.depthwise else _dense_kernel)(image, ct, window)
    return lax.transpose(found, _inverse(_kernel_last(kernel_spec)))


def _window(node: Node, ct: Any, x: Any, kernel: Any, what: str) -> Window | None:
    """The window where one of the forms here serves better than a convolution, else None."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    groups, channels = p["feature_group_count"], x.shape[x_spec[1]]
    if jax.default_backend() != "cpu" or p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]):
        return None
    sizes = [n for a in (ct, x, kernel) for n in a.shape]
    if not all(type(n) is int and n > 0 for n in sizes) or p.get("out_sharding") is not None:
        return None
    taps = tuple(kernel.shape[i] for i in kernel_spec[2:])
    strides = tuple(p["window_strides"])
    depthwise = groups == channels > 1
    if not taps or math.prod(taps) > _MOST_TAPS or (groups > 1 and not depthwise):
        return None
    if what == "image" and math.prod(taps) > 1 and math.prod(strides) > _MOST_PHASES:
        return None
    positions = ct.size // ct.shape[out_spec[1]]
    if not depthwise and math.prod(taps) > 1 and positions > _FEW_POSITIONS[what]:
        return None
    before = tuple(low for low, _ in p["padding"])
    dtype = p["preferred_element_type"]
    return Window(taps, strides, tuple(p["rhs_dilation"]), before, depthwise, p["precision"], dtype)


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[0], *spec[2:], spec[1])


def _kernel_last(spec: Sequence[int]) -> tuple[int, ...]:
    return (*spec[2:], spec[1], spec[0])


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(permutation.index(i) for i in range(len(permutation)))


def _accumulator(dtype: Any) -> Any:
    """The type sums are kept in: float32 for narrower floats."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def _pad(x: Array, low: Sequence[int], high: Sequence[int], gaps: Sequence[int] | None = None) -> Array:
    """Zeros before, after and between along the spatial axes; negative ones crop."""
    edges = list(zip(low, high, gaps or [0] * len(low)))
    edges = [(0, 0, 0), *edges, *[(0, 0, 0)] * (x.ndim - 1 - len(low))]
    return lax.pad(x, jnp.zeros((), x.dtype), edges) if any(map(any, edges)) else x


def _cut(x: Array, start: Sequence[int], size: Sequence[int], strides: Sequence[int]) -> Array:
    """x[:, start + strides * i] for i < size, along the spatial axes."""
    if (*size,) == x.shape[1 : 1 + len(size)]:
        return x
    rest = x.shape[1 + len(start) :]
    stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides)]
    return lax.slice(x, (0, *start, *[0] * len(rest)), (x.shape[0], *stop, *rest), (1, *strides, *[1] * len(rest)))


def _taps(window: Window) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, window.taps)))


# -- kernels ----------------------------------------------------------------------------------------------------------


def _padded(x: Array, places: Sequence[int], window: Window) -> Array:
    """The image with its padding, at least as far as a window that stands at so many places along each axis reads it.

    It is put behind a barrier, without which XLA computes what the image comes from once for each position of the
    window, unless there is but one.
    """
    read = [(n - 1) * s + (t - 1) * d + 1 for n, s, t, d in zip(places, window.strides, window.taps, window.dilation)]
    high = [r - size - low for r, size, low in zip(read, x.shape[1:], window.before)]
    if len(_taps(window)) > 1:
        return lax.optimization_barrier(_pad(x, window.before, high))
    return _pad(x, window.before, [max(0, h) for h in high])


def _depthwise_kernel(x: Array, ct: Array, window: Window) -> Array:
    """dw[t, c, m] = sum_{n, p} x[n, s p + d t - b, c] dy[n, p, (c, m)].

    All products stand side by side before they are summed: XLA's sums are fast over what is there already. Written as
    one view of the image they take half as long to compile as one slice for each position.
    """
    channels, outer = x.shape[-1], ct.shape[-1] // x.shape[-1]
    places, wide = ct.shape[1:-1], _accumulator(ct.dtype)
    last = (channels, *[outer] * (outer > 1))
    padded = _padded(x, places, window).astype(wide)
    if outer > 1:
        padded = lax.reshape(padded, (*padded.shape, 1))
    given = lax.optimization_barrier(ct.astype(wide))

    def sums(view: Array, first: int) -> Array:
        """Over all places; the view's axes before ``first`` are places only."""
        for i in range(len(places) - 1, first - 1, -1):
            view = _shifted(view, 1 + i, window.taps[i], places[i], window.strides[i], window.dilation[i])
        apart = (ct.shape[0], *places[:first], *(n for p in places[first:] for n in (1, p)), *last)
        products = lax.optimization_barrier(view * lax.reshape(given, apart))
        summed = (*range(1 + first), *range(2 + first, 2 * len(places) + 1 - first, 2))
        return lax.reduce_sum(products, summed)

    if ct.size * math.prod(window.taps) * jnp.dtype(wide).itemsize <= _MOST_BYTES:
        found = sums(padded, 0)
    else:
        rows, stride = places[0], window.strides[0]

        def row(t: Array) -> Array:
            reads = lax.dynamic_slice_in_dim(padded, t * window.dilation[0], (rows - 1) * stride + 1, 1)
            return sums(lax.slice_in_dim(reads, 0, None, stride, 1), 1)

        found = lax.map(row, jnp.arange(window.taps[0]))
    return found.reshape(*window.taps, 1, channels * outer).astype(ct.dtype)


def _shifted(x: Array, axis: int, taps: int, places: int, stride: int, dilation: int) -> Array:
    """x[..., s p + d t, ...] as [..., t, p, ...], where the axis is at least as long as that reads.

    The axis, repeated and cut again into pieces that are d longer, starts d later in each piece.
    """
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    other = [i for i in range(x.ndim + 1) if i != axis]
    repeated = lax.broadcast_in_dim(x, (*before, taps, size, *after), other)
    flat = lax.reshape(repeated, (*before, taps * size, *after))
    edges = [(0, taps * dilation if i == axis else 0, 0) for i in range(x.ndim)]
    pieces = lax.reshape(lax.pad(flat, jnp.zeros((), x.dtype), edges), (*before, taps, size + dilation, *after))
    return lax.slice_in_dim(pieces, 0, (places - 1) * stride + 1, stride, axis + 1)


def _dense_kernel(x: Array, ct: Array, window: Window) -> Array:
    """dw[t, c, k] = sum_{n, p} x[n, s p + d t - b, c] dy[n, p, k]: one product with the columns."""
    places = ct.shape[1:-1]
    taps = _taps(window)
    padded = _padded(x, places, window)
    reads = [_cut(padded, [t * d for t, d in zip(tap, window.dilation)], places, window.strides) for tap in taps]
    columns = reads[0] if len(reads) == 1 else lax.concatenate(reads, x.ndim - 1)
    rows = math.prod(columns.shape[:-1])
    product = lax.dot_general(
        columns.reshape(rows, -1),
        ct.reshape(rows, -1),
        (((0,), (0,)), ((), ())),
        precision=window.precision,
        preferred_element_type=window.dtype,
    )
    return product.reshape(*window.taps, x.shape[-1], ct.shape[-1])


def _total(terms: Sequence[Array]) -> Array:
    return functools.reduce(lax.add, terms)


# -- images -----------------------------------------------------------------------------------------------------------


def _depthwise_image(ct: Array, kernel: Array, shape: Sequence[int], window: Window) -> Array:
    """dx[n, q, c] = sum_t sum_m dy[n, (q + b - d t) / s, (c, m)] w[t, c, m]."""
    *size, channels = shape
    outer = ct.shape[-1] // channels
    wide = _accumulator(ct.dtype)
    last = [channels, *[outer] * (outer > 1)]
    weights = lax.reshape(kernel, [math.prod(window.taps), *[1] * len(size), *last]).astype(wide)
    given = lax.reshape(ct, [*ct.shape[:-1], *last])
    index = {tap: i for i, tap in enumerate(_taps(window))}

    def term(reads: Array, tap: tuple[int, ...], start: Sequence[int], length: Sequence[int]) -> Array:
        mine = lax.slice_in_dim(weights, index[tap], index[tap] + 1)
        return _cut(reads, start, length, [1] * len(size)).astype(wide) * mine

    found = _spread(given, size, window, term)
    return (found if outer == 1 else lax.reduce_sum(found, (found.ndim - 1,))).astype(ct.dtype)


def _dense_image(ct: Array, kernel: Array, shape: Sequence[int], window: Window) -> Array:
    """dx[n, q, c] = sum_t (dy w[t]ᵀ)[n, (q + b - d t) / s, c]: one product, its columns added where they belong."""
    *size, channels = shape
    taps = _taps(window)
    product = lax.dot_general(
        ct.reshape(-1, ct.shape[-1]),
        kernel.reshape(-1, ct.shape[-1]),
        (((1,), (1,)), ((), ())),
        precision=window.precision,
        preferred_element_type=window.dtype,
    )
    if len(taps) == 1:
        gaps = [s - 1 for s in window.strides]
        reach = [(n - 1) * s + 1 for n, s in zip(ct.shape[1:], window.strides)]
        high = [n + b - r for n, b, r in zip(size, window.before, reach)]
        return _pad(lax.reshape(product, [*ct.shape[:-1], channels]), [-b for b in window.before], high, gaps)
    columns = product.reshape(*ct.shape[:-1], len(taps), channels)
    index = {tap: i for i, tap in enumerate(taps)}

    def term(reads: Array, tap: tuple[int, ...], start: Sequence[int], length: Sequence[int]) -> Array:
        low = (0, *start, index[tap], 0)
        high = (reads.shape[0], *(a + n for a, n in zip(start, length)), index[tap] + 1, channels)
        return lax.squeeze(lax.slice(reads, low, high), [reads.ndim - 2])

    return _spread(columns, size, window, term)


Term = Callable[[Array, tuple[int, ...], Sequence[int], Sequence[int]], Array]


def _spread(given: Array, size: Sequence[int], window: Window, term: Term) -> Array:
    """The sum over the window's positions t of what stands at (q + b - d t) / s, at every place q of the image.

    Places that leave the same remainder by the strides have the same positions of the window; each such phase is a sum
    without gaps, and they are interleaved in the end.

    Args:
        given: what there is at each place of the window; axes after the spatial ones are the terms'.
        size: of the image.
        window: the window.
        term: ``term(padded, t, start, length)``: what position t contributes, read from so many places on.
    """
    axes = [_phases(t, s, d, b) for t, s, d, b in zip(window.taps, window.strides, window.dilation, window.before)]
    lengths = [-(-n // s) for n, s in zip(size, window.strides)]
    starts = [[a for phase in axis for _, a in phase] for axis in axes]
    low = [max(0, -min(a, default=0)) for a in starts]
    high = [max(a, default=0) + m - n for a, m, n in zip(starts, lengths, given.shape[1:])]
    padded = lax.optimization_barrier(_pad(given, low, high))

    def phase(*chosen: list[tuple[int, int]]) -> Array:
        terms = []
        for reads in itertools.product(*chosen):
            tap = tuple(t for t, _ in reads)
            terms.append(term(padded, tap, [a + b for (_, a), b in zip(reads, low)], lengths))
        return _total(terms) if terms else empty

    empty = jnp.zeros_like(jax.eval_shape(lambda x: term(x, (0,) * len(size), [0] * len(size), lengths), padded))

    def interleaved(*chosen: list[tuple[int, int]]) -> Array:
        axis = len(chosen)
        if axis == len(axes):
            return phase(*chosen)
        parts = [interleaved(*chosen, each) for each in axes[axis]]
        if len(parts) == 1:
            return parts[0]
        apart = jnp.stack(parts, 2 + axis)
        joined = apart.reshape(*apart.shape[: 1 + axis], -1, *apart.shape[3 + axis :])
        return lax.slice_in_dim(joined, 0, size[axis], axis=1 + axis)

    return interleaved()


def _phases(taps: int, stride: int, dilation: int, before: int) -> list[list[tuple[int, int]]]:
    """For each remainder of places by the stride: the window's positions t that meet it, with (q + b - d t) / s."""
    found = []
    for q in range(stride):
        reached = [(t, q + before - dilation * t) for t in range(taps)]
        found.append([(t, a // stride) for t, a in reached if a % stride == 0])
    return found
