"""Partial evaluation: what depends on known values only is computed once, ahead of time.

Literals alone are left to XLA (folding a broadcast scalar would trade a free operation for memory traffic); what is
folded descends from an array, or is a table that takes costly functions of an iota, such as the sines of an encoding of
positions: XLA computes these anew in everything that reads them. A known value much larger than the weights it comes
from, such as a bias broadcast over an image, stays an operation on its folded operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, GraphBuilder, Node, Value, emit

# A folded array may be this many times larger than what it is computed from, plus a little: kernels transformed for
# Winograd's F(4, 3) grow fourfold in two dimensions and eightfold in three.
_GROWTH = 8
_FREE_BYTES = 4096
# Functions that take longer to compute than a table of their values takes to read, up to a size that nobody misses.
_COSTLY = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 igamma "
    "igammac lgamma log log1p logistic pow random_bits rsqrt sin sinh sqrt tan tanh threefry2x32".split()
)
_TABLE_BYTES = 1 << 20

Evaluate = Callable[[Graph], Sequence[Any]]


def fold(graph: Graph, evaluate: Evaluate | None = None) -> Graph:
    """Replaces every known value that descends from an array by a constant.

    Args:
        graph: the program.
        evaluate: computes the outputs of a graph without inputs; by default on JAX's default device, compiled once.

    Returns:
        The graph with the known values folded; the same object when there is nothing to fold.
    """
    frontier = list(dict.fromkeys(_frontier(graph)))
    if not frontier:
        return graph
    arrays = (evaluate or evaluate_known)(_known_part(graph, frontier))
    return _substitute(graph, dict(zip(frontier, arrays)))


def evaluate_known(known: Graph) -> Sequence[Any]:
    """Computes a graph that has no inputs."""
    weights = [w.value for w in known.weights]
    return compile_known(known)(weights)


def compile_known(known: Graph) -> jax.stages.Compiled:
    """A graph that has no inputs as a compiled function of the list of its weights.

    It runs once, so little time goes into compiling it well.
    """
    # At level 0, tanh and rsqrt would come out otherwise than in the program.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(emit(known), compiler_options=options).lower([w.value for w in known.weights]).compile()


def nbytes(aval: Any) -> int:
    """Bytes of an array of this type; symbolic or extended types count as nothing."""
    if _jax.is_extended(aval.dtype) or not all(isinstance(d, int) for d in aval.shape):
        return 0
    return int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize


def folded(graph: Graph) -> set[Value]:
    """The values that folding would replace by constants, those of nested graphs included."""
    return set(_frontier(graph))


def _frontier(graph: Graph) -> Iterable[Value]:
    """The known values that the unknown part of the program needs, nested graphs included."""
    sources: dict[Node, frozenset[Node]] = {}
    # Known in every dimension but a symbolic one: not to be computed before that is known too.
    open_: set[Node] = set()
    # What differs from element to element without an array behind it.
    uneven: set[Node] = set()

    def weights_below(node: Node) -> frozenset[Node]:
        if node.is_const:
            return frozenset((node,)) if getattr(node.aval, "shape", ()) else frozenset()
        return sources.get(node, frozenset())

    def needed(value: Value, user: Node | None) -> Iterable[Value]:
        if value.node not in graph.known:
            return
        if _is_view(value.node, user):
            yield from needed(value.node.inputs[0], user)
            return
        below = frozenset() if value.node in open_ else weights_below(value.node)
        if below and nbytes(value.aval) <= _GROWTH * sum(nbytes(w.aval) for w in below) + _FREE_BYTES:
            yield value
        else:
            for operand in value.node.inputs:
                yield from needed(operand, value.node)

    for node in graph.nodes:
        if node in graph.known:
            sources[node] = frozenset().union(*(weights_below(v.node) for v in node.inputs))
            if any(map(_is_symbolic, node.avals)) or any(v.node in open_ for v in node.inputs):
                open_.add(node)
            if node.op == "iota" or any(v.node in uneven for v in node.inputs):
                uneven.add(node)
                if node.op in _COSTLY and sum(map(nbytes, node.avals)) <= _TABLE_BYTES:
                    sources[node] = frozenset((node,))
    for node in graph.nodes:
        if node not in graph.known:
            for value in node.inputs:
                yield from needed(value, node)
            for sub in node.subgraphs:
                yield from _frontier(sub)
    for value in graph.outputs:
        yield from needed(value, None)


def _is_symbolic(aval: Any) -> bool:
    return not all(isinstance(d, int) for d in getattr(aval, "shape", ()))


def _is_view(node: Node, user: Node | None) -> bool:
    """Whether a known node only looks at a part of an array, or widens it, where XLA fuses that into what reads it.

    Folded, the taps of one kernel would become as many arguments, and weights in fewer bits would be read in more. For
    a product, a slice would be copied at each call, and so would a wider array.
    """
    if user is None or user.op not in _FUSED:
        return False
    while node.op in ("reshape", "squeeze", "broadcast_in_dim") and nbytes(node.aval) == nbytes(node.inputs[0].aval):
        node = node.inputs[0].node
    widens = node.op == "convert_element_type" and nbytes(node.aval) > nbytes(node.inputs[0].aval)
    return widens or node.op == "slice"


_FUSED = frozenset("mul add sub max min div broadcast_in_dim reshape squeeze convert_element_type neg".split())


def _known_part(graph: Graph, frontier: Sequence[Value]) -> Graph:
    builder = GraphBuilder()

    def add(nodes: Iterable[Node], known: frozenset[Node]) -> None:
        for node in nodes:
            if node in known:
                builder.add(node)
            for sub in node.subgraphs if node not in known else ():
                add(sub.nodes, sub.known)

    add(graph.nodes, graph.known)
    return builder.build(frontier)


def _substitute(graph: Graph, arrays: Mapping[Value, Any]) -> Graph:
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    moved: dict[Value, Value] = {v: builder.const(a, v.aval) for v, a in arrays.items()}
    changed = False

    def swap(param: Any) -> Any:
        if isinstance(param, Graph):
            return _substitute(param, arrays)
        if isinstance(param, tuple) and any(isinstance(p, Graph) for p in param):
            return tuple(map(swap, param))
        return param

    for node in graph.nodes:
        params = {k: swap(v) for k, v in node.params.items()}
        extra = {"params": params} if any(params[k] is not v for k, v in node.params.items()) else {}
        new = builder.copy(node, [moved.get(v, v) for v in node.inputs], **extra)
        changed = changed or new is not node
        for i in range(len(node.avals)):
            moved.setdefault(Value(node, i), Value(new, i))
    changed = changed or any(v in arrays for v in graph.outputs)
    if not changed:
        return graph
    return builder.build([moved.get(v, v) for v in graph.outputs], out_avals=graph.out_avals)
