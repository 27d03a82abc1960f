"""Coupling through operations that move elements: reshapes, transpositions, slices, concatenations, lookups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Node, Value
from jaxinfer.sparsity.coupling.elementwise import Axes, Rule
from jaxinfer.sparsity.coupling.index_sets import FREE, Vector, free, given

if TYPE_CHECKING:
    from jaxinfer.sparsity.coupling.domain import Coupling


def _transpose(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    return [tuple(x[axis] for axis in node.params["permutation"])]


def _squeeze(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    gone = {axis % len(x) for axis in node.params["dimensions"]}
    for axis in gone:
        _drop(domain, x[axis])
    return [tuple(v for axis, v in enumerate(x) if axis not in gone)]


def _drop(domain: Coupling, vector: Vector) -> None:
    """An axis of one index is gone, and what hangs on the index is not tracked any further."""
    domain.units.lock(vector, "taken out of its axis")


def _broadcast(domain: Coupling, node: Node, x: Axes, *dynamic: Axes) -> Sequence[Axes]:
    axes = list(map(free, node.aval.shape))
    for vector, place in zip(x, node.params["broadcast_dimensions"]):
        if len(vector) == len(axes[place]):
            axes[place] = vector
        else:
            _drop(domain, vector)
    return [tuple(axes)]


def _expand(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    new = {axis % len(node.aval.shape) for axis in node.params["dimensions"]}
    rest = iter(x)
    return [tuple(free(1) if axis in new else next(rest) for axis in range(len(node.aval.shape)))]


def _reverse(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    return [tuple(v[::-1] if axis in node.params["dimensions"] else v for axis, v in enumerate(x))]


def _tile(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    reps = node.params["reps"]
    if len(reps) != len(x):
        return domain.default(node, x)
    return [tuple(np.tile(v, n) for v, n in zip(x, reps))]


def _slice(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    p = node.params
    steps = p["strides"] or (1,) * len(x)
    return [tuple(v[a:b:s] for v, a, b, s in zip(x, p["start_indices"], p["limit_indices"], steps))]


def _split(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    axis = node.params["axis"]
    parts = np.split(x[axis], np.cumsum(node.params["sizes"])[:-1])
    return [(*x[:axis], part, *x[axis + 1 :]) for part in parts]


def _concatenate(domain: Coupling, node: Node, *inputs: Axes) -> Sequence[Axes]:
    axis = node.params["dimension"]
    others = domain.meet([(*x[:axis], *x[axis + 1 :]) for x in inputs])
    return [(*others[:axis], np.concatenate([x[axis] for x in inputs]), *others[axis:])]


def _stack(domain: Coupling, node: Node, *inputs: Axes) -> Sequence[Axes]:
    axis = node.params["axis"]
    others = domain.meet(inputs)
    return [(*others[:axis], given(len(inputs)), *others[axis:])]


def _unstack(domain: Coupling, node: Node, x: Axes) -> Sequence[Axes]:
    axis = node.params["axis"]
    _drop(domain, x[axis])
    return [(*x[:axis], *x[axis + 1 :])] * len(node.avals)


def _pad(domain: Coupling, node: Node, x: Axes, value: Axes) -> Sequence[Axes]:
    axes = []
    for vector, (low, high, interior), size in zip(x, node.params["padding_config"], node.aval.shape):
        spread = np.full(len(vector) + max(len(vector) - 1, 0) * interior, FREE)
        spread[:: interior + 1] = vector
        wide = np.concatenate([np.full(max(low, 0), FREE), spread, np.full(max(high, 0), FREE)])
        axes.append(wide[max(-low, 0) :][:size])
    return [tuple(axes)]


# -- reshape ----------------------------------------------------------------------------------------------------------


def _reshape(domain: Coupling, node: Node, x: Axes, *dynamic: Axes) -> Sequence[Axes]:
    order = node.params.get("dimensions") or range(len(x))
    x = tuple(x[axis] for axis in order)
    old, new = tuple(node.inputs[0].shape[axis] for axis in order), node.aval.shape
    if 0 in old or dynamic:
        return domain.default(node, x, *dynamic)
    axes: list[Vector] = list(map(free, new))
    for vector in x:
        if len(vector) == 1:
            _drop(domain, vector)
    for sources, places in reshape_blocks(old, new):
        if len(sources) == len(places) == 1:
            axes[places[0]] = x[sources[0]]
            continue
        # Composed and split the same way round, so that what is merged and split again is what it was.
        whole = x[sources[-1]]
        for axis in sources[-2::-1]:
            whole = domain.units.compose(x[axis], whole)
        for i, place in enumerate(places[:-1]):
            rest = math.prod(new[p] for p in places[i + 1 :])
            axes[place], whole = domain.units.split(whole, new[place], rest)
        axes[places[-1]] = whole
    return [tuple(axes)]


def reshape_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a reshape's operand become which axes of its result, axes of length one left out."""
    sources = [i for i, d in enumerate(old) if d != 1]
    places = [i for i, d in enumerate(new) if d != 1]
    blocks: list[tuple[list[int], list[int]]] = []
    while sources:
        take, give = [sources.pop(0)], [places.pop(0)]
        while (have := math.prod(old[i] for i in take)) != (want := math.prod(new[i] for i in give)):
            if have < want:
                take.append(sources.pop(0))
            else:
                give.append(places.pop(0))
        blocks.append((take, give))
    return blocks


# -- positions that are data ------------------------------------------------------------------------------------------


def _known(value: Value) -> np.ndarray | None:
    return np.asarray(value.node.value) if value.node.is_const and _jax.is_concrete(value.node.value) else None


def _starts(node: Node, first: int, whole: Sequence[int], part: Sequence[int]) -> list[int | None]:
    """Where a window begins along each axis, None where that is not known."""
    starts: list[int | None] = []
    for value, size, window in zip(node.inputs[first:], whole, part):
        at = _known(value)
        starts.append(0 if size == window else None if at is None else int(np.clip(at, 0, size - window)))
    return starts


def _dynamic_slice(domain: Coupling, node: Node, x: Axes, *index: Axes) -> Sequence[Axes]:
    sizes, shape = node.params["slice_sizes"], node.inputs[0].shape
    if len(index) != len(sizes):
        return domain.default(node, x, *index)
    axes = []
    for vector, start, size in zip(x, _starts(node, 1, shape, sizes), sizes):
        if start is None:
            domain.units.lock(vector, "looked up at a position that depends on data")
        axes.append(given(size) if start is None else vector[start : start + size])
    return [tuple(axes)]


def _dynamic_update_slice(domain: Coupling, node: Node, x: Axes, update: Axes, *index: Axes) -> Sequence[Axes]:
    shape, window = node.inputs[0].shape, node.inputs[1].shape
    starts = _starts(node, 2, shape, window)
    partial = [axis for axis, (size, part) in enumerate(zip(shape, window)) if size != part]
    axes = []
    for axis, start in enumerate(starts):
        if axis not in partial:
            axes.append(domain.units.unify(x[axis], update[axis]))
        elif start is None or len(partial) > 1:
            for vector in (x[axis], update[axis]):
                domain.units.lock(vector, "written at a position that depends on data")
            axes.append(given(shape[axis]))
        else:
            vector = np.array(x[axis])
            vector[start : start + window[axis]] = update[axis]
            axes.append(vector)
    return [tuple(axes)]


def _gather(domain: Coupling, node: Node, x: Axes, index: Axes) -> Sequence[Axes]:
    d, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    shape, units = node.inputs[0].shape, domain.units
    axes: list[Vector] = list(map(given, node.aval.shape))
    rows = [a for a in range(len(node.aval.shape)) if a not in d.offset_dims]
    for place, vector in zip(rows, index[:-1], strict=True):
        axes[place] = vector
    for axis, along in zip(d.operand_batching_dims, d.start_indices_batching_dims):
        axes[rows[along]] = units.unify(x[axis], index[along])
    windows = [a for a in range(len(shape)) if a not in (*d.collapsed_slice_dims, *d.operand_batching_dims)]
    for axis, place in zip(windows, d.offset_dims, strict=True):
        if sizes[axis] == shape[axis]:
            axes[place] = x[axis]
        else:
            units.lock(x[axis], "looked up at positions that depend on data")
    at = _known(node.inputs[1])
    for axis in d.collapsed_slice_dims:
        if at is not None and tuple(d.start_index_map) == (axis,) and len(rows) == 1:
            axes[rows[0]] = _picked(x[axis], at[..., 0])
        else:
            units.lock(x[axis], "looked up at positions that depend on data")
    return [tuple(axes)]


def _picked(vector: Vector, at: np.ndarray) -> Vector:
    """What stands at known positions; what is out of bounds is filled, or taken from an end: in no case removed."""
    inside = (at >= 0) & (at < len(vector))
    return np.where(inside, vector[np.clip(at, 0, len(vector) - 1)], FREE)


def _scatter(domain: Coupling, node: Node, x: Axes, index: Axes, updates: Axes) -> Sequence[Axes]:
    d, units = node.params["dimension_numbers"], domain.units
    shape, axes = node.inputs[0].shape, list(x)
    rows = [a for a in range(len(updates)) if a not in d.update_window_dims]
    windows = [a for a in range(len(shape)) if a not in (*d.inserted_window_dims, *d.operand_batching_dims)]
    passed = set()
    for axis, place in zip(windows, d.update_window_dims, strict=True):
        if len(updates[place]) == shape[axis]:
            axes[axis] = units.unify(x[axis], updates[place])
            passed |= {("x", axis), ("u", place)}
    for axis, along in zip(d.operand_batching_dims, d.scatter_indices_batching_dims):
        axes[axis] = units.unify(units.unify(x[axis], updates[rows[along]]), index[along])
        passed |= {("x", axis), ("u", rows[along])}
    for name, side in (("x", x), ("u", updates)):
        for axis, vector in enumerate(side):
            if (name, axis) not in passed:
                units.lock(vector, "written at positions that depend on data")
    return [tuple(v if ("x", axis) in passed else given(len(v)) for axis, v in enumerate(axes))]


def _table(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _expand,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    **_table("scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub", _scatter),
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
