"""The Laplacian through operations that act element by element.

For y = f(a, b, …): Jᵢ(y) = Σₐ fₐ Jᵢ(a) and L(y) = Σₐ fₐ L(a) + Σₐᵦ fₐᵦ Σᵢ Jᵢ(a) Jᵢ(b). Derivatives of f that have no
entry below come from JAX's own rule for the operation, with its conventions at special values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.structure import ELEMENTWISE
from jaxinfer.differentiation.laplacian.blocks import Block
from jaxinfer.differentiation.laplacian.moves import spread
from jaxinfer.differentiation.laplacian.terms import Term, Triple, added, cross, is_active, primal, triple
from jaxinfer.graph import Node

Rule = Callable[..., Sequence[Any]]

# Second derivatives of these are zero wherever they exist.
PIECEWISE_LINEAR = frozenset("abs max min clamp rem real imag neg".split())
# Derivatives of these are zero wherever they exist.
PIECEWISE_CONSTANT = frozenset("sign floor ceil round stop_gradient nextafter".split())


def _power(x: Any, _: Any, p: Mapping[str, Any]) -> tuple[Any, Any]:
    n = p["y"]
    return n * lax.integer_pow(x, n - 1), n * (n - 1) * lax.integer_pow(x, n - 2) if n not in (0, 1) else 0 * x


# operation -> (operand, result, parameters) -> (f′, f″)
DERIVATIVES: Mapping[str, Callable[[Any, Any, Mapping[str, Any]], tuple[Any, Any]]] = {
    "tanh": lambda x, y, p: (1 - y * y, -2 * y * (1 - y * y)),
    "exp": lambda x, y, p: (y, y),
    "log": lambda x, y, p: (1 / x, -1 / (x * x)),
    "logistic": lambda x, y, p: (y * (1 - y), y * (1 - y) * (1 - 2 * y)),
    "sin": lambda x, y, p: (lax.cos(x), -y),
    "cos": lambda x, y, p: (-lax.sin(x), -y),
    "sqrt": lambda x, y, p: (0.5 / y, -0.25 / (y * x)),
    "rsqrt": lambda x, y, p: (-0.5 * y / x, 0.75 * y / (x * x)),
    "square": lambda x, y, p: (2 * x, jnp.full((), 2, x.dtype)),
    "integer_pow": _power,
}


def rebound(domain: Any, node: Node, inputs: Sequence[Any], active: Sequence[Triple]) -> Callable[..., Any]:
    """The node as a function of the operands that are active, each taken once however often it is used."""

    def fun(*values: Any) -> Any:
        at = {id(t): v for t, v in zip(active, values)}
        return domain.bind(node, *(at[id(x)] if is_active(x) else x for x in inputs))[0]

    return fun


def elementwise(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Any operation that is declared to act element by element."""
    if not all(_is_real(primal(x)) for x in inputs) or not _is_float(node.aval):
        return domain.unknown(node, *inputs)
    shape = node.aval.shape
    inputs = tuple(spread(x, shape) if is_active(x) else x for x in inputs)
    active = list({id(x): x for x in inputs if is_active(x)}.values())
    fun = rebound(domain, node, inputs, active)
    if len(active) == 1:
        return [_unary(node, fun, active[0])]
    return [through(fun, active, node.op not in PIECEWISE_LINEAR)]


def _unary(node: Node, fun: Callable[..., Any], x: Triple) -> Any:
    if node.op in DERIVATIVES and len(node.inputs) == 1:
        y = fun(x.value)
        return curve(y, x, *DERIVATIVES[node.op](x.value, y, node.params))
    return through(fun, [x], node.op not in PIECEWISE_LINEAR)


def curve(y: Any, x: Triple, first: Any, second: Any) -> Any:
    """y = f(x) from f′ and f″ (None: zero) at x."""
    bend = None if second is None else second * x.squares
    slope = None if x.laplacian is None else first * x.laplacian
    return triple(y, [t.times(first) for t in x.terms], added(slope, bend))


def through(fun: Callable[..., Any], active: Sequence[Triple], curved: bool = True) -> Any:
    """A function that acts element by element on values of one shape, by JAX's derivatives of it."""
    values = tuple(x.value for x in active)

    def direction(i: int) -> tuple[Any, ...]:
        return tuple(jnp.ones_like(v) if i == j else jnp.zeros_like(v) for j, v in enumerate(values))

    def slope(i: int) -> Callable[..., tuple[Any, Any]]:
        return lambda *v: jax.jvp(fun, v, direction(i))

    terms, lap, y = [], None, None
    for i, x in enumerate(active):
        if curved:
            (y, first), (_, second) = jax.jvp(slope(i), values, direction(i))
            lap = added(lap, second * x.squares)
        else:
            y, first = slope(i)(*values)
        terms += [t.times(first) for t in x.terms]
        lap = added(lap, None if x.laplacian is None else first * x.laplacian)
        for j in range(i if curved else 0):
            if (both := cross(x, active[j])) is not None:
                lap = added(lap, 2 * both * jax.jvp(lambda *v: slope(i)(*v)[1], values, direction(j))[1])  # noqa: B023
    return triple(y, terms, lap)


def add(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """Sums and differences: terms are put beside each other."""
    minus = node.op == "sub"
    value = domain.bind(node, primal(a), primal(b))[0]
    a, b = (spread(x, node.aval.shape) if is_active(x) else None for x in (a, b))
    terms = [*(a.terms if a else ()), *_signed(b.terms if b else (), minus)]
    right = b.laplacian if b else None
    lap = added(a.laplacian if a else None, -right if minus and right is not None else right)
    return [triple(value, terms, lap)]


def _signed(terms: Sequence[Term], minus: bool) -> Sequence[Term]:
    return [t.times(-jnp.ones((), t.block.data.dtype)) for t in terms] if minus else terms


def neg(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """The sign goes to the factors."""
    lap = None if x.laplacian is None else -x.laplacian
    return [triple(-x.value, _signed(x.terms, True), lap)]


def mul(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """J(ab) = b J(a) + a J(b), L(ab) = b L(a) + a L(b) + 2 Σᵢ Jᵢ(a) Jᵢ(b)."""
    value = domain.bind(node, primal(a), primal(b))[0]
    shape = node.aval.shape
    a, b = (spread(x, shape) if is_active(x) else x for x in (a, b))
    if not (is_active(a) and is_active(b)):
        x, other = (a, b) if is_active(a) else (b, a)
        lap = None if x.laplacian is None else x.laplacian * other
        return [triple(value, [t.times(other) for t in x.terms], lap)]
    if a is b:
        return [curve(value, a, 2 * a.value, jnp.full((), 2, a.value.dtype))]
    terms = [*(t.times(b.value) for t in a.terms), *(t.times(a.value) for t in b.terms)]
    both = cross(a, b)
    lap = added(
        None if a.laplacian is None else a.laplacian * b.value,
        None if b.laplacian is None else b.laplacian * a.value,
        None if both is None else 2 * both,
    )
    return [triple(value, terms, lap)]


def div(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """From a = y b: J(y) = (J(a) − y J(b))/b, L(y) = (L(a) − y L(b) − 2 Σᵢ Jᵢ(y) Jᵢ(b))/b."""
    value = domain.bind(node, primal(a), primal(b))[0]
    shape = node.aval.shape
    a, b = (spread(x, shape) if is_active(x) else x for x in (a, b))
    if not is_active(b):
        lap = None if a.laplacian is None else a.laplacian / b
        return [triple(value, [_over(t, b) for t in a.terms], lap)]
    reciprocal = 1 / b.value
    slope = -value * reciprocal
    terms = [t.times(slope) for t in b.terms]
    lap = added(None if b.laplacian is None else slope * b.laplacian, -2 * slope * reciprocal * b.squares)
    if is_active(a):
        terms += [t.times(reciprocal) for t in a.terms]
        both = cross(a, b)
        lap = added(
            lap,
            None if a.laplacian is None else reciprocal * a.laplacian,
            None if both is None else -2 * reciprocal * reciprocal * both,
        )
    return [triple(value, terms, lap)]


def _over(term: Term, other: Any) -> Term:
    one = jnp.ones((), term.block.data.dtype) if term.factor is None else term.factor
    return Term(one / other, term.block)


def flat(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Steps: the value alone, which does not change with the inputs."""
    return domain.bind(node, *map(primal, inputs))


def select(domain: Any, node: Node, which: Any, *cases: Any) -> Sequence[Any]:
    """Elements of several values. What is not chosen is dropped, not multiplied by zero: it may be infinite."""
    cases = tuple(spread(c, node.aval.shape) if is_active(c) else c for c in cases)
    value = domain.bind(node, which, *map(primal, cases))[0]
    curvatures = [c.curvature if is_active(c) else jnp.zeros_like(value) for c in cases]
    bent = any(is_active(c) and c.laplacian is not None for c in cases)
    lap = domain.bind(node, which, *curvatures)[0] if bent else None
    blocks = {t.block for c in cases if is_active(c) for t in c.terms}
    if len(blocks) == 1 and all(is_active(c) and len(c.terms) == 1 for c in cases):
        (block,) = blocks
        ones = jnp.ones(node.aval.shape, block.data.dtype)
        factors = [ones if c.terms[0].factor is None else c.terms[0].factor * ones for c in cases]
        return [triple(value, [Term(domain.bind(node, which, *factors)[0], block)], lap)]
    which = jnp.asarray(which)
    terms = []
    for i, case in enumerate(cases):
        if is_active(case):
            block = case.block
            chosen = (which if i else ~which) if which.dtype == bool else which == i
            data = jnp.where(chosen, block.data, jnp.zeros((), block.data.dtype))
            terms.append(Term(None, Block(data, block.rows, block.shape)))
    return [triple(value, terms, lap)]


def pointwise(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Linear operations on each element, such as conversions; what is rounded or cut is the derivative too."""
    value = domain.bind(node, x.value)[0]
    if not _jax.is_inexact(node.aval.dtype):
        return [value]

    def mapped(data: Any) -> Any:
        return domain.bind(node, data)[0]

    block = x.block
    lap = None if x.laplacian is None else mapped(x.laplacian)
    return [triple(value, [Term(None, Block(mapped(block.data), block.rows, block.shape))], lap)]


def _is_real(x: Any) -> bool:
    return not np.issubdtype(jnp.result_type(x), np.complexfloating)


def _is_float(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(sorted(ELEMENTWISE | {"clamp", "add_any"}), elementwise),
    **dict.fromkeys(sorted(PIECEWISE_CONSTANT), flat),
    **dict.fromkeys(("convert_element_type", "reduce_precision", "real", "imag", "conj", "copy", "copy_p"), pointwise),
    "add": add,
    "add_any": add,
    "sub": add,
    "neg": neg,
    "mul": mul,
    "div": div,
    "select_n": select,
}
