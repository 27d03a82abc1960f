"""Rounding that can be trained through: straight-through derivatives and learned step sizes.

A value v is written as v̂ = s · round(clip(v / s, low, high)). Derivatives take rounding for the identity:

    ∂v̂/∂v = 1 inside of the range, 0 outside
    ∂v̂/∂s = round(v / s) − v / s inside, low or high outside

and that of s is multiplied with 1 / √(N · high), N the number of values that share it.

Reference: Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned step size quantization", ICLR 2020 (equations 1 to 3
and section 2.2).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.quantization.scheme import Format, Group

# Steps are kept away from zero, where all derivatives would be lost.
_LEAST = 1e-8


def rounded(v: Any, step: Any, low: Any, high: Any, entries: float) -> jax.Array:
    """v̂, with the derivatives above; in v's type.

    Args:
        v: floating-point.
        step: s, of a shape that broadcasts to that of ``v``. Its sign means nothing.
        low, high: the least and greatest code, less the zero point; scalars or of a shape that broadcasts likewise.
        entries: N, how many entries share a step.
    """
    step = jnp.asarray(step, jnp.float32)
    share = 1 / jnp.sqrt(entries * jnp.maximum(jnp.asarray(high, jnp.float32), 1))
    s = jnp.maximum(jnp.abs(step), _LEAST)
    # The value of s, with a share of its derivative.
    s = lax.stop_gradient(s) + (s - lax.stop_gradient(s)) * share
    y = v.astype(jnp.float32) / s
    y = jnp.where(y < low, low, jnp.where(y > high, high, y))
    return ((y + lax.stop_gradient(jnp.round(y) - y)) * s).astype(v.dtype)


def spread(x: Any, form: Format, shape: tuple[int, ...], group_axis: int | None) -> Any:
    """Steps or zero points of groups, in a shape that broadcasts to the array's."""
    if x is None or group_axis is None:
        return x
    assert isinstance(form.per, Group)
    return jnp.take(x, np.arange(shape[group_axis]) // form.per.size, group_axis)
