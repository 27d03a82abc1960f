"""Operations that only move elements: for each element of a result, which element of an operand it is.

Elements are numbered through all operands of an operation, and the operation is run on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation.sparse.pattern import Flow, is_array, size
from jaxinfer.graph import Node
from jaxinfer.rewriting.numpy_operations import NUMPY

NOWHERE = -1

# Results are the operands, in the same order.
_IDENTITY = frozenset("convert_element_type copy copy_p optimization_barrier reduce_precision".split())
_ALWAYS = frozenset(
    "broadcast_in_dim concatenate expand_dims pad reshape rev slice split squeeze stack tile transpose".split()
)


def numbers(node: Node) -> list[np.ndarray]:
    """For each operand an array of its shape, the elements of all operands numbered one after the other."""
    starts = np.cumsum([0, *(size(v.aval) for v in node.inputs)])
    return [np.arange(a, b).reshape(v.shape) for a, b, v in zip(starts, starts[1:], node.inputs)]


def origins(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    """For each element of each result the number of the operand's element that it is, or :data:`NOWHERE`.

    Args:
        node: an operation.
        inputs: what is known of its operands; positions must be known.

    Returns:
        One flat array for each result, or None where the operation does more than move, or positions are not known.
    """
    if node.op in _IDENTITY:
        return [x.reshape(-1) for x in numbers(node)]
    if node.op in _ALWAYS:
        if node.op in ("reshape", "squeeze", "expand_dims"):
            return [np.arange(size(node.aval))]
        found = NUMPY[node.op](node, *numbers(node))
        return [np.asarray(x).reshape(-1) for x in (found if node.op == "split" else [found])]
    if node.op == "unstack":
        return [x.reshape(-1) for x in np.moveaxis(numbers(node)[0], node.params["axis"], 0)]
    rule = _POSITIONED.get(node.op)
    return None if rule is None else rule(node, inputs)


def _select(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    which = inputs[0].array()
    if which is None:
        return None
    return [np.broadcast_to(NUMPY["select_n"](node, which, *numbers(node)[1:]), node.aval.shape).reshape(-1)]


def starts_of(inputs: Sequence[Flow], shape: Sequence[int], window: Sequence[int]) -> list[int | None]:
    """Where a window begins along each axis, None where that is not known; clamped as JAX does."""
    starts: list[int | None] = []
    for flow, whole, part in zip(inputs, shape, window, strict=True):
        at = flow.array()
        starts.append(0 if whole == part else None if at is None else int(np.clip(at, 0, whole - part)))
    return starts


def _dynamic_slice(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    sizes = node.params["slice_sizes"]
    if len(inputs) != 1 + len(sizes):
        return None
    starts = starts_of(inputs[1:], node.inputs[0].shape, sizes)
    if None in starts:
        return None
    window = tuple(slice(s, s + n) for s, n in zip(starts, sizes) if s is not None)
    return [numbers(node)[0][window].reshape(-1)]


def _dynamic_update_slice(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    part = node.inputs[1].shape
    starts = starts_of(inputs[2:], node.inputs[0].shape, part)
    if None in starts:
        return None
    whole, update = numbers(node)[:2]
    whole[tuple(slice(s, s + n) for s, n in zip(starts, part) if s is not None)] = update
    return [whole.reshape(-1)]


def gathered(values: np.ndarray, node: Node, indices: np.ndarray) -> np.ndarray:
    """What a ``gather`` picks from an array of numbers; :data:`NOWHERE` out of bounds where it fills."""
    with jax.ensure_compile_time_eval():
        params = {**node.params, "fill_value": NOWHERE}
        picked = _jax.bind(node.primitive, [jax.numpy.asarray(values, np.int32), jax.numpy.asarray(indices)], params)
    return np.asarray(picked[0])


def _gather(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    indices = inputs[1].array()
    return None if indices is None else [gathered(numbers(node)[0], node, indices).reshape(-1)]


def targets(node: Node, indices: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For each element of a scatter's updates the one of ``places`` (shaped as the operand) that it goes to."""
    d = node.params["dimension_numbers"]
    operand, updates = node.inputs[0].shape, node.inputs[2].shape
    dropped = {*d.inserted_window_dims, *d.operand_batching_dims}
    windows = iter(d.update_window_dims)
    sizes = tuple(1 if axis in dropped else updates[next(windows)] for axis in range(len(operand)))
    numbers_ = jax.lax.GatherDimensionNumbers(
        offset_dims=d.update_window_dims,
        collapsed_slice_dims=d.inserted_window_dims,
        start_index_map=d.scatter_dims_to_operand_dims,
        operand_batching_dims=d.operand_batching_dims,
        start_indices_batching_dims=d.scatter_indices_batching_dims,
    )
    with jax.ensure_compile_time_eval():
        found = jax.lax.gather(
            jax.numpy.asarray(places, np.int32),
            jax.numpy.asarray(indices),
            numbers_,
            sizes,
            mode=node.params["mode"],
            fill_value=NOWHERE,
        )
    return np.asarray(found).reshape(-1)


def _scatter(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray] | None:
    indices = inputs[1].array()
    if indices is None:
        return None
    whole, _, updates = (x.reshape(-1) for x in numbers(node))
    to = targets(node, indices, whole.reshape(node.inputs[0].shape))
    inside = to != NOWHERE
    if len(np.unique(to[inside])) < inside.sum():
        # Which of several updates stays is not said.
        return None
    whole[to[inside]] = updates[inside]
    return [whole]


_POSITIONED: Mapping[str, Callable[[Node, Sequence[Flow]], list[np.ndarray] | None]] = {
    "select_n": _select,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter,
}


# -- zeros ------------------------------------------------------------------------------------------------------------

# Zero where the operand is.
_KEEPS_ZEROS = frozenset("abs convert_element_type copy neg reduce_precision real imag sqrt square".split())


def zero_places(node: Node, inputs: Sequence[Flow]) -> list[np.ndarray | None]:
    """Where the results of an operation on partly known values are zero for certain."""
    nothing: list[np.ndarray | None] = [None] * len(node.avals)
    if not all(map(is_array, node.avals)) or all(x.known is None and x.zeros is None for x in inputs):
        return nothing
    shape = node.avals[0].shape
    if node.op in ("mul", "and", "add", "sub", "add_any", *_KEEPS_ZEROS):
        places = [x.zero_places() for x in inputs]
        if node.op in ("mul", "and"):
            some = [np.broadcast_to(z, shape) for z in places if z is not None and z.any()]
            return [np.logical_or.reduce(some)] if some else nothing
        if any(z is None or not z.any() for z in places):
            return nothing
        both = np.logical_and.reduce([np.broadcast_to(z, shape) for z in places if z is not None])
        return [both] if both.any() else nothing
    found = origins(node, inputs)
    if found is None:
        return nothing
    flat = [_zeros_of(x, v.aval) for x, v in zip(inputs, node.inputs)]
    moved = [np.concatenate([*flat, [False]])[index] for index in found]
    return [z.reshape(a.shape) if z.any() else None for z, a in zip(moved, node.avals)]


def _zeros_of(flow: Flow, aval: Any) -> np.ndarray:
    places = flow.zero_places()
    return np.zeros(size(aval), bool) if places is None else np.broadcast_to(places, aval.shape).reshape(-1)
