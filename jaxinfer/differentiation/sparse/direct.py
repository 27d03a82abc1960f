"""Sparse Jacobians without passes: the tangent program is run on the entries themselves.

Each value that depends on tangents is a sum of terms, and a term is one coefficient for each element together with the
number of the input element that it belongs to, which is known beforehand. Moving elements moves both; a product
multiplies coefficients; what belongs to the same input element is added up. So the work is that of the entries which
are there at each step: one term at first, as many as a row has entries at the end. Coefficients that are known numbers
cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.forward import interpret_node
from jaxinfer.differentiation.sparse.dependence import Dependence
from jaxinfer.differentiation.sparse.direct_terms import MOST_TERMS, Declined, Term, agree, merged, same
from jaxinfer.differentiation.sparse.moves import origins, targets
from jaxinfer.differentiation.sparse.pattern import NOTHING, Flow, Pattern, size
from jaxinfer.graph import Domain, Graph, Node, interpret
from jaxinfer.graph.emit import Emit

# Known factors up to this size become part of the coefficients.
_MOST_FOLDED = 1_000_000


class Edge(NamedTuple):
    """A value: itself and what is known of it, or the terms of a tangent."""

    primal: Any
    facts: Flow
    terms: tuple[Term, ...] | None = None


class Terms(Domain[Edge]):
    """Runs a tangent program on terms.

    Attributes:
        work: elements of coefficients computed so far.
        single: elements of tangents, as often as one pass of forward mode computes them.
    """

    rules: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, weights: Mapping[Node, Any]):
        self.emit, self.facts = Emit(weights), Dependence()
        self.work = self.single = 0

    def constant(self, node: Node) -> Edge:
        return Edge(self.emit.constant(node), self.facts.constant(node))

    def default(self, node: Node, *inputs: Edge) -> Sequence[Edge]:
        if all(x.terms is None for x in inputs):
            primals = interpret_node(self.emit, node, [x.primal for x in inputs])
            flows = self.facts.default(node, *(x.facts for x in inputs))
            return [Edge(p, f) for p, f in zip(primals, flows)]
        rule = _RULES.get(node.op)
        if rule is None:
            raise Declined(node.op)
        with _jax.at_source(node.source, node.context):
            found = rule(node, inputs)
        for aval, terms in zip(node.avals, found):
            self.single += size(aval)
            self.work += size(aval) * sum(np.ndim(t.coefficient) > 0 for t in terms)
        return [Edge(None, NOTHING, terms) for terms in found]

    def scan(self, node: Node, *inputs: Edge) -> Sequence[Edge]:
        return self.default(node, *inputs)

    def while_loop(self, node: Node, *inputs: Edge) -> Sequence[Edge]:
        return self.default(node, *inputs)

    def cond(self, node: Node, index: Edge, *inputs: Edge) -> Sequence[Edge]:
        return self.default(node, index, *inputs)


# -- rules: (node, edges) -> the terms of each result -----------------------------------------------------------------

Found = Sequence[tuple[Term, ...]]
Rule = Callable[[Node, Sequence[Edge]], Found]

# Operands that say where, not what.
_POSITIONS: Mapping[str, Callable[[int], bool]] = {
    "select_n": lambda i: i == 0,
    "dynamic_slice": lambda i: i > 0,
    "dynamic_update_slice": lambda i: i > 1,
    "gather": lambda i: i == 1,
    "scatter": lambda i: i == 1,
}


def _movement(node: Node, edges: Sequence[Edge]) -> Found:
    index = origins(node, [e.facts for e in edges])
    if index is None:
        if node.op == "select_n":
            return _choice(node, edges)
        raise Declined(f"{node.op} at unknown positions")
    count = max(len(e.terms) for e in edges if e.terms is not None)
    found: list[list[Term]] = [[] for _ in node.avals]
    for k in range(count):
        layer = [e.terms[k] if e.terms is not None and k < len(e.terms) else None for e in edges]
        for terms, term in zip(found, _moved(node, edges, layer, index)):
            terms.append(term)
    return [merged(terms, aval.shape) for terms, aval in zip(found, node.avals)]


def _moved(node: Node, edges: Sequence[Edge], layer: Sequence[Term | None], index: Sequence[np.ndarray]) -> list[Term]:
    """One term of each operand moved to its place."""
    before = np.concatenate([np.full(size(v.aval), -1) if t is None else t.numbers for t, v in zip(layer, node.inputs)])
    after = [np.where(i >= 0, before[i], -1) for i in index]
    there = [t for t in layer if t is not None]
    if all(t.is_known for t in there):
        first = there[0].coefficient
        if all(same(t.coefficient, first) and np.ndim(first) == 0 for t in there):
            return [Term(a, first, bool((a >= 0).all())) for a in after]
        zeros = [np.zeros(size(v.aval), first.dtype) for v in node.inputs]
        flat = np.concatenate(
            [z if t is None else t.everywhere(v.shape).ravel() for t, v, z in zip(layer, node.inputs, zeros)]
        )
        values = [np.where(i >= 0, flat[i], 0).astype(first.dtype) for i in index]
        return [Term(a, y.reshape(aval.shape), True) for a, y, aval in zip(after, values, node.avals)]
    is_position = _POSITIONS.get(node.op, lambda i: False)
    operands = [
        e.primal if is_position(i) else np.zeros(v.shape, v.dtype) if t is None else jnp.asarray(t.everywhere(v.shape))
        for i, (e, t, v) in enumerate(zip(edges, layer, node.inputs))
    ]
    results = _jax.bind(node.primitive, [jnp.asarray(x) for x in operands], dict(node.params))
    return [Term(a, y, True) for a, y in zip(after, results)]


def _choice(node: Node, edges: Sequence[Edge]) -> Found:
    """A choice that is made when the program runs."""
    which, shape = edges[0].primal, node.aval.shape
    groups: list[list[Term | None]] = []
    for case, edge in enumerate(edges[1:]):
        for term in edge.terms or ():
            for group in groups:
                if group[case] is None and all(agree(term, t) for t in group if t is not None):
                    group[case] = term
                    break
            else:
                groups.append([term if i == case else None for i in range(len(edges) - 1)])
    found = []
    for group in groups:
        index = np.max([t.numbers for t in group if t is not None], axis=0)
        cases = [jnp.zeros(shape, node.aval.dtype) if t is None else jnp.asarray(t.everywhere(shape)) for t in group]
        found.append(Term(index, lax.select_n(which, *cases), True))
    return [tuple(found)]


def _factor(edge: Edge) -> Any:
    """A factor's numbers if they are known, else the traced factor."""
    known = edge.facts.known
    if known is not None and math.prod(np.shape(edge.primal)) <= _MOST_FOLDED:
        array = known.array
        return array.reshape(-1)[0] if array.size and (array == array.reshape(-1)[0]).all() else array
    return edge.primal


def _scaled(term: Term, factor: Any, shape: tuple[int, ...], operation: Any) -> Term:
    """A term whose coefficients are multiplied or divided."""
    c, dtype = term.coefficient, term.coefficient.dtype
    if term.is_known and isinstance(factor, (np.ndarray, np.generic)):
        with np.errstate(all="ignore"):
            found = np.asarray(operation[0](c, factor), dtype)
        found = np.broadcast_to(found, shape) if found.ndim else found
        return term._replace(coefficient=found, clean=term.clean and bool(np.isfinite(factor).all()))
    if operation[0] is np.multiply and term.is_known and np.ndim(c) == 0 and c == 1:
        return term._replace(coefficient=jnp.broadcast_to(factor, shape))
    return term._replace(coefficient=jnp.broadcast_to(operation[1](c, factor), shape))


def _product(node: Node, edges: Sequence[Edge]) -> Found:
    side = 0 if edges[0].terms is not None else 1
    terms = edges[side].terms
    if terms is None or edges[1 - side].terms is not None or node.inputs[side].shape != node.aval.shape:
        raise Declined(node.op)
    factor = _factor(edges[1 - side])
    found = [_scaled(t, factor, node.aval.shape, (np.multiply, jnp.multiply)) for t in terms]
    return [merged(found, node.aval.shape)]


def _quotient(node: Node, edges: Sequence[Edge]) -> Found:
    terms = edges[0].terms
    if terms is None or edges[1].terms is not None or node.inputs[0].shape != node.aval.shape:
        raise Declined(node.op)
    return [tuple(_scaled(t, _factor(edges[1]), node.aval.shape, (np.divide, jnp.divide)) for t in terms)]


def _negated(term: Term) -> Term:
    return term._replace(coefficient=-term.coefficient if not term.is_known else np.asarray(-term.coefficient))


def _sum(node: Node, edges: Sequence[Edge]) -> Found:
    if any(v.shape != node.aval.shape for v, e in zip(node.inputs, edges) if e.terms is not None):
        raise Declined(node.op)
    first, second = (e.terms or () for e in edges)
    if node.op == "sub":
        second = tuple(map(_negated, second))
    return [merged([*first, *second], node.aval.shape)]


def _converted(node: Node, edges: Sequence[Edge]) -> Found:
    dtype, source = node.aval.dtype, node.inputs[0].dtype
    if not (jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(source, jnp.floating)):
        raise Declined("a conversion that is not from reals to reals")
    terms = edges[0].terms or ()
    return [tuple(t._replace(coefficient=t.coefficient.astype(dtype)) for t in terms)]


def _reduce_sum(node: Node, edges: Sequence[Edge]) -> Found:
    axes, shape, terms = node.params["axes"], node.inputs[0].shape, edges[0].terms or ()
    inner = math.prod(shape[a] for a in axes)
    if len(terms) * inner > MOST_TERMS:
        raise Declined("a sum over many elements")
    kept = [a for a in range(len(shape)) if a not in axes]
    place = np.arange(math.prod(shape)).reshape(shape).transpose(*kept, *axes).reshape(-1, inner)
    parts = []
    for term in terms:
        flat = term.coefficient
        if np.ndim(flat):
            flat = flat.transpose(*kept, *axes).reshape(*node.aval.shape, inner)
        for i in range(inner):
            index = term.numbers[place[:, i]]
            parts.append(Term(index, flat[..., i] if np.ndim(flat) else flat, term.clean or bool((index >= 0).all())))
    return [merged(parts, node.aval.shape)]


def _scatter_add(node: Node, edges: Sequence[Edge]) -> Found:
    indices, shape = edges[1].facts.array(), node.aval.shape
    if indices is None or edges[1].terms is not None:
        raise Declined("scatter-add at unknown positions")
    to = targets(node, indices, np.arange(math.prod(shape)).reshape(shape))
    inside = to >= 0
    if len(np.unique(to[inside])) < inside.sum():
        raise Declined("scatter-add that adds up")
    parts = list(edges[0].terms or ())
    for term in edges[2].terms or ():
        index = np.full(math.prod(shape), -1)
        index[to[inside]] = term.numbers[inside]
        if term.is_known and np.ndim(term.coefficient) == 0:
            parts.append(Term(index, term.coefficient, False))
            continue
        operands = [jnp.zeros(shape, node.aval.dtype), edges[1].primal, term.everywhere(node.inputs[2].shape)]
        (placed,) = _jax.bind(node.primitive, [jnp.asarray(x) for x in operands], dict(node.params))
        parts.append(Term(index, placed, True))
    return [merged(parts, shape)]


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        "broadcast_in_dim concatenate copy copy_p dynamic_slice dynamic_update_slice expand_dims gather pad reshape "
        "rev scatter select_n slice split squeeze stack tile transpose unstack".split(),
        _movement,
    ),
    **dict.fromkeys("add add_any sub".split(), _sum),
    **dict.fromkeys(("scatter-add", "scatter_add"), _scatter_add),
    "convert_element_type": _converted,
    "div": _quotient,
    "mul": _product,
    "neg": lambda node, edges: [tuple(map(_negated, edges[0].terms or ()))],
    "reduce_sum": _reduce_sum,
}


# -- programs ---------------------------------------------------------------------------------------------------------


class Emitted(NamedTuple):
    """The entries of a Jacobian, and what they took.

    Attributes:
        data: the entries, in the order of the pattern.
        work: elements of coefficients that are computed.
        single: elements of tangents that one pass of forward mode computes.
    """

    data: Any
    work: int
    single: int


def entries(graph: Graph, linear: Sequence[bool], operands: Sequence[Any], pattern: Pattern, dtype: Any) -> Emitted:
    """Computes the entries of a Jacobian from the program of its tangents.

    Args:
        graph: a program whose outputs are linear in some of its inputs.
        linear: for each input whether it is one of those.
        operands: values of the others, in order.
        pattern: a row for each element of the outputs, a column for each element of the linear inputs.
        dtype: of the result.

    Raises:
        Declined: an operation does not keep entries apart, or there are too many of them.
    """
    domain, given, column = Terms({}), iter(operands), 0
    inputs = []
    for node, is_linear in zip(graph.inputs, linear, strict=True):
        if is_linear:
            index = np.arange(column, column + size(node.aval))
            column += size(node.aval)
            inputs.append(Edge(None, NOTHING, (Term(index, np.ones((), node.aval.dtype), True),)))
        else:
            inputs.append(Edge(next(given), NOTHING))
    outputs = interpret(graph, domain, *inputs)
    return Emitted(_gathered(outputs, graph, pattern, dtype), domain.work, domain.single)


def _gathered(outputs: Sequence[Edge], graph: Graph, pattern: Pattern, dtype: Any) -> Any:
    """The entries picked out of all terms of all outputs."""
    columns = pattern.shape[1]
    parts: list[Any] = []
    rows, cols, places = [], [], []
    start = filled = 0
    for edge, value in zip(outputs, graph.outputs):
        for term in edge.terms or ():
            at = np.flatnonzero(term.numbers >= 0)
            rows.append(start + at)
            cols.append(term.numbers[at])
            scalar = np.ndim(term.coefficient) == 0 and size(value.aval) != 0
            parts.append(jnp.asarray(term.coefficient, dtype).reshape(-1))
            places.append(np.full(len(at), filled) if scalar and term.coefficient.ndim == 0 else filled + at)
            filled += parts[-1].size
        start += size(value.aval)
    if not parts:
        return jnp.zeros(pattern.nnz, dtype)
    wanted = pattern.rows.astype(np.int64) * columns + pattern.cols
    have, place = np.concatenate(rows) * columns + np.concatenate(cols), np.concatenate(places)
    entry = np.searchsorted(wanted, have)
    inside = (entry < len(wanted)) & (wanted[np.minimum(entry, len(wanted) - 1)] == have)
    entry, place = entry[inside], place[inside]
    order = np.argsort(entry, kind="stable")
    entry, place = entry[order], place[order]
    first = np.ones(len(entry), bool)
    first[1:] = entry[1:] != entry[:-1]
    source = np.full(pattern.nnz, filled)  # the zero that is appended, for entries that cancel
    source[entry[first]] = place[first]
    if (source == filled).any():
        parts.append(jnp.zeros(1, dtype))
    values = lax.concatenate(parts, 0) if len(parts) > 1 else parts[0]
    data = values.at[source].get(mode="promise_in_bounds")
    if not first.all():
        data = data.at[entry[~first]].add(values.at[place[~first]].get(mode="promise_in_bounds"))
    return data
