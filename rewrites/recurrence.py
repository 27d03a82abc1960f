"""Work that leaves loops: what is the same in every step, and products that all steps can share.

A recurrent cell multiplies its input, its state and often its output by weights. Only the product with the state has to
wait for the step before: the others are one product over all steps, before or after the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.cost import nbytes
from jaxinfer.analysis.loops import Dependence, Loop, below, cut, dependence
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.analysis.structure import ELEMENTWISE, MOVEMENT, is_static
from jaxinfer.graph import Graph, Node, Value, run
from jaxinfer.rewrites.loop_operands import match_loop, pick, replace_loop
from jaxinfer.rewriting import Find, Match, Rule

# What moves out of a loop may take this many times the memory of the loop's rows, or a small amount, without asking; up
# to a larger multiple it is offered.
_GROWTH = 4
_FREE_BYTES = 1 << 20
_OFFERED_GROWTH = 64
FREELY, _LARGE = (0, _GROWTH), (_GROWTH, _OFFERED_GROWTH)

# Operations that ``jax.vmap`` applies to all steps at once as it would to each.
_BATCHED = (
    ELEMENTWISE
    | MOVEMENT
    | frozenset(PRODUCTS)
    | frozenset(
        "argmax argmin broadcast_in_dim clamp concatenate dynamic_slice expand_dims gather iota pad reduce_and "
        "reduce_max reduce_min reduce_or reduce_prod reduce_sum rev select_n slice split stack stop_gradient".split()
    )
)

Finder = Callable[[Graph, Node], Match | None]


def is_batched(node: Node) -> bool:
    """Whether all steps of an operation can be taken at once: it has a batched form and its shapes are numbers."""
    values = (*node.inputs, *(Value(node, i) for i in range(len(node.avals))))
    return node.op in _BATCHED and is_static(*values) and node.params.get("out_sharding") is None


def total_bytes(values: Sequence[Value]) -> int:
    """Memory that values take together, in bytes."""
    return sum(nbytes(v.aval) for v in values)


# -- loop constants ---------------------------------------------------------------------------------------------------


def _find_invariants(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    moved = _invariants(loop)
    if not moved:
        return None
    fixed, carries, steps = loop.steps_inputs
    body = cut(loop.body.outputs, [*fixed, *moved, *carries, *steps], out_avals=loop.body.out_avals)
    once = cut(moved, fixed)

    def build(read: Callable[[Value], Any]) -> Sequence[Any]:
        first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
        conditions = {"cond": loop.cond, "cond_fixed": [read(v) for v in loop.cond_fixed]} if loop.cond else {}
        return loop.run(body, [*first, *run(once, {}, *first)], init, xs, **conditions)

    return match_loop(graph, node, build)


def _invariants(loop: Loop) -> list[Value]:
    """The largest values that depend on loop constants alone and do not take more memory than these."""
    kinds = dependence(loop, lambda _: True)

    def is_fixed(value: Value) -> bool:
        return kinds.get(value.node) is Dependence.FIXED and value.node.op != "input"

    def smallest(value: Value) -> Iterator[Value]:
        """The value, or what it is made of where it only repeats something smaller."""
        if not is_fixed(value):
            return
        sources = [Value(n, 0) for n in below([value]) if n.op == "input"]
        if is_static(value, *sources) and nbytes(value.aval) <= max(total_bytes(sources), 1):
            yield value
        else:
            for operand in value.node.inputs:
                yield from smallest(operand)

    edge = [v for n in loop.body.nodes if kinds[n] > Dependence.FIXED for v in n.inputs]
    return list(dict.fromkeys(x for v in (*edge, *loop.body.outputs) for x in smallest(v)))


# -- products before the loop -----------------------------------------------------------------------------------------


def _find_input_products(growth: tuple[float, float]) -> Finder:
    """Finds values that depend on rows of xs alone and come from products, whose memory is within bounds.

    Args:
        growth: more than this many times the loop's rows, and at most that many times.
    """

    def find(graph: Graph, node: Node) -> Match | None:
        loop = Loop.of(node)
        if loop.length is None or loop.length < 2 or not loop.xs:
            return None
        moved, made = _from_rows(loop)
        if not moved or not within(loop, made, growth):
            return None
        fixed, carries, steps = loop.steps_inputs
        body = cut(loop.body.outputs, [*fixed, *carries, *steps, *moved], out_avals=loop.body.out_avals)
        each = cut(moved, [*fixed, *steps])

        def build(read: Callable[[Value], Any]) -> Sequence[Any]:
            first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
            return loop.run(body, first, init, [*xs, *_all_steps(each, first, xs)])

        return match_loop(graph, node, build)

    return find


def _all_steps(each: Graph, fixed: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
    """One step's computation for all steps at once."""
    return list(jax.vmap(lambda *rows: tuple(run(each, {}, *fixed, *rows)))(*xs))


def _from_rows(loop: Loop) -> tuple[list[Value], list[Value]]:
    """Values to compute for all steps before the loop, and every value that is made on the way."""
    kinds = dependence(loop, is_batched)

    def is_moving(value: Value) -> bool:
        return kinds.get(value.node) is Dependence.ROW and value.node.op != "input"

    multiplied: set[Node] = set()
    for node in loop.body.nodes:
        if kinds[node] is Dependence.ROW and (node.op in PRODUCTS or any(v.node in multiplied for v in node.inputs)):
            multiplied.add(node)

    def smallest(value: Value) -> Iterator[Value]:
        if value.node not in multiplied:
            return
        rows = [v for v in value.node.inputs if is_moving(v)]
        if value.node.op in PRODUCTS or nbytes(value.aval) <= max(total_bytes(rows), 1):
            yield value
        else:
            for operand in rows:
                yield from smallest(operand)

    edge = [v for n in loop.body.nodes if kinds[n] is Dependence.CARRY for v in n.inputs]
    moved = list(dict.fromkeys(x for v in (*edge, *loop.body.outputs) for x in smallest(v)))
    made = below(moved, lambda v: not is_moving(v))
    return moved, [Value(n, i) for n in made for i in range(len(n.avals))]


def within(loop: Loop, made: Sequence[Value], growth: tuple[float, float]) -> bool:
    """Whether holding some of a body's values for all steps takes memory within bounds.

    Args:
        loop: the loop.
        made: the values of one step.
        growth: more than this many times the loop's rows (0: any), and at most that many times or a small amount.
    """
    assert loop.length is not None
    more = loop.length * total_bytes(made)
    rows = total_bytes((*loop.xs, *loop.results[len(loop.init) :]))
    low, high = growth
    return (low == 0 or more > max(low * rows, _FREE_BYTES)) and more <= max(high * rows, _FREE_BYTES)


# -- products after the loop ------------------------------------------------------------------------------------------


def _find_output_products(growth: tuple[float, float]) -> Finder:
    """Finds products that only ys need, and what follows them."""

    def find(graph: Graph, node: Node) -> Match | None:
        loop = Loop.of(node)
        if loop.length is None or loop.length < 2:
            return None
        late = _for_rows_only(loop)
        count = len(loop.init)
        rows = [i for i, v in enumerate(loop.rows) if v.node in late]
        used = [i for i in rows if graph.uses.get(Value(node, count + i))]
        fixed, carries, steps = loop.steps_inputs
        if not used:
            return None
        outputs = pick(loop.rows, used)
        needed = below(outputs, lambda v: v.node not in late)
        reads = dict.fromkeys(v for n in loop.body.nodes if n in needed for v in n.inputs)
        sources = [v for v in reads if v.node not in late and not loop.body.is_known(v)]
        stacked = [v for v in sources if v not in fixed and v not in steps]
        made = [Value(n, i) for n in late for i in range(len(n.avals))]
        if not within(loop, [*made, *stacked], growth):
            return None
        stay = [i for i in range(len(loop.rows)) if i not in rows]
        new = [v for v in stacked if v not in pick(loop.rows, stay)]
        out_avals = [*pick(loop.body.out_avals, [*range(count), *(count + i for i in stay)]), *(v.aval for v in new)]
        body = cut([*loop.carried, *pick(loop.rows, stay), *new], [*fixed, *carries, *steps], out_avals=out_avals)
        each = cut(outputs, [*fixed, *steps, *stacked], out_avals=[loop.body.out_avals[count + i] for i in used])

        def build(read: Callable[[Value], Any]) -> Sequence[Any]:
            first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
            results = loop.run(body, first, init, xs)
            ys = dict(zip([*pick(loop.rows, stay), *new], results[count:]))
            after = _all_steps(each, first, [*xs, *(ys[v] for v in stacked)])
            found = {**dict(zip(used, after)), **dict(zip(stay, results[count:]))}
            return [*results[:count], *(found.get(i) for i in range(len(loop.rows)))]

        return match_loop(graph, node, build)

    return find


def _for_rows_only(loop: Loop) -> set[Node]:
    """Products that only ys need and what is computed from them, as far as all steps can be taken at once."""
    kinds = dependence(loop, is_batched)
    needed = below(loop.carried) | below([v for n in loop.body.nodes if not n.is_pure for v in n.inputs])
    stuck = {n for n in loop.body.nodes if n in needed or not n.is_pure or not is_batched(n)}
    late: set[Node] = set()
    for node in reversed(loop.body.nodes):
        uses = [u for i in range(len(node.avals)) for u, _ in loop.body.uses.get(Value(node, i), ())]
        if node not in stuck and kinds[node] > Dependence.FIXED and all(u is None or u in late for u in uses):
            late.add(node)
    moved: set[Node] = set()
    for node in loop.body.nodes:
        if node in late and (node.op in PRODUCTS or any(v.node in moved for v in node.inputs)):
            moved.add(node)
    return moved


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_invariants(s: Any) -> Iterator[Any]:
    s.floating_only()
    size, steps = s.dim(2), s.dim(2)

    def scan(w: Any, b: Any, c: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (c @ (w * b) + x, jnp.exp(b)), c, xs)

    yield scan, (s.array(size, size), s.array(size), s.array(1, size), s.array(steps, 1, size))

    def loop(w: Any, c: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * jnp.tanh(w)), (0, c))[1]

    yield loop, (s.array(size), s.array(size))


def _cell(c: Any, x: Any, w: Any, u: Any, b: Any) -> Any:
    return jnp.tanh(x @ w + (c @ u + b))


def _case_input_products(s: Any) -> Iterator[Any]:
    s.floating_only()
    inputs, size, steps, rows = s.dim(), s.dim(), s.dim(2), s.dim()
    w, u, b = s.array(inputs, size), s.array(size, size), s.array(size)
    for reverse in (False, True):

        def scan(w: Any, u: Any, b: Any, c: Any, xs: Any, reverse: bool = reverse) -> Any:
            def step(c: Any, x: Any) -> Any:
                new = _cell(c, x, w, u, b)
                return new, new

            return lax.scan(step, c, xs, reverse=reverse)

        yield scan, (w, u, b, s.array(rows, size), s.array(steps, rows, inputs))


def _case_large_input_products(s: Any) -> Iterator[Any]:
    s.floating_only()
    # Enough memory in every dtype to be asked about.
    rows, steps = 1024, 16
    w, u = s.array(1, 32), s.array(32, 1)

    def scan(w: Any, u: Any, c: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (jnp.tanh(c + (x @ w) @ u), None), c, xs)[0]

    yield scan, (w, u, s.array(rows, 1), s.array(steps, rows, 1))


def _case_output_products(s: Any) -> Iterator[Any]:
    s.floating_only()
    size, outputs, steps, rows = s.dim(), s.dim(), s.dim(2), s.dim()

    def scan(w: Any, v: Any, c: Any, xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            new = jnp.tanh(c @ w + x)
            return new, (jnp.exp(new @ v) * x.sum() + c.sum(), new)

        return lax.scan(step, c, xs, reverse=True)

    yield scan, (s.array(size, size), s.array(size, outputs), s.array(rows, size), s.array(steps, rows, size))


def _case_large_output_products(s: Any) -> Iterator[Any]:
    s.floating_only()
    rows, steps = 1024, 16

    def scan(w: Any, v: Any, c: Any, xs: Any) -> Any:
        def step(c: Any, x: Any) -> Any:
            new = jnp.tanh(c + x)
            return new, (new @ w) @ v

        return lax.scan(step, c, xs)[1]

    yield scan, (s.array(1, 32), s.array(32, 1), s.array(rows, 1), s.array(steps, rows, 1))


RULES: tuple[Rule, ...] = (
    Rule(
        "loop-invariant",
        "loop: what depends on loop constants alone → computed once",
        Find(("scan", "while"), _find_invariants),
        replace_loop,
        "bitwise",
        cases=_case_invariants,
    ),
    Rule(
        "products-before-loop",
        "scan: x[t] W in every step → X W before the loop",
        Find(("scan",), _find_input_products(FREELY)),
        replace_loop,
        "reassociate",
        cases=_case_input_products,
    ),
    Rule(
        "large-products-before-loop",
        "scan: x[t] W in every step → X W before the loop, where that takes much memory",
        Find(("scan",), _find_input_products(_LARGE)),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_case_large_input_products,
    ),
    Rule(
        "products-after-loop",
        "scan: y[t] = h[t] W in every step → H W after the loop",
        Find(("scan",), _find_output_products(FREELY)),
        replace_loop,
        "reassociate",
        cases=_case_output_products,
    ),
    Rule(
        "large-products-after-loop",
        "scan: y[t] = h[t] W in every step → H W after the loop, where that takes much memory",
        Find(("scan",), _find_output_products(_LARGE)),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_case_large_output_products,
    ),
)
