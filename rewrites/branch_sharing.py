"""Choices made by the same index become one.

A function, its gradient and its Hessian asked for together each choose between branches again, and compute something
else there. Joined, a branch computes what they have in common once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from jaxinfer.analysis.cost import flops
from jaxinfer.analysis.loops import below, copied
from jaxinfer.graph import Graph, GraphBuilder, Node, Value
from jaxinfer.graph.emit import Emit
from jaxinfer.graph.node import context_key
from jaxinfer.rewrites.loop_operands import LoopMatch, replace_loop
from jaxinfer.rewriting import Find, Match, Rule

# Operations that some branch has twice. Less is no reason to make both choices at once.
_LEAST_FLOPS = 3


def _find_shared(graph: Graph, node: Node) -> Match | None:
    index = node.inputs[0]
    users = [u for u, place in graph.uses[index] if u is not None and u.op == "cond" and place == 0 and u is not node]
    if not users:
        return None
    earlier = set(graph.nodes[: graph.nodes.index(node)])
    for other in users:
        alike = other.is_pure and context_key(other.context) == context_key(node.context)
        if other not in earlier and alike and node not in below(other.inputs):
            joint = _joined(node, other)
            if _saved(node, other, joint) >= _LEAST_FLOPS:
                return _match(graph, node, other, joint)
    return None


@dataclass(frozen=True, eq=False)
class _Joint:
    """Branches that compute what those of two nodes do, from their distinct operands.

    Attributes:
        operands: of the new node, without the index.
        branches: its branches.
        places: for each result of the two nodes, one node after the other, which of the new node's it is.
    """

    operands: tuple[Value, ...]
    branches: tuple[Graph, ...]
    places: tuple[int, ...]


def _joined(a: Node, b: Node) -> _Joint:
    operands = tuple(dict.fromkeys((*a.inputs[1:], *b.inputs[1:])))
    place = {v: i for i, v in enumerate(operands)}
    found = []
    for first, second in zip(a.params["branches"], b.params["branches"], strict=True):
        builder = GraphBuilder()
        inputs = [builder.input(v.aval) for v in operands]
        outputs: list[Value] = []
        for node, branch in ((a, first), (b, second)):
            env = {Value(n, 0): inputs[place[v]] for n, v in zip(branch.inputs, node.inputs[1:])}
            outputs += copied(builder, branch, env)
        found.append((builder, outputs, (*first.out_avals, *second.out_avals)))
    # Results that are equal in every branch are one.
    kept: dict[Any, int] = {}
    types = found[0][2]
    columns = [(str(t), getattr(t, "weak_type", False), *outs) for t, *outs in zip(types, *(o for _, o, _ in found))]
    places = [kept.setdefault(column, len(kept)) for column in columns]
    first_of = [places.index(i) for i in range(len(kept))]
    branches = tuple(
        builder.build([outputs[i] for i in first_of], out_avals=[avals[i] for i in first_of])
        for builder, outputs, avals in found
    )
    return _Joint(operands, branches, tuple(places))


def _saved(a: Node, b: Node, joint: _Joint) -> float:
    """Operations that the joint branches have less than both, where that is most."""
    before = ([sum(map(flops, g.nodes)) for g in node.params["branches"]] for node in (a, b))
    after = [sum(map(flops, g.nodes)) for g in joint.branches]
    return max(x + y - z for x, y, z in zip(*before, after))


def _match(graph: Graph, a: Node, b: Node, joint: _Joint) -> LoopMatch:
    results = [Value(n, i) for n in (a, b) for i in range(len(n.avals))]
    used = [i for i, v in enumerate(results) if graph.uses.get(v)]
    operands = (a.inputs[0], *joint.operands)
    values = {f"x{i}": v for i, v in enumerate(dict.fromkeys(operands))}

    def build(read: Callable[[Value], Any]) -> Sequence[Any]:
        found = lax.switch(read(a.inputs[0]), [Emit({}).body(g) for g in joint.branches], *map(read, joint.operands))
        return [found[joint.places[i]] for i in used]

    return LoopMatch(graph, tuple(results[i] for i in used), values, build=build)


def _case_shared(s: Any) -> Iterator[Any]:
    size = s.dim(3)

    def function(p: Any, w: Any, x: Any) -> Any:
        def half(x: Any) -> Any:
            return (x * w + x) * w

        first = lax.cond(p, lambda x: (half(x), x), lambda x: (x, x + w), x)
        # What the second choice reads is made between the two.
        return first, lax.cond(p, lambda x, y: half(x) + y, lambda x, y: y - x, x, x * 3)

    yield function, (s.array(dtype=bool), s.array(size), s.array(size))


RULES: tuple[Rule, ...] = (
    Rule(
        "choices-by-the-same-index",
        "switch(i, f, x), switch(i, g, y) → switch(i, (f, g), (x, y)), where f and g have work in common",
        Find(("cond",), _find_shared),
        replace_loop,
        "bitwise",
        cases=_case_shared,
    ),
)
