"""Products of int8 with known weights, summed exactly in int32, as a kernel in C; what makes them real numbers too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import again, is_static
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.native import integer_offsets, integer_product, library, pack_integers
from jaxinfer.rewrites.native_kernels import LEAST_MULTIPLICATIONS, layout_over, number_of
from jaxinfer.rewriting import Find, Match, Rule

# The most entries of a sum of products of int8 that an int32 holds whatever they are.
_LONGEST_SUM = (1 << 17) - 1


def _product(graph: Graph, node: Node) -> int | None:
    """Which operand of a product of int8 is known; None where the kernel does not know the product."""
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
    return known.index(True)


def _find_integers(graph: Graph, node: Node) -> Match | None:
    side = _product(graph, node)
    if side is None:
        return None
    values = {"x": node.inputs[1 - side], "w": node.inputs[side]}
    return Match(graph, (Value(node, 0),), values, {"product": node})


def _operands(m: Match, x: Any, w: Any) -> tuple[Any, Any]:
    """The operands as matrices of rows and columns."""
    node = m.nodes["product"]
    (contract, _), free = node.params["dimension_numbers"], free_axes(node)
    side = int(m["w"] == node.inputs[1])
    depth = math.prod(w.shape[a] for a in contract[side])
    rows = lax.transpose(x, (*free[1 - side], *contract[1 - side])).reshape(-1, depth)
    return rows, lax.transpose(w, (*contract[side], *free[side])).reshape(depth, -1)


def _packed_integers(m: Match, x: Any, w: Any) -> Any:
    node, panel = m.nodes["product"], again(library()).panel
    rows, columns = _operands(m, x, w)
    packed, offsets = pack_integers(columns, panel), integer_offsets(columns, panel)
    result = integer_product(rows, packed, offsets, columns.shape[1])
    if m["w"] == node.inputs[0]:
        result = lax.transpose(result, (1, 0))
    return result.reshape(node.aval.shape)


# -- as real numbers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """An operation after a product: with a known row for all rows, or a number.

    Attributes:
        op: which.
        term: the other operand.
        first: whether that comes first.
    """

    op: str
    term: Value
    first: bool = False


def _chain(graph: Graph, value: Value) -> tuple[list[_Step], Value]:
    """The operations that follow a product of int8: sums of integers, a conversion, scales and shifts, and bounds."""
    steps: list[_Step] = []
    while True:
        uses = graph.uses.get(value, ())
        user = uses[0][0] if len(uses) == 1 else None
        if user is None or len(user.avals) != 1 or user.aval.shape != value.shape:
            return steps, value
        if user.op == "convert_element_type" and str(value.dtype) == "int32" and str(user.aval.dtype) == "float32":
            steps.append(_Step("real", value))
        elif user.op in ("add", "sub", "mul", "max", "min") and user.aval.dtype == value.dtype:
            step = _Step(user.op, user.inputs[1 - uses[0][1]], first=uses[0][1] == 1)
            if not _takes(graph, steps, step, len(value.shape)):
                return steps, value
            steps.append(step)
        else:
            return steps, value
        value = Value(user, 0)


def _takes(graph: Graph, steps: list[_Step], step: _Step, rank: int) -> bool:
    """Whether the kernel can do one more operation."""
    bounds = [s.op for s in steps if s.op in ("max", "min")]
    real = any(s.op == "real" for s in steps)
    if step.op in ("max", "min"):
        return real and bounds == ([] if step.op == "max" else ["max"]) and number_of(graph, step.term) is not None
    row = graph.is_known(step.term) and layout_over(step.term, rank).varies <= {rank - 1}
    return row and not bounds and (real or step.op != "mul") and not (step.op == "sub" and step.first)


def _find_real(graph: Graph, node: Node) -> Match | None:
    if _product(graph, node) != 1 or len(free_axes(node)[1]) != 1:
        return None
    steps, root = _chain(graph, Value(node, 0))
    if not any(s.op == "real" for s in steps):
        return None
    values = {"x": node.inputs[0], "w": node.inputs[1]}
    for i, step in enumerate(steps):
        if step.op in ("add", "sub", "mul"):
            values[f"row{i}"] = layout_over(step.term, len(root.shape)).source
    return Match(graph, (root,), values, {"product": node})


def _packed_real(m: Match, x: Any, w: Any, **given: Any) -> Any:
    node, panel = m.nodes["product"], again(library()).panel
    steps, root = _chain(m.graph, Value(node, 0))
    rows, columns = _operands(m, x, w)
    width, rank = columns.shape[1], len(root.shape)
    more = jnp.zeros(width, jnp.int32)
    scale, shift = jnp.ones(width, jnp.float32), jnp.zeros(width, jnp.float32)
    low, high = -math.inf, math.inf
    for i, step in enumerate(steps):
        if step.op in ("max", "min"):
            bound = again(number_of(m.graph, step.term))
            low, high = (bound, high) if step.op == "max" else (low, bound)
        elif step.op != "real":
            row = jnp.broadcast_to(layout_over(step.term, rank).spread(given[f"row{i}"]).reshape(-1), (width,))
            row = -row if step.op == "sub" else row
            if row.dtype == jnp.int32:
                more = more + row
            elif step.op == "mul":
                scale, shift = scale * row, shift * row
            else:
                shift = shift + row
    offsets = integer_offsets(columns, panel)
    more, scale, shift = (jnp.pad(term, (0, -width % panel)) for term in (more, scale, shift))
    packed = pack_integers(columns, panel)
    return integer_product(rows, packed, offsets + more, width, scale, shift, low, high).reshape(root.shape)


# -- cases ------------------------------------------------------------------------------------------------------------


def _integer_cases(s: Any) -> Iterator[Any]:
    s.only("int32")
    rows, inner, outer = s.choice((1, 20)), s.choice((130, 301)), s.choice((130, 200))

    def product(x: Any, w: Any) -> Any:
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    small = {"dtype": "int8"}
    yield product, (s.array(rows, inner, **small), s.frozen(inner, outer, **small))
    yield lambda w, x: product(w, x), (s.frozen(outer, inner, **small), s.array(inner, rows, **small))


def _real_cases(s: Any) -> Iterator[Any]:
    s.only("float32")
    rows, inner, outer = s.choice((1, 20)), s.choice((130, 301)), s.choice((130, 200))
    zero = s.frozen(1, outer, dtype="int32")

    def layer(x: Any, w: Any, zero: Any, scale: Any, shift: Any, bias: Any) -> Any:
        codes = jnp.clip(jnp.round(x * 40), -128, 127).astype(jnp.int8)
        sums = lax.dot_general(codes, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32) - zero
        return jnp.minimum(jnp.maximum((sums.astype(jnp.float32) * scale - shift) * 0.25 + bias, -6.0), 6.0)

    terms = (s.frozen(outer), s.frozen(outer), s.frozen(outer))
    yield layer, (s.array(rows, inner), s.frozen(inner, outer, dtype="int8"), zero, *terms)


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
    Rule(
        "packed-integers-real",
        "min(max((x W - z) s + b, low), high), x and W int8 → one kernel, with a scale and a shift for each column",
        Find(("dot_general",), _find_real),
        _packed_real,
        "reassociate",
        kind="offer",
        cases=_real_cases,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
)
