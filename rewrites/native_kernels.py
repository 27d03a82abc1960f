"""Convolutions and matrix products with known weights as kernels in C.

A kernel adds a bias, adds another array and bounds the result on its way to memory, so the rules take the operations
that follow along: P + b, P + y, max(P, number), min(P, number) and the clamp of the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import native
from jaxinfer.analysis.products import Linear, free_axes, linear
from jaxinfer.analysis.structure import Layout, again, known_number, layout
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.native import Window, depthwise_convolution, library, pack, packed_convolution
from jaxinfer.rewriting import Find, Match, Rule

# Smaller products take less time than it takes to call a kernel.
LEAST_MULTIPLICATIONS = 1 << 14
# Spatial axes of the images the kernel knows.
_AXES = 2


@dataclass(frozen=True)
class _Tail:
    """The operations after a product that a kernel does as well.

    Attributes:
        root: the result of the last of them.
        bias: a known term that varies along the last axis only.
        addend: a term of the shape of the result.
        low: least value of the result.
        high: greatest value of the result.
        pool: sizes of pools, of each of which the largest value is kept.
    """

    root: Value
    bias: Value | None = None
    addend: Value | None = None
    low: float = -math.inf
    high: float = math.inf
    pool: tuple[int, int] = (1, 1)


def _tail(graph: Graph, value: Value) -> _Tail:
    """What of the operations that follow a product a kernel can do; ``value`` has its features last."""
    tail = _Tail(value)
    while (longer := _longer(graph, tail)) is not None:
        tail = longer
    return tail


def _longer(graph: Graph, tail: _Tail) -> _Tail | None:
    uses = graph.uses.get(tail.root, ())
    user = uses[0][0] if len(uses) == 1 else None
    if (
        user is None
        or user.op not in ("add", "max", "min", "clamp")
        or user.aval.shape != tail.root.shape
        or user.aval.dtype != tail.root.dtype
    ):
        return None
    root = Value(user, 0)
    bounded = tail.low != -math.inf or tail.high != math.inf
    if user.op == "clamp" and uses[0][1] == 1 and not bounded:
        low, high = (number_of(graph, user.inputs[i]) for i in (0, 2))
        return None if low is None or high is None or low > high else replace(tail, root=root, low=low, high=high)
    if user.op == "clamp":
        return None
    other = user.inputs[1 - uses[0][1]]
    if user.op == "add":
        return None if bounded else _with_term(graph, replace(tail, root=root), other, uses[0][1])
    number = number_of(graph, other)
    if number is None:
        return None
    if user.op == "max":
        return replace(tail, root=root, low=number) if not bounded else None
    return replace(tail, root=root, high=number) if tail.high == math.inf and tail.low <= number else None


def _with_term(graph: Graph, tail: _Tail, term: Value, position: int) -> _Tail | None:
    if graph.is_known(term):
        along = layout_over(term, len(tail.root.shape)).varies
        if tail.bias is None and tail.addend is None and along <= {len(tail.root.shape) - 1}:
            return replace(tail, bias=term)
    if tail.addend is not None or term.shape != tail.root.shape or term.dtype != tail.root.dtype:
        return None
    if graph.is_known(term):
        return None
    # Of two products that are added up the first one takes the other.
    return replace(tail, addend=term) if position == 0 or not _is_product(graph, term) else None


def _is_product(graph: Graph, value: Value) -> bool:
    """Whether a value is one that a rule here could take along."""
    if len(graph.uses.get(value, ())) != 1:
        return False
    if value.node.op == "add" and any(graph.is_known(v) for v in value.node.inputs):
        value = next(v for v in value.node.inputs if not graph.is_known(v))
    return linear(graph, value) is not None


def layout_over(value: Value, rank: int) -> Layout:
    """The layout of a term over all axes of the result it is added to."""
    found = layout(value)
    return found if len(found.axes) == rank else Layout(found.source, (None,) * rank)


def number_of(graph: Graph, value: Value) -> float | None:
    """The number that all elements of a value are known to be, if it is one that is no NaN."""
    found = layout(value)
    if found.varies or math.prod(found.source.shape) != 1:
        return None
    source = found.source
    number = known_number(graph, source) if source.shape == () else None
    return None if number is None or math.isnan(float(number)) else float(number)


def _pooled(graph: Graph, tail: _Tail) -> _Tail | None:
    """With the maximum over windows side by side that follows."""
    uses = graph.uses.get(tail.root, ())
    user = uses[0][0] if len(uses) == 1 else None
    if user is None or user.op != "reduce_window_max" or tail.addend is not None or len(tail.root.shape) != 2 + _AXES:
        return None
    p = user.params
    batch, *pool, channels = p["window_dimensions"]
    apart = any(d != 1 for d in (*p["window_dilation"], *p["base_dilation"]))
    if apart or any(map(any, p["padding"])) or tuple(p["window_strides"]) != tuple(p["window_dimensions"]):
        return None
    if batch != 1 or channels != 1 or not 1 < math.prod(pool) <= again(library()).tile_rows:
        return None
    return replace(tail, root=Value(user, 0), pool=tuple(pool))


# -- where the rules apply --------------------------------------------------------------------------------------------


def _product(graph: Graph, node: Node) -> tuple[Linear, _Tail] | None:
    """A product that the kernel can compute, and what it does besides."""
    product = linear(graph, Value(node, 0))
    if product is None or str(node.aval.dtype) != "float32" or product.input.node.op == "optimization_barrier":
        return None
    if not (_is_convolution(product) or _is_unbatched(product)) or 0 in product.input.shape:
        return None
    return product, _tail(graph, Value(node, 0)) if _has_features_last(product) else _Tail(Value(node, 0))


def _find(depthwise: bool = False, pooled: bool = False) -> Callable[[Graph, Node], Match | None]:
    def find(graph: Graph, node: Node) -> Match | None:
        found = _product(graph, node) if library() is not None else None
        if found is None or (found[0].groups > 1) != depthwise or _multiplications(found[0]) < LEAST_MULTIPLICATIONS:
            return None
        product, tail = found
        if pooled:
            longer = _pooled(graph, tail) if _has_features_last(product) else None
            if longer is None:
                return None
            tail = longer
        values = {"x": product.input, "w": product.weights}
        if tail.bias is not None:
            values["bias"] = layout_over(tail.bias, len(tail.root.shape)).source
        if tail.addend is not None:
            values["addend"] = tail.addend
        return Match(graph, (tail.root,), values, {"product": node})

    return find


def _features(product: Linear) -> int:
    """How many elements of the result one position of the window, or one row, gives."""
    return math.prod(product.weights.shape[a] for a in product.out_axes if a is not None)


def _multiplications(product: Linear) -> int:
    return math.prod(product.weights.shape) * product.node.aval.size // _features(product)


def _has_features_last(product: Linear) -> bool:
    """Whether the result is laid out as the kernel writes it."""
    node = product.node
    if node.op == "dot_general":
        return product.out_axes[-1] is not None and _features(product) == node.aval.shape[-1]
    return _channels_last(node.params["dimension_numbers"].out_spec) == tuple(range(len(node.aval.shape)))


def _is_convolution(product: Linear) -> bool:
    params = product.node.params
    return (
        product.node.op == "conv_general_dilated"
        and 1 <= len(params["window_strides"]) <= _AXES
        and params["batch_group_count"] == 1
        and (params["feature_group_count"] == 1 or _is_depthwise(product.node))
        and all(d == 1 for d in params["lhs_dilation"])
        and all(low >= 0 and high >= 0 for low, high in params["padding"])
    )


def _is_depthwise(node: Node) -> bool:
    """Whether each channel has a window of its own, and gives one channel."""
    numbers, groups = node.params["dimension_numbers"], node.params["feature_group_count"]
    channels = node.inputs[0].shape[numbers.lhs_spec[1]]
    return groups == channels == node.inputs[1].shape[numbers.rhs_spec[0]]


def _is_unbatched(product: Linear) -> bool:
    return product.node.op == "dot_general" and not product.node.params["dimension_numbers"][1][0]


# -- what is put in place ---------------------------------------------------------------------------------------------


def _packed(m: Match, x: Any, w: Any, bias: Any = None, addend: Any = None) -> Any:
    product, tail = again(_product(m.graph, m.nodes["product"]))
    if m.roots[0] != tail.root:
        tail = again(_pooled(m.graph, tail))
    if bias is not None:
        bias = layout_over(again(tail.bias), len(tail.root.shape)).spread(bias)
    form = _convolution if product.node.op == "conv_general_dilated" else _dot
    return form(product, tail, x, w, bias, addend)


def _kernel_tail(tail: _Tail, features: int, bias: Any, addend: Any, panel: int = 1) -> native.Tail:
    if bias is not None:
        bias = jnp.pad(jnp.broadcast_to(bias.reshape(-1), (features,)), (0, -features % panel))
    return native.Tail(bias, addend, tail.low, tail.high, tail.pool)


def _convolution(product: Linear, tail: _Tail, x: Any, w: Any, bias: Any, addend: Any) -> Any:
    params = product.node.params
    numbers = params["dimension_numbers"]
    missing = _AXES - len(params["window_strides"])

    def planar(array: Any, at: int) -> Any:
        """With a height of 1, where there is one spatial axis only."""
        return lax.expand_dims(array, range(at, at + missing))

    window = Window(
        (*(1,) * missing, *params["window_strides"]),
        (*((0, 0),) * missing, *params["padding"]),
        (*(1,) * missing, *params["rhs_dilation"]),
    )
    images = planar(lax.transpose(x, _channels_last(numbers.lhs_spec)), 1)
    weights = planar(lax.transpose(w, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])), 0)
    addend = None if addend is None else planar(addend, 1)
    features = weights.shape[-1]
    if params["feature_group_count"] > 1:
        result = depthwise_convolution(images, weights[:, :, 0], window, _kernel_tail(tail, features, bias, addend))
    else:
        panel = again(library()).panel
        after = _kernel_tail(tail, features, bias, addend, panel)
        result = packed_convolution(images, pack(weights, panel), features, window, after)
    order = _channels_last(numbers.out_spec)
    result = lax.squeeze(result, tuple(range(1, 1 + missing)))
    return lax.transpose(result, [order.index(i) for i in range(len(order))])


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings axes (batch, feature, *space) to channels-last."""
    return (spec[0], *spec[2:], spec[1])


def _dot(product: Linear, tail: _Tail, x: Any, w: Any, bias: Any, addend: Any) -> Any:
    """x[m, k] · w[k, n], as an image of one row and m columns."""
    (contract, _), side = product.node.params["dimension_numbers"], product.side
    free = free_axes(product.node)
    summed = math.prod(w.shape[a] for a in contract[side])
    images = lax.transpose(x, (*free[1 - side], *contract[1 - side])).reshape(1, 1, -1, summed)
    weights = lax.transpose(w, (*contract[side], *free[side])).reshape(1, 1, summed, -1)
    shape = (1, 1, images.shape[2], weights.shape[3])
    addend = None if addend is None else addend.reshape(shape)
    panel = again(library()).panel
    after = _kernel_tail(tail, shape[3], bias, addend, panel)
    result = packed_convolution(images, pack(weights, panel), shape[3], Window(), after)
    if side == 0:
        result = lax.transpose(result.reshape(shape[2:]), (1, 0))
    return result.reshape(product.node.aval.shape)


# -- cases ------------------------------------------------------------------------------------------------------------


def _tails(s: Any, features: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What may follow a product, and the arrays it takes."""
    low, high = s.choice(((0.0, 6.0), (-1.0, 0.5)))
    return s.choice(
        (
            (lambda y: y, ()),
            (lambda y, b: y + b, (s.frozen(features),)),
            (lambda y, b: jnp.maximum(b + y, 0.0), (s.frozen(features),)),
            (lambda y, b: lax.clamp(low, y + b, high), (s.frozen(features),)),
            (lambda y: jnp.minimum(jnp.maximum(jnp.tanh(y[::-1]) + y, low), high), ()),
        )
    )


def _convolution_cases(s: Any, depthwise: bool = False) -> Iterator[Any]:
    s.only("float32")
    rank, window = s.choice((1, 2, 2)), s.choice((1, 3))
    strides, dilation = (s.choice((1, 2)),) * rank, (s.choice((1, 2)),) * rank
    padding = ((s.choice((0, 1)), s.choice((0, 1, 2))),) * rank
    inner, outer = (1, s.choice((20, 70))) if depthwise else (s.choice((3, 16)), s.choice((20, 70)))
    space, groups = tuple(s.choice((12, 17)) for _ in range(rank)), outer if depthwise else 1
    layout = (
        ("NWC", "NHWC")[rank - 1],
        ("WIO", "HWIO")[rank - 1],
        s.choice(("NWC", "NCW") if rank == 1 else ("NHWC", "NCHW")),
    )
    tail, arrays = _tails(s, outer) if layout[2][-1] == "C" else (lambda y: y, ())

    def program(x: Any, w: Any, *arrays: Any) -> Any:
        options = {"rhs_dilation": dilation, "dimension_numbers": layout, "feature_group_count": groups}
        return tail(lax.conv_general_dilated(x, w, strides, padding, **options), *arrays)

    yield program, (s.array(8, *space, inner * groups), s.frozen(*(window,) * rank, inner, outer), *arrays)


def _pooled_cases(s: Any) -> Iterator[Any]:
    s.only("float32")
    pool, stride, bias = s.choice(((2, 2), (1, 3), (2, 1))), s.choice((1, 2)), s.frozen(20)

    def program(x: Any, w: Any, b: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=layout)
        sizes = (1, *pool, 1)
        return lax.reduce_window(jnp.maximum(y + b, 0.0), -jnp.inf, lax.max, sizes, sizes, "VALID")

    yield program, (s.array(3, s.choice((9, 14)), s.choice((11, 16)), 5), s.frozen(3, 3, 5, 20), bias)


def _dot_cases(s: Any) -> Iterator[Any]:
    s.only("float32")
    rows, inner, outer = s.choice((1, 20)), s.choice((130, 300)), s.choice((130, 200))
    tail, arrays = _tails(s, outer)
    yield lambda x, w, *arrays: tail(x @ w, *arrays), (s.array(rows, inner), s.frozen(inner, outer), *arrays)
    yield lambda x, w: jnp.einsum("ijk,lik->jl", x, w), (s.array(2, rows, inner), s.frozen(outer, 2, inner))
    yield lambda w, x: jnp.einsum("ki,kj->ij", w, x), (s.frozen(inner, outer), s.array(inner, rows))


RULES: tuple[Rule, ...] = (
    Rule(
        "packed-convolution",
        "min(max(conv(x, w) + b + y, low), high) → one kernel, w in panels of output channels",
        Find(("conv_general_dilated",), _find()),
        _packed,
        "reassociate",
        kind="offer",
        cases=_convolution_cases,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
    Rule(
        "packed-convolution-pooled",
        "the same, and the maximum over windows side by side; XLA may lose a NaN there",
        Find(("conv_general_dilated",), _find(pooled=True)),
        _packed,
        "reassociate",
        kind="offer",
        cases=_pooled_cases,
        finite=True,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
    Rule(
        "depthwise-kernel",
        "min(max(depthwise conv(x, w) + b + y, low), high) → one kernel; XLA spreads a NaN over channels",
        Find(("conv_general_dilated",), _find(depthwise=True)),
        _packed,
        "reassociate",
        kind="offer",
        cases=functools.partial(_convolution_cases, depthwise=True),
        finite=True,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
    Rule(
        "packed-product",
        "min(max(x W + b + y, low), high) → one kernel, W in panels of columns",
        Find(("dot_general",), _find()),
        _packed,
        "reassociate",
        kind="offer",
        cases=_dot_cases,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
)
