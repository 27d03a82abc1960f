"""Products as rows times columns: what is common to matrix products in any layout and to 1×1 convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.matrices import matrix_of, rows_of
from jaxinfer.graph import Node
from jaxinfer.quantization.integer import is_pointwise


def is_rows(node: Node) -> bool:
    """Whether a product with a parameter is one of rows and columns."""
    return node.op == "dot_general" or is_pointwise(node)


def rows(node: Node, side: int, x: Any) -> Any:
    """What the weights are multiplied with: [m, k]."""
    if node.op == "dot_general":
        return rows_of(node, side, x)
    spec = node.params["dimension_numbers"].lhs_spec
    return lax.transpose(x, (spec[0], *spec[2:], spec[1])).reshape(-1, x.shape[spec[1]])


def columns(node: Node, side: int, w: Any) -> Any:
    """The weights: [k, n]."""
    return matrix_of(node, side, w)


def result(node: Node, side: int, y: Any) -> Any:
    """The result of the product, from [m, n]."""
    shape = node.aval.shape
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        kept = len(node.inputs[side].shape) - len(contract[side])
        if side:
            return y.reshape(shape)
        # Results have the axes of the first operand first.
        turned = y.reshape(*shape[kept:], *shape[:kept])
        free = len(shape) - kept
        return lax.transpose(turned, (*range(free, len(shape)), *range(free)))
    spec = node.params["dimension_numbers"].out_spec
    order = (spec[0], *spec[2:], spec[1])
    turned = y.reshape([shape[a] for a in order])
    return lax.transpose(turned, [order.index(a) for a in range(len(shape))])


def count(node: Node, side: int) -> Any:
    """m: how many rows the weights are multiplied with."""
    shape = node.inputs[1 - side].shape
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        return math.prod(n for a, n in enumerate(shape) if a not in contract[1 - side])
    spec = node.params["dimension_numbers"].lhs_spec
    return math.prod(n for a, n in enumerate(shape) if a != spec[1])


def by_feature(node: Node, x: Any) -> Any:
    """A vector with an entry for each output channel of a convolution, in a shape that broadcasts to its result."""
    shape = [1] * len(node.aval.shape)
    shape[node.params["dimension_numbers"].out_spec[1]] = -1
    return jnp.reshape(x, shape)
