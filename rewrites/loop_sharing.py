"""Loops that carry the same thing become one loop.

A function, its gradient and its Hessian asked for together each run the function's loops again, and keep something else
of every step. Joined, the loops run once; what is equal in them is then found by the rule for equal carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.cost import flops
from jaxinfer.analysis.loops import Loop, below, copied
from jaxinfer.graph import Graph, GraphBuilder, Node, Value
from jaxinfer.graph.node import context_key
from jaxinfer.rewrites.loop_operands import LoopMatch, equal_carries, replace_loop
from jaxinfer.rewriting import Find, Match, Rule

# Operations in one step of what is carried twice. A counter or a clock is no reason to join loops.
_LEAST_FLOPS = 3


def _find_shared(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    for other in _later(graph, loop):
        joint = _joined(loop, Loop.of(other))
        if _shares(joint, len(loop.init)):
            return _match(graph, loop, Loop.of(other), joint)
    return None


def _later(graph: Graph, loop: Loop) -> Iterator[Node]:
    """Loops later in the program, with as many steps, that start from something this one starts from too and do not
    depend on its results."""
    starts = [v for v in dict.fromkeys(loop.init) if _is_inexact(v)]
    users = dict.fromkeys(u for v in starts for u, _ in graph.uses[v] if u is not None and u.op == "scan")
    alike = [u for u in users if u is not loop.node and u.is_pure and _kind(u) == _kind(loop.node)]
    if not alike:
        return
    earlier = set(graph.nodes[: graph.nodes.index(loop.node)])
    for other in alike:
        if other not in earlier and set(starts) & set(Loop.of(other).init) and loop.node not in below(other.inputs):
            yield other


def _kind(node: Node) -> tuple[Any, ...]:
    return (*(node.params[name] for name in ("length", "reverse", "unroll")), context_key(node.context))


def _is_inexact(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _joined(a: Loop, b: Loop) -> Loop:
    """A loop that does what both do: carries of both, then rows of both; what both read is read once."""
    builder = GraphBuilder()
    shared: dict[Any, tuple[Value, Value]] = {}

    def inputs(inner: Sequence[Value], outer: Sequence[Value], kind: str) -> dict[Value, Value]:
        found = {}
        for x, v in zip(inner, outer):
            key = (kind, v, str(x.aval), getattr(x.aval, "weak_type", False))
            if key not in shared:
                shared[key] = (v, builder.input(x.aval))
            found[x] = shared[key][1]
        return found

    (fixed_a, carries_a, steps_a), (fixed_b, carries_b, steps_b) = a.steps_inputs, b.steps_inputs
    in_a, in_b = inputs(fixed_a, a.fixed, "fixed"), inputs(fixed_b, b.fixed, "fixed")
    in_a |= {x: builder.input(x.aval) for x in carries_a}
    in_b |= {x: builder.input(x.aval) for x in carries_b}
    in_a |= inputs(steps_a, a.xs, "row")
    in_b |= inputs(steps_b, b.xs, "row")
    fixed, xs = (tuple(v for (kind, *_), (v, _) in shared.items() if kind == k) for k in ("fixed", "row"))
    out_a, out_b = copied(builder, a.body, in_a), copied(builder, b.body, in_b)
    m, n = len(a.init), len(b.init)
    outputs = [*out_a[:m], *out_b[:n], *out_a[m:], *out_b[n:]]
    types_a, types_b = a.body.out_avals, b.body.out_avals
    body = builder.build(outputs, out_avals=[*types_a[:m], *types_b[:n], *types_a[m:], *types_b[n:]])
    return Loop(a.node, fixed, (*a.init, *b.init), xs, body)


def _shares(joint: Loop, first: int) -> bool:
    """Whether a carry of the second loop, after the `first` ones, is one of the first loop's, and takes work."""
    carries = joint.steps_inputs[1]
    place = {c: i for i, c in enumerate(carries)}
    same = equal_carries(joint)
    twice = [c for c, to in same.items() if place[c] >= first > place[to] and _is_inexact(c)]
    return sum(flops(n) for n in below([joint.carried[place[c]] for c in twice]) if n.inputs) >= _LEAST_FLOPS


def _match(graph: Graph, a: Loop, b: Loop, joint: Loop) -> LoopMatch:
    m, n = len(a.init), len(b.init)
    results = (*a.results[:m], *b.results[:n], *a.results[m:], *b.results[n:])
    used = [i for i, v in enumerate(results) if graph.uses.get(v)]
    values = {f"x{i}": v for i, v in enumerate(dict.fromkeys((*joint.fixed, *joint.init, *joint.xs)))}

    def build(read: Callable[[Value], Any]) -> Sequence[Any]:
        found = joint.run(joint.body, *(list(map(read, v)) for v in (joint.fixed, joint.init, joint.xs)))
        return [found[i] for i in used]

    return LoopMatch(graph, tuple(results[i] for i in used), values, build=build)


def _case_shared(s: Any) -> Iterator[Any]:
    size, steps = s.dim(2), s.dim(2)
    for reverse in (False, True):

        def scans(w: Any, c: Any, d: Any, xs: Any, zs: Any, reverse: bool = reverse) -> Any:
            def step(c: Any, x: Any) -> Any:
                return (c * w + x) * w, None

            def longer(carry: Any, rows: Any) -> Any:
                (c, d), (x, z) = carry, rows
                return (step(c, x)[0], d * z + c), c + d

            last = lax.scan(step, c, xs, reverse=reverse)[0]
            # The second loop's rows are made between the two.
            return last, lax.scan(longer, (c, d), (xs, zs * w), reverse=reverse)

        yield scans, (s.array(size), s.array(size), s.array(size), s.array(steps, size), s.array(steps, size))


RULES: tuple[Rule, ...] = (
    Rule(
        "loops-that-carry-the-same",
        "scan(f, c), scan((f, g), (c, d)) → scan((f, g), (c, d))",
        Find(("scan",), _find_shared),
        replace_loop,
        "bitwise",
        cases=_case_shared,
    ),
)
