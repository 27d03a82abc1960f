"""Special functions: error, gamma, beta, zeta and Bessel functions, and polynomials.

Formulas: NIST Digital Library of Mathematical Functions, https://dlmf.nist.gov, chapters 5 to 10 and 25.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule, add, unbroadcast
from jaxinfer.differentiation.tables.elementwise import (
    Partial,
    Slope,
    broadcast,
    constant,
    pullback_rule,
    scaled,
    tangent_rule,
    times,
    unary,
)
from jaxinfer.graph import Node


def _refused(name: str, operand: str) -> Partial:
    def partial(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
        raise ValueError(
            f"{name} has no derivative for {operand}, in JAX neither. Stop the gradient (jax.lax.stop_gradient) or "
            f"leave {operand} constant. The operation: {_jax.source_line(node.source)}"
        )

    return partial


def _gaussian(x: Any) -> Any:
    return lax.exp(lax.neg(lax.square(x)))


def _bessel_i0e(x: Any, y: Any) -> Slope:
    return lax.sub(lax.bessel_i1e(x), lax.mul(lax.sign(x), y))


def _bessel_i1e(x: Any, y: Any) -> Slope:
    """I₀ − I₁/x, which is one half at zero."""
    tiny = constant(x, float(jnp.finfo(x.dtype).eps))
    is_tiny = lax.le(lax.abs(x), tiny)
    safe = jnp.where(is_tiny, tiny, x)
    inverse = lax.div(constant(x, 1), safe)
    slope = lax.sub(lax.bessel_i0e(safe), lax.mul(y, lax.add(lax.sign(safe), inverse)))
    return jnp.where(is_tiny, constant(x, 0.5), slope)


def _polygamma(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    order, x = primals
    return lax.polygamma(lax.add(order, constant(order, 1)), x)


def _gamma_density(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    """x^(a−1) e^(−x) / Γ(a)."""
    a, x = primals
    power = lax.mul(lax.sub(a, constant(a, 1)), lax.log(x))
    return lax.exp(lax.sub(lax.sub(power, x), lax.lgamma(a)))


def _beta_density(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    """x^(a−1) (1−x)^(b−1) / B(a, b)."""
    a, b, x = primals
    one = constant(x, 1)
    log_beta = lax.sub(lax.add(lax.lgamma(a), lax.lgamma(b)), lax.lgamma(lax.add(a, b)))
    powers = lax.add(
        lax.mul(lax.sub(b, one), lax.log1p(lax.neg(x))),
        lax.mul(lax.sub(a, one), lax.log(x)),
    )
    return lax.exp(lax.sub(powers, log_beta))


def _random_gamma(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    """How a sample moves with the shape parameter, at the same place of the distribution function."""
    _, a = primals
    (sample,) = outs
    if not node.params["log_space"]:
        return lax.random_gamma_grad(a, sample)
    # A logarithm below the smallest number's is taken for that number's.
    value = lax.max(lax.exp(sample), constant(sample, float(jnp.finfo(sample.dtype).tiny)))
    return lax.div(lax.random_gamma_grad(a, value), value)


def _zeta(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Slope:
    s, q = primals
    return lax.neg(lax.mul(s, lax.zeta(lax.add(s, constant(s, 1)), q)))


def _polynomial_tangent(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]
) -> Sequence[Any]:
    """Of c₀ + c₁x + c₂x² + …, by Horner's scheme."""
    (x, *coefficients), (dx, *moved) = primals, tangents
    total = None
    for moving in reversed(moved):
        total = add(None if total is None else lax.mul(total, x), moving)
    if dx is not None and len(coefficients) > 1:
        total = add(total, lax.mul(dx, _polynomial_slope(x, coefficients)))
    return [None if total is None else broadcast(total, outs[0])]


def _polynomial_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    (x, *coefficients), (ct,) = primals, cotangents
    found = [
        unbroadcast(lax.mul(ct, _polynomial_slope(x, coefficients)), x) if active[0] and coefficients[1:] else None
    ]
    last = max((i for i, mark in enumerate(active[1:]) if mark), default=-1)
    for i in range(len(coefficients)):
        found.append(unbroadcast(ct, coefficients[i]) if active[1 + i] else None)
        if i < last:
            ct = lax.mul(ct, x)
    return found


def _polynomial_slope(x: Any, coefficients: Sequence[Any]) -> Any:
    return lax.polynomial(x, [scaled(c, k) for k, c in enumerate(coefficients[1:], 1)])


PARTIALS: Mapping[str, tuple[Partial, ...]] = {
    "erf": unary(lambda x, y: times(2 / math.sqrt(math.pi), _gaussian(x))),
    "erfc": unary(lambda x, y: times(-2 / math.sqrt(math.pi), _gaussian(x))),
    "erf_inv": unary(lambda x, y: times(math.sqrt(math.pi) / 2, lax.exp(lax.square(y)))),
    "lgamma": unary(lambda x, y: lax.digamma(x)),
    "digamma": unary(lambda x, y: lax.polygamma(constant(x, 1), x)),
    "polygamma": (_refused("polygamma", "the order"), _polygamma),
    "igamma": (lambda node, primals, outs: lax.igamma_grad_a(*primals), _gamma_density),
    "igammac": (
        lambda node, primals, outs: lax.neg(lax.igamma_grad_a(*primals)),
        lambda node, primals, outs: lax.neg(_gamma_density(node, primals, outs)),
    ),
    "random_gamma": (lambda node, primals, outs: None, _random_gamma),
    "regularized_incomplete_beta": (_refused("betainc", "a"), _refused("betainc", "b"), _beta_density),
    "zeta": (_refused("zeta", "the exponent"), _zeta),
    "bessel_i0e": unary(_bessel_i0e),
    "bessel_i1e": unary(_bessel_i1e),
}

TANGENTS: Mapping[str, TangentRule] = {op: tangent_rule(partials) for op, partials in PARTIALS.items()} | {
    "polynomial": _polynomial_tangent
}
PULLBACKS: Mapping[str, PullbackRule] = {op: pullback_rule(partials) for op, partials in PARTIALS.items()} | {
    "polynomial": _polynomial_pullback
}
