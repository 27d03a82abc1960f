"""A loop's products of one vector with constant weights, done in blocks by two processor cores at once.

XLA gives a small loop to one core: a product of a vector with a matrix is one operation, and the body one function. The
weights are then read from the cache all cores share, step after step. In halves they stay in the caches of two cores.
What it takes, as of XLA:CPU's thunk executor:

* more than eight operations that can start at once: then half of them go to another thread;
* a body that is no single function: an operation that is always called, such as a sort, sees to that;
* a larger share for the thread that starts the step. It then comes last, goes on with the step, and is the one that
  starts the next: each core meets the same weights again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.loops import Loop
from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import rebind, size
from jaxinfer.graph import Graph, Node, Value, run, trace_function
from jaxinfer.rewrites.loop_forms import in_stages, loop_products
from jaxinfer.rewrites.loop_operands import match_loop, replace_loop
from jaxinfer.rewriting import Find, Match, Rule

# The first four blocks stay with the thread that starts the step.
_KEPT, _GIVEN = 4, 5
_KEPT_SHARE = 0.55
_MULTIPLE = 8
# Smaller weights are read faster than another thread is told of them.
_LEAST_BYTES = 1 << 17


def _find(side: int) -> Callable[[Graph, Node], Match | None]:
    def find(graph: Graph, node: Node) -> Match | None:
        loop = Loop.of(node)
        if loop.cond is not None or loop.length is None or loop.length < 2:
            return None
        groups = [g for g in loop_products(loop, side, known=True) if _pays(g, side)]
        if not groups:
            return None
        body = _blocked(loop, groups, side)

        used = [i for i in range(len(node.avals)) if graph.uses.get(Value(node, i))]
        if not used:
            return None
        smallest = min(used, key=lambda i: node.avals[i].size)

        def build(read: Callable[[Value], Any]) -> Sequence[Any]:
            first, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
            sorted_, *results = loop.run(body, first, [jnp.zeros(2, np.int32), *init], xs)
            # Always so, but XLA cannot tell; it would drop a sort that nothing depends on.
            result = results[smallest]
            results[smallest] = lax.select(
                lax.full_like(result, sorted_[0] >= 0, bool), result, lax.full_like(result, 0)
            )
            return results

        return match_loop(graph, node, build)

    return find


def _pays(nodes: Sequence[Node], side: int) -> bool:
    """Whether these are products of one vector with enough weights, and not blocks already."""
    if nodes[0].inputs[1 - side].node.op == "optimization_barrier":
        return False
    vector = all(nodes[0].inputs[1 - side].shape[i] == 1 for i in free_axes(nodes[0])[1 - side])
    precision = nodes[0].params["precision"]
    alike = not isinstance(precision, tuple) or precision[0] == precision[1]
    weights = sum(size(n.inputs[side]) * np.dtype(n.inputs[side].dtype).itemsize for n in nodes)
    return vector and alike and weights >= _LEAST_BYTES and sum(n.aval.size for n in nodes) >= _MULTIPLE * 2 * _GIVEN


def _blocked(loop: Loop, groups: Sequence[Sequence[Node]], side: int) -> Graph:
    """The body with each group done in blocks, and a sort that depends on the step."""
    body = in_stages(loop, groups, side, _products(side))

    def step(*arrays: Any) -> Sequence[Any]:
        fixed, count, rest = arrays[: len(loop.fixed)], arrays[len(loop.fixed)], arrays[len(loop.fixed) + 1 :]
        return [lax.sort(count + np.array([1, 0], np.int32)), *run(body, {}, *fixed, *rest)]

    avals = [n.aval for n in body.inputs]
    return trace_function(
        step, *avals[: len(loop.fixed)], jax.ShapeDtypeStruct((2,), np.int32), *avals[len(loop.fixed) :]
    )


def _products(side: int) -> Callable[..., list[Any]]:
    """Products of a vector with weights: ``after(nodes, x, weights)``, all columns in blocks, taken apart again."""

    def after(nodes: Sequence[Node], x: Any, weights: Sequence[Any]) -> list[Any]:
        rows = []
        for node, w in zip(nodes, weights):
            contract, free = node.params["dimension_numbers"][0][side], free_axes(node)[side]
            rows.append(lax.reshape(lax.transpose(w, (*free, *contract)), (node.aval.size, x.size)))
        first = nodes[0]
        contract, free = first.params["dimension_numbers"][0][1 - side], free_axes(first)[1 - side]
        vector = lax.reshape(lax.transpose(x, (*free, *contract)), (x.size,))
        joined, places = lax.concatenate(rows, 0), list(itertools.pairwise(_bounds(sum(r.shape[0] for r in rows))))
        blocks = [lax.slice_in_dim(joined, start, stop) for start, stop in places]
        # Told apart, the operands keep the products from being joined again.
        vectors = lax.optimization_barrier((vector,) * len(blocks))
        numbers = (((1,), (0,)), ((), ()))
        whole = lax.concatenate([rebind(first, b, v, dimension_numbers=numbers) for b, v in zip(blocks, vectors)], 0)
        # Fused into what reads its parts, the concatenation would be decided element by element.
        whole = lax.optimization_barrier(whole)
        offsets = itertools.accumulate((n.aval.size for n in nodes), initial=0)
        return [
            lax.reshape(lax.slice_in_dim(whole, start, stop), node.aval.shape)
            for node, (start, stop) in zip(nodes, itertools.pairwise(offsets))
        ]

    return after


def _bounds(columns: int) -> list[int]:
    """Where blocks begin and end."""
    shares = [_KEPT_SHARE / _KEPT] * _KEPT + [(1 - _KEPT_SHARE) / _GIVEN] * (_GIVEN - 1)
    inner = [round(columns * share / _MULTIPLE) * _MULTIPLE for share in itertools.accumulate(shares)]
    return [0, *inner, columns]


# -- cases ------------------------------------------------------------------------------------------------------------


def _cases(side: int) -> Callable[[Any], Iterator[Any]]:
    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        inner, width = 64, s.choice((520, 600))
        known = s.choice((True, False))
        u, v = ((s.frozen if known else s.array)(*((inner, width) if side else (width, inner))) for _ in range(2))

        def scan(u: Any, v: Any, c: Any, xs: Any) -> Any:
            def step(h: Any, x: Any) -> Any:
                a, b = (h @ u, h @ v) if side else ((u @ h.T).T, (v @ h.T).T)
                return (a - b + x)[:, :inner], b

            return lax.scan(step, c, xs)

        yield scan, (u, v, s.array(1, inner), s.array(2, 1, width))

    return cases


RULES: tuple[Rule, ...] = tuple(
    Rule(
        f"products-in-blocks{name}",
        f"scan: {before}, constants A and B and a vector h → {after}, so that two cores share the work",
        Find(("scan",), _find(side)),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_cases(side),
        platforms=frozenset({"cpu"}),
    )
    for side, name, before, after in (
        (1, "", "h A, h B", "[A B] in nine blocks of columns"),
        (0, "-left", "A h, B h", "[A; B] in nine blocks of rows"),
    )
)
