"""Products of arrays: operations that are linear in each of two operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule, add
from jaxinfer.differentiation.tables.linear import operation_on
from jaxinfer.graph import Node


def tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    """d(x y) = dx y + x dy, of any operation that is linear in both operands."""
    (x, y), (dx, dy) = primals, tangents
    left = None if dx is None else operation_on(node, dx, y)[0]
    return [left if dy is None else add(left, operation_on(node, x, dy)[0])]


def like(ct: Any, primal: Any) -> Any:
    """A cotangent in the type of what it belongs to."""
    dtype = _jax.aval_of(primal).dtype
    if jnp.iscomplexobj(ct) and not jnp.issubdtype(dtype, jnp.complexfloating):
        ct = lax.real(ct)
    return lax.convert_element_type(ct, dtype)


def _dot_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (x, y), (ct,) = primals, cotangents
    (x_sums, y_sums), (x_batch, y_batch) = node.params["dimension_numbers"]
    x_kept = _others(jnp.ndim(x), x_sums, x_batch)
    y_kept = _others(jnp.ndim(y), y_sums, y_batch)
    first = len(x_batch)
    of_x = range(first, first + len(x_kept))
    of_y = range(first + len(x_kept), first + len(x_kept) + len(y_kept))
    return [
        _dot_operand(node, ct, of_x, of_y, x, (x_batch, x_kept, x_sums), y, (y_batch, y_kept, y_sums), False)
        if active[0]
        else None,
        _dot_operand(node, ct, of_y, of_x, y, (y_batch, y_kept, y_sums), x, (x_batch, x_kept, x_sums), True)
        if active[1]
        else None,
    ]


def _others(ndim: int, *used: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in used)]


def _dot_operand(
    node: Node,
    ct: Any,
    ct_mine: Sequence[int],
    ct_other: Sequence[int],
    mine: Any,
    mine_axes: tuple[Sequence[int], ...],
    other: Any,
    other_axes: tuple[Sequence[int], ...],
    is_second: bool,
) -> Any:
    """The cotangent of one operand: the cotangent of the product times the other operand, over what that one kept.

    Of the two orders of operands the one is taken whose result has its axes as the operand has them, if there is one.

    Args:
        node: the product.
        ct: its cotangent.
        ct_mine: which axes of ``ct`` are those that this operand kept.
        ct_other: which are those that the other kept.
        mine: the operand.
        mine_axes: its batch axes, kept axes and summed axes.
        other: the other operand.
        other_axes: likewise.
        is_second: whether the operand is the product's second one.
    """
    batch, kept, sums = mine_axes
    other_batch, other_kept, other_sums = other_axes
    partner = dict(zip(other_sums, sums))
    summed = [partner[i] for i in sorted(partner)]
    ct_batch = tuple(range(len(batch)))
    orders = {False: [*batch, *kept, *summed], True: [*batch, *summed, *kept]}
    plain = list(range(jnp.ndim(mine)))
    # Without a natural order the roles of the product stay: the cotangent for its own side.
    swap = next((s for s in (is_second, not is_second) if orders[s] == plain), is_second)
    a = (ct, tuple(ct_other), ct_batch)
    b = (other, tuple(other_kept), tuple(other_batch))
    (left, left_sums, left_batch), (right, right_sums, right_batch) = (b, a) if swap else (a, b)
    found = lax.dot_general(
        left,
        right,
        ((left_sums, right_sums), (left_batch, right_batch)),
        precision=_precision(node.params["precision"], swap, is_second),
        preferred_element_type=node.params["preferred_element_type"],
        out_sharding=_sharding_of(mine, orders[swap]),
    )
    if orders[swap] != plain:
        found = lax.transpose(found, [orders[swap].index(i) for i in plain])
    return like(found, mine)


def _precision(precision: Any, swap: bool, is_second: bool) -> Any:
    """Precisions of (cotangent, other operand) in the order of the new product; the cotangent takes the operand's."""
    if not isinstance(precision, tuple):
        return precision
    mine, other = precision[::-1] if is_second else precision
    return (other, mine) if swap else (mine, other)


def _sharding_of(x: Any, order: Sequence[int]) -> Any:
    """How an array with its axes in another order lies on an explicit mesh, None without one."""
    sharding = getattr(_jax.aval_of(x), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return None
    spec = [*sharding.spec, *[None] * jnp.ndim(x)]
    return sharding.update(spec=type(sharding.spec)(*(spec[i] for i in order)))


TANGENTS: Mapping[str, TangentRule] = {"dot_general": tangent}
PULLBACKS: Mapping[str, PullbackRule] = {"dot_general": _dot_pullback}
