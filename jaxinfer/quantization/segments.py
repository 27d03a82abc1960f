"""Where values flow as codes: from where they are computed to the products that read them, as far as that goes.

A value that a product with static ranges reads is written as codes where it is computed, once, for all that read it;
so is what it is a part of (what is reshaped, pooled or put together into it). Operations that only move or compare
entries work on codes. Whatever else reads it, a residual addition for one, gets the numbers that the codes stand for,
and XLA fuses the conversion: what lies in memory between two products is int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.quantization.activations import Codes, Static

_MOVES = frozenset("reshape transpose squeeze expand_dims rev slice copy copy_p broadcast_in_dim".split())
_PASSING = _MOVES | {"reduce_window_max"}


def wanted_codes(graph: Graph, statics: Mapping[Node, tuple[int, Static]]) -> dict[Value, Static]:
    """The values that are to be codes, and how they are written.

    Args:
        graph: the program; its nested graphs are looked at as well.
        statics: for products that take codes, which operand is the parameter, and how the other one is written.
    """
    found: dict[Value, Static] = {}
    # Backwards, so that the first of several readers has the last word.
    for node in reversed(graph.nodes):
        for sub in node.subgraphs:
            found.update(wanted_codes(sub, statics))
        if node in statics:
            side, static = statics[node]
            found[node.inputs[1 - side]] = static
        elif len(node.avals) == 1 and (static_ := found.get(Value(node, 0))) is not None:
            if node.op in _PASSING:
                found[node.inputs[0]] = static_
            elif node.op == "concatenate":
                found.update((v, static_) for v in node.inputs if v not in found)
    return found


def on_codes(node: Node, inputs: Sequence[Any], static: Static | None) -> Codes | None:
    """The result of an operation that works on codes; None for one that does not.

    Args:
        node: the operation.
        inputs: its operands, one of them :class:`Codes` at least.
        static: how the result is to be written, if it is.
    """
    if node.op == "concatenate":
        return _concatenate(node, inputs, static)
    if node.op in _PASSING and len(inputs) == 1:
        (x,) = inputs
        if x.scale.ndim:
            return None
        return _with_values(x, _jax.bind(node.primitive, [x.values], _params(node))[0])
    if node.op in ("max", "min"):
        return _bounded(node, inputs)
    if node.op == "pad" and _is_zero(inputs[1]):
        zero = jnp.asarray(0 if inputs[0].zero_point is None else inputs[0].zero_point, jnp.int8)
        return _with_values(inputs[0], lax.pad(inputs[0].values, zero, node.params["padding_config"]))
    return None


def _concatenate(node: Node, inputs: Sequence[Any], static: Static | None) -> Codes | None:
    first = inputs[0]
    if all(isinstance(x, Codes) and x.same_scale(first) for x in inputs) and not first.scale.ndim:
        parts = list(inputs)
    elif static is not None:
        parts = [static.codes(x.real() if isinstance(x, Codes) else x) for x in inputs]
    else:
        return None
    return _with_values(parts[0], lax.concatenate([x.values for x in parts], node.params["dimension"]))


def _bounded(node: Node, inputs: Sequence[Any]) -> Codes | None:
    """max(x, 0) and min(x, 0): zero has a code."""
    codes = [x for x in inputs if isinstance(x, Codes)]
    others = [x for x in inputs if not isinstance(x, Codes)]
    if len(codes) != 1 or not all(map(_is_zero, others)):
        return None
    (x,) = codes
    zero = jnp.asarray(0 if x.zero_point is None else x.zero_point, jnp.int8)
    return _with_values(x, (jnp.maximum if node.op == "max" else jnp.minimum)(x.values, zero))


def _with_values(x: Codes, values: Any) -> Codes:
    return Codes(values, x.scale, x.zero_point, x.dtype)


def _is_zero(x: Any) -> bool:
    return not isinstance(x, Codes) and _jax.is_concrete(x) and np.size(x) == 1 and float(np.asarray(x).ravel()[0]) == 0


def _params(node: Node) -> dict[str, Any]:
    return dict(node.params.get("_original", node.params))
