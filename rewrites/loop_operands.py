"""What loops read and carry: known constants go inside, what is unused, unchanging or the same twice goes away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import lax

from jaxinfer.analysis.loops import Loop, below, cut
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule
from jaxinfer.rewriting.fold import folded

Read = Callable[[Value], Any]


@dataclass
class LoopMatch(Match):
    """A loop, and how to compute it in another way.

    Attributes:
        build: from a reader of the loop's operands to the values of ``roots``.
    """

    build: Callable[[Read], Sequence[Any]] | None = None


def match_loop(graph: Graph, node: Node, build: Callable[[Read], Sequence[Any]]) -> LoopMatch | None:
    """A match of the results of a loop that are used at all.

    Args:
        graph: the program.
        node: the loop.
        build: gives all results of the loop, from a reader of its operands; None for a result that is not used.
    """
    used = [i for i in range(len(node.avals)) if graph.uses.get(Value(node, i))]
    if not used:
        return None
    values = {f"x{i}": v for i, v in enumerate(dict.fromkeys(node.inputs))}

    def build_used(read: Read) -> Sequence[Any]:
        results = build(read)
        return [results[i] for i in used]

    return LoopMatch(graph, tuple(Value(node, i) for i in used), values, build=build_used)


def replace_loop(m: LoopMatch, **operands: Any) -> Sequence[Any]:
    """The replacement of every match made by :func:`match_loop`."""
    arrays = dict(zip(m.values.values(), operands.values()))
    assert m.build is not None
    return m.build(arrays.__getitem__)


def pick(items: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """The items at some positions."""
    return [items[i] for i in positions]


# -- known operands go inside -----------------------------------------------------------------------------------------


def _find_known(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    candidates = {v for v in (*loop.fixed, *loop.cond_fixed) if graph.is_known(v)}
    if not candidates:
        return None
    known = {v for v in candidates if v.node.is_const}
    if known != candidates:
        known |= candidates & folded(graph)
    if not known:
        return None
    body, fixed = _inside(loop.body, loop.fixed, known)
    if loop.cond is None:
        return match_loop(
            graph, node, lambda read: loop.run(body, *(list(map(read, v)) for v in (fixed, loop.init, loop.xs)))
        )
    cond, cond_fixed = _inside(loop.cond, loop.cond_fixed, known)
    return match_loop(
        graph,
        node,
        lambda read: loop.run(
            body, *(list(map(read, v)) for v in (fixed, loop.init)), cond=cond, cond_fixed=list(map(read, cond_fixed))
        ),
    )


def _inside(body: Graph, fixed: Sequence[Value], known: set[Value]) -> tuple[Graph, list[Value]]:
    """A body that holds known operands, with the operations that compute them, and the operands that are left."""
    inputs = [Value(n, 0) for n in body.inputs]
    same = {x: v for x, v in zip(inputs, fixed) if v in known}
    left = [v for v in fixed if v not in known]
    return cut(body.outputs, [x for x in inputs if x not in same], same, body.out_avals), left


# -- what is not needed -----------------------------------------------------------------------------------------------


def _find_unused(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    fixed, carries, steps = loop.steps_inputs
    count = len(carries)
    used = {i for i in range(len(node.avals)) if graph.uses.get(Value(node, i))}
    rows = [i for i in range(len(loop.rows)) if count + i in used]
    kept = {i for i in range(count) if i in used}
    for_cond: set[Node] = set()
    if loop.cond is not None:
        for_cond = below(loop.cond.outputs)
        kept |= {i for i in range(count) if loop.cond.inputs[len(loop.cond_fixed) + i] in for_cond}
    while True:
        outputs = [*pick(loop.carried, sorted(kept)), *pick(loop.rows, rows)]
        needed = below(outputs)
        grown = kept | {i for i, c in enumerate(carries) if c.node in needed}
        if grown == kept:
            break
        kept = grown
    carry = sorted(kept)
    keep_fixed = [i for i, v in enumerate(fixed) if v.node in needed]
    keep_xs = [i for i, v in enumerate(steps) if v.node in needed]
    keep_cond = [i for i in range(len(loop.cond_fixed)) if loop.cond is not None and loop.cond.inputs[i] in for_cond]
    old = (len(fixed), count, len(steps), len(loop.rows), len(loop.cond_fixed))
    if old == tuple(map(len, (keep_fixed, carry, keep_xs, rows, keep_cond))):
        return None
    inputs = [*pick(fixed, keep_fixed), *pick(carries, carry), *pick(steps, keep_xs)]
    out_avals = [loop.body.out_avals[i] for i in (*carry, *(count + i for i in rows))]
    body = cut(outputs, inputs, out_avals=out_avals)
    places = [*carry, *(count + i for i in rows)]

    def build(read: Read) -> Sequence[Any]:
        operands = [
            list(map(read, pick(*v))) for v in ((loop.fixed, keep_fixed), (loop.init, carry), (loop.xs, keep_xs))
        ]
        if loop.cond is None:
            results = loop.run(body, *operands)
        else:
            conditions = [Value(n, 0) for n in loop.cond.inputs]
            inner = [*pick(conditions, keep_cond), *pick(conditions[len(loop.cond_fixed) :], carry)]
            cond = cut(loop.cond.outputs, inner, out_avals=loop.cond.out_avals)
            cond_fixed = list(map(read, pick(loop.cond_fixed, keep_cond)))
            results = loop.run(body, *operands, cond=cond, cond_fixed=cond_fixed)
        found = dict(zip(places, results))
        return [found.get(i) for i in range(len(node.avals))]

    return match_loop(graph, node, build)


# -- carries that stay what they were ---------------------------------------------------------------------------------


def _find_unchanged(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    fixed, carries, steps = loop.steps_inputs
    stays = [i for i in range(len(carries)) if _stays(loop, i)]
    if not stays:
        return None
    moves = [i for i in range(len(carries)) if i not in stays]
    rows = range(len(carries), len(loop.body.outputs))
    outputs = pick(loop.body.outputs, (*moves, *rows))
    inputs = [*fixed, *pick(carries, stays), *pick(carries, moves), *steps]
    body = cut(outputs, inputs, out_avals=pick(loop.body.out_avals, (*moves, *rows)))

    def build(read: Read) -> Sequence[Any]:
        first = list(map(read, loop.init))
        operands = [[*map(read, loop.fixed), *pick(first, stays)], pick(first, moves), list(map(read, loop.xs))]
        if loop.cond is None:
            results = loop.run(body, *operands)
        else:
            conditions = [Value(n, 0) for n in loop.cond.inputs]
            given, carried = conditions[: len(loop.cond_fixed)], conditions[len(loop.cond_fixed) :]
            inner = [*given, *pick(carried, stays), *pick(carried, moves)]
            cond = cut(loop.cond.outputs, inner, out_avals=loop.cond.out_avals)
            cond_fixed = [*map(read, loop.cond_fixed), *pick(first, stays)]
            results = loop.run(body, *operands, cond=cond, cond_fixed=cond_fixed)
        found = {**dict(zip(stays, pick(first, stays))), **dict(zip((*moves, *rows), results))}
        return [found[i] for i in range(len(node.avals))]

    return match_loop(graph, node, build)


def _stays(loop: Loop, i: int) -> bool:
    """Whether a carry has the same value in every step: it is passed on, or set to what it starts from."""
    fixed, carries, _ = loop.steps_inputs
    out, first = loop.carried[i], loop.init[i]
    if out == carries[i]:
        return True
    if out in fixed:
        return loop.fixed[fixed.index(out)] == first
    return out.node.is_const and first.node.is_const and _same_array(out, first)


def _same_array(a: Value, b: Value) -> bool:
    if a.node.value is b.node.value:
        return True
    if a.shape or b.shape or a.dtype != b.dtype or not isinstance(a.dtype, np.dtype):
        return False
    return np.asarray(a.node.value).tobytes() == np.asarray(b.node.value).tobytes()


# -- the same thing twice ---------------------------------------------------------------------------------------------


def _find_equal(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    fixed, carries, steps = loop.steps_inputs
    same = {
        **_repeated(fixed, loop.fixed),
        **_repeated(steps, loop.xs),
        **equal_carries(loop),
    }
    first_row: dict[Value, int] = {}
    rows = [first_row.setdefault(same.get(v, v), i) for i, v in enumerate(loop.rows)]
    passed = {i: loop.xs[steps.index(v)] for i, v in enumerate(loop.rows) if v in steps}
    repeated = {i: loop.fixed[fixed.index(v)] for i, v in enumerate(loop.rows) if v in fixed}
    keep_rows = [i for i, first in enumerate(rows) if first == i and i not in passed and i not in repeated]
    if not same and len(keep_rows) == len(rows):
        return None
    kept = [[i for i, v in enumerate(values) if v not in same] for values in (fixed, carries, steps)]
    inputs = [v for values in (fixed, carries, steps) for v in values if v not in same]
    outputs = [*pick(loop.carried, kept[1]), *pick(loop.rows, keep_rows)]
    count = len(carries)
    out_avals = pick(loop.body.out_avals, [*kept[1], *(count + i for i in keep_rows)])
    body = cut(outputs, inputs, same, out_avals)

    def build(read: Read) -> Sequence[Any]:
        operands = [list(map(read, pick(v, k))) for v, k in zip((loop.fixed, loop.init, loop.xs), kept)]
        results = loop.run(body, *operands)
        final = {carries[i]: x for i, x in zip(kept[1], results)}
        ys = dict(zip(keep_rows, results[len(kept[1]) :]))
        ys.update((i, read(v)) for i, v in passed.items())
        ys.update((i, lax.broadcast(read(v), node.avals[count + i].shape[:1])) for i, v in repeated.items())
        return [*(final[same.get(c, c)] for c in carries), *(ys[first] for first in rows)]

    return match_loop(graph, node, build)


def _repeated(inner: Sequence[Value], outer: Sequence[Value]) -> dict[Value, Value]:
    """Inputs of the body that are given the same operand as an earlier one."""
    first: dict[Value, Value] = {}
    found = {x: first.setdefault(v, x) for x, v in zip(inner, outer)}
    return {x: y for x, y in found.items() if x != y}


def equal_carries(loop: Loop) -> dict[Value, Value]:
    """Carries that start the same and, being the same, go on the same: the coarsest partition that steps respect."""
    fixed, carries, steps = loop.steps_inputs
    types = [(str(v.aval), getattr(v.aval, "weak_type", False)) for v in carries]
    groups: list[Any] = [(v, t) for v, t in zip(loop.init, types)]
    while True:
        first: dict[Any, Value] = {}
        leader = [first.setdefault(g, c) for g, c in zip(groups, carries)]
        same = {c: to for c, to in zip(carries, leader) if c != to}
        if not same:
            return {}
        stepped = cut(loop.carried, [*fixed, *(c for c in carries if c not in same), *steps], same).outputs
        refined = [(to, out) for to, out in zip(leader, stepped)]
        if len(set(refined)) == len(set(groups)):
            return same
        groups = refined


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_known(s: Any) -> Iterator[Any]:
    size, steps = s.dim(), s.dim(2)

    def scan(w: Any, b: Any, c: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (c * w + x - b, c), c, xs)

    yield scan, (s.frozen(size), s.array(size), s.array(size), s.array(steps, size))

    def scan_computed(w: Any, c: Any, xs: Any) -> Any:
        twice = w + w
        return lax.scan(lambda c, x: (c * twice + x, c), c, xs)

    yield scan_computed, (s.frozen(size), s.array(size), s.array(steps, size))

    def loop(w: Any, c: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * w), (0, c))[1]

    yield loop, (s.frozen(size), s.array(size))


def _case_unused(s: Any) -> Iterator[Any]:
    size, steps = s.dim(), s.dim(2)

    def scan(c: Any, d: Any, xs: Any, zs: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            c, d, e = carry
            return (c + rows[0], d * e, e + d), (c * 2, d)

        (c, _, _), (ys, _) = lax.scan(step, (c, d, d), (xs, zs))
        return c, ys

    yield scan, (s.array(size), s.array(size), s.array(steps, size), s.array(steps))

    def loop(c: Any, d: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + c[0], c[2] * c[1]), (0, c, d))[1]

    yield loop, (s.array(size), s.array(size))


def _case_unchanged(s: Any) -> Iterator[Any]:
    size, steps = s.dim(), s.dim(2)

    def scan(c: Any, d: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: ((c[0] * c[1] + x, d), c[0]), (c, d), xs)

    yield scan, (s.array(size), s.array(size), s.array(steps, size))

    def loop(c: Any, d: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < c[3], lambda c: (c[0] + 1, c[1] + c[2], c[2], c[3]), (0, c, d, 3))[1:]

    yield loop, (s.array(size), s.array(size))


def _case_equal(s: Any) -> Iterator[Any]:
    size, steps = s.dim(), s.dim(2)

    def scan(c: Any, f: Any, xs: Any) -> Any:
        def step(carry: Any, rows: Any) -> Any:
            c, d, e = carry
            return (c + rows[0], d + rows[1], e * 2), (c, d, c + d, rows[0], f)

        return lax.scan(step, (c, c, c), (xs, xs))

    yield scan, (s.array(size), s.array(size), s.array(steps, size))


RULES: tuple[Rule, ...] = (
    Rule(
        "unused-carry",
        "loop: carries, rows and constants that no result needs → none",
        Find(("scan", "while"), _find_unused),
        replace_loop,
        "bitwise",
        cases=_case_unused,
    ),
    Rule(
        "unchanged-carry",
        "loop: a carry that keeps its value → a loop constant",
        Find(("scan", "while"), _find_unchanged),
        replace_loop,
        "bitwise",
        cases=_case_unchanged,
    ),
    Rule(
        "equal-carries",
        "scan: operands, carries or rows that are equal in every step → one",
        Find(("scan",), _find_equal),
        replace_loop,
        "bitwise",
        cases=_case_equal,
    ),
    Rule(
        "known-loop-constant",
        "loop: known operand that stays the same → a constant inside the body",
        Find(("scan", "while"), _find_known),
        replace_loop,
        "bitwise",
        cases=_case_known,
    ),
)
