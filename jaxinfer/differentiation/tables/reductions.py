"""Reductions over axes and over windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule
from jaxinfer.graph import Node

# -- the largest or smallest along axes -------------------------------------------------------------------------------


def _shares(node: Node, operand: Any, out: Any) -> tuple[Any, Any]:
    """Where the operand is chosen, as zeros and ones, and how many places share each result."""
    kept = _kept(node, operand)
    chosen = lax.convert_element_type(lax.eq(operand, jnp.reshape(out, kept)), operand.dtype)
    return chosen, jnp.sum(chosen, node.params["axes"])


def _kept(node: Node, operand: Any) -> tuple[Any, ...]:
    """The operand's shape with reduced axes of size 1."""
    return tuple(1 if i in node.params["axes"] else d for i, d in enumerate(operand.shape))


def _chosen_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """max x → the mean of ẋ where x is largest."""
    chosen, count = _shares(node, primals[0], outs[0])
    return [lax.div(jnp.sum(lax.mul(tangents[0], chosen), node.params["axes"]), count)]


def _chosen_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    """Equal shares to where x is largest."""
    chosen, count = _shares(node, primals[0], outs[0])
    share = jnp.reshape(lax.div(cotangents[0], count), _kept(node, primals[0]))
    return [lax.mul(jnp.broadcast_to(share, chosen.shape), chosen)]


# -- products along axes ----------------------------------------------------------------------------------------------


def _product_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """Halves are multiplied until one is left: linear work, and no division, so zeros are right to any order."""
    axes, x = node.params["axes"], primals[0]
    rest = [i for i in range(x.ndim) if i not in axes]
    shape = tuple(x.shape[i] for i in rest)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    if not count:
        return [None]
    x, t = (lax.reshape(lax.transpose(a, (*axes, *rest)), (count, *shape)) for a in (x, tangents[0]))
    while count > 1:
        half = count // 2
        x1, x2, t1, t2 = x[:half], x[half : 2 * half], t[:half], t[half : 2 * half]
        x_rest, t_rest = x[2 * half :], t[2 * half :]
        x, t = lax.mul(x1, x2), lax.add(lax.mul(t1, x2), lax.mul(x1, t2))
        if count % 2:
            x, t = lax.concatenate([x, x_rest], 0), lax.concatenate([t, t_rest], 0)
        count = x.shape[0]
    return [lax.reshape(t, shape)]


# -- windows ----------------------------------------------------------------------------------------------------------


def _window_sum_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """Linear."""
    return _jax.bind(node.primitive, tangents, dict(node.params))


def _window_sum_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    """Sums over windows of the cotangents, which stand apart by the strides; strides and base dilation change places.

    Input i lies at low + i·base, window o covers o·stride + k·dilation for k < size.
    """
    p, x, ct = node.params, primals[0], cotangents[0]
    if not x.size or not ct.size:
        return [None]
    padding = []
    for i, (low, _) in enumerate(p["padding"]):
        reach = (p["window_dimensions"][i] - 1) * p["window_dilation"][i]
        length = (ct.shape[i] - 1) * p["window_strides"][i] + 1
        wanted = reach + (x.shape[i] - 1) * p["base_dilation"][i] + 1
        padding.append((reach - low, wanted - (reach - low) - length, p["window_strides"][i] - 1))
    apart = lax.pad(ct, jnp.zeros((), ct.dtype), padding)
    sizes, steps, dilation = p["window_dimensions"], p["base_dilation"], p["window_dilation"]
    none = [(0, 0)] * x.ndim
    zero = ct.dtype.type(0)
    return [lax.reduce_window(apart, zero, lax.add, sizes, steps, none, window_dilation=dilation)]


def _window_params(node: Node) -> dict[str, Any]:
    """The parameters of a windowed choice, dilations included."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    ones = (1,) * len(node.params["window_dimensions"])
    return {name: node.params.get(name, ones) for name in names}


def _gathered(values: Any, keys: Any, select: Any, windows: Mapping[str, Any]) -> Any:
    """In each window the value at the place that the keys choose; the first of equal ones."""
    params = {"select_prim": select, **windows}
    (out,) = _jax.bind(primitives.select_and_gather_add_p, [values, keys], params)
    return out


def _scattered(cotangent: Any, keys: Any, select: Any, windows: Mapping[str, Any]) -> Any:
    """The transpose of :func:`_gathered`."""
    if any(d != 1 for d in windows["window_dilation"]):
        return _scattered_by_place(cotangent, keys, select, windows)
    shape, base = keys.shape, windows["base_dilation"]
    if any(d != 1 for d in base):
        worst = jnp.array(-jnp.inf if select is primitives.ge_p else jnp.inf, keys.dtype)
        keys = lax.pad(keys, worst, [(0, 0, d - 1) for d in base])
    params = {name: windows[name] for name in ("window_dimensions", "window_strides", "padding")}
    (out,) = _jax.bind(primitives.select_and_scatter_add_p, [cotangent, keys], {"select_prim": select, **params})
    return lax.slice(out, (0,) * len(shape), out.shape, base) if out.shape != shape else out


def _scattered_by_place(cotangent: Any, keys: Any, select: Any, windows: Mapping[str, Any]) -> Any:
    """The same where windows have gaps, for which XLA has no operation: places are found first, then added to."""
    places = lax.reshape(lax.iota("int32", keys.size), keys.shape)

    def better(a: Any, b: Any) -> tuple[Any, Any]:
        keep = select.bind(a[0], b[0])
        return lax.select(keep, a[0], b[0]), lax.select(keep, a[1], b[1])

    worst = keys.dtype.type(-jnp.inf if select is primitives.ge_p else jnp.inf)
    # Windows of padding only choose a place out of bounds, where nothing is added.
    nowhere = np.int32(keys.size)
    _, found = lax.reduce_window((lax.stop_gradient(keys), places), (worst, nowhere), better, **windows)
    flat = jnp.zeros(keys.size, cotangent.dtype).at[found.ravel()].add(cotangent.ravel(), mode="drop")
    return flat.reshape(keys.shape)


def _window_choice(select: Any) -> tuple[TangentRule, PullbackRule]:
    """Rules of the largest (or smallest) in each window."""

    def tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        return [_gathered(tangents[0], primals[0], select, _window_params(node))]

    def pullback(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        return [_scattered(cotangents[0], primals[0], select, _window_params(node))]

    return tangent, pullback


def _linear_in_first(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """Values move by fixed keys."""
    if tangents[0] is None:
        return [None]
    return _jax.bind(node.primitive, [tangents[0], primals[1]], dict(node.params))


def _gather_add_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    if not active[0]:
        return [None, None]
    return [_scattered(cotangents[0], primals[1], node.params["select_prim"], _window_params(node)), None]


def _scatter_add_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    if not active[0]:
        return [None, None]
    return [_gathered(cotangents[0], primals[1], node.params["select_prim"], _window_params(node)), None]


# -- rounding ---------------------------------------------------------------------------------------------------------


def _rounded_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """Tangents are rounded as values are."""
    return _jax.bind(node.primitive, tangents, dict(node.params))


def _rounded_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    return _jax.bind(node.primitive, cotangents, dict(node.params))


_MAX, _MIN = _window_choice(primitives.ge_p), _window_choice(primitives.le_p)

TANGENTS: Mapping[str, TangentRule] = {
    "reduce_max": _chosen_tangent,
    "reduce_min": _chosen_tangent,
    "reduce_precision": _rounded_tangent,
    "reduce_prod": _product_tangent,
    "reduce_window_max": _MAX[0],
    "reduce_window_min": _MIN[0],
    "reduce_window_sum": _window_sum_tangent,
    "select_and_gather_add": _linear_in_first,
    "select_and_scatter_add": _linear_in_first,
}
PULLBACKS: Mapping[str, PullbackRule] = {
    "reduce_max": _chosen_pullback,
    "reduce_min": _chosen_pullback,
    "reduce_precision": _rounded_pullback,
    "reduce_window_max": _MAX[1],
    "reduce_window_min": _MIN[1],
    "reduce_window_sum": _window_sum_pullback,
    "select_and_gather_add": _gather_add_pullback,
    "select_and_scatter_add": _scatter_add_pullback,
}
