"""Transposes, reshapes and broadcasts, brought to one form and to where they cancel.

The normal form: axes of length one come and go by ``reshape`` alone; transposes and reshapes stand after the
elementwise operations that could come before or after them; elementwise operations on repeated data are done before it
is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.structure import (
    BINARY,
    ELEMENTWISE,
    Layout,
    again,
    aligned_axes,
    is_static,
    layout,
    moves_units,
    rebind,
    size,
)
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Pattern, Rule, op, var

# -- conditions -------------------------------------------------------------------------------------------------------


def _static(m: Match) -> bool:
    return is_static(m["x"], m.roots[0])


def _same_type(m: Match) -> bool:
    return _static(m) and m["x"].shape == m.roots[0].shape


def _plain_reshape(node: Node) -> bool:
    return node.params.get("dimensions") is None and len(node.inputs) == 1


def _expands(node: Node) -> bool:
    """Whether a broadcast only adds axes of length one."""
    return len(node.inputs) == 1 and is_static(node.inputs[0]) and size(node.inputs[0]) == math.prod(node.aval.shape)


def _moves_only_units(node: Node) -> bool:
    if not is_static(*node.inputs):
        return False
    moved = [i for i in node.params["permutation"] if node.inputs[0].shape[i] != 1]
    return moved == sorted(moved)


# -- one operation from two -------------------------------------------------------------------------------------------


def _keep(m: Match, x: Any, **_: Any) -> Any:
    return x


def _reshape(m: Match, x: Any) -> Any:
    return lax.reshape(x, m.roots[0].shape)


def _transpose_twice(m: Match, x: Any) -> Any:
    inner, outer = m.params("inner")["permutation"], m.params("outer")["permutation"]
    return lax.transpose(x, [inner[i] for i in outer])


def _broadcast_twice(m: Match, x: Any) -> Any:
    inner, outer = m.params("inner")["broadcast_dimensions"], m.params("outer")["broadcast_dimensions"]
    return lax.broadcast_in_dim(x, m.roots[0].shape, [outer[i] for i in inner])


def _broadcast_of_units(m: Match, x: Any) -> Any:
    """Axes longer than one keep their places; axes of length one are dropped before the broadcast."""
    outer = m.params("outer")["broadcast_dimensions"]
    squeezed = lax.reshape(x, [d for d in x.shape if d != 1])
    places = [outer[i] for i, d in enumerate(m.roots[0].node.inputs[0].shape) if d != 1]
    return lax.broadcast_in_dim(squeezed, m.roots[0].shape, places)


def _has_units(node: Node) -> bool:
    return _plain_reshape(node) and 1 in node.aval.shape and is_static(*node.inputs)


def _moves_units(m: Match) -> bool:
    return _static(m) and moves_units(m["x"].shape, m.nodes["inner"].aval.shape)


# -- elementwise operations -------------------------------------------------------------------------------------------


def _find_repeated(graph: Graph, node: Node) -> Match | None:
    """An elementwise operation whose operands all repeat along some axis."""
    if not any(v.node.op in ("broadcast_in_dim", "reshape", "transpose") for v in node.inputs):
        return None
    shape = node.aval.shape
    if not is_static(*node.inputs, Value(node, 0)) or 0 in shape:
        return None
    layouts = _layouts(node)
    along = frozenset().union(*(found.varies for found in layouts))
    if all(d == 1 or i in along for i, d in enumerate(shape)):
        return None
    return Match(graph, (Value(node, 0),), {f"x{i}": found.source for i, found in enumerate(layouts)})


def _compute_then_repeat(m: Match, **sources: Any) -> Any:
    node = m.roots[0].node
    layouts, shape = _layouts(node), node.aval.shape
    along = sorted(frozenset().union(*(found.varies for found in layouts)))
    places = [along.index(i) if i in along else 0 for i in range(len(shape))]
    operands = [
        lax.reshape(x, ()) if not found.varies else found.spread(x, places, len(along))
        for found, x in zip(layouts, sources.values())
    ]
    small = rebind(node, *operands)
    return lax.broadcast_in_dim(small, shape, along)


def _layouts(node: Node) -> list[Layout]:
    """Layouts of the operands, a scalar's over all axes of the result."""
    rank = len(node.aval.shape)
    found = [layout(v) for v in node.inputs]
    return [f if len(f.axes) == rank else Layout(f.source, (None,) * rank) for f in found]


def _find_repeated_scalar(graph: Graph, node: Node) -> Match | None:
    """A binary operation of which one operand is a scalar constant, repeated."""
    for i, value in enumerate(node.inputs):
        other = node.inputs[1 - i]
        if value.node.op == "broadcast_in_dim" and other.shape == node.aval.shape and is_static(value, other):
            source = layout(value).source
            if source.node.is_const and source.shape == ():
                pair = (("x0", source), ("x1", other)) if i == 0 else (("x0", other), ("x1", source))
                return Match(graph, (Value(node, 0),), dict(pair))
    return None


def _rebound(m: Match, **operands: Any) -> Any:
    return rebind(m.roots[0].node, *operands.values())


# -- moving past elementwise operations -------------------------------------------------------------------------------

# For each operand, the value that takes its place before the move and, where that is spread first, its layout and where
# its axes go.
Plan = list[tuple[Value, tuple[Layout, list[int]] | None]]


def _plan(m: Match, node: Node, move: str) -> tuple[Node, Plan] | None:
    """How an elementwise operation on moved operands is done before the move instead."""
    result = Value(node, 0)
    if not any(v.node.op == move for v in node.inputs) or not is_static(*node.inputs, result) or 0 in result.shape:
        return None
    moved = [v.node for v in node.inputs if _is_moved(m, v, move, node)]
    if not moved or not all(_moved_alike(n, moved[0]) for n in moved):
        return None
    first, plan = moved[0], []
    for value in node.inputs:
        found = layout(value)
        if value.node in moved:
            plan.append((value.node.inputs[0], None))
        elif value.shape == ():
            plan.append((value, None))
        elif (places := _places(found, first)) is not None and _is_cheap(m, found, node):
            plan.append((found.source, (found, places)))
        else:
            return None
    return first, plan


def _is_moved(m: Match, value: Value, move: str, node: Node) -> bool:
    found = value.node
    return (
        found.op == move
        and value.shape == node.aval.shape
        and (move == "transpose" or _plain_reshape(found))
        and is_static(found.inputs[0])
        and not m.graph.is_known(value)
        and all(user is node for user, _ in m.graph.uses[value])
    )


def _moved_alike(a: Node, b: Node) -> bool:
    if a.op == "transpose":
        return a.params["permutation"] == b.params["permutation"]
    return a.inputs[0].shape == b.inputs[0].shape


def _is_cheap(m: Match, found: Layout, node: Node) -> bool:
    """Whether moving an operand costs nothing to speak of: it is known, or small."""
    return m.graph.is_known(found.source) or size(found.source) < math.prod(node.aval.shape)


def _places(found: Layout, move: Node) -> list[int] | None:
    """For each axis after the move, where it was before; None if an axis that matters was nowhere."""
    if move.op == "transpose":
        return list(move.params["permutation"])
    before = aligned_axes(move.aval.shape, move.inputs[0].shape)
    if any(before[i] is None for i in found.varies):
        return None
    return [0 if p is None else p for p in before]


def _find_moved(move: str) -> Find:
    def find(graph: Graph, node: Node) -> Match | None:
        m = Match(graph, (Value(node, 0),))
        planned = _plan(m, node, move)
        if planned is None:
            return None
        m.nodes["move"] = planned[0]
        m.values.update({f"x{i}": value for i, (value, _) in enumerate(planned[1])})
        m.alike = tuple(None if spread is None else (spread[0].axes, *spread[1]) for _, spread in planned[1])
        return m

    return Find(tuple(sorted(ELEMENTWISE)), find)


def _move_after(m: Match, **operands: Any) -> Any:
    node, move = m.roots[0].node, m.nodes["move"]
    _, plan = again(_plan(m, node, move.op))
    rank = len(move.inputs[0].shape)
    spread = [x if how is None else how[0].spread(x, how[1], rank) for (_, how), x in zip(plan, operands.values())]
    result = rebind(node, *spread)
    return rebind(move, result) if move.op == "transpose" else lax.reshape(result, node.aval.shape)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Any], *shapes: Sequence[int]) -> Callable[[Any], Iterator[Any]]:
    """One function on arrays of the given shapes."""
    return lambda s: iter([(function, tuple(s.array(*shape) for shape in shapes))])


def _any(*names: str, **options: Any) -> Pattern:
    return op(names, var("x"), **options)


RULES: tuple[Rule, ...] = (
    # ** one form for axes of length one **
    Rule(
        "squeeze-as-reshape",
        "squeeze(x) → reshape(x)",
        _any("squeeze"),
        _reshape,
        "bitwise",
        when=_static,
        cases=_case(lambda x: lax.squeeze(x, (1,)), (3, 1, 2)),
    ),
    Rule(
        "expand-as-reshape",
        "broadcast(x) that only adds axes of length one → reshape(x)",
        _any("broadcast_in_dim", where=_expands),
        _reshape,
        "bitwise",
        when=_static,
        cases=_case(lambda x: lax.broadcast_in_dim(x, (1, 3, 1, 2), (1, 3)), (3, 2)),
    ),
    Rule(
        "transpose-of-units",
        "reshape(transpose(x)) that moves only axes of length one → reshape(x)",
        op("reshape", _any("transpose", where=_moves_only_units), where=_plain_reshape),
        _reshape,
        "bitwise",
        when=_static,
        cases=_case(lambda x: lax.reshape(lax.transpose(x, (1, 0, 2)), (6,)), (1, 3, 2)),
    ),
    Rule(
        "units-then-transpose",
        "transpose(reshape(x)) that moves only axes of length one → reshape(x)",
        op("transpose", _any("reshape", where=_plain_reshape), where=_moves_only_units),
        _reshape,
        "bitwise",
        when=_static,
        cases=_case(lambda x: lax.transpose(lax.reshape(x, (1, 3, 2)), (1, 0, 2)), (6,)),
    ),
    # ** one operation from two, none from one **
    Rule(
        "reshape-twice",
        "reshape(reshape(x)) → reshape(x)",
        op("reshape", _any("reshape", where=_plain_reshape), where=_plain_reshape),
        _reshape,
        "bitwise",
        when=_static,
        cases=_case(lambda x: x.reshape(3, 2, 2).reshape(6, 2), (3, 4)),
    ),
    Rule(
        "reshape-to-itself",
        "reshape(x) to its own shape → x",
        _any("reshape", where=_plain_reshape),
        _keep,
        "bitwise",
        when=_same_type,
        cases=_case(lambda x: lax.reshape_p.bind(x, new_sizes=x.shape, dimensions=None, sharding=None), (2, 3)),
    ),
    Rule(
        "transpose-twice",
        "transpose(transpose(x)) → transpose(x)",
        op("transpose", _any("transpose", name="inner"), name="outer"),
        _transpose_twice,
        "bitwise",
        cases=_case(lambda x: x.transpose(1, 2, 0).transpose(1, 0, 2), (2, 3, 4)),
    ),
    Rule(
        "transpose-to-itself",
        "transpose(x) that moves nothing → x",
        _any("transpose", where=lambda n: tuple(n.params["permutation"]) == tuple(range(len(n.aval.shape)))),
        _keep,
        "bitwise",
        cases=_case(lambda x: lax.transpose_p.bind(x, permutation=(0, 1)), (2, 3)),
    ),
    Rule(
        "broadcast-twice",
        "broadcast(broadcast(x)) → broadcast(x)",
        op("broadcast_in_dim", _any("broadcast_in_dim", name="inner"), name="outer"),
        _broadcast_twice,
        "bitwise",
        when=_static,
        cases=_case(lambda x: jnp.broadcast_to(jnp.broadcast_to(x, (4, 3)), (2, 4, 3)), (3,)),
    ),
    Rule(
        "broadcast-of-units",
        "broadcast(reshape(x)) with axes of length one → broadcast(x)",
        op("broadcast_in_dim", _any("reshape", where=_has_units, name="inner"), name="outer"),
        _broadcast_of_units,
        "bitwise",
        when=_moves_units,
        cases=_case(lambda x: jnp.broadcast_to(x.reshape(2, 1, 3), (2, 4, 3)), (2, 3)),
    ),
    # ** elementwise operations on what is repeated **
    Rule(
        "repeat-after",
        "f(broadcast(x), broadcast(y), ...) → broadcast(f(x, y, ...))",
        Find(tuple(sorted(ELEMENTWISE)), _find_repeated),
        _compute_then_repeat,
        "bitwise",
        cases=_case(lambda x, y: jnp.broadcast_to(x, (4, 3)) * jnp.broadcast_to(y, (4, 3)), (3,), ()),
    ),
    Rule(
        "scalar-operand",
        "f(x, broadcast(c)) → f(x, c), c a number",
        Find(tuple(sorted(BINARY)), _find_repeated_scalar),
        _rebound,
        "bitwise",
        cases=_case(lambda x: lax.max(x, jnp.zeros_like(x)), (2, 3)),
    ),
    # ** moves come last **
    Rule(
        "transpose-after",
        "f(transpose(x), ...) → transpose(f(x, ...)), f elementwise",
        _find_moved("transpose"),
        _move_after,
        "bitwise",
        cases=_case(lambda x, b: jnp.tanh(x.transpose(2, 0, 1) + b), (2, 3, 4), (2, 3)),
    ),
    Rule(
        "reshape-after",
        "f(reshape(x), ...) → reshape(f(x, ...)), f elementwise",
        _find_moved("reshape"),
        _move_after,
        "bitwise",
        cases=_case(lambda x, b: jnp.tanh(x.reshape(6, 4) + b), (2, 3, 4), (4,)),
    ),
)
