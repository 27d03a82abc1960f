"""Elementwise operations: each element's derivative is a number, so both modes multiply by the same array.

Special values (ties of ``max``, ``abs`` and ``pow`` at zero, and so on) follow the newest supported JAX. Where a
derivative is cheaper to get from the result than from the operand, it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule, add, unbroadcast
from jaxinfer.graph import Node

# The derivative of a result for one operand: an array, a Python number, or a function that multiplies a tangent by it
# (where that is cheaper than having the array); None for zero.
Slope = Any
Partial = Callable[[Node, Sequence[Any], Sequence[Any]], Slope]


def constant(like: Any, number: complex) -> Any:
    """A scalar of the dtype of a value."""
    return np.asarray(number, _jax.aval_of(like).dtype)


def scaled(tangent: Any, slope: Slope) -> Any:
    """A tangent or cotangent times a derivative that is not None."""
    if callable(slope):
        return slope(tangent)
    if isinstance(slope, (int, float)):
        if abs(slope) == 1:
            return tangent if slope == 1 else lax.neg(tangent)
        slope = constant(tangent, slope)
    return lax.mul(tangent, slope)


def one_minus(x: Any) -> Any:
    """1 − x."""
    return lax.sub(constant(x, 1), x)


def one_plus(x: Any) -> Any:
    """1 + x."""
    return lax.add(constant(x, 1), x)


def times(number: float, x: Any) -> Any:
    """A number times an array."""
    return lax.mul(constant(x, number), x)


def divided_by(divisor: Any) -> Callable[[Any], Any]:
    """Multiplication by 1/divisor, in one operation."""
    return lambda t: lax.div(t, divisor)


def chosen(predicate: Any) -> Callable[[Any], Any]:
    """Multiplication by one where the predicate holds and by zero elsewhere."""
    return lambda t: jnp.where(predicate, t, constant(t, 0))


def without_zeros(x: Any) -> Any:
    """The array with ones in the place of zeros."""
    return jnp.where(lax.eq(x, constant(x, 0)), constant(x, 1), x)


def unary(function: Callable[[Any, Any], Slope]) -> tuple[Partial]:
    """The derivative of an operation with one operand, from the operand and the result."""
    return (lambda node, primals, outs: function(primals[0], outs[0]),)


def _with_accuracy(function: Callable[..., Slope]) -> tuple[Partial]:
    """As :func:`unary`, for what is to be computed as accurately as the operation itself."""
    return (lambda node, primals, outs: function(primals[0], outs[0], node.params.get("accuracy")),)


# -- derivatives that take more than a line ---------------------------------------------------------------------------


def _is_highest(accuracy: Any) -> bool:
    return getattr(accuracy, "name", None) == "HIGHEST"


def _tanh(x: Any, y: Any, accuracy: Any) -> Slope:
    if _is_highest(accuracy):  # 1 − y² loses what is asked for where y is close to one
        a, b = (lax.logistic(times(factor, x), accuracy=accuracy) for factor in (2, -2))
        return times(4, lax.mul(a, b))
    return one_minus(lax.square(y))


def _logistic(x: Any, y: Any, accuracy: Any) -> Slope:
    return lax.mul(y, lax.logistic(lax.neg(x), accuracy=accuracy) if _is_highest(accuracy) else one_minus(y))


def _asinh(x: Any, y: Any) -> Slope:
    if jnp.iscomplexobj(x):
        return divided_by(lax.cosh(y))
    # 1/√(1 + x²) of x/s and 1/s, so that no square overflows; s stays finite where x is not.
    limit = constant(x, 2.0 ** (jnp.finfo(x.dtype).maxexp // 2 + 2))
    r = lax.div(constant(x, 1), lax.stop_gradient(lax.clamp(constant(x, 1), lax.abs(x), limit)))
    return lax.mul(r, lax.rsqrt(lax.add(lax.square(lax.mul(x, r)), lax.square(r))))


def _acosh(x: Any, y: Any) -> Slope:
    return lax.mul(lax.rsqrt(lax.sub(x, constant(x, 1))), lax.rsqrt(one_plus(x)))


def _abs_real(x: Any, y: Any) -> Slope:
    return lambda t: jnp.where(lax.ge(x, constant(x, 0)), t, lax.neg(t))


def _integer_pow(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    (x,), n = primals, node.params["y"]
    match n:
        case 0:
            return None
        case 1:
            return 1
        case 2:
            return times(2, x)
        case 3:
            return times(3, lax.square(x))
        case -1:
            return lax.neg(lax.square(outs[0]))
        case _:
            return times(n, lax.integer_pow(x, n - 1))


def _pow_base(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    x, y = primals
    if _jax.is_inexact(_jax.aval_of(y).dtype):
        return lax.mul(y, lax.pow(x, lax.sub(y, constant(y, 1))))
    # An exponent known to be a whole number: x⁰ is flat at zero too.
    factor = lax.convert_element_type(y, _jax.aval_of(x).dtype)
    slope = lax.mul(without_zeros(factor), lax.pow(x, lax.sub(y, constant(y, 1))))
    return jnp.where(lax.eq(y, constant(y, 0)), constant(x, 0), slope)


def _pow_exponent(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    return lax.mul(lax.log(without_zeros(primals[0])), outs[0])


def _div_divisor(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    return lax.neg(lax.div(outs[0], primals[1]))


def _atan2(node: Node, primals: Sequence[Any], outs: Sequence[Any], which: int) -> Slope:
    x, y = primals
    squares = lax.add(lax.square(x), lax.square(y))
    return lax.div(y, squares) if which == 0 else lax.neg(lax.div(x, squares))


def _rem_divisor(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    ratio = lax.div(*primals)
    return lax.neg(lax.mul(lax.sign(ratio), lax.floor(lax.abs(ratio))))


def _larger(a: Any, b: Any) -> Slope:
    """One where a > b, one half where they are equal."""
    half = constant(a, 0.5)
    return lambda t: jnp.where(lax.gt(a, b), t, jnp.where(lax.eq(a, b), lax.mul(half, t), constant(t, 0)))


def _clamped(node: Node, primals: Sequence[Any], outs: Sequence[Any], which: int) -> Slope:
    low, x, high = primals
    if which == 0:
        return chosen(lax.bitwise_and(_compared(lax.gt, low, x), _compared(lax.lt, low, high)))
    if which == 1:
        return chosen(lax.bitwise_and(_compared(lax.gt, x, low), _compared(lax.lt, x, high)))
    return chosen(_compared(lax.lt, high, x))


def _compared(comparison: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    return comparison(*jnp.broadcast_arrays(a, b)) if jnp.shape(a) != jnp.shape(b) else comparison(a, b)


# -- the table --------------------------------------------------------------------------------------------------------

_SUM: tuple[Partial, ...] = (lambda node, primals, outs: 1,) * 2

PARTIALS: Mapping[str, tuple[Partial, ...]] = {
    "neg": unary(lambda x, y: -1),
    "sin": _with_accuracy(lambda x, y, accuracy: lax.cos(x, accuracy=accuracy)),
    "cos": _with_accuracy(lambda x, y, accuracy: lax.neg(lax.sin(x, accuracy=accuracy))),
    "tan": unary(lambda x, y: one_plus(lax.square(y))),
    "asin": unary(lambda x, y: lax.rsqrt(_jax.one_minus_square(x))),
    "acos": unary(lambda x, y: lax.neg(lax.rsqrt(_jax.one_minus_square(x)))),
    "atan": unary(lambda x, y: divided_by(one_plus(lax.square(x)))),
    "sinh": unary(lambda x, y: lax.cosh(x)),
    "cosh": unary(lambda x, y: lax.sinh(x)),
    "tanh": _with_accuracy(_tanh),
    "asinh": unary(_asinh),
    "acosh": unary(_acosh),
    "atanh": unary(lambda x, y: divided_by(_jax.one_minus_square(x))),
    "exp": unary(lambda x, y: y),
    "exp2": unary(lambda x, y: times(math.log(2), y)),
    "expm1": _with_accuracy(lambda x, y, accuracy: lax.exp(x, accuracy=accuracy)),
    "log": unary(lambda x, y: divided_by(x)),
    "log2": unary(lambda x, y: divided_by(times(math.log(2), x))),
    "log1p": unary(lambda x, y: divided_by(one_plus(x))),
    "logistic": _with_accuracy(_logistic),
    "sqrt": unary(lambda x, y: lax.div(constant(y, 0.5), y)),
    "rsqrt": unary(lambda x, y: times(-0.5, lax.div(y, x))),
    "cbrt": unary(lambda x, y: divided_by(times(3, lax.square(y)))),
    "square": unary(lambda x, y: times(2, x)),
    "one_minus_square": unary(lambda x, y: times(-2, x)),
    "integer_pow": (_integer_pow,),
    "abs": unary(_abs_real),
    "sign": unary(lambda x, y: None),
    "add": _SUM,
    "add_any": _SUM,
    "sub": (lambda node, primals, outs: 1, lambda node, primals, outs: -1),
    "mul": (lambda node, primals, outs: primals[1], lambda node, primals, outs: primals[0]),
    "div": (lambda node, primals, outs: divided_by(primals[1]), _div_divisor),
    "rem": (lambda node, primals, outs: 1, _rem_divisor),
    "pow": (_pow_base, _pow_exponent),
    "atan2": (
        lambda node, primals, outs: _atan2(node, primals, outs, 0),
        lambda node, primals, outs: _atan2(node, primals, outs, 1),
    ),
    "max": (
        lambda node, primals, outs: _larger(primals[0], primals[1]),
        lambda node, primals, outs: _larger(primals[1], primals[0]),
    ),
    "min": (
        lambda node, primals, outs: _larger(primals[1], primals[0]),
        lambda node, primals, outs: _larger(primals[0], primals[1]),
    ),
    "nextafter": (lambda node, primals, outs: 1, lambda node, primals, outs: None),
    "clamp": (
        lambda node, primals, outs: _clamped(node, primals, outs, 0),
        lambda node, primals, outs: _clamped(node, primals, outs, 1),
        lambda node, primals, outs: _clamped(node, primals, outs, 2),
    ),
}


# -- both modes -------------------------------------------------------------------------------------------------------


def broadcast(tangent: Any, like: Any) -> Any:
    """A tangent of an operand that is a scalar, or has axes of size one, as a tangent of the result."""
    shape, have = jnp.shape(like), jnp.shape(tangent)
    return tangent if have == shape else lax.broadcast_in_dim(tangent, shape, tuple(range(len(have))))


def tangent_rule(partials: Sequence[Partial]) -> TangentRule:
    """Forward mode: the sum of tangents times derivatives."""

    def rule(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        total = None
        for partial, tangent in zip(partials, tangents, strict=True):
            if tangent is None or (slope := partial(node, primals, outs)) is None:
                continue
            if total is not None and isinstance(slope, int) and slope == -1:
                total = lax.sub(total, tangent)
            else:
                total = add(total, scaled(tangent, slope))
        return [None if total is None else broadcast(total, outs[0])]

    return rule


def pullback_rule(partials: Sequence[Partial]) -> PullbackRule:
    """Reverse mode: the cotangent times each derivative, summed where the operand was repeated."""

    def rule(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        (ct,) = cotangents
        found: list[Any] = []
        for partial, primal, mark in zip(partials, primals, active, strict=True):
            slope = partial(node, primals, outs) if mark else None
            if slope is None:
                found.append(None)
            elif isinstance(slope, (int, float)):
                found.append(scaled(unbroadcast(ct, primal), slope))
            else:
                found.append(unbroadcast(scaled(ct, slope), primal))
        return found

    return rule


# -- operations that are linear over the real numbers only, or change the dtype ---------------------------------------


def _abs_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    (x,), (t,) = primals, tangents
    if not jnp.iscomplexobj(x):
        return _REAL_ABS[0](node, primals, outs, tangents)
    product = lax.add(lax.mul(lax.real(t), lax.real(x)), lax.mul(lax.imag(t), lax.imag(x)))
    return [lax.div(product, without_zeros(outs[0]))]


def _abs_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    (x,), (ct,) = primals, cotangents
    if not jnp.iscomplexobj(x):
        return _REAL_ABS[1](node, primals, outs, active, cotangents)
    ct = lax.div(ct, without_zeros(outs[0]))
    return [lax.complex(lax.mul(ct, lax.real(x)), lax.neg(lax.mul(ct, lax.imag(x))))]


_REAL_ABS = tangent_rule(PARTIALS["abs"]), pullback_rule(PARTIALS["abs"])


def _sign_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    """Of x/|x|: the direction turns by the part of the tangent across it."""
    (x,), (y,), (t,) = primals, outs, tangents
    if not jnp.iscomplexobj(x):
        return [None]
    across = lax.sub(lax.mul(lax.real(y), lax.imag(t)), lax.mul(lax.imag(y), lax.real(t)))
    turn = lax.div(across, without_zeros(lax.abs(x)))
    return [lax.complex(lax.neg(lax.mul(lax.imag(y), turn)), lax.mul(lax.real(y), turn))]


def _sign_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    (x,), (y,), (ct,) = primals, outs, cotangents
    if not jnp.iscomplexobj(x):
        return [None]
    across = lax.add(lax.mul(lax.real(ct), lax.imag(y)), lax.mul(lax.imag(ct), lax.real(y)))
    turn = lax.div(across, without_zeros(lax.abs(x)))
    return [lax.complex(lax.mul(lax.imag(y), turn), lax.mul(lax.real(y), turn))]


def _mul_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    dtype = node.params.get("out_dtype")
    if dtype is None:
        return _SAME_DTYPE_MUL[0](node, primals, outs, tangents)
    (x, y), (dx, dy) = primals, tangents
    total = add(
        None if dx is None else lax.mul(dx, y, out_dtype=dtype), None if dy is None else lax.mul(x, dy, out_dtype=dtype)
    )
    return [broadcast(total, outs[0])]


def _mul_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    if node.params.get("out_dtype") is None:
        return _SAME_DTYPE_MUL[1](node, primals, outs, active, cotangents)
    (ct,) = cotangents

    def back(mine: Any, other: Any) -> Any:
        return unbroadcast(lax.mul(ct, other, out_dtype=_jax.aval_of(mine).dtype), mine)

    return [back(x, y) if a else None for x, y, a in zip(primals, reversed(primals), active)]


_SAME_DTYPE_MUL = tangent_rule(PARTIALS["mul"]), pullback_rule(PARTIALS["mul"])


def _div_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    """A divisor that was repeated gets its factor after the sum over the repetitions."""
    (_, y), (ct,) = primals, cotangents
    if jnp.shape(y) == jnp.shape(ct) or not active[1]:
        return _PLAIN_DIV(node, primals, outs, active, cotangents)
    of_first = _PLAIN_DIV(node, primals, outs, [active[0], False], cotangents)[0]
    return [of_first, lax.neg(lax.div(unbroadcast(lax.mul(ct, outs[0]), y), y))]


_PLAIN_DIV = pullback_rule(PARTIALS["div"])


TANGENTS: Mapping[str, TangentRule] = {op: tangent_rule(partials) for op, partials in PARTIALS.items()} | {
    "abs": _abs_tangent,
    "sign": _sign_tangent,
    "mul": _mul_tangent,
}
PULLBACKS: Mapping[str, PullbackRule] = {op: pullback_rule(partials) for op, partials in PARTIALS.items()} | {
    "abs": _abs_pullback,
    "sign": _sign_pullback,
    "mul": _mul_pullback,
    "div": _div_pullback,
}
