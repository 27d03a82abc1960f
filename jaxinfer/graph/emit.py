"""Graph → function: primitives are bound again, under whatever trace the caller is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.graph.interpret import Domain, interpret
from jaxinfer.graph.node import Graph, Node


def emit(graph: Graph) -> Callable[..., list[Any]]:
    """The function a graph stands for.

    Args:
        graph: the program.

    Returns:
        ``f(weights, *inputs) -> outputs``: ``weights`` are arrays for ``graph.weights``, in order, so that known arrays
        travel as arguments and not as literals; inputs and outputs are flat. Output avals, weak types included, are
        ``graph.out_avals``.
    """

    def emitted(weights: Sequence[Any], *inputs: Any) -> list[Any]:
        if len(weights) != len(graph.weights):
            raise ValueError(f"the program has {len(graph.weights)} weights, {len(weights)} were given")
        return run(graph, dict(zip(graph.weights, weights)), *inputs)

    return emitted


def run(graph: Graph, weights: Mapping[Node, Any], *inputs: Any) -> list[Any]:
    """Binds the operations of a graph on the given values; constants not in ``weights`` are used as they are."""
    outputs = interpret(graph, Emit(weights), *inputs)
    return [_jax.with_aval(x, aval) if hasattr(aval, "dtype") else x for x, aval in zip(outputs, graph.out_avals)]


class Emit(Domain[Any]):
    """The domain whose values are JAX values: arrays, or tracers of whoever is tracing."""

    def __init__(self, weights: Mapping[Node, Any]):
        self.weights = weights

    def constant(self, node: Node) -> Any:
        return self.weights.get(node, node.value)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        with _jax.at_source(node.source, node.context):
            return _jax.bind(node.primitive, inputs, dict(_bind_params(node)))

    def body(self, graph: Graph) -> Callable[..., list[Any]]:
        """A nested graph as a function; its weights are closed over."""
        return lambda *inputs: run(graph, self.weights, *inputs)

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        body = node.params["body"]
        if body.origin is not None:
            return self.default(node, *inputs)
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        fixed = inputs[:consts]
        step_function = self.body(body)

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            out = step_function(*fixed, *carry, *xs)
            return tuple(out[:carries]), tuple(out[carries:])

        init = _typed(inputs[consts : consts + carries], body.inputs[consts : consts + carries])
        length = node.params["length"]
        with _jax.at_source(node.source, node.context):
            carry, ys = jax.lax.scan(
                step,
                init,
                tuple(inputs[consts + carries :]),
                # lax.scan takes a symbolic length from what is scanned alone.
                length=length if isinstance(length, int) else None,
                reverse=node.params["reverse"],
                unroll=node.params["unroll"],
            )
        return [*carry, *ys]

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        cond, body = node.params["cond"], node.params["body"]
        if cond.origin is not None and body.origin is not None:
            return self.default(node, *inputs)
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        run_cond, run_body = self.body(cond), self.body(body)
        init = _typed(inputs[n_cond + n_body :], body.inputs[n_body:])
        with _jax.at_source(node.source, node.context):
            return jax.lax.while_loop(
                lambda carry: run_cond(*for_cond, *carry)[0],
                lambda carry: tuple(run_body(*for_body, *carry)),
                init,
            )

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        branches = node.params["branches"]
        if all(branch.origin is not None for branch in branches):
            return self.default(node, index, *inputs)
        weights = _weights_of(branches)
        jaxprs = [self._closed(branch, weights, inputs) for branch in branches]
        with _jax.at_source(node.source, node.context):
            return _jax.bind(
                node.primitive,
                [index, *(self.constant(w) for w in weights), *inputs],
                {**node.params["_original"], "branches": tuple(jaxprs)},
            )

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        body = node.params["body"]
        if body.origin is not None:
            return self.default(node, *inputs)
        weights = _weights_of([body])
        jaxpr, consts = _jax.without_constvars(self._closed(body, weights, inputs))
        with _jax.at_source(node.source, node.context):
            return _jax.bind(
                node.primitive,
                [*consts, *(self.constant(w) for w in weights), *inputs],
                {**node.params["_original"], "jaxpr": jaxpr},
            )

    def _closed(self, graph: Graph, weights: Sequence[Node], inputs: Sequence[Any]) -> Any:
        """A nested graph as a jaxpr whose weights are leading arguments."""
        count = len(weights)

        def fun(*args: Any) -> list[Any]:
            return run(graph, dict(zip(weights, args[:count])), *args[count:])

        avals = [*(w.aval for w in weights), *(n.aval for n in graph.inputs)]
        return _jax.make_jaxpr(fun, avals)


def _bind_params(node: Node) -> Mapping[str, Any]:
    return node.params.get("_original", node.params)


def _weights_of(graphs: Sequence[Graph]) -> list[Node]:
    return list(dict.fromkeys(w for g in graphs for w in g.weights))


def _typed(values: Sequence[Any], inputs: Sequence[Node]) -> tuple[Any, ...]:
    """Values with exactly the avals of the graph inputs they go to: loop carries must keep their weak types."""
    return tuple(_jax.with_aval(x, node.aval) if hasattr(node.aval, "dtype") else x for x, node in zip(values, inputs))
