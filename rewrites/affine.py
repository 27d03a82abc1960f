"""Known scales and shifts, such as a normalisation's, folded into the weights and bias of the product beside them.

A product is linear in its weights, so a known factor that varies only along their free axes is a factor of the weights,
and known terms after it are one bias. The intermediate results must have no other use. A shift is moved only past what
carries a rounding error of its own size anyway: on exact data, as in (x - 290) · W, the new form could lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.products import Linear, is_valid_convolution, linear
from jaxinfer.analysis.structure import Layout, again, is_rounded, is_static, layout, rebind, size
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule, is_float
from jaxinfer.rewriting.sampler import Frozen

# -- finding ----------------------------------------------------------------------------------------------------------


def _split(graph: Graph, node: Node) -> tuple[Value, Value, int] | None:
    """The unknown and the known operand of a binary operation in one dtype, and the position of the known one."""
    result = Value(node, 0)
    known = [graph.is_known(v) for v in node.inputs]
    if known[0] == known[1] or not is_static(result, *node.inputs) or any(v.dtype != result.dtype for v in node.inputs):
        return None
    i = known.index(True)
    return (node.inputs[1 - i], node.inputs[i], i) if node.inputs[1 - i].shape == result.shape else None


def _layout_of(value: Value, rank: int) -> Layout:
    """The layout of an elementwise operand over all axes of the result."""
    found = layout(value)
    return found if len(found.axes) == rank else Layout(found.source, (None,) * rank)


def _once(graph: Graph, value: Value) -> bool:
    return len(graph.uses[value]) == 1


def _absorbs(product: Linear, factor: Layout) -> bool:
    """Whether a factor of the result varies only along free axes of the weights."""
    return all(product.out_axes[i] is not None for i in factor.varies)


def _scaled_weights(product: Linear, w: Any, factor: Layout, k: Any, operation: Callable[[Any, Any], Any]) -> Any:
    places = [0 if a is None else a for a in product.out_axes]
    return operation(w, factor.spread(k, places, w.ndim))


def _result(m: Match, product: Linear, w: Any, x: Any) -> Any:
    return rebind(product.node, *product.operands(w, x))


# -- a factor after the product ---------------------------------------------------------------------------------------


def _find_scaled(graph: Graph, node: Node) -> Match | None:
    """mul(P, k), div(P, k) or neg(P)."""
    if node.op == "neg":
        y, k = node.inputs[0], None
    else:
        split = _split(graph, node)
        if split is None or (node.op == "div" and (split[2] == 0 or not is_float(split[0]))):
            return None
        y, k, _ = split
    product = linear(graph, y)
    if product is None or not _once(graph, y):
        return None
    m = Match(graph, (Value(node, 0),), {"w": product.weights, "x": product.input})
    if k is not None:
        factor = _layout_of(k, len(y.shape))
        if not _absorbs(product, factor):
            return None
        m.values["k"] = factor.source
    return m


def _scale_weights(m: Match, w: Any, x: Any, k: Any = None) -> Any:
    node = m.roots[0].node
    if k is None:
        product = again(linear(m.graph, node.inputs[0]))
        return _result(m, product, lax.neg(w), x)
    y, known, _ = again(_split(m.graph, node))
    product = again(linear(m.graph, y))
    operation = lax.mul if node.op == "mul" else lax.div
    return _result(m, product, _scaled_weights(product, w, _layout_of(known, len(y.shape)), k, operation), x)


# -- a factor after product and bias ----------------------------------------------------------------------------------


def _find_scaled_sum(graph: Graph, node: Node) -> Match | None:
    """mul or div of (P ± b) by k, or of (b - P), where the weights can take the factor."""
    split = _split(graph, node)
    if split is None or (node.op == "div" and (split[2] == 0 or not is_float(split[0]))):
        return None
    total, k, _ = split
    inner = _split(graph, total.node) if total.node.op in ("add", "sub") and _once(graph, total) else None
    if inner is None:
        return None
    y, b, _ = inner
    product = linear(graph, y)
    if product is None or not _once(graph, y) or not _absorbs(product, _layout_of(k, len(y.shape))):
        return None
    return Match(graph, (Value(node, 0),), {"y": y, "b": b, "k": k}, {"sum": total.node})


def _scale_both(m: Match, y: Any, b: Any, k: Any) -> Any:
    operation = lax.mul if m.roots[0].node.op == "mul" else lax.div
    first, second = operation(y, k), operation(b, k)
    if m.graph.is_known(m.nodes["sum"].inputs[0]):
        first, second = second, first
    return rebind(m.nodes["sum"], first, second)


# -- terms after the product ------------------------------------------------------------------------------------------


def _find_two_terms(graph: Graph, node: Node) -> Match | None:
    """(y ± a) ± b, a and b known, y a value with a rounding error of its own."""
    outer = _split(graph, node)
    if outer is None or outer[0].node.op not in ("add", "sub") or not _once(graph, outer[0]):
        return None
    inner = _split(graph, outer[0].node)
    if inner is None or not is_rounded(inner[0]):
        return None
    rank = len(node.aval.shape)
    along = _layout_of(inner[1], rank).varies, _layout_of(outer[1], rank).varies
    if not (along[0] <= along[1] or along[1] <= along[0]):
        return None
    return Match(graph, (Value(node, 0),), {"y": inner[0], "a": inner[1], "b": outer[1]}, {"inner": outer[0].node})


def _merge_terms(m: Match, y: Any, a: Any, b: Any) -> Any:
    """(±y ± a) with signs (s, t), then (±that ± b): y's sign and the sum of the terms."""
    sign_y, sign_a = _signs(m, m.nodes["inner"])
    sign_sum, sign_b = _signs(m, m.roots[0].node)
    term = lax.add(a if sign_a * sign_sum > 0 else lax.neg(a), b if sign_b > 0 else lax.neg(b))
    return lax.add(y, term) if sign_y * sign_sum > 0 else lax.sub(term, y)


def _signs(m: Match, node: Node) -> tuple[int, int]:
    """Signs of the unknown and of the known operand of a sum or difference."""
    if node.op == "add":
        return 1, 1
    return (-1, 1) if m.graph.is_known(node.inputs[0]) else (1, -1)


def _find_difference(graph: Graph, node: Node) -> Match | None:
    """P - b or b - P."""
    split = _split(graph, node)
    if split is None or linear(graph, split[0]) is None:
        return None
    if split[2] == 0 and not _once(graph, split[0]):
        return None
    return Match(graph, (Value(node, 0),), {"y": split[0], "b": split[1]})


def _as_sum(m: Match, y: Any, b: Any) -> Any:
    known_first = m.graph.is_known(m.roots[0].node.inputs[0])
    return lax.add(lax.neg(y), b) if known_first else lax.add(y, lax.neg(b))


# -- a factor before the product --------------------------------------------------------------------------------------


def _find_scaled_input(graph: Graph, node: Node) -> Match | None:
    if not any(v.node.op in ("mul", "div", "neg") for v in node.inputs):
        return None
    product = linear(graph, Value(node, 0))
    if product is None or product.input.node.op not in ("mul", "div", "neg") or not _once(graph, product.input):
        return None
    before = product.input.node
    if before.op == "neg":
        return Match(graph, (Value(node, 0),), {"w": product.weights, "x": before.inputs[0]})
    split = _split(graph, before)
    if split is None or (before.op == "div" and (split[2] == 0 or not is_float(split[0]))):
        return None
    factor = _layout_of(split[1], len(product.input.shape))
    if any(product.in_axes[i] is None for i in factor.varies):
        return None
    return Match(graph, (Value(node, 0),), {"w": product.weights, "x": split[0], "k": factor.source})


def _scale_before(m: Match, w: Any, x: Any, k: Any = None) -> Any:
    product = again(linear(m.graph, m.roots[0]))
    before = product.input.node
    if k is None:
        return _result(m, product, lax.neg(w), x)
    factor = _layout_of(again(_split(m.graph, before))[1], x.ndim)
    operation = lax.mul if before.op == "mul" else lax.div
    return _result(m, product, operation(w, _meeting(product, factor, k, w)), x)


def _meeting(product: Linear, known: Layout, k: Any, w: Any) -> Any:
    """A known array over the input, laid out over the weights that meet it."""
    places = [0 if a is None else a for a in product.in_axes]
    if product.groups == 1 or not known.varies:
        return known.spread(k, places, w.ndim)
    numbers = product.node.params["dimension_numbers"]
    out, into = numbers.rhs_spec[:2]
    by_group = lax.reshape(known.spread(k, [0] * len(places), 1), (product.groups, w.shape[into]))
    by_output = jnp.repeat(by_group, w.shape[out] // product.groups, axis=0)
    shape = [d if i in (out, into) else 1 for i, d in enumerate(w.shape)]
    if out > into:
        by_output = lax.transpose(by_output, (1, 0))
    return lax.broadcast_in_dim(by_output, shape, sorted((out, into)))


# -- a term before the product ----------------------------------------------------------------------------------------


def _find_shifted_input(graph: Graph, node: Node) -> Match | None:
    """(x + b) · W with x rounded, where what b contributes is a bias no larger than what it was added to, or is added
    to one that is there."""
    if not any(v.node.op in ("add", "sub") for v in node.inputs):
        return None
    product = linear(graph, Value(node, 0))
    if product is None or product.input.node.op not in ("add", "sub") or not _once(graph, product.input):
        return None
    split = _split(graph, product.input.node)
    if split is None or not is_rounded(split[0]):
        return None
    if node.op == "conv_general_dilated" and not is_valid_convolution(node):
        return None
    term = _layout_of(split[1], len(product.input.shape))
    if any(product.in_axes[i] is None for i in term.varies):
        return None
    users = graph.uses[Value(node, 0)]
    biased = len(users) == 1 and users[0][0] is not None and _adds_known(graph, users[0][0])
    if not biased and math.prod(node.aval.shape) > size(product.input):
        return None
    return Match(graph, (Value(node, 0),), {"w": product.weights, "x": split[0], "b": term.source})


def _adds_known(graph: Graph, node: Node) -> bool:
    return node.op in ("add", "sub") and _split(graph, node) is not None


def _shift_after(m: Match, w: Any, x: Any, b: Any) -> Any:
    product = again(linear(m.graph, m.roots[0]))
    sign_x, sign_b = _signs(m, product.input.node)
    term = _layout_of(again(_split(m.graph, product.input.node))[1], x.ndim)
    y = _result(m, product, w, x)
    met = lax.mul(w, lax.broadcast_in_dim(_meeting(product, term, b, w), w.shape, range(w.ndim)))
    bias = _contribution(product, met)
    if sign_b < 0:
        bias = lax.neg(bias)
    return lax.add(y, bias) if sign_x > 0 else lax.sub(bias, y)


def _contribution(product: Linear, met: Any) -> Any:
    """What weights times known input add up to, over the axes of the result."""
    kept = [a for a in product.out_axes if a is not None]
    summed = lax.reduce_sum(met, tuple(i for i in range(met.ndim) if i not in kept))
    order = sorted(kept)
    summed = lax.transpose(summed, [order.index(a) for a in kept])
    shape = [1 if a is None else met.shape[a] for a in product.out_axes]
    return lax.reshape(summed, shape)


# -- cases ------------------------------------------------------------------------------------------------------------


def _convolve(x: Any, w: Any, groups: int = 1, padding: str = "SAME") -> Any:
    return lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _after_dot(function: Callable[..., Any]) -> Callable[[Any], Iterator[Any]]:
    """``function(y, k)`` of y = x · W, k along the features; and of a batched product of known times unknown."""

    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        rows, inner, columns = s.shape(3)
        k = Frozen(s.positive(1, columns))
        yield lambda x, w, k: function(x @ w, k), (s.array(rows, inner), s.frozen(inner, columns), k)
        batch = s.dim(2)
        arguments = (s.array(batch, inner, columns), s.frozen(batch, rows, inner), Frozen(s.positive(batch, rows, 1)))
        yield lambda x, w, k: function(jnp.matmul(w, x), k), arguments

    return cases


def _after_convolution(function: Callable[..., Any]) -> Callable[[Any], Iterator[Any]]:
    """The same after a convolution in groups."""

    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        groups, features = s.choice((1, 2)), 4
        x, w = s.array(2, 5, 5, 4), s.frozen(3, 3, 4 // groups, features)
        yield lambda x, w, k: function(_convolve(x, w, groups), k), (x, w, Frozen(s.positive(features)))

    return cases


def _both(function: Callable[..., Any]) -> Callable[[Any], Iterator[Any]]:
    def cases(s: Any) -> Iterator[Any]:
        yield from _after_dot(function)(s)
        yield from _after_convolution(function)(s)

    return cases


def _before(function: Callable[..., Any], padding: str) -> Callable[[Any], Iterator[Any]]:
    """Products of ``function(x, k)``, k along the features."""

    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        rows, inner = s.dim(), s.dim(2)
        columns = s.integers(1, inner + 1)
        arguments = (s.array(rows, inner), Frozen(s.positive(1, inner)), s.frozen(inner, columns))
        yield lambda x, k, w: function(x, k) @ w, arguments
        groups = s.choice((1, 2))
        arguments = (s.array(2, 5, 5, 4), Frozen(s.positive(4)), s.frozen(3, 3, 4 // groups, 4))
        yield lambda x, k, w: _convolve(function(x, k), w, groups, padding), arguments

    return cases


RULES: tuple[Rule, ...] = (
    Rule(
        "scale-weights",
        "(x · W) · k → x · (W · k), and so / k and -, k known and constant where x varies",
        Find(("mul", "div", "neg"), _find_scaled),
        _scale_weights,
        "reassociate",
        finite=True,
        cases=_both(lambda y, k: -(y * k / (1 + k))),
    ),
    Rule(
        "scale-before-bias",
        "(x · W + b) · k → (x · W) · k + b · k, and so -, /",
        Find(("mul", "div"), _find_scaled_sum),
        _scale_both,
        "reassociate",
        finite=True,
        cases=_both(lambda y, k: (y - k) * k),
    ),
    Rule(
        "difference-as-bias",
        "x · W - b → x · W + (-b); b - x · W → -(x · W) + b",
        Find(("sub",), _find_difference),
        _as_sum,
        "reassociate",
        cases=_both(lambda y, k: k - y),
    ),
    Rule(
        "merge-biases",
        "y + a + b → y + (a + b), and so -, a and b known, y rounded",
        Find(("add", "sub"), _find_two_terms),
        _merge_terms,
        "reassociate",
        finite=True,
        cases=_both(lambda y, k: y - k + k * 2),
    ),
    Rule(
        "scale-weights-before",
        "(x · k) · W → x · (k · W), and so / k and -, k known and constant where W does not vary",
        Find(("dot_general", "conv_general_dilated"), _find_scaled_input),
        _scale_before,
        "reassociate",
        finite=True,
        cases=_before(lambda x, k: -(x * k), "SAME"),
    ),
    Rule(
        "shift-after-product",
        "(x + b) · W → x · W + b · W, b known, x rounded, no padding",
        Find(("dot_general", "conv_general_dilated"), _find_shifted_input),
        _shift_after,
        "reassociate",
        finite=True,
        cases=_before(lambda x, k: jnp.tanh(x) + k, "VALID"),
    ),
)
