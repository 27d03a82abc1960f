"""Gathers, scatters, sorting and the largest k: elements move to other places, which have no derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, ResultsRule, TangentRule, add, filled, place, zeros_of
from jaxinfer.graph import Node

# -- gather and scatter-add, each other's transpose -------------------------------------------------------------------


class Places(NamedTuple):
    """Where windows of an array are taken from or added to, and how: the same for a gather and its scatter.

    Attributes:
        indices: first elements of the windows.
        numbers: dimension numbers of the gather.
        sizes: of the windows.
        options: of both operations: mode and what is known of the indices.
    """

    indices: Any
    numbers: lax.GatherDimensionNumbers
    sizes: tuple[Any, ...]
    options: dict[str, Any]

    @staticmethod
    def of_gather(node: Node, indices: Any) -> Places:
        """The places a gather reads."""
        p = node.params
        return Places(indices, p["dimension_numbers"], tuple(p["slice_sizes"]), _options(p))

    @staticmethod
    def of_scatter(node: Node, shape: Sequence[Any], indices: Any, updates: Any) -> Places:
        """The places a scatter into an array of some shape writes."""
        d = node.params["dimension_numbers"]
        windows = iter(d.update_window_dims)
        single = (*d.inserted_window_dims, *d.operand_batching_dims)
        sizes = tuple(1 if i in single else updates.shape[next(windows)] for i in range(len(shape)))
        numbers = lax.GatherDimensionNumbers(
            offset_dims=d.update_window_dims,
            collapsed_slice_dims=d.inserted_window_dims,
            start_index_map=d.scatter_dims_to_operand_dims,
            operand_batching_dims=d.operand_batching_dims,
            start_indices_batching_dims=d.scatter_indices_batching_dims,
        )
        return Places(indices, numbers, sizes, _options(node.params))

    @property
    def scatter_numbers(self) -> lax.ScatterDimensionNumbers:
        """Dimension numbers of the scatter."""
        n = self.numbers
        return lax.ScatterDimensionNumbers(
            update_window_dims=n.offset_dims,
            inserted_window_dims=n.collapsed_slice_dims,
            scatter_dims_to_operand_dims=n.start_index_map,
            operand_batching_dims=n.operand_batching_dims,
            scatter_indices_batching_dims=n.start_indices_batching_dims,
        )

    def take(self, x: Any, fill: Any = 0) -> Any:
        """The windows; ``fill`` where one is out of bounds and the mode asks for it."""
        return lax.gather(x, self.indices, self.numbers, self.sizes, fill_value=fill, **self.options)

    def put(self, x: Any, updates: Any) -> Any:
        """The array with windows added at their places."""
        return lax.scatter_add(x, self.indices, updates, self.scatter_numbers, **self.options)


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("indices_are_sorted", "unique_indices", "mode")}


def _gather_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return [None if tangents[0] is None else Places.of_gather(node, primals[1]).take(tangents[0])]


def _gather_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    return [Places.of_gather(node, primals[1]).put(zeros_of(primals[0]), cotangents[0]), None]


def _sum_rules(sign: Callable[[Any], Any]) -> tuple[TangentRule, PullbackRule]:
    """Rules of scatter-add, and with a sign of scatter-sub."""

    def tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        operand, _, updates = tangents
        if updates is None:
            return [operand]
        places = Places.of_scatter(node, primals[0].shape, primals[1], primals[2])
        return [places.put(filled(operand, primals[0]), sign(updates))]

    def pullback(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        places = Places.of_scatter(node, primals[0].shape, primals[1], primals[2])
        return [cotangents[0], None, sign(places.take(cotangents[0])) if active[2] else None]

    return tangent, pullback


# -- scatter: the last write stays ------------------------------------------------------------------------------------


def _winners(node: Node, primals: Sequence[Any]) -> tuple[Places, Any, Any]:
    """Where a scatter writes, what it leaves of the operand, and which of the updates stay.

    Which of several updates of one place stays is not specified, so their numbers are scattered in the same way.
    """
    operand, indices, updates = primals
    places = Places.of_scatter(node, operand.shape, indices, updates)
    windows = node.params["dimension_numbers"].update_window_dims
    shape = tuple(1 if i in windows else d for i, d in enumerate(updates.shape))
    dtype = "int32" if updates.size < np.iinfo("int32").max else "int64"
    numbers = lax.reshape(lax.iota(dtype, int(np.prod(shape))), shape) + jnp.ones((), dtype)
    numbers = jnp.broadcast_to(numbers, updates.shape)
    none = lax.full(operand.shape, 0, dtype)
    written = lax.scatter(none, indices, numbers, places.scatter_numbers, **places.options)
    return places, lax.eq(written, none), lax.eq(places.take(written), numbers)


def _refuse_function(node: Node) -> None:
    if node.params["update_jaxpr"] is not None:
        raise NotImplementedError(
            "a function applied to some elements of an array (x.at[i].apply(f)) has no derivative in JAX: use "
            f"x.at[i].set(f(x[i])){place(node)}"
        )


def _masked(keep: Any, x: Any) -> Any:
    return lax.select(keep, x, jnp.zeros_like(x))


def _scatter_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    _refuse_function(node)
    operand, _, updates = tangents
    operand, updates = filled(operand, primals[0]), filled(updates, primals[2])
    if node.params["unique_indices"]:
        return _jax.bind(node.primitive, [operand, primals[1], updates], dict(node.params))
    places, left, stays = _winners(node, primals)
    return [places.put(_masked(left, operand), _masked(stays, updates))]


def _scatter_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    _refuse_function(node)
    (ct,), (operand, indices, updates) = cotangents, primals
    if not node.params["unique_indices"] and active[2]:
        places, left, stays = _winners(node, primals)
        return [_masked(left, ct), None, _masked(stays, places.take(ct))]
    places = Places.of_scatter(node, operand.shape, indices, updates)
    erased = None
    if active[0]:
        erased = lax.scatter(ct, indices, zeros_of(updates), places.scatter_numbers, **places.options)
    return [erased, None, places.take(ct) if active[2] else None]


# -- scatter-mul, -min and -max ---------------------------------------------------------------------------------------


def _refuse_repeated(node: Node) -> None:
    if not node.params["unique_indices"]:
        raise NotImplementedError(
            "the derivative of scatter_mul (x.at[i].multiply(y)) for the factors needs unique_indices=True"
            f"{place(node)}"
        )


def _product_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    total = None
    if tangents[0] is not None:
        (total,) = _jax.bind(node.primitive, [tangents[0], *primals[1:]], dict(node.params))
    if tangents[2] is not None:
        _refuse_repeated(node)
        places = Places.of_scatter(node, primals[0].shape, primals[1], primals[2])
        total = add(total, lax.mul(primals[0], places.put(zeros_of(primals[0]), tangents[2])))
    return [total]


def _product_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (ct,), (operand, indices, updates) = cotangents, primals
    back: list[Any] = [None, None, None]
    if active[0]:
        (back[0],) = _jax.bind(node.primitive, [ct, indices, updates], dict(node.params))
    if active[2]:
        _refuse_repeated(node)
        places = Places.of_scatter(node, operand.shape, indices, updates)
        back[2] = places.take(lax.mul(ct, operand))
    return back


def _extremum_shares(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> tuple[Places, Any, Any]:
    """Shares of operand and updates in the results: those that equal a result share it equally."""
    operand, indices, updates = primals
    places = Places.of_scatter(node, operand.shape, indices, updates)
    chosen = lax.eq(updates, places.take(outs[0]))
    ones = lax.full(updates.shape, 1, operand.dtype)
    count = places.put(zeros_of(operand), _masked(chosen, ones))
    stays = lax.convert_element_type(lax.eq(operand, outs[0]), operand.dtype)
    total = lax.add(count, stays)
    return places, lax.div(stays, total), _masked(chosen, lax.div(ones, places.take(total, 1)))


def _extremum_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    places, of_operand, of_updates = _extremum_shares(node, primals, outs)
    operand, _, updates = tangents
    moved = zeros_of(primals[0]) if operand is None else lax.mul(of_operand, operand)
    return [moved if updates is None else places.put(moved, lax.mul(of_updates, updates))]


def _extremum_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    places, of_operand, of_updates = _extremum_shares(node, primals, outs)
    (ct,) = cotangents
    return [lax.mul(of_operand, ct), None, lax.mul(of_updates, places.take(ct)) if active[2] else None]


# -- sorting and the largest k ----------------------------------------------------------------------------------------


def _along(axis: int, x: Any, indices: Any) -> Places:
    """One element of every row along an axis for each index."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=others,
        start_indices_batching_dims=others,
    )
    options = {"mode": lax.GatherScatterMode.PROMISE_IN_BOUNDS, "unique_indices": True, "indices_are_sorted": False}
    return Places(lax.expand_dims(indices, (x.ndim,)), numbers, (1,) * x.ndim, options)


def _sort_results(node: Node, primals: Sequence[Any]) -> list[Any]:
    """Numbers are sorted with the operands and tell where each element came from."""
    p, shape = node.params, primals[0].shape
    return primitives.sort_p.bind(*primals, lax.broadcasted_iota("int32", shape, p["dimension"]), **p)


def _order(node: Node, primals: Sequence[Any], outs: Sequence[Any]) -> Places:
    """Where a sort takes its elements from."""
    sorted_ = outs if len(outs) > len(primals) else _sort_results(node, primals)
    return _along(node.params["dimension"], primals[0], sorted_[-1])


def _sort_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    order = _order(node, primals, outs)
    return [None if t is None else order.take(t) for t in tangents]


def _sort_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    order = _order(node, primals, outs)
    return [None if ct is None else order.put(zeros_of(x), ct) for x, ct in zip(primals, cotangents)]


def _top_rules(axis_name: str) -> tuple[TangentRule, PullbackRule]:
    """Rules of operations that give elements along an axis and their indices."""

    def places(node: Node, x: Any, indices: Any) -> Places:
        return _along(node.params[axis_name] % x.ndim, x, indices)

    def tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        return [places(node, primals[0], outs[1]).take(tangents[0]), None]

    def pullback(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        return [places(node, primals[0], outs[1]).put(zeros_of(primals[0]), cotangents[0])]

    return tangent, pullback


_ADD, _SUB = _sum_rules(lambda x: x), _sum_rules(lax.neg)
_TOP, _APPROXIMATE = _top_rules("axis"), _top_rules("reduction_dimension")

TANGENTS: Mapping[str, TangentRule] = {
    "approx_top_k": _APPROXIMATE[0],
    "gather": _gather_tangent,
    "scatter": _scatter_tangent,
    "scatter-add": _ADD[0],
    "scatter-max": _extremum_tangent,
    "scatter-min": _extremum_tangent,
    "scatter-mul": _product_tangent,
    "scatter-sub": _SUB[0],
    "sort": _sort_tangent,
    "top_k": _TOP[0],
}
PULLBACKS: Mapping[str, PullbackRule] = {
    "approx_top_k": _APPROXIMATE[1],
    "gather": _gather_pullback,
    "scatter": _scatter_pullback,
    "scatter-add": _ADD[1],
    "scatter-max": _extremum_pullback,
    "scatter-min": _extremum_pullback,
    "scatter-mul": _product_pullback,
    "scatter-sub": _SUB[1],
    "sort": _sort_pullback,
    "top_k": _TOP[1],
}
RESULTS: Mapping[str, ResultsRule] = {"sort": _sort_results}
