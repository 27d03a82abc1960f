"""Arrays in fewer bits: a pytree class that stands among parameters, and how to make one.

    integers        x ≈ scale · (values − zero_point)
    8-bit floats    x ≈ scale · values
    16-bit floats   x ≈ values

Scales have the rank of the array: size 1 along axes that share one, the array's size along those of channels, and the
number of groups along the axis that is cut into groups. Four-bit integers lie two in a byte: along one axis, the first
half of the entries in the low halves of the bytes, the second half in the high ones, so that unpacking is a
concatenation and no interleaving.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.quantization.scheme import Format, Group


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "zero_point"),
    meta_fields=("format", "dtype", "axes", "group_axis", "packed", "order"),
)
@dataclass(frozen=True, eq=False)
class Quantized:
    """An array in fewer bits.

    Attributes:
        values: int8, or uint8 with two int4 each, fp8, bf16 or f16; of the array's shape, but for packing.
        scale: float32, None for 16-bit floats.
        zero_point: int8, of the shape of ``scale``; None where it is 0.
        format: how it is written.
        dtype: name of the element type of the array that it stands for.
        axes: those along which scales differ from entry to entry.
        group_axis: the axis along which they differ from group to group, or None.
        packed: of int4, the axis along which two are in a byte and its size; None for others.
        order: the values lie transposed by this, for a product that reads them so; None where they do not.
    """

    values: Any
    scale: Any
    zero_point: Any
    format: Format
    dtype: str
    axes: tuple[int, ...] = ()
    group_axis: int | None = None
    packed: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        shape = list(self.values.shape)
        if self.order is not None:
            shape = [shape[self.order.index(a)] for a in range(len(shape))]
        if self.packed is not None:
            axis, size = self.packed
            shape[axis] = size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Rank of the array that it stands for."""
        return int(self.values.ndim)

    @property
    def size(self) -> int:
        """Number of entries of the array that it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return sum(x.size * x.dtype.itemsize for x in (self.values, self.scale, self.zero_point) if x is not None)

    def codes(self) -> Any:
        """The values, unpacked: int8 of the array's shape for integers."""
        values = self.values
        if self.order is not None:
            values = lax.transpose(values, [self.order.index(a) for a in range(self.ndim)])
        return values if self.packed is None else unpack(values, *self.packed)

    def reordered(self, order: tuple[int, ...]) -> Quantized:
        """The same with values that lie transposed by ``order`` of the array's axes."""
        values = lax.transpose(replace(self, packed=None).codes(), order)
        return replace(self, values=values, order=None if order == tuple(range(self.ndim)) else order)

    def spread(self, x: Any) -> Any:
        """A scale or zero point in a shape that broadcasts to the array's: each group's for all of its entries."""
        if self.group_axis is None:
            return x
        return _repeat(x, self.format, self.group_axis, self.shape[self.group_axis])

    def dequantize(self) -> jax.Array:
        """The array that it stands for, in that array's dtype."""
        return _real(self.codes(), self.spread(self.scale), self.spread(self.zero_point)).astype(self.dtype)


def _real(codes: Any, scale: Any, zero_point: Any) -> Any:
    if scale is None:
        return codes
    x = codes.astype(jnp.float32)
    if zero_point is not None:
        x = x - zero_point.astype(jnp.float32)
    return x * scale


def _repeat(x: Any, form: Format, axis: int, size: int) -> Any:
    if x is None:
        return None
    assert isinstance(form.per, Group)
    return lax.slice_in_dim(jnp.repeat(x, form.per.size, axis), 0, size, axis=axis)


# -- making one -------------------------------------------------------------------------------------------------------


def quantize_array(
    array: Any,
    form: Format,
    axes: tuple[int, ...] = (),
    group_axis: int | None = None,
    *,
    scale: Any = None,
    zero_point: Any = None,
    packing: int | None = None,
) -> Quantized:
    """Rounds an array to the nearest values of a format. Can be traced.

    Args:
        array: floating-point.
        form: the format.
        axes: axes along which each index has a scale of its own (of weights per channel or group: what is kept).
        group_axis: the axis that groups are cut from, if there are groups.
        scale: the scales to use, shaped as :class:`Quantized` says; None takes what covers the whole range.
        zero_point: the zero points that belong to them.
        packing: the axis along which two int4 are put in a byte; None takes that of groups, or one that is even.

    Raises:
        ValueError: if there are groups and no axis for them, or axes that the array has not.
    """
    array = jnp.asarray(array)
    if isinstance(form.per, Group) != (group_axis is not None):
        raise ValueError("group_axis goes with a format in groups, and with no other")
    if any(not 0 <= a < array.ndim for a in (*axes, *([] if group_axis is None else [group_axis]))):
        raise ValueError(f"axes {axes}, {group_axis}: the array has axes 0 to {array.ndim - 1}")
    dtype = str(array.dtype)
    if not form.has_scale:
        return Quantized(array.astype(form.dtype), None, None, form, dtype)
    if scale is None:
        scale, zero_point = scale_of(*ranges(array, form, axes, group_axis), form)
    codes = codes_of(array, form, group_axis, scale, zero_point)
    packed = None
    if form.number == "int4":
        axis = next(a for a in (packing, group_axis, packing_axis(array.shape)) if a is not None)
        packed, codes = (axis, array.shape[axis]), pack(codes, axis)
    return Quantized(codes, scale, zero_point, form, dtype, axes, group_axis, packed)


def ranges(array: Any, form: Format, axes: tuple[int, ...] = (), group_axis: int | None = None) -> tuple[Any, Any]:
    """The least and greatest entry of everything that shares a scale, shaped like scales."""
    array = jnp.asarray(array, jnp.float32)
    # The last group is filled up with copies of its last entry.
    low, high = (by_scale(array, form, axes, group_axis, reduce, "edge") for reduce in (jnp.min, jnp.max))
    return low, high


def by_scale(
    array: Any, form: Format, axes: tuple[int, ...], group_axis: int | None, reduce: Callable[..., Any], filled: str
) -> Any:
    """One number of all entries that share a scale, shaped like scales.

    Args:
        array: of any type.
        form, axes, group_axis: what shares a scale: see :func:`quantize_array`.
        reduce: as ``jnp.sum`` is called.
        filled: with what the last group is, where it is smaller: a mode of ``jnp.pad``.
    """
    others = tuple(a for a in range(array.ndim) if a not in axes and a != group_axis)
    if group_axis is None:
        return reduce(array, others, keepdims=True)
    assert isinstance(form.per, Group)
    size, group = array.shape[group_axis], form.per.size
    count = -(-size // group)
    padding = [(0, count * group - size if a == group_axis else 0) for a in range(array.ndim)]
    array = jnp.pad(array, padding, mode=filled)
    shape = (*array.shape[:group_axis], count, group, *array.shape[group_axis + 1 :])
    reduced = (group_axis + 1, *(a + (a > group_axis) for a in others))
    return jnp.squeeze(reduce(array.reshape(shape), reduced, keepdims=True), group_axis + 1)


def scale_of(low: Any, high: Any, form: Format) -> tuple[Any, Any]:
    """Scales, and zero points or None, with which a format covers what lies between ``low`` and ``high``.

    Zero is always exact: where the range does not hold it, it is widened.
    """
    low, high = jnp.minimum(jnp.asarray(low, jnp.float32), 0), jnp.maximum(jnp.asarray(high, jnp.float32), 0)
    if not form.affine:
        most = jnp.maximum(-low, high)
        return _positive(most / form.high), None
    scale = _positive((high - low) / (form.high - form.low))
    zero_point = jnp.clip(form.low - jnp.round(low / scale), form.low, form.high)
    return scale, zero_point.astype(jnp.int8)


def _positive(scale: Any) -> Any:
    # Of a denormal scale the reciprocal may overflow.
    return jnp.where(scale > jnp.finfo(jnp.float32).tiny, scale, 1.0)


def codes_of(array: Any, form: Format, group_axis: int | None, scale: Any, zero_point: Any) -> Any:
    """The nearest values of a format at given scales, unpacked."""
    if group_axis is not None:
        size = array.shape[group_axis]
        scale = _repeat(scale, form, group_axis, size)
        zero_point = _repeat(zero_point, form, group_axis, size)
    x = jnp.asarray(array, jnp.float32) / scale
    if form.is_integer:
        x = jnp.round(x)
        if zero_point is not None:
            x = x + zero_point.astype(jnp.float32)
    return jnp.clip(x, form.low, form.high).astype(form.dtype)


# -- two in a byte ----------------------------------------------------------------------------------------------------


def packing_axis(shape: tuple[int, ...]) -> int:
    """The axis along which int4 is packed where there are no groups: the first of even size that is not the last."""
    even = [a for a, n in enumerate(shape[:-1]) if n % 2 == 0 and n]
    return even[-1] if even else max(len(shape) - 1, 0)


def pack(codes: Any, axis: int) -> jax.Array:
    """int8 codes of four bits, two in a byte along an axis; an odd one is filled up with a zero."""
    size = codes.shape[axis]
    half = -(-size // 2)
    low = lax.slice_in_dim(codes, 0, half, axis=axis)
    high = lax.slice_in_dim(codes, half, size, axis=axis)
    high = jnp.pad(high, [(0, 2 * half - size if a == axis else 0) for a in range(codes.ndim)])
    low, high = low.astype(jnp.uint8), high.astype(jnp.uint8)
    return (low & 15) | (high << 4)


def unpack(packed: Any, axis: int, size: int) -> jax.Array:
    """The int8 codes that :func:`pack` packed.

    Args:
        packed: uint8.
        axis: the axis that was packed.
        size: its size before.
    """
    signed = lax.bitcast_convert_type(packed, jnp.int8)
    # Shifts of signed integers carry the sign along.
    low = lax.shift_right_arithmetic(lax.shift_left(signed, jnp.int8(4)), jnp.int8(4))
    high = lax.shift_right_arithmetic(signed, jnp.int8(4))
    return lax.slice_in_dim(jnp.concatenate([low, high], axis), 0, size, axis=axis)
