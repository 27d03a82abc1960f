"""The forms in which a product with a quantized parameter can be computed, as plain JAX.

Integer forms sum codes exactly and scale the sums:

    Σ x w  =  sx · sw · (Σ qx qw  −  zx Σ qw)

The others take floating-point activations: they write the weights out again, as a whole or block by block, or take the
activations apart into digits, so that the int8 product gives the result in nearly full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.weights import Weights, bound
from jaxinfer.graph import Node
from jaxinfer.quantization import integer
from jaxinfer.quantization.activations import Codes, Static, digits, dynamic, from_digits
from jaxinfer.quantization.layers import Layer, matrix_form
from jaxinfer.quantization.rows import by_feature, columns, count, is_rows, result, rows
from jaxinfer.quantization.scheme import Format, Scheme
from jaxinfer.quantization.tensor import Quantized, codes_of, scale_of

FLOAT = "float"
# Columns of weights that are written out at a time: with 4,096 rows they are 1 MiB.
_BLOCK = 64
# More rows than this are never made columns, nor taken apart into digits.
_FEW_ROWS = 16


@dataclass(frozen=True, eq=False)
class Use:
    """A product at which a quantized parameter is met.

    Attributes:
        node: the product, in the program that is being run.
        side: which operand the parameter is.
        weights: the parameter, whose value is :class:`Quantized`.
        scheme: what holds for it.
        static: how its other operand is written, if calibration settled that.
        smooth: float32[k]: what each channel of the other operand is divided by first, or None.
        correction: float32[n]: what is added to each channel of the result, or None.
    """

    node: Node
    side: int
    weights: Weights
    scheme: Scheme
    static: Static | None = None
    smooth: Any = None
    correction: Any = None

    @property
    def quantized(self) -> Quantized:
        """The parameter."""
        return self.weights.value

    @property
    def dtype(self) -> Any:
        """Element type of the result."""
        return self.node.aval.dtype

    def codes(self) -> Any:
        """The weights' codes, as the product takes its operand."""
        return self.weights.place(self.quantized.codes())

    def kept(self, x: Any) -> Any:
        """A scale or zero point of the weights: for each column (float32[n]), or a scalar where all share one."""
        if x.size == 1:
            return jnp.reshape(x, ()).astype(jnp.float32)
        moved = self.weights.place(jnp.broadcast_to(x, self.quantized.shape))
        form = matrix_form(self.node, self.side)
        assert form is not None
        first = lax.transpose(moved, (*form.summed, *form.kept))
        return first[(0,) * len(form.summed)].reshape(-1).astype(jnp.float32)


Form = Callable[[Use, Any], Any]


# -- integer forms ----------------------------------------------------------------------------------------------------


def _rows_form(kind: integer.DotForm) -> Form:
    def run(use: Use, x: Any) -> Any:
        w = columns(use.node, use.side, use.codes())
        codes = _row_codes(use, x)
        sums = integer.dot(codes.values, w, kind)
        if codes.zero_point is not None:
            sums = sums - codes.zero_point * jnp.sum(w, 0, dtype=jnp.int32)
        y = sums.astype(jnp.float32) * (codes.scale * use.kept(use.quantized.scale))
        return result(use.node, use.side, _corrected(use, y).astype(use.dtype))

    return run


def _row_codes(use: Use, x: Any) -> Codes:
    """The other operand in codes, as rows."""
    if isinstance(x, Codes):
        return Codes(rows(use.node, use.side, x.values), x.scale, x.zero_point, x.dtype)
    if use.static is not None and use.smooth is None:
        codes = use.static.codes(x)
        return Codes(rows(use.node, use.side, codes.values), codes.scale, codes.zero_point, codes.dtype)
    form = use.scheme.activations
    assert form is not None
    smoothed = _smoothed(use, rows(use.node, use.side, x))
    if use.static is not None:
        return use.static.codes(smoothed)
    return dynamic(smoothed, form, (1,) if form.per == "token" else (0, 1))


def _convolution_form(kind: Callable[..., Any]) -> Form:
    def run(use: Use, x: Any) -> Any:
        codes = _image_codes(use, x)
        w = use.codes()
        zero = 0 if codes.zero_point is None else codes.zero_point
        sums = kind(codes.values, w, use.node.params, zero)
        if codes.zero_point is not None:
            out, *_ = use.node.params["dimension_numbers"].rhs_spec
            totals = jnp.sum(w, [a for a in range(w.ndim) if a != out], dtype=jnp.int32)
            sums = sums - by_feature(use.node, codes.zero_point * totals)
        scale = use.kept(use.quantized.scale)
        if scale.ndim:
            scale = by_feature(use.node, scale)
        y = sums.astype(jnp.float32) * (codes.scale * scale)
        return _corrected(use, y).astype(use.dtype)

    return run


def _image_codes(use: Use, x: Any) -> Codes:
    if isinstance(x, Codes):
        return x
    if use.static is not None:
        return use.static.codes(x)
    form = use.scheme.activations
    assert form is not None
    if form.per == "tensor":
        return dynamic(x, form, tuple(range(x.ndim)))
    # What lies beyond the edges has one code for all images: no zero points of their own.
    numbers = use.node.params["dimension_numbers"]
    shared = tuple(a for a in range(x.ndim) if a != numbers.lhs_spec[0])
    codes = dynamic(x, replace(form, affine=False), shared)
    # The batch axis of the result may be another one.
    shape = [1] * x.ndim
    shape[numbers.out_spec[0]] = -1
    return Codes(codes.values, codes.scale.reshape(shape), None, codes.dtype)


# -- floating-point forms ---------------------------------------------------------------------------------------------


def _dequantize(use: Use, x: Any) -> Any:
    w = use.weights.move(use.quantized.dequantize())
    return _float_product(use, real(x), w)


def _float_product(use: Use, x: Any, w: Any) -> Any:
    if use.smooth is not None:
        y = jnp.matmul(_smoothed(use, rows(use.node, use.side, x)), columns(use.node, use.side, w))
        return result(use.node, use.side, _corrected(use, y).astype(use.dtype))
    if integer.is_depthwise(use.node):
        y = integer.depthwise(x, w, use.node.params)
    else:
        y = bound(use.node, [x, w] if use.side else [w, x])
    if use.correction is None:
        return y
    if is_rows(use.node):
        flat = _corrected(use, rows_of_result(use, y))
        return result(use.node, use.side, flat.astype(use.dtype))
    return _corrected(use, y).astype(use.dtype)


def rows_of_result(use: Use, y: Any) -> Any:
    """The result of a product as [m, n]: the inverse of :func:`jaxinfer.quantization.rows.result`."""
    shape = jax.ShapeDtypeStruct((count(use.node, use.side), y.size // count(use.node, use.side)), y.dtype)
    (back,) = jax.linear_transpose(lambda z: result(use.node, use.side, z), shape)(y)
    return back


def _blocks(use: Use, x: Any) -> Any:
    """Weights are written out a few columns at a time, which stay in the cache until they are multiplied."""
    q = use.quantized
    w = lax.transpose(columns(use.node, use.side, use.codes()), (1, 0))
    n, k = w.shape
    blocks = n // _BLOCK
    r = _smoothed(use, rows(use.node, use.side, real(x)).astype(jnp.float32))
    parts = [w.reshape(blocks, _BLOCK, k)]
    for extra in (q.scale, q.zero_point):
        if extra is not None:
            parts.append(_per_group(use, extra, k).reshape(blocks, _BLOCK, -1))

    def one(block: Any) -> Any:
        codes, *rest = block
        y = codes.astype(jnp.float32).reshape(_BLOCK, rest[0].shape[1], -1) if rest else codes.astype(jnp.float32)
        if len(rest) == 2:
            y = y - rest[1][..., None].astype(jnp.float32)
        if rest:
            y = (y * rest[0][..., None]).reshape(_BLOCK, k)
        return lax.dot_general(r, y, (((1,), (1,)), ((), ())))

    out = lax.map(one, tuple(parts))
    y = jnp.transpose(out, (1, 0, 2)).reshape(r.shape[0], n)
    return result(use.node, use.side, _corrected(use, y).astype(use.dtype))


def _multiplied(use: Use, x: Any) -> Any:
    """One row: weights are widened, multiplied and summed in one pass over them as they lie."""
    q = use.quantized
    w = lax.transpose(columns(use.node, use.side, use.codes()), (1, 0))
    r = _smoothed(use, rows(use.node, use.side, real(x)).astype(jnp.float32))
    y = jnp.sum(w.astype(jnp.float32) * r, 1)[None]
    if q.zero_point is not None:
        y = y - jnp.sum(r) * use.kept(q.zero_point)
    return result(use.node, use.side, _corrected(use, y * use.kept(q.scale)).astype(use.dtype))


def _per_group(use: Use, x: Any, k: int) -> Any:
    """Scales or zero points of the weights: [n, groups]."""
    q = use.quantized
    moved = use.weights.place(jnp.broadcast_to(q.spread(x), q.shape))
    step = k if q.group_axis is None else q.format.per.size  # type: ignore[union-attr]
    return lax.transpose(columns(use.node, use.side, moved)[::step], (1, 0))


def _digits_form(kind: integer.DotForm) -> Form:
    def run(use: Use, x: Any) -> Any:
        q = use.quantized
        r = _smoothed(use, rows(use.node, use.side, real(x)).astype(jnp.float32))
        parts, scale = digits(r)
        y = from_digits(integer.dot(parts, columns(use.node, use.side, use.codes()), kind), scale)
        if q.zero_point is not None:
            y = y - jnp.sum(r, 1, keepdims=True) * use.kept(q.zero_point)
        y = y * use.kept(q.scale)
        return result(use.node, use.side, _corrected(use, y).astype(use.dtype))

    return run


def _rounded(use: Use, x: Any) -> Any:
    """Activations in floating-point numbers of 8 or 16 bits; sums in float32."""
    form = use.scheme.activations
    assert form is not None
    x = real(x)
    if form.has_scale:
        scale = (
            use.static.scale
            if use.static is not None
            else scale_of(-_largest(x, use, form), _largest(x, use, form), form)[0]
        )
        x = (codes_of(x, form, None, scale, None).astype(jnp.float32) * scale).astype(x.dtype)
        return _float_product(use, x, use.weights.move(use.quantized.dequantize()))
    w = use.weights.place(use.quantized.dequantize()).astype(form.dtype)
    params = {**use.node.params.get("_original", use.node.params), "preferred_element_type": np.dtype(np.float32)}
    narrow = [x.astype(form.dtype), w] if use.side else [w, x.astype(form.dtype)]
    if integer.is_depthwise(use.node):
        return integer.depthwise(x.astype(form.dtype), w, use.node.params).astype(use.dtype)
    return use.node.primitive.bind(*narrow, **params).astype(use.dtype)


def _largest(x: Any, use: Use, form: Format) -> Any:
    if form.per == "tensor":
        return jnp.max(jnp.abs(x))
    spec = use.node.params["dimension_numbers"]
    if use.node.op == "dot_general":
        return jnp.max(jnp.abs(x), spec[0][1 - use.side], keepdims=True)
    return jnp.max(jnp.abs(x), [a for a in range(x.ndim) if a != spec.lhs_spec[0]], keepdims=True)


def real(x: Any) -> Any:
    """An activation as real numbers."""
    return x.real() if isinstance(x, Codes) else x


def _smoothed(use: Use, r: Any) -> Any:
    return r if use.smooth is None else r * (1 / jnp.asarray(use.smooth, jnp.float32))


def _corrected(use: Use, y: Any) -> Any:
    """Adds the correction to [m, n], or to the result of a convolution."""
    if use.correction is None:
        return y
    correction = jnp.asarray(use.correction, jnp.float32)
    return y + (correction if is_rows(use.node) else by_feature(use.node, correction))


# -- the table --------------------------------------------------------------------------------------------------------

FORMS: Mapping[str, Form] = {
    "int8 product": _rows_form("rows"),
    "int8 product, columns": _rows_form("columns"),
    "int8 convolution": _convolution_form(integer.convolution),
    "int8 shifts": _convolution_form(integer.depthwise),
    "digits": _digits_form("rows"),
    "digits, columns": _digits_form("columns"),
    "multiply and sum": _multiplied,
    "dequantize": _dequantize,
    "dequantize in blocks": _blocks,
    "rounded": _rounded,
}
# Those for which weights lie with the summed axes last.
TURNED = frozenset(["int8 product, columns", "digits, columns", "multiply and sum", "dequantize in blocks"])


def forms_of(layer: Layer, scheme: Scheme) -> list[str]:
    """The forms in which a scheme can be computed at the product that reads a parameter."""
    node, side = layer.reads[0].node, layer.reads[0].side
    weights, activations = scheme.weights, scheme.activations
    assert weights is not None
    form = matrix_form(node, side)
    assert form is not None
    shape = node.inputs[side].shape
    summed = int(np.prod([shape[a] for a in form.summed]))
    kept = int(np.prod([shape[a] for a in form.kept]))
    short = summed <= integer.LONGEST_SUM
    few = is_rows(node) and _at_most(count(node, side), _FEW_ROWS)
    if activations is not None and not activations.is_integer:
        return ["rounded"]
    found = []
    if activations is not None and short:
        if is_rows(node):
            found += ["int8 product"] + (["int8 product, columns"] if few else [])
        elif integer.is_depthwise(node):
            found += ["int8 shifts"]
        else:
            found += ["int8 convolution"]
    elif activations is None:
        in_groups = not isinstance(weights.per, str)
        if few and weights.number == "int8" and not in_groups and count(node, side) == 1:
            found += ["multiply and sum"]
        if few and short and weights.is_integer and not in_groups:
            found += ["digits", "digits, columns"]
        if few and kept % _BLOCK == 0 and kept > _BLOCK and (not in_groups or _whole_groups(layer, weights)):
            found += ["dequantize in blocks"]
    return [*found, "dequantize"] if activations is None or not found else found


def _at_most(n: Any, most: int) -> bool:
    return isinstance(n, int) and n <= most


def _whole_groups(layer: Layer, weights: Format) -> bool:
    """Whether every so many rows of the weights are a group."""
    _, axis = layer.axes(weights)
    return axis is not None and layer.shape[axis] % weights.per.size == 0  # type: ignore[union-attr]


def fitting(form: str, node: Node, side: int) -> str:
    """The form to use at a product of other shapes than those it was chosen for."""
    if form in TURNED and not _at_most(count(node, side), _FEW_ROWS):
        return {"int8 product, columns": "int8 product"}.get(form, "dequantize")
    if form == "multiply and sum" and count(node, side) != 1:
        return "dequantize"
    if form == "digits" and not _at_most(count(node, side), _FEW_ROWS):
        return "dequantize"
    return form


def apply(form: str, use: Use, x: Any) -> Any:
    """The result of a product, computed in a form; ``x`` is its other operand, real numbers or :class:`Codes`."""
    if isinstance(x, Codes) and use.smooth is not None:
        x = x.real()
    return FORMS[fitting(form, use.node, use.side)](use, x)
