"""Other forms of loops: products that are only added up, gates as one product, several steps at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.cost import flops
from jaxinfer.analysis.loops import Loop, cut
from jaxinfer.analysis.products import free_axes, same_product
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value, run, trace_function
from jaxinfer.rewrites.loop_operands import match_loop, pick, replace_loop
from jaxinfer.rewrites.parallel_products import one_dot
from jaxinfer.rewrites.recurrence import FREELY, is_batched, within
from jaxinfer.rewriting import Find, Match, Rule

# A loop that is shorter does not pay for joining weights before it.
_LONG = 4
# Several steps of a body up to this size are written out: its work is small beside what starting a step costs.
_SMALL_BODY = 40
_SMALL_WORK = 1 << 14


# -- products that are only added up ----------------------------------------------------------------------------------


def _find_sums(graph: Graph, node: Node) -> Match | None:
    """Carries that products are added to and nothing else reads."""
    loop = Loop.of(node)
    if loop.length is None or loop.length < 2:
        return None
    fixed, carries, steps = loop.steps_inputs
    sums = {i: v for i in range(len(carries)) if (v := _summand(loop, i)) is not None}
    if not sums:
        return None
    products = {i: _product_below(loop, v) for i, v in sums.items()}
    factors = list(dict.fromkeys(x for p in products.values() for x in p.node.inputs))
    rows = [v for v in factors if v not in steps and v not in loop.rows]
    if not within(loop, rows, FREELY):
        return None
    kept = [i for i in range(len(carries)) if i not in sums]
    places = [*kept, *range(len(carries), len(loop.body.outputs))]
    body = cut(
        [*pick(loop.body.outputs, places), *rows],
        [*fixed, *pick(carries, kept), *steps],
        out_avals=[*pick(loop.body.out_avals, places), *(v.aval for v in rows)],
    )

    def build(read: Callable[[Value], Any]) -> Sequence[Any]:
        first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
        results = loop.run(body, first, pick(init, kept), xs)
        found = dict(zip(places, results))
        ys = {v: found[len(carries) + i] for i, v in enumerate(loop.rows)}
        ys.update(zip((*rows, *steps), (*results[len(places) :], *xs)))
        for i, value in sums.items():
            product = products[i]
            total = _summed_product(product.node, *(ys[v] for v in product.node.inputs))
            found[i] = init[i] + run(cut([value], [product]), {}, total)[0]
        return [found[i] for i in range(len(node.avals))]

    return match_loop(graph, node, build)


def _summand(loop: Loop, i: int) -> Value | None:
    """What a carry that nothing else reads grows by in each step, where it is a product."""
    carry, out = loop.steps_inputs[1][i], loop.carried[i]
    uses = loop.body.uses
    if out.node.op not in ("add", "add_any") or len(uses.get(carry, ())) != 1 or len(uses[out]) != 1:
        return None
    value = next((v for v in out.node.inputs if v != carry), carry)
    if carry not in out.node.inputs or not (out.aval.shape == carry.shape == value.shape):
        return None
    product = _product_below(loop, value)
    if product is None or value.dtype != carry.dtype:
        return None
    node = product.node
    fixed = loop.steps_inputs[0]
    if any(v.dtype != product.dtype or v in fixed or loop.body.is_known(v) for v in node.inputs):
        return None
    return value


def _product_below(loop: Loop, value: Value) -> Value | None:
    """The product that a value is, or is a rearrangement of, if nothing else uses it."""
    while len(loop.body.uses[value]) == 1 and is_batched(value.node):
        if value.node.op == "dot_general":
            return value
        if value.node.op not in ("transpose", "reshape", "squeeze"):
            return None
        value = value.node.inputs[0]
    return None


def _summed_product(node: Node, lhs: Any, rhs: Any) -> Any:
    """The sum over the leading axis of products of rows: that axis is one more that is contracted."""
    contract, batch = node.params["dimension_numbers"]
    numbers = tuple((0, *(d + 1 for d in dims)) for dims in contract), tuple(tuple(d + 1 for d in b) for b in batch)
    options = {k: node.params[k] for k in ("precision", "preferred_element_type")}
    return lax.dot_general(lhs, rhs, numbers, **options)


# -- gates as one product ---------------------------------------------------------------------------------------------


def _find_gates(side: int) -> Callable[[Graph, Node], Match | None]:
    def find(graph: Graph, node: Node) -> Match | None:
        loop = Loop.of(node)
        if loop.cond is None and (loop.length is None or loop.length < _LONG):
            return None
        groups = [g for g in loop_products(loop, side) if len(g) > 1]
        if not groups:
            return None
        body = in_stages(loop, groups, side, _one_product(side))

        def build(read: Callable[[Value], Any]) -> Sequence[Any]:
            first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
            conditions = {"cond": loop.cond, "cond_fixed": [read(v) for v in loop.cond_fixed]} if loop.cond else {}
            return loop.run(body, first, init, xs, **conditions)

        return match_loop(graph, node, build)

    return find


def loop_products(loop: Loop, side: int, known: bool = False) -> list[list[Node]]:
    """Products of one operand that changes with loop constants on ``side``, those together that can be one product.

    Args:
        loop: the loop.
        side: which operand the constants are.
        known: whether constants may be known ones. Those that share an operand are joined by other rules.
    """
    fixed = loop.steps_inputs[0]
    groups: dict[Any, list[Node]] = {}
    for node in loop.body.nodes:
        if node.op != "dot_general" or not is_batched(node) or 0 in node.aval.shape:
            continue
        weights, x = node.inputs[side], node.inputs[1 - side]
        if node.params["dimension_numbers"][1][0] or not free_axes(node)[side]:
            continue
        constant = weights in fixed or (known and loop.body.is_known(weights))
        if constant and x not in fixed and not loop.body.is_known(x):
            groups.setdefault((x, weights.dtype, node.context), []).append(node)
    return [[n for n in nodes if same_product(nodes[0], n)] for nodes in groups.values()]


Products = Callable[[Sequence[Node], Any, Sequence[Any]], Sequence[Any]]


def in_stages(loop: Loop, groups: Sequence[Sequence[Node]], side: int, products: Products) -> Graph:
    """The body with groups of products done in another way.

    Args:
        loop: the loop.
        groups: products that share an operand, as :func:`loop_products` finds them.
        side: which operand the constants are.
        products: ``products(nodes, x, constants)`` computes one group. What it does with constants alone is the same
            in every step, so it moves out of the loop.
    """
    inputs = [Value(n, 0) for n in loop.body.inputs]
    # Groups in program order: the operand of a later one may depend on an earlier one.
    found: list[Value] = []
    stages = []
    for nodes in sorted(groups, key=lambda g: loop.body.nodes.index(g[0])):
        operands = [nodes[0].inputs[1 - side], *(n.inputs[side] for n in nodes)]
        stages.append((cut(operands, [*inputs, *found]), nodes))
        found.extend(Value(n, 0) for n in nodes)
    rest = cut(loop.body.outputs, [*inputs, *found], out_avals=loop.body.out_avals)

    def step(*arrays: Any) -> list[Any]:
        made: list[Any] = []
        for operands, nodes in stages:
            x, *constants = run(operands, {}, *arrays, *made)
            made.extend(products(nodes, x, constants))
        return run(rest, {}, *arrays, *made)

    return trace_function(step, *(n.aval for n in loop.body.inputs))


def _one_product(side: int) -> Products:
    def products(nodes: Sequence[Node], x: Any, constants: Sequence[Any]) -> Sequence[Any]:
        return one_dot(nodes, side, x, constants)

    return products


# -- several steps at a time ------------------------------------------------------------------------------------------


def _find_unrolled(steps: int) -> Callable[[Graph, Node], Match | None]:
    def find(graph: Graph, node: Node) -> Match | None:
        loop = Loop.of(node)
        if loop.length is None or loop.length < 2 * steps or node.params["unroll"] != 1:
            return None
        body = loop.body
        if body.size > _SMALL_BODY or any(True for n in body.nodes for _ in n.subgraphs):
            return None
        values = [Value(n, i) for n in body.nodes for i in range(len(n.avals))]
        if not is_static(*values) or sum(map(flops, body.nodes)) > _SMALL_WORK:
            return None
        longer = Loop.of(dataclasses.replace(node, params={**node.params, "unroll": steps}))

        def build(read: Callable[[Value], Any]) -> Sequence[Any]:
            first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
            return longer.run(body, first, init, xs)

        return match_loop(graph, node, build)

    return find


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_sums(s: Any) -> Iterator[Any]:
    s.floating_only()
    left, right, steps, rows = s.dim(), s.dim(), s.dim(2), s.dim()

    def scan(total: Any, xs: Any, ys: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            x, y = row
            total, c = carry
            return (total + (y.T @ jnp.tanh(c * x)).T, c + x), None

        return lax.scan(step, (total, xs[0]), (xs, ys))[0]

    yield scan, (s.array(left, right), s.array(steps, rows, left), s.array(steps, rows, right))


def _case_gates(side: int) -> Callable[[Any], Iterator[Any]]:
    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        size, steps, rows = s.dim(), s.dim(_LONG), s.dim()

        def times(h: Any, w: Any) -> Any:
            return h @ w if side else (w @ h.T).T

        def step(h: Any, x: Any, u: Any, v: Any, w: Any) -> Any:
            gate = jnp.tanh(times(h, u) + x) * times(h, v)
            return gate * h + times(gate, w) - times(gate, u)

        def scan(u: Any, v: Any, w: Any, c: Any, xs: Any) -> Any:
            return lax.scan(lambda h, x: (step(h, x, u, v, w), h), c, xs)

        arrays = (*(s.array(size, size) for _ in range(3)), s.array(rows, size))
        yield scan, (*arrays, s.array(steps, rows, size))

        def loop(u: Any, v: Any, w: Any, c: Any) -> Any:
            return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, step(c[1], 0, u, v, w)), (0, c))[1]

        yield loop, arrays

    return cases


def _case_unrolled(steps: int) -> Callable[[Any], Iterator[Any]]:
    def cases(s: Any) -> Iterator[Any]:
        size, length = s.dim(), s.dim(2 * steps, 2 * steps + 3)
        reverse = s.choice((False, True))

        def scan(c: Any, xs: Any) -> Any:
            return lax.scan(lambda c, x: (c * x + 1, c - x), c, xs, reverse=reverse)

        yield scan, (s.array(size), s.array(length, size))

    return cases


RULES: tuple[Rule, ...] = (
    Rule(
        "summed-products",
        "scan: s ← s + a[t]ᵀ b[t] → s + Aᵀ B after the loop",
        Find(("scan",), _find_sums),
        replace_loop,
        "reassociate",
        cases=_case_sums,
    ),
    Rule(
        "gates-as-product",
        "loop: h A, h B, constants A and B → h [A B], taken apart",
        Find(("scan", "while"), _find_gates(1)),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_case_gates(1),
    ),
    Rule(
        "gates-as-product-left",
        "loop: A h, B h, constants A and B → [A; B] h, taken apart",
        Find(("scan", "while"), _find_gates(0)),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_case_gates(0),
    ),
    *(
        Rule(
            f"{steps}-steps-at-a-time",
            f"scan of a small step → {steps} steps written out",
            Find(("scan",), _find_unrolled(steps)),
            replace_loop,
            "bitwise",
            kind="offer",
            cases=_case_unrolled(steps),
        )
        for steps in (2, 4, 8)
    ),
)
