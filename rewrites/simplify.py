"""Arithmetic identities, conversions and selections that expose other rewrites.

XLA removes such things itself; they stand here because they separate operations that belong together, such as the
factors of a folded normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.structure import is_static, layout, size
from jaxinfer.rewriting import Match, Pattern, Rule, is_float, known, number, op, var
from jaxinfer.rewriting.sampler import Frozen

Case = tuple[Callable[..., Any], tuple[Any, ...]]

# -- conditions -------------------------------------------------------------------------------------------------------


def _same_shape(m: Match) -> bool:
    return m["x"].shape == m.roots[0].shape


def _root_is_float(m: Match) -> bool:
    return is_float(m.roots[0])


def _real(m: Match) -> bool:
    return jnp.issubdtype(m.roots[0].dtype, jnp.floating)


def _factors_merge(m: Match) -> bool:
    """Whether multiplying two known factors first gives something no larger than the larger one."""
    if m.graph.is_known(m["x"]) or not is_static(m["a"], m["b"]) or m["x"].shape != m.roots[0].shape:
        return False
    a, b = layout(m["a"]).varies, layout(m["b"]).varies
    return a <= b or b <= a


def _float_factors_merge(m: Match) -> bool:
    return _root_is_float(m) and _factors_merge(m)


def _power_of_two(m: Match) -> bool:
    """Whether the divisor is a scalar whose reciprocal is exact and normal."""
    divisor = m["k"]
    if not divisor.node.is_const or divisor.shape != () or not _real(m) or m.graph.is_known(m["x"]):
        return False
    value, limits = float(m.known("k")), jnp.finfo(divisor.dtype)
    if value == 0 or not math.isfinite(value) or math.frexp(abs(value))[0] != 0.5:
        return False
    return float(limits.smallest_normal) <= abs(1 / value) <= float(limits.max)


def _repeated_divisor(m: Match) -> bool:
    divisor = m["k"]
    if not is_float(divisor) or m.graph.is_known(m["x"]) or not is_static(divisor, m.roots[0]) or size(divisor) == 1:
        return False
    along = layout(divisor).varies
    return math.prod(divisor.shape[i] for i in along) < size(m.roots[0])


def _ordered_bounds(m: Match) -> bool:
    low, high = m["low"].node, m["high"].node
    return (
        low.is_const
        and high.is_const
        and low.aval.shape == high.aval.shape == ()
        and jnp.issubdtype(low.aval.dtype, jnp.number)
        and not jnp.issubdtype(low.aval.dtype, jnp.complexfloating)
        and bool(np.asarray(low.value) <= np.asarray(high.value))
    )


def _small_exponent(m: Match) -> bool:
    exponent = m["y"].node
    if not exponent.is_const or exponent.aval.shape != () or not _root_is_float(m):
        return False
    value = np.asarray(exponent.value)
    return value.dtype.kind in "iufV" and float(value) in (1.0, 2.0, 3.0, 4.0)


# -- replacements -----------------------------------------------------------------------------------------------------


def _keep(m: Match, x: Any, **_: Any) -> Any:
    return x


def _merged(first: Callable[[Any, Any], Any], outer: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """``outer(x, first(a, b))``."""
    return lambda m, x, a, b: outer(x, first(a, b))


# -- cases ------------------------------------------------------------------------------------------------------------


def _with_number(function: Callable[[Any], Any], floating: bool = False) -> Callable[[Any], Iterator[Case]]:
    def cases(s: Any) -> Iterator[Case]:
        if floating:
            s.floating_only()
        yield function, (s.array(*s.shape(2)),)

    return cases


def _with_factors(function: Callable[..., Any], floating: bool = True) -> Callable[[Any], Iterator[Case]]:
    def cases(s: Any) -> Iterator[Case]:
        if floating:
            s.floating_only()
        rows, columns = s.shape(2)
        x, a, b = s.array(rows, columns), s.positive(1, columns), s.positive(1, columns)
        yield function, (x, Frozen(a), Frozen(b))

    return cases


def _case_reciprocal(s: Any) -> Iterator[Case]:
    s.floating_only()
    rows, columns = s.dim(2), s.dim(2)
    yield lambda x, k: x / k, (s.array(rows, columns), Frozen(s.positive(1, columns)))


def _case_two(function: Callable[[Any, Any], Any]) -> Callable[[Any], Iterator[Case]]:
    def cases(s: Any) -> Iterator[Case]:
        shape = s.shape(2)
        yield function, (s.array(*shape), s.array(*shape))

    return cases


def _plain(name: str, *operands: Pattern, once: bool = False) -> Pattern:
    """Arithmetic in one dtype (``mul`` may have another dtype for its result)."""
    return op(name, *operands, once=once, where=lambda n: all(v.dtype == n.aval.dtype for v in n.inputs))


_x, _y, _a, _b = var("x"), var("y"), known("a"), known("b")
_times_a = _plain("mul", _x, _a, once=True)
_over_a = _plain("div", _x, _a, once=True)


RULES: tuple[Rule, ...] = (
    # ** neutral elements **
    Rule(
        "add-zero",
        "x + 0 → x",
        _plain("add", _x, number(0)),
        _keep,
        "reassociate",
        when=_same_shape,
        cases=_with_number(lambda x: x + 0),
    ),
    Rule(
        "add-negative-zero",
        "x + (-0) → x",
        _plain("add", _x, number(-0.0)),
        _keep,
        "reassociate",
        when=_same_shape,
        cases=_with_number(lambda x: x + -0.0, floating=True),
    ),
    Rule(
        "subtract-zero",
        "x - 0 → x",
        _plain("sub", _x, number(0)),
        _keep,
        "reassociate",
        when=_same_shape,
        cases=_with_number(lambda x: x - 0),
    ),
    Rule(
        "multiply-by-one",
        "x · 1 → x",
        _plain("mul", _x, number(1)),
        _keep,
        "reassociate",
        when=_same_shape,
        cases=_with_number(lambda x: x * 1),
    ),
    Rule(
        "divide-by-one",
        "x / 1 → x",
        _plain("div", _x, number(1)),
        _keep,
        "reassociate",
        when=_same_shape,
        cases=_with_number(lambda x: lax.div(x, jnp.asarray(1, x.dtype))),
    ),
    # ** signs **
    Rule(
        "double-negation",
        "-(-x) → x",
        op("neg", op("neg", _x)),
        _keep,
        "bitwise",
        cases=_with_number(lambda x: lax.neg(lax.neg(x))),
    ),
    Rule(
        "double-not",
        "¬¬x → x",
        op("not", op("not", _x)),
        _keep,
        "bitwise",
        cases=lambda s: iter([(lambda x: ~~x, (s.array(*s.shape(2), dtype="int32"),))]),
    ),
    Rule(
        "add-negated",
        "x + (-y) → x - y",
        _plain("add", _x, op("neg", _y, once=True)),
        lambda m, x, y: lax.sub(x, y),
        "bitwise",
        # A known term stays a sum, the form in which biases meet.
        when=lambda m: not m.graph.is_known(m["y"]),
        cases=_case_two(lambda x, y: x + -y),
    ),
    Rule(
        "subtract-negated",
        "x - (-y) → x + y",
        _plain("sub", _x, op("neg", _y, once=True)),
        lambda m, x, y: lax.add(x, y),
        "bitwise",
        cases=_case_two(lambda x, y: x - -y),
    ),
    Rule(
        "multiply-negated",
        "(-x) · (-y) → x · y",
        _plain("mul", op("neg", _x, once=True), op("neg", _y, once=True)),
        lambda m, x, y: lax.mul(x, y),
        "bitwise",
        cases=_case_two(lambda x, y: -x * -y),
    ),
    # ** known factors **
    Rule(
        "negate-product",
        "-(x · a) → x · (-a), a known",
        op("neg", _times_a),
        lambda m, x, a: lax.mul(x, -a),
        "bitwise",
        when=lambda m: not m.graph.is_known(m["x"]),
        cases=lambda s: iter([(lambda x, a: -(x * a), (s.array(2, 3), s.frozen(2, 3)))]),
    ),
    Rule(
        "multiply-twice",
        "x · a · b → x · (a · b), a and b known; a · b must be finite",
        _plain("mul", _times_a, _b),
        _merged(lax.mul, lax.mul),
        "reassociate",
        when=_factors_merge,
        finite=True,
        cases=_with_factors(lambda x, a, b: x * a * b, floating=False),
    ),
    Rule(
        "multiply-then-divide",
        "x · a / b → x · (a / b), a and b known; a / b must be finite",
        _plain("div", _times_a, _b),
        _merged(lax.div, lax.mul),
        "reassociate",
        when=_float_factors_merge,
        finite=True,
        cases=_with_factors(lambda x, a, b: x * a / b),
    ),
    Rule(
        "divide-then-multiply",
        "x / a · b → x · (b / a), a and b known; b / a must be finite",
        _plain("mul", _over_a, _b),
        lambda m, x, a, b: lax.mul(x, lax.div(b, a)),
        "reassociate",
        when=_float_factors_merge,
        finite=True,
        cases=_with_factors(lambda x, a, b: x / a * b),
    ),
    Rule(
        "divide-twice",
        "x / a / b → x / (a · b), a and b known; a · b must be finite",
        _plain("div", _over_a, _b),
        _merged(lax.mul, lax.div),
        "reassociate",
        when=_float_factors_merge,
        finite=True,
        cases=_with_factors(lambda x, a, b: x / a / b),
    ),
    Rule(
        "divide-by-power-of-two",
        "x / 2ⁿ → x · 2⁻ⁿ",
        _plain("div", _x, known("k")),
        lambda m, x, k: lax.mul(x, np.asarray(1 / m.known("k"), x.dtype)),
        "bitwise",
        when=_power_of_two,
        reads_values=True,
        cases=_with_number(lambda x: x / 8, floating=True),
    ),
    Rule(
        "divide-by-known",
        "x / k → x · (1 / k), k known and repeated; 1 / k must be finite",
        _plain("div", _x, known("k")),
        lambda m, x, k: lax.mul(x, lax.div(lax.full_like(k, 1), k)),
        "reassociate",
        when=_repeated_divisor,
        finite=True,
        cases=_case_reciprocal,
    ),
    # ** bounds **
    Rule(
        "clamp-as-bounds",
        "clamp(a, x, b) → min(max(x, a), b)",
        op("clamp", var("low"), _x, var("high")),
        lambda m, low, x, high: lax.min(lax.max(x, low), high),
        "bitwise",
        cases=_with_number(lambda x: lax.clamp(jnp.asarray(-1, x.dtype), x, jnp.asarray(2, x.dtype))),
    ),
    Rule(
        "lower-bound-first",
        "max(min(x, b), a) → min(max(x, a), b), a ≤ b",
        op("max", op("min", _x, known("high"), once=True), known("low")),
        lambda m, x, high, low: lax.min(lax.max(x, low), high),
        "bitwise",
        when=_ordered_bounds,
        reads_values=True,
        cases=_with_number(lambda x: jnp.maximum(jnp.minimum(x, 2), -1)),
    ),
    Rule(
        "max-twice",
        "max(max(x, a), b) → max(x, max(a, b)), a and b known",
        op("max", op("max", _x, _a, once=True), _b),
        _merged(lax.max, lax.max),
        "bitwise",
        when=_factors_merge,
        cases=_with_factors(lambda x, a, b: jnp.maximum(jnp.maximum(x, a), b), floating=False),
    ),
    Rule(
        "min-twice",
        "min(min(x, a), b) → min(x, min(a, b)), a and b known",
        op("min", op("min", _x, _a, once=True), _b),
        _merged(lax.min, lax.min),
        "bitwise",
        when=_factors_merge,
        cases=_with_factors(lambda x, a, b: jnp.minimum(jnp.minimum(x, a), b), floating=False),
    ),
    Rule(
        "same-operands",
        "max(x, x) → x, and so min, and, or",
        op(("max", "min", "and", "or"), _x, _x),
        _keep,
        "reassociate",
        cases=_with_number(lambda x: lax.max(x, x)),
    ),
    # ** powers **
    Rule(
        "small-power",
        "pow(x, n) → xⁿ, n = 1 … 4",
        op("pow", _x, var("y")),
        lambda m, x, y: lax.integer_pow(x, int(float(m.known("y")))),
        "reassociate",
        when=_small_exponent,
        reads_values=True,
        cases=_with_number(lambda x: lax.pow(x, jnp.asarray(3, x.dtype)), floating=True),
    ),
    Rule(
        "first-power",
        "x¹ → x",
        op("integer_pow", _x, where=lambda n: n.params["y"] == 1),
        _keep,
        "bitwise",
        cases=_with_number(lambda x: lax.integer_pow_p.bind(x, y=1)),
    ),
)
