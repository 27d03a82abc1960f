"""What products are fed with, as int8 codes.

Codes flow from one product to the next as long as nothing between them needs real numbers: see ``segments``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.quantization.scheme import Format
from jaxinfer.quantization.tensor import scale_of

# Adding it to a float32 of magnitude below 2²² leaves the nearest integer (ties to even) in the lowest bits: faster
# than rounding and a saturating conversion.
_ROUND = np.float32(3 << 22)


@dataclass(frozen=True, eq=False)
class Codes:
    """An activation as integers: ``scale * (values - zero_point)``.

    Attributes:
        values: int8.
        scale: float32, a scalar or of a shape that broadcasts to that of ``values``.
        zero_point: int32 likewise, or None where it is 0.
        dtype: element type of what it stands for.
    """

    values: Any
    scale: Any
    zero_point: Any
    dtype: Any

    def real(self) -> jax.Array:
        """What it stands for."""
        x = self.values.astype(jnp.float32)
        if self.zero_point is not None:
            x = x - jnp.asarray(self.zero_point, jnp.float32)
        return (x * self.scale).astype(self.dtype)

    def same_scale(self, other: Codes) -> bool:
        """Whether equal codes mean equal numbers in both, as far as is known without looking at values."""
        return self.scale is other.scale and self.zero_point is other.zero_point


@dataclass(frozen=True, eq=False)
class Static:
    """How an activation is written, settled by calibration.

    Attributes:
        form: its format.
        scale: float32 scalar.
        zero_point: int32 scalar, None where it is 0.
        low, high: the range that was chosen.
    """

    form: Format
    scale: Any
    zero_point: Any
    low: float
    high: float

    @staticmethod
    def of(form: Format, low: float, high: float) -> Static:
        """The format with a scale that covers a range."""
        with jax.ensure_compile_time_eval():
            scale, zero_point = scale_of(low, high, form)
            zero = None if zero_point is None else np.int32(zero_point)
            return Static(form, np.float32(scale), zero, low, high)

    def codes(self, x: Any) -> Codes:
        """An activation, written so."""
        return encode(x, self.form, self.scale, self.zero_point)


def dynamic(x: Any, form: Format, axes: tuple[int, ...]) -> Codes:
    """An activation, scaled by what it is.

    Args:
        x: floating-point.
        form: an integer format.
        axes: those along which entries share a scale (all of them, per tensor).
    """
    if form.affine:
        low, high = (f(x.astype(jnp.float32), axes, keepdims=True) for f in (jnp.min, jnp.max))
        scale, zero_point = scale_of(low, high, form)
    else:
        largest = _largest(x, axes)
        scale, zero_point = scale_of(-largest, largest, form)
    return encode(x, form, scale, None if zero_point is None else zero_point.astype(jnp.int32))


def _largest(x: Any, axes: tuple[int, ...]) -> Any:
    """The largest magnitude; along a last axis in two steps, the first of which a processor does on whole vectors."""
    x = jnp.abs(x.astype(jnp.float32))
    last, lanes = x.ndim - 1, 16
    if axes == (last,) and isinstance(x.shape[last], int) and x.shape[last] % lanes == 0 and x.shape[last] > lanes:
        x = jnp.max(x.reshape(*x.shape[:-1], -1, lanes), last)
    return jnp.max(x, axes, keepdims=True)


def encode(x: Any, form: Format, scale: Any, zero_point: Any) -> Codes:
    """The nearest codes at a given scale. What lies outside the range goes to its ends; NaN becomes any code."""
    y = x.astype(jnp.float32) * (np.float32(1) / scale)
    low: Any = np.float32(form.low)
    high: Any = np.float32(form.high)
    if zero_point is not None:
        zero = zero_point.astype(np.float32)
        low, high = low - zero, high - zero
    bits = lax.bitcast_convert_type(lax.min(lax.max(y, _like(low, y)), _like(high, y)) + _ROUND, jnp.int32)
    if zero_point is not None:
        bits = bits + zero_point
    return Codes(bits.astype(jnp.int8), scale, zero_point, x.dtype)


def _like(bound: Any, y: Any) -> Any:
    return jnp.broadcast_to(bound, y.shape)


# -- more precise than one code ---------------------------------------------------------------------------------------

# Digits of seven bits: with three of them the error is that of float32's sum of a few thousand terms.
DIGITS = 3
_BASE = 128


def digits(x: Any) -> tuple[Any, Any]:
    """Rows as numbers of :data:`DIGITS` int8 digits, so that an int8 product gives them in nearly full precision.

    Args:
        x: floating-point [m, k].

    Returns:
        int8[DIGITS · m, k], the lowest digits of all rows first, and the scale of the lowest, float32[m, 1]: rows are
        scale · Σ digit_i · 128^i, up to 2⁻²¹ of each row's largest entry.
    """
    x = x.astype(jnp.float32)
    most = np.float32((_BASE - 2) * _BASE ** (DIGITS - 1))
    largest = jnp.maximum(_largest(x, (1,)), np.float32(np.finfo(np.float32).tiny * most))
    scale = largest / most
    rest = jnp.round(x / scale).astype(jnp.int32)
    found = []
    for _ in range(DIGITS - 1):
        digit = ((rest + _BASE // 2) & (_BASE - 1)) - _BASE // 2
        found.append(digit.astype(jnp.int8))
        rest = (rest - digit) >> 7
    return jnp.concatenate([*found, rest.astype(jnp.int8)], 0), scale


def from_digits(sums: Any, scale: Any) -> Any:
    """The product of the rows that :func:`digits` took apart: float32[m, n] of int32[DIGITS · m, n]."""
    parts = jnp.split(sums, DIGITS, 0)
    total = parts[-1].astype(jnp.float32)
    for part in reversed(parts[:-1]):
        total = total * np.float32(_BASE) + part.astype(jnp.float32)
    return total * scale
