"""Products of a vector with known weights most of which are zero: only the others are read.

Where one vector is multiplied, the time goes into reading the weights. Each output's nonzero weights are kept beside
the places of what they are multiplied with (the ELLPACK format: as many places for every output as the fullest one
needs). With more rows a dense product is faster at every density worth pruning to, since each weight is used again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule
from jaxinfer.rewriting.sampler import Frozen

# Of the places an output may have, how many may be taken: gathered one by one, they cost more than dense ones.
_MOST_FILLED = 0.25
# Smaller weights stay in the caches, where a dense product reads them faster than places can be looked up.
_LEAST_ENTRIES = 1 << 12


def _find(graph: Graph, node: Node) -> Match | None:
    known = [v.node.is_const for v in node.inputs]
    if known[0] == known[1] or not is_static(Value(node, 0), *node.inputs):
        return None
    side = known.index(True)
    weights, x = node.inputs[side], node.inputs[1 - side]
    _, batch = node.params["dimension_numbers"]
    if batch[0] or x.dtype != weights.dtype or node.params.get("out_sharding") is not None:
        return None
    if weights.node.aval.size < _LEAST_ENTRIES or any(x.shape[a] != 1 for a in free_axes(node)[1 - side]):
        return None
    matrix = _matrix(node, side, np.asarray(weights.node.value))
    if matrix.size == 0 or np.count_nonzero(matrix, axis=0).max() > _MOST_FILLED * matrix.shape[0]:
        return None
    match = Match(graph, (Value(node, 0),), {"x": x})
    match.nodes["product"] = node
    return match


def _matrix(node: Node, side: int, weights: np.ndarray) -> np.ndarray:
    """Weights as [summed, kept]."""
    contract, _ = node.params["dimension_numbers"]
    free = free_axes(node)[side]
    rows = math.prod(weights.shape[a] for a in contract[side])
    return np.transpose(weights, (*contract[side], *free)).reshape(rows, -1)


def _after(m: Match, x: Any) -> Any:
    node = m.nodes["product"]
    side = 0 if node.inputs[0].node.is_const else 1
    places, entries = ellpack(_matrix(node, side, np.asarray(node.inputs[side].node.value)))
    contract, _ = node.params["dimension_numbers"]
    free = free_axes(node)[1 - side]
    vector = lax.reshape(lax.transpose(x, (*free, *contract[1 - side])), (x.size,))
    dtype = node.aval.dtype
    terms = jnp.take(vector, places, axis=0, mode="clip").astype(dtype) * entries.astype(dtype)
    # Results have the free axes of the first operand first; those of the vector all have size one.
    return lax.reshape(terms.sum(0, dtype=dtype), node.aval.shape)


def ellpack(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nonzero entries of a matrix, column by column.

    Args:
        matrix: [rows, columns].

    Returns:
        Row numbers (int32) and entries, [most nonzeros of a column, columns]; columns with fewer end in zeros.

    Reference: Bell and Garland, "Implementing sparse matrix-vector multiplication on throughput-oriented processors",
    2009, section 3.2.
    """
    nonzero = matrix != 0
    depth = int(nonzero.sum(0).max(initial=0))
    # A stable sort brings the rows of nonzero entries to the top, in order.
    order = np.argsort(~nonzero, axis=0, kind="stable")[:depth]
    filled = np.take_along_axis(nonzero, order, 0)
    return np.where(filled, order, 0).astype(np.int32), np.where(filled, np.take_along_axis(matrix, order, 0), 0)


def _cases(s: Any) -> Iterator[Any]:
    s.only("float32", "float64", "int32")
    rows, columns = s.choice((96, 128)), s.choice((64, 80))
    kept = s.rng.random((rows, columns)) < 0.1
    shape = s.choice(((rows, columns), (columns, rows)))
    first = shape[0] == rows
    weights = s.array(*shape)
    frozen = Frozen(weights * jnp.asarray(kept if first else kept.T, weights.dtype))
    if s.choice((True, False)):
        yield lambda x, w: lax.dot_general(x, w, (((1,), (0 if first else 1,)), ((), ()))), (s.array(1, rows), frozen)
    else:
        yield lambda x, w: lax.dot_general(w, x, (((0 if first else 1,), (0,)), ((), ()))), (s.array(rows), frozen)


RULES: tuple[Rule, ...] = (
    Rule(
        "sparse-weights",
        "x · W, x one row and most of W known zeros → sum over the nonzero w of x[place] · w, for finite x",
        Find(("dot_general",), _find),
        _after,
        "reassociate",
        kind="offer",
        finite=True,
        reads_values=True,
        cases=_cases,
        platforms=frozenset({"cpu"}),
    ),
)
