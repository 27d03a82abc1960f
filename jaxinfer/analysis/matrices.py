"""Products as matrix products: the weights as one matrix, and the rows that it is multiplied with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
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
    windows = _windows(x, [node.inputs[1].shape[a] for a in node.params["dimension_numbers"].rhs_spec[2:]], node.params)
    return windows.reshape(-1, math.prod(windows.shape[-2:]))


def _windows(x: Any, window: Sequence[int], params: Mapping[str, Any]) -> Any:
    """What each position of a convolution reads: [batch, *positions, window, features].

    As slices one beside the other; as the convolution that JAX makes patches with it takes a hundred times as long.
    """
    spec = params["dimension_numbers"].lhs_spec
    image = lax.transpose(x, (spec[0], *spec[2:], spec[1]))
    edges = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"])]
    image = lax.pad(image, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    strides, holes = params["window_strides"], params["rhs_dilation"]
    counts = [(n - h * (k - 1) - 1) // s + 1 for n, h, k, s in zip(image.shape[1:-1], holes, window, strides)]
    parts = []
    for at in itertools.product(*map(range, window)):
        start = [a * h for a, h in zip(at, holes)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, counts, strides)]
        parts.append(lax.slice(image, (0, *start, 0), (image.shape[0], *stop, image.shape[-1]), (1, *strides, 1)))
    return jnp.stack(parts, -2)
