"""How axes run through operations untouched.

An axis runs through an operation when taking a part of the operands along it gives the same part of the results:
``f(x)[part] = f(x[part])``. A :class:`Way` names the axis of every operand and result that do; a rule lists the ways of
one kind of operation. What is true of single indices is true of blocks of them, so an axis of size ``n·k`` may be taken
as ``n`` blocks; a reshape keeps ``n`` blocks in order even where it changes ``k``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax

from jaxinfer.analysis.structure import ELEMENTWISE, is_static
from jaxinfer.graph import Node, Value


class Way(NamedTuple):
    """One axis through an operation.

    Attributes:
        operands: for each operand the axis, or None where the whole operand is needed for every part.
        results: for each result the axis.
    """

    operands: tuple[int | None, ...]
    results: tuple[int, ...]


Ways = Iterable[Way]


def ways(node: Node, blocks: int) -> list[Way]:
    """The ways through an operation of axes that ``blocks`` divides; none where the operation is not known."""
    rule = _RULES.get(node.op)
    values = [*node.inputs, *(Value(node, i) for i in range(len(node.avals)))]
    if rule is None or not is_static(*values):
        return []

    def divides(way: Way) -> bool:
        taken = zip((*way.operands, *way.results), values, strict=True)
        return all(a is None or (v.shape[a] > 0 and v.shape[a] % blocks == 0) for a, v in taken)

    return [way for way in rule(node, blocks) if divides(way)]


def resized(node: Node, way: Way, old: int, new: int) -> Mapping[str, Any]:
    """Parameters of the operation when the axis of a way has ``new`` blocks instead of ``old``."""
    rule = _SHAPES.get(node.op)
    if rule is None:
        return node.params
    name, side = rule
    axis, aval = (way.operands[0], node.inputs[0].aval) if side == "operand" else (way.results[0], node.aval)
    sizes = list(node.params[name])
    if axis is None or sizes[axis] != aval.shape[axis]:
        return node.params
    sizes[axis] = aval.shape[axis] // old * new
    return {**node.params, name: tuple(sizes)}


# Parameters that repeat a size of the first operand or of the result.
_SHAPES = {
    "broadcast_in_dim": ("shape", "result"),
    "reshape": ("new_sizes", "result"),
    "iota": ("shape", "result"),
    "slice": ("limit_indices", "operand"),
    "dynamic_slice": ("slice_sizes", "operand"),
    "gather": ("slice_sizes", "operand"),
}


# -- rules ------------------------------------------------------------------------------------------------------------


def _rank(node: Node) -> int:
    return len(node.inputs[0].shape)


def _same(node: Node, axis: int) -> Way:
    """The same axis in every operand and result."""
    return Way((axis,) * len(node.inputs), (axis,) * len(node.avals))


def _elementwise(node: Node, blocks: int) -> Ways:
    shape = node.avals[0].shape
    for axis, size in enumerate(shape):
        # Scalars and axes of length one are repeated.
        along = [axis if len(v.shape) == len(shape) and v.shape[axis] == size else None for v in node.inputs]
        if any(a is not None for a in along):
            yield Way(tuple(along), (axis,) * len(node.avals))


def _reduction(node: Node, blocks: int) -> Ways:
    gone = node.params["axes"]
    kept = [a for a in range(_rank(node)) if a not in gone]
    return [Way((a,), (i,)) for i, a in enumerate(kept)]


def _along_other(name: str) -> Callable[[Node, int], Ways]:
    """Every axis but the one that a parameter names."""
    return lambda node, blocks: [_same(node, a) for a in range(_rank(node)) if a != node.params[name] % _rank(node)]


def _reverse(node: Node, blocks: int) -> Ways:
    return [_same(node, a) for a in range(_rank(node)) if a not in node.params["dimensions"]]


def _leading(core: Callable[[Node], int]) -> Callable[[Node, int], Ways]:
    """Every axis but the last ones."""
    return lambda node, blocks: [_same(node, a) for a in range(_rank(node) - core(node))]


def _transpose(node: Node, blocks: int) -> Ways:
    return [Way((a,), (i,)) for i, a in enumerate(node.params["permutation"])]


def _broadcast(node: Node, blocks: int) -> Ways:
    if len(node.inputs) != 1:
        return
    places = node.params["broadcast_dimensions"]
    shape = node.inputs[0].shape
    source = {place: axis for axis, place in enumerate(places) if shape[axis] == node.aval.shape[place]}
    for axis in range(len(node.aval.shape)):
        yield Way((source.get(axis),), (axis,))


def _reshape(node: Node, blocks: int) -> Ways:
    old, new = node.inputs[0].shape, node.aval.shape
    if len(node.inputs) != 1 or node.params.get("dimensions") is not None or 0 in old:
        return []
    return [Way((a,), (b,)) for a, b in _pairs(len(old), len(new)) if math.prod(old[:a]) == math.prod(new[:b])]


def _pairs(m: int, n: int) -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(m) for b in range(n))


def _squeeze(node: Node, blocks: int) -> Ways:
    gone = {d % _rank(node) for d in node.params["dimensions"]}
    return [Way((a,), (i,)) for i, a in enumerate(a for a in range(_rank(node)) if a not in gone)]


def _iota(node: Node, blocks: int) -> Ways:
    return [Way((), (a,)) for a in range(len(node.aval.shape)) if a != node.params["dimension"] and not node.inputs]


def _slice(node: Node, blocks: int) -> Ways:
    strides = node.params["strides"] or (1,) * _rank(node)
    shape = node.inputs[0].shape
    whole = zip(node.params["start_indices"], node.params["limit_indices"], strides, shape)
    return [_same(node, a) for a, (start, limit, stride, d) in enumerate(whole) if (start, limit, stride) == (0, d, 1)]


def _dynamic_slice(node: Node, blocks: int) -> Ways:
    # A start along an axis that is taken whole is clamped to 0.
    starts = (None,) * (len(node.inputs) - 1)
    return [Way((a, *starts), (a,)) for a, d in enumerate(node.inputs[0].shape) if d == node.params["slice_sizes"][a]]


def _dynamic_update_slice(node: Node, blocks: int) -> Ways:
    whole, part = node.inputs[0].shape, node.inputs[1].shape
    starts = (None,) * (len(node.inputs) - 2)
    return [Way((a, a, *starts), (a,)) for a in range(len(whole)) if whole[a] == part[a]]


def _pad(node: Node, blocks: int) -> Ways:
    return [Way((a, None), (a,)) for a, p in enumerate(node.params["padding_config"]) if tuple(p) == (0, 0, 0)]


def _stack(node: Node, blocks: int) -> Ways:
    new = node.params["axis"]
    return [Way((a,) * len(node.inputs), (a + (a >= new),)) for a in range(_rank(node))]


def _tile(node: Node, blocks: int) -> Ways:
    reps = node.params["reps"]
    return [_same(node, a) for a in range(_rank(node)) if len(reps) == _rank(node) and reps[a] == 1]


def _window(node: Node, blocks: int) -> Ways:
    p = node.params
    sides = zip(p["window_dimensions"], p["window_strides"], map(tuple, p["padding"]), p["base_dilation"])
    return [_same(node, a) for a, side in enumerate(sides) if side == (1, 1, (0, 0), 1)]


def _dot(node: Node, blocks: int) -> Ways:
    (contract, batch) = node.params["dimension_numbers"]
    for i, pair in enumerate(zip(*batch)):
        yield Way(tuple(pair), (i,))
    place = len(batch[0])
    for side in (0, 1):
        taken = {*contract[side], *batch[side]}
        for axis in range(len(node.inputs[side].shape)):
            if axis not in taken:
                yield Way((None, axis) if side else (axis, None), (place,))
                place += 1


def _convolution(node: Node, blocks: int) -> Ways:
    if node.params["batch_group_count"] != 1:
        return
    lhs, rhs, out = node.params["dimension_numbers"]
    yield Way((lhs[0], None), (out[0],))
    if node.params["feature_group_count"] == 1:
        yield Way((None, rhs[0]), (out[1],))


def _gather(node: Node, blocks: int) -> Ways:
    d, shape = node.params["dimension_numbers"], node.inputs[0].shape
    rows = [a for a in range(len(node.aval.shape)) if a not in d.offset_dims]
    windows = [a for a in range(len(shape)) if a not in (*d.collapsed_slice_dims, *d.operand_batching_dims)]
    # A start along an axis that is taken whole is clamped to 0, or promised to be 0.
    settled = node.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    for axis, place in zip(windows, d.offset_dims, strict=True):
        if (settled or axis not in d.start_index_map) and node.params["slice_sizes"][axis] == shape[axis]:
            yield Way((axis, None), (place,))
    # The index vectors lie along the last axis of the indices.
    for axis, place in enumerate(rows):
        if axis not in d.start_indices_batching_dims:
            yield Way((None, axis), (place,))
    for operand, index in zip(d.operand_batching_dims, d.start_indices_batching_dims):
        yield Way((operand, index), (rows[index],))


def _scatter(node: Node, blocks: int) -> Ways:
    d = node.params["dimension_numbers"]
    operand, _, updates = (v.shape for v in node.inputs)
    windows = [a for a in range(len(operand)) if a not in (*d.inserted_window_dims, *d.operand_batching_dims)]
    for axis, place in zip(windows, d.update_window_dims, strict=True):
        if axis not in d.scatter_dims_to_operand_dims and operand[axis] == updates[place]:
            yield Way((axis, None, place), (axis,))
    rows = [a for a in range(len(updates)) if a not in d.update_window_dims]
    for axis, index in zip(d.operand_batching_dims, d.scatter_indices_batching_dims):
        yield Way((axis, index, rows[index]), (axis,))


def _table(names: str, rule: Callable[[Node, int], Ways]) -> dict[str, Callable[[Node, int], Ways]]:
    return dict.fromkeys(names.split(), rule)


_RULES: Mapping[str, Callable[[Node, int], Ways]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **_table(
        "add_any bessel_i1e clamp complex copy copy_p igamma igammac name polygamma regularized_incomplete_beta "
        "select_n stop_gradient zeta",
        _elementwise,
    ),
    **_table("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor", _reduction),
    **_table("cumlogsumexp cummax cummin cumprod cumsum split top_k", _along_other("axis")),
    **_table("concatenate sort", _along_other("dimension")),
    **_table("reduce_window_max reduce_window_min reduce_window_sum", _window),
    **_table("cholesky eigh lu qr svd triangular_solve", _leading(lambda node: 2)),
    "fft": _leading(lambda node: len(node.params["fft_lengths"])),
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    **_table("scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub", _scatter),
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}


def takes(way: Way, axes: Sequence[int | None]) -> bool:
    """Whether a way goes along the given axes of those operands that have one."""
    return all(have is None or have == want for have, want in zip(axes, way.operands, strict=True))
