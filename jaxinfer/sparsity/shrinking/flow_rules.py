"""How kinds and needs of entries go through operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxinfer.analysis.axes import ways
from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.flow import (
    CONSTANT,
    ZERO,
    Kinds,
    Needs,
    Rule,
    uniform,
)
from jaxinfer.sparsity.shrinking.flow_products import RULES as PRODUCTS
from jaxinfer.sparsity.shrinking.slices_elementwise import ABSORBING
from jaxinfer.sparsity.shrinking.slices_elementwise import RULES as ELEMENTWISE
from jaxinfer.sparsity.shrinking.slices_moves import segments

# Zero where all operands are.
_ZERO_STAYS = frozenset(
    "abs add add_any and asin asinh atan atanh bessel_i1e cbrt ceil clamp complex conj convert_element_type copy "
    "copy_p erf erf_inv expm1 floor gt imag integer_pow log1p lt max min mul name ne neg or "
    "population_count real reduce_precision round select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
_ZERO_STAYS_ALONG = frozenset(
    "cummax cummin cumprod cumsum fft reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window_max "
    "reduce_window_min reduce_window_sum reduce_xor rev sort stack tile unstack".split()
)
# The operands of these that hold what is moved; others say where to.
_MOVED: Mapping[str, Sequence[int]] = {
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
}


# -- elements ---------------------------------------------------------------------------------------------------------


def _lifted(kinds: Kinds, rank: int) -> Kinds:
    return kinds if kinds.ndim == rank else kinds.reshape((1,) * rank)


def _greatest(kinds: Sequence[np.ndarray]) -> np.ndarray:
    found = kinds[0]
    for k in kinds[1:]:
        found = np.maximum(found, k)
    return found


def _elementwise(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    rank = len(node.aval.shape)
    lifted = [_lifted(k, rank) for k in kinds]
    found = _greatest(lifted)
    stays = node.op in _ZERO_STAYS and not (node.op == "integer_pow" and node.params["y"] <= 0)
    if not stays:
        found = np.maximum(found, CONSTANT)
    if node.op in ABSORBING:
        for i in ABSORBING[node.op](len(lifted)):
            found = np.where(lifted[i] == ZERO, ZERO, found)
    if node.op == "select_n":
        found = np.where(_greatest(lifted[1:]) == ZERO, ZERO, found)
    return [found.astype(np.uint8)]


def _fold(need: Needs, shape: Sequence[int], out: Sequence[int]) -> Needs:
    """The needs of an operand that is repeated along some axes of the result."""
    if not shape:
        return np.asarray(need.max(initial=0), np.uint8)
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and out[a] != 1)
    return need.max(axis=axes, keepdims=True, initial=0) if axes else need


def _elementwise_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    return [_fold(needs[0], v.shape, node.aval.shape) for v in node.inputs]


# -- movement ---------------------------------------------------------------------------------------------------------


def reshaped(table: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """A table whose axes may have size one, for a value in another shape."""
    if 0 in old:
        return uniform(int(table.max(initial=0)), len(new))
    spread, target = list(table.shape), [1] * len(new)
    for left, right in segments(old, new):
        if any(table.shape[a] != 1 for a in left):
            for a in left:
                spread[a] = old[a]
            for b in right:
                target[b] = new[b]
    return np.broadcast_to(table, spread).reshape(target)


def _order(node: Node) -> Sequence[int]:
    """The axes of the operand of a reshape in the order in which its elements are read."""
    order = node.params["dimensions"] if node.op == "reshape" else None
    return range(len(node.inputs[0].shape)) if order is None else order


def _reshape(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    order = _order(node)
    return [reshaped(kinds[0].transpose(order), [node.inputs[0].shape[a] for a in order], node.aval.shape)]


def _reshape_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    order = _order(node)
    need = reshaped(needs[0], node.aval.shape, [node.inputs[0].shape[a] for a in order])
    return [need.transpose(np.argsort(order))]


def _transpose(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    return [kinds[0].transpose(node.params["permutation"])]


def _transpose_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    return [needs[0].transpose(np.argsort(node.params["permutation"]))]


def _broadcast(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    shape = [1] * len(node.aval.shape)
    for place, n in zip(node.params["broadcast_dimensions"], kinds[0].shape):
        shape[place] = n
    return [kinds[0].reshape(shape), *()]


def _broadcast_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    places = node.params["broadcast_dimensions"]
    shape = node.inputs[0].shape
    stays = {p for p, n in zip(places, shape) if n == node.aval.shape[p]}
    gone = tuple(a for a in range(len(node.aval.shape)) if a not in stays)
    need = needs[0].max(axis=gone, keepdims=True, initial=0)
    return [need.reshape([need.shape[p] for p in places]), *(uniform(0, k.ndim) for k in kinds[1:])]


def _slices(node: Node) -> tuple[slice, ...]:
    p = node.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    return tuple(map(slice, p["start_indices"], p["limit_indices"], steps))


def _slice(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    (k,) = kinds
    return [k[tuple(s if n > 1 else slice(None) for s, n in zip(_slices(node), k.shape))]]


def _slice_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    whole = node.inputs[0].shape
    cut = [n != m for n, m in zip(whole, node.aval.shape)]
    found = np.zeros([n if c else s for n, c, s in zip(whole, cut, needs[0].shape)], np.uint8)
    found[tuple(s if c else slice(None) for s, c in zip(_slices(node), cut))] = needs[0]
    return [found]


def _wide(table: np.ndarray, axis: int, size: int) -> np.ndarray:
    """A table with the full size along one axis."""
    shape = list(table.shape)
    shape[axis] = size
    return np.broadcast_to(table, shape)


def _concatenate(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    axis = node.params["dimension"]
    sizes = [max(n) for n in zip(*(k.shape for k in kinds))]
    full = []
    for k, v in zip(kinds, node.inputs):
        sizes[axis] = v.shape[axis]
        full.append(np.broadcast_to(k, sizes))
    return [np.concatenate(full, axis)]


def _parts(table: np.ndarray, axis: int, sizes: Sequence[int]) -> list[np.ndarray]:
    wide = _wide(table, axis, sum(sizes))
    return np.split(wide, np.cumsum(sizes)[:-1], axis)


def _concatenate_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    axis = node.params["dimension"]
    return _parts(needs[0], axis, [v.shape[axis] for v in node.inputs])


def _split(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    return _parts(kinds[0], node.params["axis"], node.params["sizes"])


def _split_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    axis = node.params["axis"]
    sizes = [max(n) for n in zip(*(k.shape for k in needs))]
    full = []
    for k, size in zip(needs, node.params["sizes"]):
        sizes[axis] = size
        full.append(np.broadcast_to(k, sizes))
    return [np.concatenate(full, axis)]


def _padded_axes(node: Node) -> list[int]:
    return [a for a, c in enumerate(node.params["padding_config"]) if tuple(c) != (0, 0, 0)]


def _places(node: Node, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries along a padded axis go to, and which of them do not fall off."""
    low, _, between = node.params["padding_config"][axis]
    places = low + np.arange(node.inputs[0].shape[axis]) * (between + 1)
    inside = (places >= 0) & (places < node.aval.shape[axis])
    return places[inside], np.flatnonzero(inside)


def _at(axis: int, indices: np.ndarray) -> tuple[Any, ...]:
    return (*(slice(None),) * axis, indices)


def _pad(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    found, value = kinds[0], int(kinds[1].max())
    for axis in _padded_axes(node):
        places, inside = _places(node, axis)
        shape = list(found.shape)
        shape[axis] = node.aval.shape[axis]
        full = np.full(shape, value, np.uint8)
        wide = _wide(found, axis, node.inputs[0].shape[axis])
        full[_at(axis, places)] = wide[_at(axis, inside)]
        found = full
    return [found]


def _pad_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    found = needs[0]
    for axis in _padded_axes(node):
        places, inside = _places(node, axis)
        shape = list(found.shape)
        shape[axis] = node.inputs[0].shape[axis]
        full = np.zeros(shape, np.uint8)
        full[_at(axis, inside)] = _wide(found, axis, node.aval.shape[axis])[_at(axis, places)]
        found = full
    return [found, np.asarray(needs[0].max(initial=0), np.uint8)]


# -- axes that run through --------------------------------------------------------------------------------------------


def _through(node: Node) -> list[Any]:
    """The ways through an operation that keep the size of their axis."""
    found = []
    for way in ways(node, 1):
        sizes = {v.shape[a] for v, a in zip(node.inputs, way.operands) if a is not None}
        sizes |= {v.shape[a] for v, a in zip(node.avals, way.results)}
        if len(sizes) == 1:
            found.append(way)
    return found


def _carried(table: np.ndarray, axes: Mapping[int, int], rank: int) -> np.ndarray:
    """A table with the greatest over all axes but some, which go to other places."""
    gone = tuple(a for a in range(table.ndim) if a not in axes)
    table = table.max(axis=gone, initial=0)
    order = sorted(axes)
    places = [axes[a] for a in order]
    table = table.transpose(np.argsort(places)) if table.ndim else np.asarray(table)
    shape = [1] * rank
    for place, n in zip(sorted(places), table.shape):
        shape[place] = n
    return table.reshape(shape)


def _along(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    found = _through(node)
    results = []
    for i, aval in enumerate(node.avals):
        parts = [
            _carried(k, {w.operands[j]: w.results[i] for w in found if w.operands[j] is not None}, len(aval.shape))
            for j, k in enumerate(kinds)
        ]
        most = _greatest(parts) if parts else uniform(CONSTANT, len(aval.shape))
        moved = _MOVED.get(node.op)
        if moved is not None:
            most = np.where(_greatest([parts[j] for j in moved]) == ZERO, ZERO, most)
        elif node.op not in _ZERO_STAYS_ALONG:
            most = np.maximum(most, CONSTANT)
        results.append(most.astype(np.uint8))
    return results


def _along_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    found = _through(node)
    results = []
    for j, k in enumerate(kinds):
        parts = [
            _carried(n, {w.results[i]: w.operands[j] for w in found if w.operands[j] is not None}, k.ndim)
            for i, n in enumerate(needs)
        ]
        results.append(_greatest(parts) if parts else uniform(0, k.ndim))
    return results


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, Rule(_elementwise, _elementwise_back)),
    "reshape": Rule(_reshape, _reshape_back),
    "squeeze": Rule(_reshape, _reshape_back),
    "transpose": Rule(_transpose, _transpose_back),
    "broadcast_in_dim": Rule(_broadcast, _broadcast_back),
    "slice": Rule(_slice, _slice_back),
    "concatenate": Rule(_concatenate, _concatenate_back),
    "split": Rule(_split, _split_back),
    "pad": Rule(_pad, _pad_back),
    **PRODUCTS,
    "*": Rule(_along, _along_back),
}
