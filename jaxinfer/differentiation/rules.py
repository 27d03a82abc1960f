"""What a derivative rule is.

Along every edge goes a primal value and, in forward mode, a tangent of the same shape and dtype; in reverse mode
cotangents come back. ``None`` stands for a zero of either kind that is never computed. Cotangents of complex values
follow JAX: transposes are those of linear maps, without conjugation.

A table of rules has two parts, and an operation needs one entry in either:

* ``TANGENTS``: ``rule(node, primals, outs, tangents) -> tangents of outs``. What it does must be linear in the
  tangents, of which at least one is not None.
* ``PULLBACKS``: ``rule(node, primals, outs, active, cotangents) -> cotangents of primals``. ``active`` says which
  operands are asked for; entries for others are ignored. At least one cotangent is not None.

Where rules need more than an operation's results (the order that a sort finds), a third part computes both at once:

* ``RESULTS``: ``rule(node, primals) -> results of the operation, then what its rules find behind them in outs``. Rules
  compute the rest themselves where they are given the results alone.

Reverse mode transposes the tangent rule where an operation has no pullback of its own; forward mode needs the tangent
rule. Both are plain JAX code, called at the user's source line. Reference: Griewank and Walther, *Evaluating
Derivatives*, 2nd edition, chapters 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.graph import Node

TangentRule = Callable[[Node, Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[Any]]
PullbackRule = Callable[[Node, Sequence[Any], Sequence[Any], Sequence[bool], Sequence[Any]], Sequence[Any]]
ResultsRule = Callable[[Node, Sequence[Any]], Sequence[Any]]

# Results of these do not change when their operands change a little.
FLAT = frozenset(
    "and argmax argmin bitcast_convert_type ceil clz eq floor ge gt iota is_finite le lt mulhi ne not or "
    "population_count reduce_and reduce_or reduce_xor rng_uniform round shift_left shift_right_arithmetic "
    "shift_right_logical sign stop_gradient xor".split()
)


def is_flat(node: Node) -> bool:
    """Whether an operation has derivatives of zero everywhere; the direction of a complex number, its sign, has not."""
    return node.op in FLAT and not (node.op == "sign" and jnp.issubdtype(node.aval.dtype, jnp.complexfloating))


def place(node: Node) -> str:
    """Where an operation was called, for the end of a message; nothing where that is not known."""
    line = _jax.source_line(node.source)
    return f" (at {line})" if line else ""


def zeros_of(value: Any) -> Any:
    """The zero tangent of a value, as an array."""
    aval = _jax.aval_of(value)
    return lax.full(aval.shape, 0, aval.dtype)


def filled(tangent: Any, value: Any) -> Any:
    """A tangent or cotangent of a value, with zeros in place of None."""
    return zeros_of(value) if tangent is None else tangent


def add(a: Any, b: Any) -> Any:
    """The sum of two tangents."""
    if a is None or b is None:
        return b if a is None else a
    return lax.add(a, b)


def unbroadcast(cotangent: Any, like: Any) -> Any:
    """The cotangent of an operand that was repeated along axes: summed over these."""
    shape, have = jnp.shape(like), jnp.shape(cotangent)
    if shape == have:
        return cotangent
    if not shape:
        return jnp.sum(cotangent)
    axes = tuple(i for i, (d, h) in enumerate(zip(shape, have)) if d != h)
    return jnp.sum(cotangent, axes, keepdims=True)
