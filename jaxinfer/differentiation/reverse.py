"""Reverse mode: values are computed once, then cotangents go back through the operations that matter."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation.activity import useful_values
from jaxinfer.differentiation.forward import interpret_node, results
from jaxinfer.differentiation.linear_solve import solve
from jaxinfer.differentiation.reverse_control import cond, refuse_while, scan
from jaxinfer.differentiation.rules import add, is_flat, zeros_of
from jaxinfer.differentiation.tables import PULLBACKS, TANGENTS
from jaxinfer.graph import Domain, Graph, Node, Value, interpret, trace_function
from jaxinfer.graph.emit import Emit

Pullback = Callable[[Sequence[Any]], Sequence[Any]]


class Traced(NamedTuple):
    """A value, and whether it depends on what is differentiated."""

    primal: Any
    active: bool = False


def vjp(
    graph: Graph,
    weights: Mapping[Node, Any],
    active: Sequence[bool],
    useful: Sequence[bool],
    *inputs: Any,
    borrowed: Counter[str],
) -> tuple[list[Any], Pullback]:
    """Runs a program and keeps how to pull cotangents back through it.

    Args:
        graph: the program.
        weights: arrays or tracers in the place of known arrays.
        active: which inputs are differentiated.
        useful: which outputs may get a cotangent.
        *inputs: the program's inputs, as JAX values.
        borrowed: counts the operations whose derivative was left to JAX's own rule.

    Returns:
        The outputs, and a function from their cotangents (None for zero, also where not useful) to those of the inputs
        (None for zero, also where not active).
    """
    domain = Reverse(weights, useful_values(graph, useful), borrowed)
    found = interpret(graph, domain, *(Traced(x, a) for x, a in zip(inputs, active)))
    outs = [
        _jax.with_aval(x.primal, aval) if hasattr(aval, "dtype") else x.primal
        for x, aval in zip(found, graph.out_avals)
    ]
    live = [x.active and u for x, u in zip(found, useful)]

    def pullback(cotangents: Sequence[Any]) -> list[Any]:
        sums: dict[Value, Any] = {}
        for value, ct, counts in zip(graph.outputs, cotangents, live):
            if counts and ct is not None:
                sums[value] = add(sums.get(value), ct)
        for node, marks, pull in reversed(domain.tape):
            got = [sums.pop(Value(node, i), None) for i in range(len(node.avals))]
            if all(ct is None for ct in got):
                continue
            with _jax.at_source(node.source, node.context):
                back = pull(got)
                for value, ct, mark in zip(node.inputs, back, marks, strict=True):
                    if mark and ct is not None:
                        sums[value] = add(sums.get(value), ct)
        return [sums.get(Value(node, 0)) if a else None for node, a in zip(graph.inputs, active)]

    return outs, pullback


class Reverse(Domain[Traced]):
    """Computes values and writes down the pullbacks of what is active and useful.

    Attributes:
        tape: (operation, which operands are active, pullback) in program order.
    """

    def __init__(self, weights: Mapping[Node, Any], useful: set[Value], borrowed: Counter[str]):
        self.emit = Emit(weights)
        self.useful = useful
        self.borrowed = borrowed
        self.tape: list[tuple[Node, list[bool], Pullback]] = []

    def constant(self, node: Node) -> Traced:
        """Known arrays do not change."""
        return Traced(self.emit.constant(node))

    def is_recorded(self, node: Node, inputs: Sequence[Traced]) -> bool:
        """Whether a cotangent can come to an operation and go on from it."""
        return (
            not is_flat(node)
            and any(x.active for x in inputs)
            and any(_jax.has_tangent(a) and Value(node, i) in self.useful for i, a in enumerate(node.avals))
        )

    def default(self, node: Node, *inputs: Traced) -> Sequence[Traced]:
        """By the table, by transposing the tangent rule, or by JAX's own rule."""
        primals, active = [x.primal for x in inputs], [x.active for x in inputs]
        if not self.is_recorded(node, inputs):
            return self.plain(node, primals)
        if node.op in PULLBACKS:
            outs = results(self.emit, node, primals)
            pull: Pullback = functools.partial(PULLBACKS[node.op], node, primals, outs, active)
        elif node.op in TANGENTS:
            outs = results(self.emit, node, primals)
            pull = functools.partial(_transposed, node, primals, outs, active, self.borrowed)
        else:
            return self.borrow(node, primals, active)
        return self.record(node, outs, active, pull)

    def plain(self, node: Node, primals: Sequence[Any]) -> list[Traced]:
        """The results of an operation through which no cotangent goes."""
        return [Traced(x) for x in interpret_node(self.emit, node, primals)]

    def record(self, node: Node, outs: Sequence[Any], active: Sequence[bool], pull: Pullback) -> list[Traced]:
        """Writes a pullback down."""
        self.tape.append((node, list(active), pull))
        return [Traced(x, _jax.has_tangent(a)) for x, a in zip(outs, node.avals)]

    def borrow(self, node: Node, primals: Sequence[Any], active: Sequence[bool]) -> list[Traced]:
        """An operation whose derivative JAX knows: custom rules, rematerialised calls, other people's primitives."""
        self.borrowed[node.op] += 1
        moving = [i for i, a in enumerate(active) if a]

        def of_moving(*values: Any) -> Sequence[Any]:
            operands = list(primals)
            for i, value in zip(moving, values):
                operands[i] = value
            return tuple(interpret_node(self.emit, node, operands))

        with _jax.at_source(node.source, node.context):
            outs, back = jax.vjp(of_moving, *(primals[i] for i in moving))

        def pull(cotangents: Sequence[Any]) -> list[Any]:
            full = tuple(_full(ct, x) for ct, x in zip(cotangents, outs))
            found = dict(zip(moving, back(full)))
            return [found.get(i) for i in range(len(primals))]

        return self.record(node, outs, active, pull)

    # -- control flow --

    def scan(self, node: Node, *inputs: Traced) -> Sequence[Traced]:
        """The loop keeps what its pullback needs of each step, and a loop the other way uses it."""
        return self._structured(scan, node, inputs)

    def cond(self, node: Node, index: Traced, *inputs: Traced) -> Sequence[Traced]:
        """The branch that was taken keeps what its pullback needs."""
        return self._structured(cond, node, [Traced(index.primal), *inputs])

    def while_loop(self, node: Node, *inputs: Traced) -> Sequence[Traced]:
        """Without a derivative: how many steps there are to keep is not known.

        Raises:
            ValueError: if a result depends on what is differentiated.
        """
        refuse_while(node, [x.active for x in inputs], self.useful)
        return self.plain(node, [x.primal for x in inputs])

    def linear_solve(self, node: Node, *inputs: Traced) -> Sequence[Traced]:
        """The transposed system."""
        return self._structured(solve, node, inputs)

    rules: ClassVar[Mapping[str, Any]] = {"custom_linear_solve": linear_solve}

    def remat(self, node: Node, *inputs: Traced) -> Sequence[Traced]:
        """JAX's own rule, which computes the body again when cotangents come back."""
        primals, active = [x.primal for x in inputs], [x.active for x in inputs]
        return self.borrow(node, primals, active) if self.is_recorded(node, inputs) else self.plain(node, primals)

    def _structured(self, rule: Callable[..., Any], node: Node, inputs: Sequence[Traced]) -> Sequence[Traced]:
        primals, active = [x.primal for x in inputs], [x.active for x in inputs]
        if not self.is_recorded(node, inputs):
            return self.plain(node, primals)
        useful = [Value(node, i) in self.useful for i in range(len(node.avals))]
        run_vjp = functools.partial(vjp, borrowed=self.borrowed)
        outs, pull = rule(run_vjp, self.emit, node, primals, active, useful)
        return self.record(node, outs, active, pull)


def _full(cotangent: Any, out: Any) -> Any:
    """A cotangent as JAX wants it: zeros are arrays, those of integers of the type float0."""
    if cotangent is not None:
        return cotangent
    aval = _jax.aval_of(out)
    return zeros_of(out) if _jax.has_tangent(aval) else np.zeros(aval.shape, jax.dtypes.float0)


def _transposed(
    node: Node,
    primals: Sequence[Any],
    outs: Sequence[Any],
    active: Sequence[bool],
    borrowed: Counter[str],
    cotangents: Sequence[Any],
) -> list[Any]:
    """Cotangents through an operation that has a tangent rule only: the rule is a linear program, run backwards."""
    moving = [i for i, a in enumerate(active) if a]
    avals = [_jax.aval_of(x) for x in (*(primals[i] for i in moving), *primals, *outs)]
    has: list[bool] = []

    def linear(*args: Any) -> list[Any]:
        tangents: list[Any] = [None] * len(primals)
        for i, t in zip(moving, args):
            tangents[i] = t
        inner = args[len(moving) :]
        found = TANGENTS[node.op](node, inner[: len(primals)], inner[len(primals) :], tangents)
        has[:] = [t is not None for t in found]
        return [t for t in found if t is not None]

    graph = trace_function(linear, *avals, keep_custom=True)
    marks = [True] * len(moving) + [False] * (len(primals) + len(outs))
    inputs = [*(zeros_of(primals[i]) for i in moving), *primals, *outs]
    mine = [ct for ct, h in zip(cotangents, has) if h]
    _, pull = vjp(graph, {}, marks, [ct is not None for ct in mine], *inputs, borrowed=borrowed)
    found = dict(zip(moving, pull(mine)))
    return [found.get(i) for i in range(len(primals))]


__all__ = ["Pullback", "Reverse", "Traced", "vjp"]
