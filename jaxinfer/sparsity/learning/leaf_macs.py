"""How much work of products each parameter takes part in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.analysis.cost import flops, trips
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Domain, Graph, Node, interpret, trace

Sources = frozenset[int] | None
"""The parameters, by position, that a value is computed from; None if anything else takes part."""


def parameter_macs(fun: Callable[..., Any], params: Any, *args: Any) -> tuple[Mapping[int, float], float]:
    """Multiply-accumulates of the products that each parameter is a factor of.

    Nothing is run.

    Args:
        fun: ``fun(params, *args)``.
        params: a pytree.
        *args: an example of the other arguments; shapes are enough.

    Returns:
        Multiply-accumulates by the position of the leaf, and those of the whole program. All steps of a loop count; a
        ``while`` counts as one iteration. A factor that is computed from several parameters (a kernel times a scale)
        counts for the largest of them.
    """
    graph, count = trace_leaves(fun, params, args)
    domain = _Factors([int(node.aval.size) for node in graph.inputs[:count]])
    inputs = [frozenset([i]) if i < count else None for i in range(len(graph.inputs))]
    interpret(graph, domain, *inputs)
    positions = [i for i, x in enumerate(jax.tree.leaves(params)) if hasattr(x, "dtype") and hasattr(x, "shape")]
    by_leaf: dict[int, float] = {}
    for sources, macs in domain.work.values():
        if sources:
            leaf = positions[max(sources, key=domain.size)]
            by_leaf[leaf] = by_leaf.get(leaf, 0.0) + macs
    return by_leaf, sum(macs for _, macs in domain.work.values())


def trace_leaves(fun: Callable[..., Any], params: Any, args: Sequence[Any]) -> tuple[Graph, int]:
    """The graph of ``fun(params, *args)`` in its arrays, those of ``params`` first, and how many those are."""
    leaves, tree = jax.tree.flatten((params, tuple(args)))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def flat(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        own, others = jax.tree.unflatten(tree, [next(rest) if a else x for x, a in zip(leaves, is_array)])
        return jax.tree.leaves(fun(own, *others))

    avals = [_jax.abstract(x) for x, a in zip(leaves, is_array) if a]
    return trace(_jax.make_jaxpr(flat, avals)), sum(is_array[: len(jax.tree.leaves(params))])


class _Factors(Domain[Sources]):
    """Which parameters values are computed from, and the products between them and anything else."""

    def __init__(self, sizes: Sequence[int]):
        self._sizes = sizes
        self._around: list[Node] = []
        # Bodies of loops are walked until nothing changes: the last walk's findings stand.
        self.work: dict[Any, tuple[Sources, float]] = {}

    def size(self, leaf: int) -> int:
        """Number of entries of a parameter."""
        return self._sizes[leaf]

    def constant(self, node: Node) -> Sources:
        return frozenset()

    def join(self, a: Sources, b: Sources) -> Sources:
        return None if a is None or b is None else a | b

    def default(self, node: Node, *inputs: Sources) -> Sequence[Sources]:
        if node.op in PRODUCTS:
            factors = [x for x in inputs if x]
            times = 1
            for outer in self._around:
                times *= trips(outer)
            self.work[(*self._around, node)] = (frozenset().union(*factors), times * flops(node) / 2)
        joined: Sources = frozenset()
        for x in inputs:
            joined = self.join(joined, x)
        return [joined] * len(node.avals)

    def scan(self, node: Node, *inputs: Sources) -> Sequence[Sources]:
        return self._inside(node, super().scan, inputs)

    def while_loop(self, node: Node, *inputs: Sources) -> Sequence[Sources]:
        return self._inside(node, super().while_loop, inputs)

    def _inside(
        self, node: Node, walk: Callable[..., Sequence[Sources]], inputs: Sequence[Sources]
    ) -> Sequence[Sources]:
        self._around.append(node)
        try:
            return walk(node, *inputs)
        finally:
            self._around.pop()
