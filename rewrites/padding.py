"""Sums of arrays padded with zeros, as adjoints of slices are: where the arrays stand apart they are concatenated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule

_SUMS = ("add", "add_any")


class Block(NamedTuple):
    """A term of a sum that is zero but for a range along one axis.

    Attributes:
        term: the padded array.
        inner: the array.
        axis: where it was padded.
        start: where it begins.
        stop: where it ends.
    """

    term: Value
    inner: Value
    axis: int
    start: int
    stop: int


def _block(value: Value) -> Block | None:
    node = value.node
    if node.op != "pad" or not is_static(*node.inputs):
        return None
    inner, filler = node.inputs
    if not filler.node.is_const or np.any(np.asarray(filler.node.value) != 0):
        return None
    padded = [i for i, config in enumerate(node.params["padding_config"]) if any(config)]
    if len(padded) != 1:
        return None
    (axis,) = padded
    low, high, between = node.params["padding_config"][axis]
    if between or low < 0 or high < 0:
        return None
    return Block(value, inner, axis, low, low + inner.shape[axis])


def _is_term(graph: Graph, value: Value) -> bool:
    """Whether a value serves for nothing but one sum of arrays of its shape."""
    users = graph.uses.get(value, [])
    user = users[0][0] if len(users) == 1 else None
    return user is not None and user.op in _SUMS and user.aval.shape == value.shape


def _terms(graph: Graph, node: Node) -> list[Value]:
    """The terms of a sum; sums that are used elsewhere too are terms."""
    found, stack = [], list(reversed(node.inputs))
    while stack:
        value = stack.pop()
        inner = value.node
        if inner.op in _SUMS and _is_term(graph, value):
            stack.extend(reversed(inner.inputs))
        else:
            found.append(value)
    return found


def _apart(blocks: list[Block]) -> list[Block]:
    """As many blocks along one axis as can be had without overlap, in their order."""
    chosen: list[Block] = []
    for block in sorted(blocks, key=lambda b: (b.stop, b.start)):
        if not chosen or block.start >= chosen[-1].stop:
            chosen.append(block)
    return chosen


def _find_blocks(graph: Graph, node: Node) -> Match | None:
    """Of a sum that is no term of another one, the blocks to join and the other terms."""
    root = Value(node, 0)
    if not is_static(root) or _is_term(graph, root):
        return None
    terms = _terms(graph, node)
    if any(v.shape != node.aval.shape or v.aval.dtype != node.aval.dtype for v in terms):
        return None
    blocks = [b for b in map(_block, terms) if b is not None and _is_term(graph, b.term)]
    joined = max((_apart([b for b in blocks if b.axis == i]) for i in range(len(node.aval.shape))), key=len, default=[])
    if len(joined) < 2:
        return None
    rest = [v for v in terms if v not in {b.term for b in joined}]
    values = {f"block{i}": b.inner for i, b in enumerate(joined)} | {f"x{i}": v for i, v in enumerate(rest)}
    return Match(graph, (root,), values, {f"block{i}": b.term.node for i, b in enumerate(joined)})


def _join(m: Match, **values: Any) -> Any:
    blocks = [(x, _block(Value(m.nodes[name], 0))) for name, x in values.items() if name in m.nodes]
    rest = [x for name, x in values.items() if name not in m.nodes]
    shape, dtype = m.roots[0].shape, m.roots[0].aval.dtype
    pieces: list[Any] = []
    axis = end = first = 0
    for x, block in blocks:
        assert block is not None
        axis = block.axis
        if not pieces:
            first = block.start
        elif block.start > end:
            pieces.append(lax.full([block.start - end if i == axis else d for i, d in enumerate(shape)], 0, dtype))
        pieces.append(x)
        end = block.stop
    total = lax.concatenate(pieces, axis)
    if first or end < shape[axis]:
        config = [(first, shape[axis] - end, 0) if i == axis else (0, 0, 0) for i in range(len(shape))]
        total = lax.pad(total, np.zeros((), dtype), config)
    for x in rest:
        total = lax.add(total, x)
    return _jax.with_aval(total, m.roots[0].aval)


def _cases(s: Any) -> Iterator[Any]:
    def padded(x: Any, low: int, high: int) -> Any:
        return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), (low, high, 0)])

    a, b, c = s.dim(), s.dim(), s.dim()
    n = s.dim()
    x, y, z = s.array(n, a), s.array(n, b), s.array(n, c)
    yield lambda x, y: padded(x, 0, b) + padded(y, a, 0), (x, y)
    yield lambda x, y, z: padded(x, 1, b + c + 2) + (padded(z, a + b + 2, 1) + padded(y, a + 1, c + 2)), (x, y, z)
    whole = s.array(n, a + b)
    # The third block overlaps the others and stays a term, as the whole array does.
    yield lambda x, y, w: (padded(x, 0, b) + w) + (padded(y, a, 0) + padded(x * 2, b, 0)), (x, y, whole)


RULES: tuple[Rule, ...] = (
    Rule(
        "join-padded",
        "pad(x) + pad(y) + z → pad([x, 0, y]) + z, x and y apart along one axis",
        Find(_SUMS, _find_blocks),
        _join,
        "reassociate",
        cases=_cases,
    ),
)
