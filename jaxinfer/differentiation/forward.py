"""Forward mode: a domain along whose edges go a value and its tangent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation import linear_solve
from jaxinfer.differentiation.activity import active_outputs
from jaxinfer.differentiation.rules import filled, is_flat
from jaxinfer.differentiation.tables import RESULTS, TANGENTS
from jaxinfer.graph import Domain, Graph, Node, interpret
from jaxinfer.graph.emit import Emit


class Dual(NamedTuple):
    """A value and its tangent, None for zero."""

    primal: Any
    tangent: Any = None


class Forward(Domain[Dual]):
    """Computes values and tangents, as JAX values.

    Args:
        weights: arrays or tracers in the place of known arrays.
        borrowed: counts the operations whose derivative was left to JAX's own rule.
    """

    def __init__(self, weights: Mapping[Node, Any], borrowed: Counter[str]):
        self.emit = Emit(weights)
        self.borrowed = borrowed

    def constant(self, node: Node) -> Dual:
        """Known arrays do not change."""
        return Dual(self.emit.constant(node))

    def default(self, node: Node, *inputs: Dual) -> Sequence[Dual]:
        """By the table, else by JAX's own rule."""
        primals, tangents = [d.primal for d in inputs], [d.tangent for d in inputs]
        if is_flat(node) or all(t is None for t in tangents) or not any(map(_jax.has_tangent, node.avals)):
            return [Dual(x) for x in self._plain(node, primals)]
        with _jax.at_source(node.source, node.context):
            rule = TANGENTS.get(node.op)
            if rule is None:
                return self._borrowed(node, primals, tangents)
            outs = results(self.emit, node, primals)
            moved = rule(node, primals, outs, tangents)
            return [Dual(x, t) for x, t in zip(outs[: len(node.avals)], moved, strict=True)]

    def _plain(self, node: Node, primals: Sequence[Any]) -> Sequence[Any]:
        return interpret_node(self.emit, node, primals)

    def _borrowed(self, node: Node, primals: Sequence[Any], tangents: Sequence[Any]) -> list[Dual]:
        self.borrowed[node.op] += 1
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def of_moving(*values: Any) -> Sequence[Any]:
            operands = list(primals)
            for i, value in zip(moving, values):
                operands[i] = value
            return tuple(self._plain(node, operands))

        outs, moved = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
        return [Dual(x, t if _jax.has_tangent(_jax.aval_of(x)) else None) for x, t in zip(outs, moved)]

    # -- control flow --

    def _nested(self, graph: Graph, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        found = interpret(graph, self, *map(Dual, primals, tangents))
        outs = [
            _jax.with_aval(d.primal, a) if hasattr(a, "dtype") else d.primal for d, a in zip(found, graph.out_avals)
        ]
        return outs, [d.tangent for d in found]

    def scan(self, node: Node, *inputs: Dual) -> Sequence[Dual]:
        """One loop over values and the tangents of what is active."""
        body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
        active = [d.tangent is not None for d in inputs]
        if not any(active):
            return [Dual(x) for x in self.emit.scan(node, *(d.primal for d in inputs))]
        moves, out = carried_activity(body, active, consts, carries)
        primals = [d.primal for d in inputs]
        tangents = [filled(d.tangent, d.primal) if m else None for d, m in zip(inputs, moves)]
        first = slice(consts, consts + carries)
        fixed, fixed_t = primals[:consts], tangents[:consts]

        def step(carry: Any, rows: Any) -> tuple[Any, Any]:
            (c, c_t), (x, x_t) = carry, rows
            outs, outs_t = self._nested(body, [*fixed, *c, *x], [*fixed_t, *c_t, *x_t])
            outs_t = [filled(t, v) if m else None for t, v, m in zip(outs_t, outs, out)]
            return (outs[:carries], outs_t[:carries]), (outs[carries:], outs_t[carries:])

        length = node.params["length"]
        with _jax.at_source(node.source, node.context):
            init = [_jax.with_aval(x, n.aval) for x, n in zip(primals[first], body.inputs[first])]
            (c, c_t), (ys, ys_t) = lax.scan(
                step,
                (init, tangents[first]),
                (primals[consts + carries :], tangents[consts + carries :]),
                length=length if isinstance(length, int) else None,
                reverse=node.params["reverse"],
                unroll=node.params["unroll"],
            )
        return [Dual(x, t) for x, t in zip((*c, *ys), (*c_t, *ys_t))]

    def while_loop(self, node: Node, *inputs: Dual) -> Sequence[Dual]:
        """Tangents are carried along; the condition looks at values only."""
        cond, body = node.params["cond"], node.params["body"]
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        active = [d.tangent is not None for d in inputs]
        if not any(active[n_cond:]):
            return [Dual(x) for x in self.emit.while_loop(node, *(d.primal for d in inputs))]
        moves, _ = carried_activity(body, active[n_cond:], n_body, len(inputs) - n_cond - n_body)
        primals = [d.primal for d in inputs]
        tangents = [filled(d.tangent, d.primal) if m else None for d, m in zip(inputs[n_cond:], moves)]
        for_cond, fixed, fixed_t = primals[:n_cond], primals[n_cond : n_cond + n_body], tangents[:n_body]
        run_cond = self.emit.body(cond)

        def step(carry: Any) -> Any:
            c, c_t = carry
            outs, outs_t = self._nested(body, [*fixed, *c], [*fixed_t, *c_t])
            return outs, [filled(t, v) if m else None for t, v, m in zip(outs_t, outs, moves[n_body:])]

        with _jax.at_source(node.source, node.context):
            init = [_jax.with_aval(x, n.aval) for x, n in zip(primals[n_cond + n_body :], body.inputs[n_body:])]
            outs, outs_t = lax.while_loop(lambda c: run_cond(*for_cond, *c[0])[0], step, (init, tangents[n_body:]))
        return [Dual(x, t) for x, t in zip(outs, outs_t)]

    def cond(self, node: Node, index: Dual, *inputs: Dual) -> Sequence[Dual]:
        """Each branch with its tangents."""
        branches = node.params["branches"]
        active = [d.tangent is not None for d in inputs]
        if not any(active):
            return [Dual(x) for x in self.emit.cond(node, index.primal, *(d.primal for d in inputs))]
        moves = [any(found) for found in zip(*(active_outputs(b, active) for b in branches))]

        def taken(branch: Graph) -> Any:
            def run_branch(primals: Any, tangents: Any) -> Any:
                outs, outs_t = self._nested(branch, primals, tangents)
                return outs, [filled(t, x) if m else None for t, x, m in zip(outs_t, outs, moves)]

            return run_branch

        with _jax.at_source(node.source, node.context):
            operands = ([d.primal for d in inputs], [d.tangent for d in inputs])
            outs, outs_t = lax.switch(branch_index(index.primal), [taken(b) for b in branches], *operands)
        return [Dual(x, t) for x, t in zip(outs, outs_t)]

    def linear_solve(self, node: Node, *inputs: Dual) -> Sequence[Dual]:
        """The same system with another right-hand side."""
        primals, tangents = [d.primal for d in inputs], [d.tangent for d in inputs]
        outs = self._plain(node, primals)
        if all(t is None for t in tangents):
            return [Dual(x) for x in outs]

        def push(graph: Graph, values: Sequence[Any], moved: Sequence[Any]) -> Sequence[Any]:
            return self._nested(graph, values, moved)[1]

        with _jax.at_source(node.source, node.context):
            return [Dual(x, t) for x, t in zip(outs, linear_solve.tangents(push, node, primals, outs, tangents))]

    rules: ClassVar[Mapping[str, Any]] = {"custom_linear_solve": linear_solve}

    def remat(self, node: Node, *inputs: Dual) -> Sequence[Dual]:
        """In forward mode nothing is kept, so there is nothing to compute again."""
        return interpret(node.params["body"], self, *inputs)


def interpret_node(emit: Emit, node: Node, primals: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation, control flow included."""
    handlers = {"scan": emit.scan, "while": emit.while_loop, "cond": emit.cond, "remat": emit.remat}
    return handlers.get(node.op, emit.default)(node, *primals)


def results(emit: Emit, node: Node, primals: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation, then what its derivative rules need besides."""
    rule = RESULTS.get(node.op)
    if rule is None:
        return interpret_node(emit, node, primals)
    with _jax.at_source(node.source, node.context):
        return rule(node, primals)


def carried_activity(body: Graph, active: Sequence[bool], fixed: int, carries: int) -> tuple[list[bool], list[bool]]:
    """Activity of a loop body's inputs and outputs once it no longer grows from step to step.

    Args:
        body: (fixed, carries, rows) → (carries, rows).
        active: which inputs are active at first.
        fixed: number of loop constants.
        carries: number of carries.
    """
    inputs = list(active)
    while True:
        outputs = active_outputs(body, inputs)
        grown = [a or b for a, b in zip(inputs[fixed : fixed + carries], outputs)]
        if grown == inputs[fixed : fixed + carries]:
            return inputs, [*grown, *outputs[carries:]]
        inputs[fixed : fixed + carries] = grown


def branch_index(index: Any) -> Any:
    """A branch index as ``lax.switch`` takes it; a predicate picks branch 1 when true."""
    return lax.convert_element_type(index, "int32") if _jax.aval_of(index).dtype == bool else index
