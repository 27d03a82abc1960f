"""The Laplacian through an operation of which only JAX's own derivative is known.

L(f) = Σₐ fₐ L(xₐ) + Σᵢ f″[Jᵢ, Jᵢ]: the derivative once along the Laplacian, and twice along each row of the Jacobian.
Functions with a derivative of the user's own go this way too, and keep it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.structure import ELEMENTWISE
from jaxinfer.differentiation.laplacian.blocks import Block, occurring
from jaxinfer.differentiation.laplacian.elementwise import rebound, through
from jaxinfer.differentiation.laplacian.terms import Term, Triple, is_active, triple
from jaxinfer.graph import Graph, Node, trace_function

_EACH_ELEMENT = ELEMENTWISE | {"select_n", "clamp", "stop_gradient", "copy"}


def common_rows(inputs: Sequence[Triple]) -> np.ndarray:
    """The inputs that any of some values depends on, sorted."""
    return functools.reduce(np.union1d, (occurring(x.block.rows) for x in inputs))


def jointly(value: Any, fun: Callable[..., Any], inputs: Sequence[Any], batched: bool) -> Any:
    """A value that is linear in operands together; operands that do not depend on the inputs count as zero."""
    names = common_rows([x for x in inputs if is_active(x)])
    rows, curvatures = [], []
    for x in inputs:
        if is_active(x):
            rows.append(x.block.as_uniform(names).full)
            curvatures.append(x.curvature)
        else:
            rows.append(jnp.zeros((names.size, *jnp.shape(x)), jnp.result_type(x)))
            curvatures.append(jnp.zeros_like(x))
    data = fun(*rows) if batched else jax.vmap(fun)(*rows)
    bent = any(is_active(x) and x.laplacian is not None for x in inputs)
    table = names.astype(np.int32).reshape(-1, *(1,) * jnp.ndim(value))
    return triple(value, [Term(None, Block(data, table, jnp.shape(value)))], fun(*curvatures) if bent else None)


def opaque(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Any operation, by JAX's own derivatives."""
    active = [x for x in inputs if is_active(x)]
    names = common_rows(active)
    values = tuple(x.value for x in active)
    along = tuple(x.block.as_uniform(names).full for x in active)
    kept = [i for i, a in enumerate(node.avals) if hasattr(a, "dtype") and _jax.is_inexact(a.dtype)]

    def fun(*values: Any) -> list[Any]:
        rest = iter(values)
        return domain.bind(node, *(next(rest) if is_active(x) else x for x in inputs))

    def smooth(*values: Any) -> list[Any]:
        results = fun(*values)
        return [results[i] for i in kept]

    tangent = _by_reverse if node.op.startswith("custom_vjp_call") else _by_forward

    def twice(*direction: Any) -> Any:
        slope = tangent(smooth, values, direction)
        return slope, tangent(lambda *v: tangent(smooth, v, direction), values, direction)

    first, second = jax.vmap(twice)(*along)
    slopes = tangent(smooth, values, tuple(x.curvature for x in active))
    results = list(fun(*values))
    for place, rows, slope, bend in zip(kept, first, slopes, second):
        value = results[place]
        table = names.astype(np.int32).reshape(-1, *(1,) * jnp.ndim(value))
        block = Block(rows, table, jnp.shape(value))
        results[place] = triple(value, [Term(None, block)], slope + jnp.sum(bend, 0))
    return results


def _by_forward(fun: Callable[..., Any], values: tuple[Any, ...], direction: tuple[Any, ...]) -> Any:
    return jax.jvp(fun, values, direction)[1]


def _by_reverse(fun: Callable[..., Any], values: tuple[Any, ...], direction: tuple[Any, ...]) -> Any:
    """The same for functions that have only a pullback: it is linear, and its transpose is the tangent map."""
    results, pullback = jax.vjp(fun, *values)
    (tangents,) = jax.linear_transpose(pullback, results)(direction)
    return tangents


# -- functions with derivatives of their own --------------------------------------------------------------------------


def pointwise_custom(domain: Any, node: Node, inputs: Sequence[Any]) -> Sequence[Any] | None:
    """A custom function whose program and derivatives act element by element, by those derivatives; else None."""
    if node.op != "custom_jvp_call" or len(node.avals) != 1 or not jnp.issubdtype(node.aval.dtype, jnp.floating):
        return None
    active = list({id(x): x for x in inputs if is_active(x)}.values())
    if any(x.shape != node.aval.shape or not jnp.issubdtype(x.value.dtype, jnp.floating) for x in active):
        return None
    fixed = [x for x in inputs if not is_active(x)]

    def both(*values: Any) -> Any:
        rest = iter(values[2 * len(active) :])
        fun = rebound(domain, node, [x if is_active(x) else next(rest) for x in inputs], active)
        at, along = values[: len(active)], values[len(active) : 2 * len(active)]
        return jax.tree.leaves(jax.jvp(lambda *v: jax.jvp(fun, v, along), at, along))

    avals = [_jax.aval_of(x) for x in (*(x.value for x in active), *(x.value for x in active), *fixed)]
    if not _acts_on_elements(trace_function(both, *avals), node.aval.shape):
        return None
    return [through(rebound(domain, node, inputs, active), active)]


def _acts_on_elements(graph: Graph, shape: tuple[int, ...]) -> bool:
    """Whether each element of the results is made of the same element of the operands."""
    for node in graph.nodes:
        if node.op == "broadcast_in_dim" and node.inputs[0].shape == ():
            continue
        if node.op not in _EACH_ELEMENT or any(v.shape not in ((), shape) for v in node.inputs):
            return False
    return True


def slogdet_axis(node: Node) -> int | None:
    """Of JAX's own `slogdet`, whose derivatives have closed forms: the axis that leads (batched: any); else None."""
    if node.op != "custom_jvp_call" or len(node.avals) != 2 or len(node.inputs) != 1:
        return None
    aval = node.inputs[0].aval
    if len(aval.shape) < 2 or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    return _slogdet_texts(tuple(aval.shape), np.dtype(aval.dtype)).get(_custom_text(node.params))


@functools.lru_cache(maxsize=64)
def _slogdet_texts(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, int]:
    """The programs that `slogdet` has, called with leading axes or under `vmap`, and the axis that leads in each."""

    def plain(x: Any) -> Any:
        return tuple(jnp.linalg.slogdet(x))

    ways: list[tuple[int, Callable[..., Any]]] = [(0, plain)]
    for _ in shape[2:]:
        ways.append((0, jax.vmap(ways[-1][1])))
    if len(shape) == 3:
        ways += [(axis, jax.vmap(plain, in_axes=axis)) for axis in (1, 2)]
    texts: dict[str, int] = {}
    for axis, fun in ways:
        rest = [d for i, d in enumerate(shape) if i != axis or not axis]
        if rest[-1] != rest[-2]:
            continue
        stack = [_jax.make_jaxpr(fun, [jax.ShapeDtypeStruct(shape, dtype)])]
        while stack:
            for eqn in _jax.open_jaxpr(stack.pop())[0].eqns:
                if _jax.operation(eqn.primitive) == "custom_jvp_call":
                    texts.setdefault(_custom_text(eqn.params), axis)
                else:
                    stack += [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
    return texts


def _custom_text(params: Any) -> str:
    """The program of a custom function and the name of its derivative."""
    rule = params.get("jvp", params.get("jvp_jaxpr_fun"))
    name = getattr(rule, "__name__", None) or str(rule).split(" at 0x")[0]
    return f"{name}\n{params['call_jaxpr']}"
