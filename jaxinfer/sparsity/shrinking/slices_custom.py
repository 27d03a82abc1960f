"""Functions with derivatives of their own: the function and its rule both run on what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, Node, Value, interpret
from jaxinfer.sparsity.shrinking.slices import Sliced, made
from jaxinfer.sparsity.shrinking.slices_control import Form, array_in, form_of, like, settled, value_in
from jaxinfer.sparsity.shrinking.slices_elementwise import RULES as ELEMENTWISE

Rule = Callable[..., Sequence[Any]]


def custom(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """A function with a derivative of its own: the function and its rule both run on what is left."""
    if not all(isinstance(x, Sliced) for x in inputs) or all(x.is_whole for x in inputs):
        return domain.densely(node, *inputs)
    values = [settled(domain, x) for x in inputs]
    graph = domain.traced(node.params["call_jaxpr"])
    active = [i for i, v in enumerate(node.inputs) if _jax.has_tangent(v.aval) and not values[i].known]
    if node.op == "custom_vjp_call" and not _is_pointwise(_cotangents(domain, node, active)):
        return domain.densely(node, *inputs)
    out: list[Form | None] = []

    def put(arrays: Sequence[Any]) -> list[Sliced]:
        found = list(values)
        for i, a in zip(active, arrays):
            found[i] = like(values[i], a)
        return found

    def primal(*arrays: Any) -> tuple[Any, ...]:
        results = [settled(domain, y) for y in interpret(graph, domain, *put(arrays))]
        out[:] = map(form_of, results)
        return tuple(r.array if isinstance(r, Sliced) else r for r in results)

    rule = _forward if node.op == "custom_jvp_call" else _backward
    call = rule(domain, node, primal, put, active, out)
    arrays = call(*(values[i].array for i in active))
    return [value_in(f, a) for f, a in zip(out, arrays)]


def _bound(node: Node) -> Callable[..., list[Any]]:
    return lambda *xs: _jax.bind(node.primitive, xs, dict(node.params))


def _filled_with_zeros(x: Sliced, array: Any) -> Sliced:
    """A tangent of a value: what is missing does not change."""
    return made(x.shape, array, x.keep, None, None, x.void)


def _forward(domain: Any, node: Node, primal: Any, put: Any, active: Sequence[int], out: list[Form | None]) -> Any:
    avals = [v.aval for v in node.inputs]
    call = jax.custom_jvp(primal)

    def tangents(*operands: Any) -> list[Any]:
        xs, ts = operands[: len(avals)], operands[len(avals) :]
        seeds = [np.zeros(a.shape, _jax.tangent_aval(a).dtype) for a in avals]
        for i, t in zip(active, ts):
            seeds[i] = t
        results, changes = jax.jvp(_bound(node), tuple(xs), tuple(seeds))
        return [*results, *changes]

    @call.defjvp
    def jvp(primals: Any, changes: Any) -> Any:
        graph = domain.traced(_jax.make_jaxpr(tangents, [*avals, *(avals[i] for i in active)]))
        values = put(primals)
        moved = [_filled_with_zeros(values[i], t) for i, t in zip(active, changes)]
        found = interpret(graph, domain, *values, *moved)
        results = primal(*primals)
        ys, ts = found[: len(results)], found[len(results) :]
        del ys
        return results, tuple(array_in(settled(domain, t), f) for t, f in zip(ts, out))

    return call


def _cotangents(domain: Any, node: Node, active: Sequence[int]) -> Graph:
    """(operands, cotangents of the results) → cotangents of the active operands, by the function's own rule."""
    avals = [v.aval for v in node.inputs]

    def cotangents(*operands: Any) -> list[Any]:
        xs, cts = operands[: len(avals)], operands[len(avals) :]

        def moving(*some: Any) -> list[Any]:
            full = list(xs)
            for i, x in zip(active, some):
                full[i] = x
            return _bound(node)(*full)

        _, back = jax.vjp(moving, *(xs[i] for i in active))
        return list(back(list(cts)))

    return domain.traced(_jax.make_jaxpr(cotangents, [*avals, *node.avals]))


def _is_pointwise(graph: Graph) -> bool:
    """Whether no two elements meet: results have the shape of the inputs, and all operations act on elements."""
    shape = graph.out_avals[0].shape
    same = all(getattr(v.aval, "shape", None) == shape for v in (*graph.outputs, *(Value(n, 0) for n in graph.inputs)))
    return same and all(
        node.op in ELEMENTWISE or (node.op == "broadcast_in_dim" and not node.inputs[0].shape) for node in graph.nodes
    )


def _backward(domain: Any, node: Node, primal: Any, put: Any, active: Sequence[int], out: list[Form | None]) -> Any:
    """Cotangents of what is missing are taken as zero, which is right where elements do not meet."""
    call = jax.custom_vjp(primal)
    graph = _cotangents(domain, node, active)

    def forward(*arrays: Any) -> Any:
        return primal(*arrays), arrays

    def backward(arrays: Any, cts: Any) -> Any:
        values = put(arrays)
        given = [ct if f is None else made(f.shape, ct, f.keep, None, None, f.void) for f, ct in zip(out, cts)]
        found = interpret(graph, domain, *values, *given)
        return tuple(array_in(settled(domain, g), form_of(values[i])) for i, g in zip(active, found))

    call.defvjp(forward, backward)
    return call


RULES: Mapping[str, Rule] = {"custom_jvp_call": custom, "custom_vjp_call": custom}
