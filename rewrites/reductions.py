"""Sums and extrema of repeated, transposed and reshaped arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.structure import Layout, again, aligned_axes, is_static, layout, moves_units, rebind
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Pattern, Rule, is_float, op, var

_IDEMPOTENT = ("reduce_max", "reduce_min", "reduce_and", "reduce_or")
_REDUCE = ("reduce_sum", "reduce_prod", *_IDEMPOTENT)


# -- conditions -------------------------------------------------------------------------------------------------------


def _moves_units(m: Match) -> bool:
    return is_static(m["x"], m.roots[0]) and moves_units(m["x"].shape, m.nodes["inner"].aval.shape)


def _reduced_units(m: Match) -> bool:
    return is_static(m["x"], m.roots[0]) and all(m["x"].shape[i] == 1 for i in m.params("reduce")["axes"])


def _find_repeats(graph: Graph, node: Node) -> Match | None:
    operand = node.inputs[0]
    if not is_static(operand) or 0 in operand.shape:
        return None
    found = layout(operand)
    repeated = [d for i, d in enumerate(operand.shape) if i not in found.varies]
    exact = 2 ** (jnp.finfo(operand.dtype).nmant + 1) if jnp.issubdtype(operand.dtype, jnp.inexact) else math.inf
    if not 1 < math.prod(repeated) <= exact:
        return None
    return Match(graph, (Value(node, 0),), {"x": found.source})


def _find_factor(graph: Graph, node: Node) -> Match | None:
    parts = _factor(node)
    if parts is None:
        return None
    x, k = parts
    m = Match(graph, (Value(node, 0),), {"x": x} if k is None else {"x": x, "k": k.source})
    m.nodes["inner"] = node.inputs[0].node
    m.alike = None if k is None else k.axes
    return m


def _factor(node: Node) -> tuple[Value, Layout | None] | None:
    """x and k of a sum of x · k or x / k, where k is the same along all that is summed; x alone of a sum of -x."""
    total, axes = node.inputs[0], node.params["axes"]
    inner = total.node
    # Sums of float16 end at 65,504: there the factor may be what keeps them finite.
    if inner.op not in ("mul", "div", "neg") or not is_static(total) or total.dtype == jnp.float16:
        return None
    if inner.op == "neg":
        return inner.inputs[0], None
    if inner.op == "div" and not is_float(total):
        return None
    for x, k in (inner.inputs, inner.inputs[::-1])[: 1 if inner.op == "div" else 2]:
        if x.shape == total.shape and is_static(k):
            found = layout(k)
            if len(found.axes) != len(total.shape):  # a scalar beside an array
                found = Layout(found.source, (None,) * len(total.shape))
            if not found.varies & set(axes):
                return x, found
    return None


# -- replacements -----------------------------------------------------------------------------------------------------


def _reshape(m: Match, x: Any) -> Any:
    return lax.reshape(x, m.roots[0].shape)


def _reduce_then_repeat(m: Match, x: Any) -> Any:
    node = m.roots[0].node
    operand, axes = node.inputs[0], node.params["axes"]
    found = layout(operand)
    along = sorted(found.varies)
    small = found.spread(x, [along.index(i) if i in along else 0 for i in range(len(operand.shape))], len(along))
    if not along:
        small = lax.reshape(x, ())
    reduced = rebind(node, small, axes=tuple(along.index(i) for i in along if i in axes))
    count = math.prod(operand.shape[i] for i in axes if i not in along)
    if node.op == "reduce_sum" and count != 1:
        reduced = lax.mul(reduced, jnp.asarray(count).astype(x.dtype))
    kept = [i for i in range(len(operand.shape)) if i not in axes]
    return lax.broadcast_in_dim(reduced, node.aval.shape, [kept.index(i) for i in along if i in kept])


def _factor_after_sum(m: Match, x: Any, k: Any = None) -> Any:
    node = m.roots[0].node
    reduced = rebind(node, x)
    _, factor = again(_factor(node))
    if factor is None:
        return lax.neg(reduced)
    kept = [i for i in range(x.ndim) if i not in node.params["axes"]]
    small = factor.spread(k, [kept.index(i) if i in kept else 0 for i in range(x.ndim)], len(kept))
    return (lax.mul if node.inputs[0].node.op == "mul" else lax.div)(reduced, small)


def _reduce_twice(m: Match, x: Any) -> Any:
    first = set(m.params("inner")["axes"])
    left = [i for i in range(x.ndim) if i not in first]
    axes = first | {left[i] for i in m.params("outer")["axes"]}
    return rebind(m.nodes["outer"], x, axes=tuple(sorted(axes)))


def _reduce_before_transpose(m: Match, x: Any) -> Any:
    permutation, axes = m.params("inner")["permutation"], m.params("outer")["axes"]
    reduced = rebind(m.nodes["outer"], x, axes=tuple(sorted(permutation[i] for i in axes)))
    kept = [p for i, p in enumerate(permutation) if i not in axes]
    return lax.transpose(reduced, [sorted(kept).index(p) for p in kept])


def _reduce_before_reshape(m: Match, x: Any) -> Any:
    node = m.nodes["outer"]
    before = aligned_axes(node.inputs[0].shape, x.shape)
    axes = tuple(sorted(before[i] for i in node.params["axes"] if before[i] is not None))
    return lax.reshape(rebind(node, x, axes=axes), m.roots[0].shape)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Any], *shapes: Sequence[int]) -> Callable[[Any], Iterator[Any]]:
    """One function on arrays of the given shapes."""
    return lambda s: iter([(function, tuple(s.array(*shape) for shape in shapes))])


def _factor_cases(s: Any) -> Iterator[Any]:
    s.only("float32", "float64", "bfloat16", "complex64", "int32")
    shape = a, b, _ = s.shape(3)
    x, along = s.array(*shape), s.positive(b)
    yield lambda x, k: lax.reduce_sum(x * k[:, None], (0, 2)), (x, along)
    yield lambda x, k: lax.reduce_sum(k.T[:, :, None] * x, (2,)), (x, s.positive(b, a))
    yield lambda x, k: lax.reduce_sum(x * k, (0, 1)), (x, s.positive())
    yield lambda x: lax.reduce_sum(-x, (1,)), (x,)
    s.floating_only()
    yield lambda x, k: lax.reduce_sum(x / k[:, None], (0, 2)), (x, along)


def _any(*names: str, **options: Any) -> Pattern:
    return op(names, var("x"), **options)


RULES: tuple[Rule, ...] = (
    Rule(
        "reduce-nothing",
        "reduce(x) over axes of length one → reshape(x)",
        _any(*_REDUCE, name="reduce"),
        _reshape,
        "reassociate",
        when=_reduced_units,
        cases=_case(lambda x: lax.reduce_sum(x, (1,)), (3, 1, 2)),
    ),
    Rule(
        "reduce-repeated",
        "Σ broadcast(x) → n · Σ x; max broadcast(x) → max x",
        Find(("reduce_sum", *_IDEMPOTENT), _find_repeats),
        _reduce_then_repeat,
        "reassociate",
        cases=_case(lambda x: lax.reduce_sum(jnp.broadcast_to(x, (4, 5, 3)), (0, 2)), (5, 1)),
    ),
    Rule(
        "reduce-twice",
        "Σ (Σ x) → Σ x, and so products and extrema",
        op(_REDUCE, _any(*_REDUCE, name="inner", once=True), name="outer"),
        _reduce_twice,
        "reassociate",
        when=lambda m: m.nodes["inner"].op == m.nodes["outer"].op,
        cases=_case(lambda x: lax.reduce_sum(lax.reduce_sum(x, (1,)), (0,)), (2, 3, 4)),
    ),
    Rule(
        "factor-after-sum",
        "Σ (k x) → k Σ x, Σ (x / k) → (Σ x) / k and Σ -x → -Σ x where k is the same along what is summed; where k is "
        "infinite, the sum of infinities of both signs was NaN",
        Find(("reduce_sum",), _find_factor),
        _factor_after_sum,
        "reassociate",
        cases=_factor_cases,
        finite=True,
    ),
    Rule(
        "reduce-before-transpose",
        "Σ transpose(x) → transpose(Σ x), and so products and extrema",
        op(_REDUCE, _any("transpose", name="inner"), name="outer"),
        _reduce_before_transpose,
        "reassociate",
        cases=_case(lambda x: lax.reduce_sum(x.transpose(2, 0, 1), (0,)), (2, 3, 4)),
    ),
    Rule(
        "reduce-before-reshape",
        "Σ reshape(x) → reshape(Σ x) where the reshape only adds or drops axes of length one",
        op(_REDUCE, _any("reshape", where=lambda n: n.params.get("dimensions") is None, name="inner"), name="outer"),
        _reduce_before_reshape,
        "reassociate",
        when=_moves_units,
        cases=_case(lambda x: lax.reduce_sum(x.reshape(3, 1, 2), (0,)), (3, 2)),
    ),
)
