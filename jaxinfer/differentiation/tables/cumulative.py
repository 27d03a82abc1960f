"""Products, maxima, minima and logarithms of sums of all elements so far. (``cumsum`` is linear.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.differentiation.rules import PullbackRule, TangentRule
from jaxinfer.graph import Node


def _recurrence(slopes: Any, terms: Any, axis: int, reverse: bool) -> Any:
    """yᵢ = slopeᵢ·yᵢ₋₁ + termᵢ, in a logarithmic number of steps."""

    def combine(a: Any, b: Any) -> tuple[Any, Any]:
        return lax.mul(a[0], b[0]), lax.add(lax.mul(b[0], a[1]), b[1])

    return lax.associative_scan(combine, (slopes, terms), axis=axis, reverse=reverse)[1]


def _shifted(x: Any, axis: int, reverse: bool, fill: float) -> Any:
    """Each element's predecessor (in reverse: successor), and ``fill`` where there is none."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (-1, 1, 0) if reverse else (1, -1, 0)
    return lax.pad(x, jnp.array(fill, x.dtype), padding)


# Both operations below have tangents ẏᵢ = slopeᵢ·ẏᵢ₋₁ + weightᵢ·ẋᵢ; the pullback is the same recurrence the other way.
Coefficients = Callable[[Node, Any, Any], tuple[Any, Any]]


def _product(node: Node, x: Any, y: Any) -> tuple[Any, Any]:
    """y = Π x: slopes x, weights the products so far."""
    return x, _shifted(y, node.params["axis"], node.params["reverse"], 1)


def _logsumexp(node: Node, x: Any, y: Any) -> tuple[Any, Any]:
    """y = log Σ eˣ: both coefficients are in [0, 1] and add up to 1."""
    before = _shifted(y, node.params["axis"], node.params["reverse"], -jnp.inf)
    return _exp_difference(before, y), _exp_difference(x, y)


def _exp_difference(a: Any, b: Any) -> Any:
    """exp(a − b), and 1 where both are the same infinity."""
    same = lax.bitwise_and(lax.eq(a, b), lax.bitwise_not(lax.is_finite(jnp.real(b))))
    return lax.exp(lax.select(same, jnp.zeros_like(a), lax.sub(a, b)))


def _recurrent(coefficients: Coefficients) -> tuple[TangentRule, PullbackRule]:
    def tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        axis, reverse = node.params["axis"], node.params["reverse"]
        slopes, weights = coefficients(node, primals[0], outs[0])
        return [_recurrence(slopes, lax.mul(weights, tangents[0]), axis, reverse)]

    def pullback(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        axis, reverse = node.params["axis"], node.params["reverse"]
        slopes, weights = coefficients(node, primals[0], outs[0])
        after = _shifted(slopes, axis, not reverse, 0)
        return [lax.mul(weights, _recurrence(after, cotangents[0], axis, not reverse))]

    return tangent, pullback


def _extremum(choose: Callable[[Any, Any], Any]) -> TangentRule:
    """Equal elements share by halves, pair by pair, in the order in which JAX combines them."""

    def combine(a: Any, b: Any) -> tuple[Any, Any]:
        (x, s), (y, t) = a, b
        best = choose(x, y)
        is_x, is_y = lax.eq(x, best), lax.eq(y, best)
        half = lax.select(lax.bitwise_and(is_x, is_y), jnp.full_like(s, 0.5), jnp.ones_like(s))
        left = lax.select(is_x, lax.mul(half, s), jnp.zeros_like(s))
        return best, lax.add(left, lax.select(is_y, lax.mul(half, t), jnp.zeros_like(t)))

    def rule(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        pairs = (primals[0], tangents[0])
        return [lax.associative_scan(combine, pairs, axis=node.params["axis"], reverse=node.params["reverse"])[1]]

    return rule


_PRODUCT, _LOGSUMEXP = _recurrent(_product), _recurrent(_logsumexp)

TANGENTS: Mapping[str, TangentRule] = {
    "cumlogsumexp": _LOGSUMEXP[0],
    "cummax": _extremum(lax.max),
    "cummin": _extremum(lax.min),
    "cumprod": _PRODUCT[0],
}
PULLBACKS: Mapping[str, PullbackRule] = {"cumlogsumexp": _LOGSUMEXP[1], "cumprod": _PRODUCT[1]}
