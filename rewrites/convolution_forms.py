"""Equivalent forms of a convolution, as plain JAX functions.

Every form takes the operands and the parameters of `conv_general_dilated` as they stand in a jaxpr
(`form(x, kernel, **params)`) and returns what that primitive returns, equal over the reals. `FORMS` names them
all beside their legality. Which one is fastest depends on shape and backend: legality is decided here, profit by
the search.

Inside, arrays are channels-last, x[n, *space, c] and kernel[*window, c / groups, k], since both the products and
the multiply-add chains then run over contiguous channels.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxinfer.rewrites.winograd import winograd_kernel, winograd_product

Params = Mapping[str, Any]

# Of three partial sums each waits for its own additions only; more need more registers than there are.
_PARTIAL_SUMS = 3


class Window(NamedTuple):
    """What a channels-last form needs to know, one entry per spatial dimension where it is a tuple."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: Any
    dtype: Any


@dataclass(frozen=True)
class ConvolutionForm:
    """One way to compute a convolution.

    Attributes:
      name: how reports call it.
      apply: `apply(x, kernel, **params)`, equal to `conv_general_dilated_p.bind(x, kernel, **params)`.
      accepts: `accepts(x_aval, kernel_aval, params)`, whether the form may be used there.
    """

    name: str
    apply: Callable[..., Array]
    accepts: Callable[[Any, Any, Params], bool]


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(permutation.index(i) for i in range(len(permutation)))


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings an operand with `spec` (batch, feature, *space) to channels-last."""
    return (spec[0], *spec[2:], spec[1])


def _kernel_last(spec: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings a kernel with `spec` (out, in, *space) to (*space, in, out)."""
    return (*spec[2:], spec[1], spec[0])


def _form(body: Callable[[Array, Array, Window], Array]) -> Callable[..., Array]:
    """Lift a channels-last computation to the operands and parameters of `conv_general_dilated`."""

    @functools.wraps(body)
    def apply(
        x: Array,
        kernel: Array,
        *,
        window_strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int],
        rhs_dilation: Sequence[int],
        dimension_numbers: lax.ConvDimensionNumbers,
        feature_group_count: int,
        batch_group_count: int,
        precision: Any,
        preferred_element_type: DTypeLike | None,
        out_sharding: Any = None,
    ) -> Array:
        if batch_group_count != 1 or any(d != 1 for d in lhs_dilation) or out_sharding is not None:
            raise ValueError(
                f"{body.__name__} takes no batch groups, dilated input or output sharding; ask `accepts` first"
            )
        window = Window(
            strides=tuple(window_strides),
            padding=tuple((lo, hi) for lo, hi in padding),
            dilation=tuple(rhs_dilation),
            groups=feature_group_count,
            precision=precision,
            dtype=jnp.dtype(preferred_element_type or x.dtype),
        )
        numbers = dimension_numbers
        result = body(
            lax.transpose(x, _channels_last(numbers.lhs_spec)),
            lax.transpose(kernel, _kernel_last(numbers.rhs_spec)),
            window,
        )
        return lax.transpose(result, _inverse(_channels_last(numbers.out_spec)))

    return apply


def _accumulator(dtype: Any) -> Any:
    """The type partial sums are kept in: float32 for floats narrower than that, else `dtype` itself."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def _output_shape(space: Sequence[int], taps: Sequence[int], window: Window) -> tuple[int, ...]:
    return tuple(
        (size + lo + hi - (tap - 1) * dilation - 1) // stride + 1
        for size, (lo, hi), tap, dilation, stride in zip(
            space, window.padding, taps, window.dilation, window.strides, strict=True
        )
    )


def _pad(x: Array, padding: Sequence[tuple[int, int]]) -> Array:
    if not any(lo or hi for lo, hi in padding):
        return x
    edges = ((0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _tap(x: Array, offset: Sequence[int], size: Sequence[int], strides: Sequence[int]) -> Array:
    """x[:, offset + strides * i, :] for i < size, per spatial dimension."""
    stop = (o + (n - 1) * s + 1 for o, n, s in zip(offset, size, strides, strict=True))
    return lax.slice(x, (0, *offset, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1))


def _taps(x: Array, kernel: Array, window: Window) -> list[tuple[tuple[int, ...], Array]]:
    """Each kernel position with the strided slice of the padded x that it multiplies.

    The padded input is put behind a barrier. Without it XLA reads the taps that miss the padding from x itself, and
    recomputes x's elementwise producer (a bias, an activation) once per tap.
    """
    taps = kernel.shape[:-2]
    size = _output_shape(x.shape[1:-1], taps, window)
    padded = lax.optimization_barrier(_pad(x, window.padding))
    offsets = itertools.product(*(range(t) for t in taps))
    return [(at, _tap(padded, [i * d for i, d in zip(at, window.dilation)], size, window.strides)) for at in offsets]


def _matmul(x: Array, weights: Array, precision: Any, dtype: Any) -> Array:
    """x[..., c] @ weights[c, k] as one two-dimensional product."""
    rows = math.prod(x.shape[:-1])
    product = lax.dot_general(
        x.reshape(rows, x.shape[-1]),
        weights,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
    return product.reshape(*x.shape[:-1], weights.shape[-1])


def _total(terms: Sequence[Array]) -> Array:
    return functools.reduce(lax.add, terms)


def _total_in_parts(terms: Sequence[Array]) -> Array:
    """A sum of many terms within one fusion, as a few sums side by side: in a single chain each addition waits."""
    size = -(-len(terms) // _PARTIAL_SUMS)
    return _total([_total(terms[i : i + size]) for i in range(0, len(terms), size)])


@_form
def pointwise_as_dot(x: Array, kernel: Array, window: Window) -> Array:
    """A convolution with a window of one position: y[p, k] = sum_c x[stride * p, c] w[c, k]."""
    size = _output_shape(x.shape[1:-1], kernel.shape[:-2], window)
    read = _tap(x, [0] * len(size), size, window.strides)
    return _matmul(read, kernel.reshape(kernel.shape[-2:]), window.precision, window.dtype)


@_form
def depthwise_as_shifted_sum(x: Array, kernel: Array, window: Window) -> Array:
    """One input channel per group: y[p, c, m] = sum_t x[stride * p + dilation * t, c] w[t, c, m].

    The chain of multiply-adds over all taps is one fusion on XLA, vectorised over channels.
    """
    channels, multiplier = x.shape[-1], kernel.shape[-1] // x.shape[-1]
    wide = _accumulator(window.dtype)
    terms = []
    for at, read in _taps(x, kernel, window):
        weights = kernel[at].astype(wide)
        if multiplier == 1:
            terms.append(read.astype(wide) * weights.reshape((1,) * (read.ndim - 1) + (channels,)))
        else:
            grid = weights.reshape((1,) * (read.ndim - 1) + (channels, multiplier))
            terms.append((read.astype(wide)[..., None] * grid).reshape(*read.shape[:-1], channels * multiplier))
    return _total(terms).astype(window.dtype)


@_form
def few_channels_as_shifted_sum(x: Array, kernel: Array, window: Window) -> Array:
    """The dense sum, term by term: y[p, k] = sum_t sum_c x[stride * p + dilation * t, c] w[t, c, k].

    Suits a first layer with one to four input channels, whose product is too thin to pay for building columns.
    """
    wide = _accumulator(window.dtype)
    terms = []
    for at, read in _taps(x, kernel, window):
        for c in range(x.shape[-1]):
            weights = kernel[at][c].astype(wide).reshape((1,) * (read.ndim - 1) + (kernel.shape[-1],))
            terms.append(read[..., c : c + 1].astype(wide) * weights)
    return _total_in_parts(terms).astype(window.dtype)


@_form
def im2col_as_dot(x: Array, kernel: Array, window: Window) -> Array:
    """All taps side by side as columns, then one product with the kernel as a [taps * c, k] matrix."""
    columns = lax.concatenate([read for _, read in _taps(x, kernel, window)], x.ndim - 1)
    weights = kernel.reshape(-1, kernel.shape[-1])
    return _matmul(columns, weights, window.precision, window.dtype)


@_form
def shifted_dots(x: Array, kernel: Array, window: Window) -> Array:
    """One product per tap, summed: y[p] = sum_t x[stride * p + dilation * t] @ w[t]."""
    wide = _accumulator(window.dtype)
    terms = [_matmul(read, kernel[at], window.precision, wide) for at, read in _taps(x, kernel, window)]
    return _total(terms).astype(window.dtype)


@_form
def rowwise_dots(x: Array, kernel: Array, window: Window) -> Array:
    """Taps along the last spatial dimension as columns, one product per remaining tap, summed.

    Builds columns for one dimension only: a third of im2col's memory for a 3x3 window.
    """
    *outer, width = kernel.shape[:-2]
    size = _output_shape(x.shape[1:-1], kernel.shape[:-2], window)
    padded = lax.optimization_barrier(_pad(x, window.padding))
    extent = padded.shape[1:-2]
    along = [
        _tap(
            padded,
            [0] * len(outer) + [j * window.dilation[-1]],
            [*extent, size[-1]],
            [1] * len(outer) + [window.strides[-1]],
        )
        for j in range(width)
    ]
    columns = lax.concatenate(along, x.ndim - 1)
    wide = _accumulator(window.dtype)
    terms = []
    for at in itertools.product(*(range(t) for t in outer)):
        offset = [i * d for i, d in zip(at, window.dilation)]
        read = _tap(columns, [*offset, 0], size, [*window.strides[:-1], 1])
        weights = kernel[at].reshape(columns.shape[-1], kernel.shape[-1])
        terms.append(_matmul(read, weights, window.precision, wide))
    return _total(terms).astype(window.dtype)


@_form
def grouped_as_batched_dot(x: Array, kernel: Array, window: Window) -> Array:
    """A grouped convolution as im2col and one product batched over the groups."""
    groups, inner = window.groups, kernel.shape[-2]
    reads = [read.reshape(*read.shape[:-1], groups, 1, inner) for _, read in _taps(x, kernel, window)]
    columns = lax.concatenate(reads, reads[0].ndim - 2)
    lead = columns.shape[:-3]
    columns = columns.reshape(math.prod(lead), groups, len(reads) * inner)
    weights = kernel.reshape(len(reads) * inner, groups, kernel.shape[-1] // groups)
    product = lax.dot_general(
        columns,
        weights,
        (((2,), (0,)), ((1,), (1,))),
        precision=window.precision,
        preferred_element_type=window.dtype,
    )
    return lax.transpose(product, (1, 0, 2)).reshape(*lead, kernel.shape[-1])


@_form
def grouped_as_split(x: Array, kernel: Array, window: Window) -> Array:
    """A grouped convolution as one convolution per group, concatenated."""
    inner, outer = kernel.shape[-2], kernel.shape[-1] // window.groups
    rank = x.ndim
    space = tuple(range(1, rank - 1))
    numbers = lax.ConvDimensionNumbers(
        (0, rank - 1, *space), (rank - 1, rank - 2, *range(rank - 2)), (0, rank - 1, *space)
    )
    parts = [
        lax.conv_general_dilated(
            x[..., g * inner : (g + 1) * inner],
            kernel[..., g * outer : (g + 1) * outer],
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=numbers,
            precision=window.precision,
            preferred_element_type=window.dtype,
        )
        for g in range(window.groups)
    ]
    return lax.concatenate(parts, rank - 1)


def _winograd(x: Array, kernel: Array, window: Window, m: int) -> Array:
    return winograd_product(x, winograd_kernel(kernel, m), m, window.padding, window.precision)


@_form
def winograd_2(x: Array, kernel: Array, window: Window) -> Array:
    """Winograd F(2, 3) in every spatial dimension; in two dimensions 2.25 times fewer multiplications."""
    return _winograd(x, kernel, window, 2)


@_form
def winograd_4(x: Array, kernel: Array, window: Window) -> Array:
    """Winograd F(4, 3) in every spatial dimension; in two dimensions 4 times fewer multiplications."""
    return _winograd(x, kernel, window, 4)


def _plain(x: Any, kernel: Any, params: Params) -> bool:
    """What every form needs: known sizes, one numeric dtype, no input dilation, a window that fits."""
    if not all(isinstance(n, int) for n in (*x.shape, *kernel.shape)) or x.dtype != kernel.dtype:
        return False
    if not (jnp.issubdtype(x.dtype, jnp.inexact) or jnp.issubdtype(x.dtype, jnp.integer)):
        return False
    if params["batch_group_count"] != 1 or params.get("out_sharding") is not None:
        return False
    if any(d != 1 for d in params["lhs_dilation"]) or any(min(edge) < 0 for edge in params["padding"]):
        return False
    numbers = params["dimension_numbers"]
    if x.shape[numbers.lhs_spec[1]] == 0 or 0 in kernel.shape:
        return False
    reach = (
        x.shape[at] + sum(edge) - (kernel.shape[tap] - 1) * dilation
        for at, tap, edge, dilation in zip(
            numbers.lhs_spec[2:], numbers.rhs_spec[2:], params["padding"], params["rhs_dilation"], strict=True
        )
    )
    return all(r >= 1 for r in reach)


def _taps_of(kernel: Any, params: Params) -> tuple[int, ...]:
    return tuple(kernel.shape[i] for i in params["dimension_numbers"].rhs_spec[2:])


def _channels(x: Any, params: Params) -> int:
    return x.shape[params["dimension_numbers"].lhs_spec[1]]


def _accepts_pointwise(x: Any, kernel: Any, params: Params) -> bool:
    bare = all(t == 1 for t in _taps_of(kernel, params)) and not any(map(any, params["padding"]))
    return _plain(x, kernel, params) and params["feature_group_count"] == 1 and bare


def _accepts_depthwise(x: Any, kernel: Any, params: Params) -> bool:
    return _plain(x, kernel, params) and params["feature_group_count"] == _channels(x, params)


def _accepts_dense(x: Any, kernel: Any, params: Params) -> bool:
    window = _taps_of(kernel, params)
    return _plain(x, kernel, params) and params["feature_group_count"] == 1 and len(window) > 0


def _accepts_few_channels(x: Any, kernel: Any, params: Params) -> bool:
    # The program grows with taps * channels; 32 terms are one fusion, hundreds are slow to compile.
    terms = math.prod(_taps_of(kernel, params)) * _channels(x, params)
    return _accepts_dense(x, kernel, params) and terms <= 32


def _accepts_grouped(x: Any, kernel: Any, params: Params) -> bool:
    return _plain(x, kernel, params) and params["feature_group_count"] > 1


def _accepts_winograd(x: Any, kernel: Any, params: Params) -> bool:
    exact_enough = x.dtype in (jnp.float32, jnp.float64) and params["preferred_element_type"] in (
        None,
        x.dtype,
    )
    window = _taps_of(kernel, params)
    steps = (*params["window_strides"], *params["rhs_dilation"])
    return (
        exact_enough
        and _accepts_dense(x, kernel, params)
        and all(t == 3 for t in window)
        and all(s == 1 for s in steps)
    )


FORMS: tuple[ConvolutionForm, ...] = (
    ConvolutionForm("pointwise_as_dot", pointwise_as_dot, _accepts_pointwise),
    ConvolutionForm("depthwise_as_shifted_sum", depthwise_as_shifted_sum, _accepts_depthwise),
    ConvolutionForm("few_channels_as_shifted_sum", few_channels_as_shifted_sum, _accepts_few_channels),
    ConvolutionForm("im2col_as_dot", im2col_as_dot, _accepts_dense),
    ConvolutionForm("shifted_dots", shifted_dots, _accepts_dense),
    ConvolutionForm("rowwise_dots", rowwise_dots, _accepts_dense),
    ConvolutionForm("grouped_as_batched_dot", grouped_as_batched_dot, _accepts_grouped),
    ConvolutionForm("grouped_as_split", grouped_as_split, _accepts_grouped),
    ConvolutionForm("winograd_2", winograd_2, _accepts_winograd),
    ConvolutionForm("winograd_4", winograd_4, _accepts_winograd),
)
