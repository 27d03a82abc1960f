"""Products of int8 with packed weights, summed exactly in int32, and made real numbers on their way to memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxinfer.native.primitive import kernel_primitive

# What the processor multiplies and adds up at a time.
_FOUR = 4


def pack_integers(weights: Any, panel: int) -> Any:
    """int8[k, n] as panels int8[n / panel, k / 4, panel, 4], filled up with zeros."""
    depth, features = weights.shape
    filled = jnp.pad(weights, ((0, -depth % _FOUR), (0, -features % panel)))
    fours, panels = filled.shape[0] // _FOUR, filled.shape[1] // panel
    return jnp.transpose(filled.reshape(fours, _FOUR, panels, panel), (2, 0, 3, 1))


def integer_offsets(weights: Any, panel: int) -> Any:
    """What the kernel's sums begin with: −128 Σ w of each column, int32[n rounded up to whole panels]."""
    return jnp.pad(-128 * jnp.sum(weights, 0, dtype=jnp.int32), (0, -weights.shape[1] % panel))


def integer_product(
    x: Any,
    weights: Any,
    offsets: Any,
    features: int,
    scale: Any = None,
    shift: Any = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Array:
    """x @ w, exactly; with scales min(max((x @ w) · scale + shift, low), high) in float32.

    Args:
        x: int8[m, k], with k at most 2¹⁷ − 1.
        weights: what :func:`pack_integers` makes of w[k, features].
        offsets: what :func:`integer_offsets` makes of it; more can be added for each column.
        features: columns of the result.
        scale: float32[features rounded up to whole panels], or None for none.
        shift: the same; there are both or neither.
        low: least value of the result, where there are scales.
        high: greatest value of the result.

    Returns:
        int32[m, features], or float32 where there are scales.
    """
    terms = [] if scale is None else [scale, shift]
    return integer_product_p.bind(x, weights, offsets, *terms, features=features, low=low, high=high)


def _plain(x: Any, weights: Any, offsets: Any, *terms: Any, features: int, low: float, high: float) -> Any:
    panels, fours, panel, four = weights.shape
    columns = jnp.transpose(weights, (1, 3, 0, 2)).reshape(fours * four, panels * panel)[: x.shape[1]]
    sums = lax.dot(x, columns, preferred_element_type=np.dtype(np.int32))
    # The kernel counts each x as x + 128.
    sums = (sums + (offsets + 128 * jnp.sum(columns, 0, dtype=jnp.int32)))[:, :features]
    if not terms:
        return sums
    scale, shift = (term[:features] for term in terms)
    return jnp.minimum(jnp.maximum(sums.astype(scale.dtype) * scale + shift, low), high)


def _abstract(x: Any, weights: Any, offsets: Any, *terms: Any, features: int, **_: Any) -> Any:
    return jax.core.ShapedArray((x.shape[0], features), terms[0].dtype if terms else np.dtype(np.int32))


def _kernel(ctx: Any, operands: Any, features: int, low: float, high: float) -> Any:
    return jax.ffi.ffi_lowering("jaxinfer_integer")(ctx, *operands, clamp=np.array([low, high], np.float32))


integer_product_p = kernel_primitive("integer_product", _plain, _abstract, _kernel, dtype=np.int8)
