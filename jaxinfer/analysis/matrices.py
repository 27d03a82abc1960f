"""Products as matrix products: the weights as one matrix, and the rows that it is multiplied with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxinfer.graph import Node


class Matrix(NamedTuple):
    """How the weights of a product are a matrix.

    Attributes:
        summed: axes that are summed over, those of a convolution's window first.
        kept: axes that remain.
    """

    summed: tuple[int, ...]
    kept: tuple[int, ...]


def as_matrix(node: Node, side: int) -> Matrix | None:
    """How the weights of a product are a matrix; None where they are several of them (batched, grouped)."""
    params = node.params
    if node.op == "dot_general":
        contract, batch = params["dimension_numbers"]
        if batch[side]:
            return None
        kept = [a for a in range(len(node.inputs[side].shape)) if a not in contract[side]]
        return Matrix(tuple(contract[side]), tuple(kept))
    if side == 0 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"].rhs_spec
    return Matrix((*numbers[2:], numbers[1]), (numbers[0],))


def matrix_of(node: Node, side: int, weights: Any) -> Any:
    """The weights of a product as a matrix [summed, kept]."""
    form = as_matrix(node, side)
    assert form is not None
    moved = jnp.transpose(weights, (*form.summed, *form.kept))
    return moved.reshape(math.prod(moved.shape[: len(form.summed)]), -1)


def rows_of(node: Node, side: int, x: Any) -> Any:
    """What the matrix of weights is multiplied with from the left: [positions, summed]."""
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        mine = contract[1 - side]
        others = [a for a in range(x.ndim) if a not in mine]
        return lax.transpose(x, (*others, *mine)).reshape(-1, math.prod(x.shape[a] for a in mine))
    params = node.params
    numbers = params["dimension_numbers"]
    window = [node.inputs[1].shape[a] for a in numbers.rhs_spec[2:]]
    rank = len(window)
    plain = lax.ConvDimensionNumbers(
        numbers.lhs_spec, (rank + 1, rank, *range(rank)), (0, rank + 1, *range(1, rank + 1))
    )
    columns = lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        plain,
        precision=lax.Precision.HIGHEST,
    )
    # Patches come with features before window positions.
    features = x.shape[numbers.lhs_spec[1]]
    apart = columns.reshape(-1, features, math.prod(window))
    return jnp.swapaxes(apart, 1, 2).reshape(apart.shape[0], -1)
