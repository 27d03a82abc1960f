"""Products of int8 with known weights, summed exactly in int32, as a kernel in C."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import again, is_static
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.native import integer_offsets, integer_product, library, pack_integers
from jaxinfer.rewrites.native_kernels import LEAST_MULTIPLICATIONS
from jaxinfer.rewriting import Find, Match, Rule

# The most entries of a sum of products of int8 that an int32 holds whatever they are.
_LONGEST_SUM = (1 << 17) - 1


def _find_integers(graph: Graph, node: Node) -> Match | None:
    kernels = library()
    known = [graph.is_known(v) for v in node.inputs]
    result = Value(node, 0)
    if kernels is None or not kernels.has_integers or known[0] == known[1] or not is_static(result, *node.inputs):
        return None
    if node.params["dimension_numbers"][1][0] or 0 in (*result.shape, *node.inputs[0].shape, *node.inputs[1].shape):
        return None
    if any(str(v.dtype) != "int8" for v in node.inputs) or str(result.dtype) != "int32":
        return None
    (contract, _), _ = node.params["dimension_numbers"]
    depth = math.prod(node.inputs[0].shape[a] for a in contract)
    if result.aval.size * depth < LEAST_MULTIPLICATIONS or depth > _LONGEST_SUM:
        return None
    side = known.index(True)
    return Match(graph, (result,), {"x": node.inputs[1 - side], "w": node.inputs[side]}, {"product": node})


def _packed_integers(m: Match, x: Any, w: Any) -> Any:
    node = m.nodes["product"]
    (contract, _), free = node.params["dimension_numbers"], free_axes(node)
    side = int(m["w"] == node.inputs[1])
    depth, panel = math.prod(w.shape[a] for a in contract[side]), again(library()).panel
    rows = lax.transpose(x, (*free[1 - side], *contract[1 - side])).reshape(-1, depth)
    columns = lax.transpose(w, (*contract[side], *free[side])).reshape(depth, -1)
    packed, offsets = pack_integers(columns, panel), integer_offsets(columns, panel)
    result = integer_product(rows, packed, offsets, columns.shape[1])
    if side == 0:
        result = lax.transpose(result, (1, 0))
    return result.reshape(node.aval.shape)


def _integer_cases(s: Any) -> Iterator[Any]:
    s.only("int32")
    rows, inner, outer = s.choice((1, 20)), s.choice((130, 301)), s.choice((130, 200))

    def product(x: Any, w: Any) -> Any:
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    small = {"dtype": "int8"}
    yield product, (s.array(rows, inner, **small), s.frozen(inner, outer, **small))
    yield lambda w, x: product(w, x), (s.frozen(outer, inner, **small), s.array(inner, rows, **small))


RULES: tuple[Rule, ...] = (
    Rule(
        "packed-integers",
        "x W of int8, exactly in int32 → one kernel, W in panels of columns",
        Find(("dot_general",), _find_integers),
        _packed_integers,
        "bitwise",
        kind="offer",
        cases=_integer_cases,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
)
