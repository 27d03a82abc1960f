"""Scales that clip: the few largest entries go to the end of the range, so that all others get finer steps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.quantization.calibrate import Inputs, Wanted
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.method import Written
from jaxinfer.quantization.scheme import Format, Group, Scheme
from jaxinfer.quantization.tensor import by_scale, quantize_array, ranges, scale_of

# Shares of the whole range that are tried.
_SHARES = np.linspace(1.0, 0.2, 81).tolist()


@dataclass(frozen=True)
class Clipped:
    """Each entry goes to the nearest value, at the scales whose mean square error is least."""

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        return None

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        assert scheme.weights is not None
        return Written(clipped_array(array, scheme.weights, *layer.axes(scheme.weights)))


def clipped_array(array: Any, form: Format, axes: tuple[int, ...] = (), group_axis: int | None = None) -> Any:
    """As :func:`quantize_array`, at scales that :func:`clipped_scale` chooses."""
    if not form.has_scale:
        return quantize_array(array, form, axes, group_axis)
    scale, zero_point = clipped_scale(array, form, axes, group_axis)
    return quantize_array(array, form, axes, group_axis, scale=scale, zero_point=zero_point)


def clipped_scale(
    array: Any, form: Format, axes: tuple[int, ...] = (), group_axis: int | None = None
) -> tuple[Any, Any]:
    """The scales, and zero points or None, at which the mean square of rounding and clipping errors is least.

    The range of what shares a scale is narrowed step by step, to a fifth of itself; each scale takes its own best.

    Args:
        array: floating-point, not a tracer.
        form: a format with scales.
        axes, group_axis: what shares a scale: see :func:`quantize_array`.

    Returns:
        float32 and int8 arrays, shaped as :class:`Quantized` says.
    """
    return _best(jnp.asarray(array, jnp.float32), form, axes, group_axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _best(array: Any, form: Format, axes: tuple[int, ...], group_axis: int | None) -> tuple[Any, Any]:
    low, high = ranges(array, form, axes, group_axis)

    def errors(share: Any) -> Any:
        scale, zero_point = scale_of(low * share, high * share, form)
        written = quantize_array(array, form, axes, group_axis, scale=scale, zero_point=zero_point).dequantize()
        return by_scale(jnp.square(written - array), form, axes, group_axis, jnp.sum, "constant")

    shares = jnp.asarray(_SHARES, jnp.float32)
    best = shares[jnp.argmin(lax.map(errors, shares), 0)]
    return scale_of(low * best, high * best, form)


def scale_numbers(
    shape: tuple[int, ...], form: Format, scale_shape: tuple[int, ...], group_axis: int | None
) -> np.ndarray:
    """Which scale holds for each entry of an array: its place among all scales, an integer array of ``shape``."""
    numbers = np.arange(int(np.prod(scale_shape))).reshape(scale_shape)
    if group_axis is not None:
        assert isinstance(form.per, Group)
        numbers = np.take(numbers, np.arange(shape[group_axis]) // form.per.size, group_axis)
    return np.broadcast_to(numbers, shape)
