"""Which form a product is computed in: timed layer by layer, at the shapes of the first batch.

Forms are timed as programs of their own. Where ranges are static, an integer form takes codes and hands codes on, as
within a segment of such layers, and the floating-point forms are timed twice: among their like, and between codes that
they have to read and write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.weights import Weights, bound
from jaxinfer.graph.node import param_key, params_key
from jaxinfer.quantization import integer
from jaxinfer.quantization.activations import Codes, Static
from jaxinfer.quantization.forms import FLOAT, TURNED, Use, apply, forms_of, real
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.rows import columns, count, is_rows, result, rows
from jaxinfer.quantization.scheme import Scheme
from jaxinfer.quantization.tensor import Quantized, quantize_array
from jaxinfer.search.measure import time_candidates

_BUDGET_S = 0.5
BETWEEN = "float between codes"
# Weights beyond this many bytes do not stay in a processor's caches from one call to the next.
_CACHE_BYTES = 32 << 20
_MOST_COPIES = 4
# Rows up to this many are tried with weights that lie transposed, in floating point too.
_FEW_ROWS = 16


class Timings:
    """Seconds of the forms of layers; equal layers are timed once.

    Args:
        total: bytes of all parameters in floating point: beyond the size of the caches, weights come from memory.
    """

    def __init__(self, total: int) -> None:
        self._cold = total > _CACHE_BYTES
        self._known: dict[Any, dict[str, float]] = {}

    def of(self, layer: Layer, scheme: Scheme) -> Mapping[str, float]:
        """Seconds of each form of a layer; of ``"float"``, of the fastest of the floating-point forms."""
        node = layer.reads[0].node
        kind = (
            node.op,
            params_key(node.params),
            tuple((v.shape, str(v.dtype)) for v in node.inputs),
            layer.reads[0].side,
            layer.shape,
            layer.kept,
            param_key((str(scheme.weights), str(scheme.activations), scheme.dynamic)),
        )
        if kind not in self._known:
            self._known[kind] = self._timed(layer, scheme)
        return self._known[kind]

    def _timed(self, layer: Layer, scheme: Scheme) -> dict[str, float]:
        rng = np.random.default_rng(0)
        read = layer.reads[0]
        operand = read.node.inputs[1 - read.side]
        x = jnp.asarray(rng.normal(size=operand.shape), operand.dtype)
        array = jnp.asarray(rng.normal(size=layer.shape), layer.dtype)
        calls: dict[str, Callable[[], Any]] = {}
        for name, fun in _float_forms(layer).items():
            calls[f"{FLOAT} {name}"] = self._call(fun, x, array if name != "turned" else columns_first(layer, array))
        static = _static(scheme)
        handed = x
        if static is not None:
            handed = static.codes(x).values
            for name, fun in _float_forms(layer).items():
                if name != "turned":
                    calls[f"{BETWEEN} {name}"] = self._call(_on_codes(fun, static, x.dtype), handed, array)
        for form in forms_of(layer, scheme):
            quantized = laid_out(layer, written(layer, array, scheme), form)
            fun = _quantized(layer, scheme, form, static)
            calls[form] = self._call(fun if static is None else _on_codes(fun, static, x.dtype), handed, quantized)
        times = dict(zip(calls, time_candidates(list(calls.values()), budget_s=_BUDGET_S)))
        found: dict[str, float] = {}
        for name, seconds in times.items():
            kind = next((k for k in (BETWEEN, FLOAT) if name.startswith(f"{k} ")), name)
            found[kind] = min(seconds, found.get(kind, seconds))
        return found

    def _call(self, fun: Callable[..., Any], x: Any, weights: Any) -> Callable[[], Any]:
        size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights))
        copies = min(_MOST_COPIES, -(-2 * _CACHE_BYTES // size)) if self._cold else 1
        # Copies are made while others are timed, if they are not waited for.
        made = jax.block_until_ready([jax.tree.map(lambda a: jnp.array(a, copy=True), weights) for _ in range(copies)])
        turns = itertools.cycle(made)
        program = jax.jit(fun).lower(x, weights).compile()
        return lambda: program(x, next(turns))


def written(layer: Layer, array: Any, scheme: Scheme) -> Quantized:
    """A parameter at the nearest values."""
    assert scheme.weights is not None
    return quantize_array(array, scheme.weights, *layer.axes(scheme.weights))


def laid_out(layer: Layer, quantized: Quantized, form: str) -> Quantized:
    """A parameter lying as a form reads it."""
    if not is_rows(layer.reads[0].node):
        return quantized
    order = (*layer.kept, *layer.summed) if form in TURNED else (*layer.summed, *layer.kept)
    return quantized.reordered(order)


def columns_first(layer: Layer, array: Any) -> Any:
    """The weights of a product of rows and columns: [n, k]."""
    read = layer.reads[0]
    return jnp.array(lax.transpose(columns(read.node, read.side, read.move(array)), (1, 0)))


def _float_forms(layer: Layer) -> dict[str, Callable[..., Any]]:
    """Ways to compute the product in floating point, those that an optimizer would try."""
    read = layer.reads[0]
    node, side = read.node, read.side

    def plain(x: Any, w: Any) -> Any:
        w = read.move(w)
        x = real(x)
        return bound(node, [x, w] if side else [w, x])

    def product(x: Any, w: Any) -> Any:
        return result(node, side, jnp.matmul(rows(node, side, real(x)), columns(node, side, read.move(w))))

    def turned(x: Any, w: Any) -> Any:
        return result(node, side, lax.dot_general(rows(node, side, x), w, (((1,), (1,)), ((), ()))))

    def shifts(x: Any, w: Any) -> Any:
        return integer.depthwise(real(x), read.move(w), node.params)

    found = {"plain": plain}
    if integer.is_pointwise(node):
        found["product"] = product
    if is_rows(node) and count(node, side) <= _FEW_ROWS:
        found["turned"] = turned
    return {"shifts": shifts} if integer.is_depthwise(node) else found


def _quantized(layer: Layer, scheme: Scheme, form: str, static: Static | None) -> Callable[..., Any]:
    read = layer.reads[0]

    def run(x: Any, w: Quantized) -> Any:
        return apply(form, Use(read.node, read.side, Weights(layer.leaf, w, read.move, read.place), scheme, static), x)

    return run


def _static(scheme: Scheme) -> Static | None:
    """For integers with static ranges, a range like any other: from −3 to 5."""
    form = scheme.activations
    return Static.of(form, -3.0, 5.0) if form is not None and form.is_integer and not scheme.dynamic else None


def _on_codes(fun: Callable[..., Any], static: Static, dtype: Any) -> Callable[..., Any]:
    """A product from codes to codes."""

    def run(values: Any, weights: Any) -> Any:
        x = Codes(values, static.scale, static.zero_point, dtype)
        return static.codes(jnp.maximum(fun(x, weights), 0)).values

    return run
