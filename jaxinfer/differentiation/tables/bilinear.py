"""Operations that are linear in each of two operands: products of arrays and convolutions.

Reference: Dumoulin and Visin, *A guide to convolution arithmetic for deep learning*, arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule, add
from jaxinfer.differentiation.tables.linear import operation_on
from jaxinfer.graph import Node


def _tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    (x, y), (dx, dy) = primals, tangents
    left = None if dx is None else operation_on(node, dx, y)[0]
    return [left if dy is None else add(left, operation_on(node, x, dy)[0])]


def _like(ct: Any, primal: Any) -> Any:
    dtype = _jax.aval_of(primal).dtype
    if jnp.iscomplexobj(ct) and not jnp.issubdtype(dtype, jnp.complexfloating):
        ct = lax.real(ct)
    return lax.convert_element_type(ct, dtype)


# -- dot_general ------------------------------------------------------------------------------------------------------


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
    return _like(found, mine)


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


# -- convolution ------------------------------------------------------------------------------------------------------


def _dilated(size: int, dilation: int) -> int:
    return 0 if size == 0 else 1 + dilation * (size - 1)


def _move_groups(x: Any, count: int, source: int, target: int) -> Any:
    """The outer factor ``count`` of one axis as the outer factor of another."""
    shape = list(x.shape)
    apart = lax.reshape(x, [*shape[:source], count, shape[source] // count, *shape[source + 1 :]])
    moved = jnp.moveaxis(apart, source, target)
    shape[source] //= count
    shape[target] *= count
    return lax.reshape(moved, shape)


def _conv_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (x, kernel), (ct,) = primals, cotangents
    if ct.size == 0:
        return [None, None]
    return [
        _conv_image(node, ct, x, kernel) if active[0] else None,
        _conv_kernel(node, ct, x, kernel) if active[1] else None,
    ]


def _window_sizes(node: Node, ct: Any, x: Any, kernel: Any) -> list[tuple[int, int, int, int, int]]:
    """Along each spatial axis: image, kernel and result with their dilations, then the paddings before and after."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    return [
        (
            _dilated(x.shape[x_spec[2 + i]], p["lhs_dilation"][i]),
            _dilated(kernel.shape[kernel_spec[2 + i]], p["rhs_dilation"][i]),
            _dilated(ct.shape[out_spec[2 + i]], p["window_strides"][i]),
            *padding,
        )
        for i, padding in enumerate(p["padding"])
    ]


def _conv_image(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The cotangent spread by the strides, with the kernel reversed and its features exchanged."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    features, batches = p["feature_group_count"], p["batch_group_count"]
    groups = max(features, batches)
    padding = [
        (k - before - 1, image + before - out) for image, k, out, before, _ in _window_sizes(node, ct, x, kernel)
    ]
    if groups > 1:
        kernel = _move_groups(kernel, groups, kernel_spec[0], kernel_spec[1])
    kernel = lax.convert_element_type(lax.rev(kernel, kernel_spec[2:]), ct.dtype)
    found = lax.conv_general_dilated(
        ct,
        kernel,
        window_strides=p["lhs_dilation"],
        padding=padding,
        lhs_dilation=p["window_strides"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            out_spec, (kernel_spec[1], kernel_spec[0], *kernel_spec[2:]), x_spec
        ),
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    if batches > 1:
        found = _move_groups(found, batches, x_spec[1], x_spec[0])
    return _like(found, x)


def _conv_kernel(node: Node, ct: Any, x: Any, kernel: Any) -> Any:
    """The image convolved with the cotangent: batch and feature axes change places, strides and dilations too."""
    p = node.params
    x_spec, kernel_spec, out_spec = p["dimension_numbers"]
    padding = [
        (before, out - image + k - before - 1) for image, k, out, before, _ in _window_sizes(node, ct, x, kernel)
    ]

    def exchanged(spec: Sequence[int]) -> tuple[int, ...]:
        return (spec[1], spec[0], *spec[2:])

    found = lax.conv_general_dilated(
        lax.convert_element_type(x, ct.dtype),
        ct,
        window_strides=p["rhs_dilation"],
        padding=padding,
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["window_strides"],
        dimension_numbers=lax.ConvDimensionNumbers(exchanged(x_spec), exchanged(out_spec), exchanged(kernel_spec)),
        feature_group_count=p["batch_group_count"],
        batch_group_count=p["feature_group_count"],
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    return _like(found, kernel)


_RULES = {"dot_general": _dot_pullback, "conv_general_dilated": _conv_pullback}

TANGENTS: Mapping[str, TangentRule] = dict.fromkeys(_RULES, _tangent)
PULLBACKS: Mapping[str, PullbackRule] = _RULES
