"""Rows of a quantized parameter: those that are taken are widened, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.weights import bound
from jaxinfer.graph import Node
from jaxinfer.quantization.tensor import Quantized

LOOKUP = "lookup"


def looked_up(node: Node, table: Quantized, indices: Sequence[Any]) -> Any:
    """The rows of a quantized parameter that are taken, as real numbers.

    Args:
        node: what takes them, of which :func:`jaxinfer.analysis.weights.takes_rows` is true.
        table: its first operand.
        indices: the others.
    """
    params = dict(node.params.get("_original", node.params))
    if not _lies_in_rows(table) or not _fills_with_zero_or_nan(params):
        return bound(node, [table.dequantize(), *indices])
    # Where the axes of a row are in the result.
    places = params["dimension_numbers"].offset_dims if node.op == "gather" else range(1, table.ndim)

    def taken(x: Any) -> Any:
        if x is None:
            return None
        # Where there is one scale for all rows, each has to have it: rows that do not exist are NaN by their scale.
        x = jnp.broadcast_to(x, (table.shape[0], *x.shape[1:]))
        sizes: dict[str, Any] = {"slice_sizes": (1, *x.shape[1:])}
        if params.get("fill_value"):
            sizes["fill_value"] = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        return _jax.bind(node.primitive, [x, *indices], {**params, **sizes})[0]

    found = replace(
        table,
        values=taken(table.values),
        scale=taken(table.scale),
        zero_point=taken(table.zero_point),
        group_axis=None if table.group_axis is None else places[table.group_axis - 1],
        packed=None if table.packed is None else (places[table.packed[0] - 1], table.packed[1]),
    )
    return found.dequantize()


def _fills_with_zero_or_nan(params: Mapping[str, Any]) -> bool:
    """Whether codes and scales of rows that do not exist can say what stands for them."""
    fill = params.get("fill_value")
    return fill is None or fill == 0 or bool(np.isnan(fill))


def _lies_in_rows(table: Quantized) -> bool:
    """Whether a row of the parameter is a row of its values, and has scales of its own or those of all rows."""
    packed = None if table.packed is None else table.packed[0]
    return table.order is None and table.group_axis != 0 and packed != 0
