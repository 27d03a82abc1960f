"""Elementwise operations: each element's derivative is a number, so both modes multiply by the same array."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.differentiation.rules import PullbackRule, TangentRule, add, unbroadcast
from jaxinfer.graph import Node

# partial(node, primals, outs) -> the derivative of the result for one operand, an array or a number; None for zero.
Partial = Callable[[Node, Sequence[Any], Sequence[Any]], Any]


def _one(function: Callable[[Any, Any], Any]) -> tuple[Partial]:
    """A derivative as a function of operand and result."""
    return (lambda node, primals, outs: function(primals[0], outs[0]),)


def _times(a: Any, b: Any) -> Any:
    return lax.mul(a, b)


# Operand by operand, in JAX's conventions for special values.
PARTIALS: Mapping[str, tuple[Partial, ...]] = {
    "sin": _one(lambda x, y: lax.cos(x)),
    "cos": _one(lambda x, y: lax.neg(lax.sin(x))),
    "tan": _one(lambda x, y: 1 + lax.square(y)),
    "tanh": _one(lambda x, y: 1 - lax.square(y)),
    "exp": _one(lambda x, y: y),
    "log": _one(lambda x, y: 1 / x),
    "logistic": _one(lambda x, y: y * (1 - y)),
}


def _tangent(partials: Sequence[Partial]) -> TangentRule:
    def rule(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        total = None
        for partial, tangent in zip(partials, tangents):
            if tangent is not None and (slope := partial(node, primals, outs)) is not None:
                total = add(total, _times(tangent, slope))
        return [total]

    return rule


def _pullback(partials: Sequence[Partial]) -> PullbackRule:
    def rule(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        (ct,) = cotangents
        found: list[Any] = []
        for partial, primal, mark in zip(partials, primals, active):
            slope = partial(node, primals, outs) if mark else None
            found.append(None if slope is None else unbroadcast(_times(ct, slope), primal))
        return found

    return rule


TANGENTS: Mapping[str, TangentRule] = {op: _tangent(partials) for op, partials in PARTIALS.items()}
PULLBACKS: Mapping[str, PullbackRule] = {op: _pullback(partials) for op, partials in PARTIALS.items()}

__all__ = ["PARTIALS", "PULLBACKS", "TANGENTS", "jnp", "np"]
