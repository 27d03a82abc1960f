"""Operations that move elements: kept indices and fills move with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.slices import (
    LARGEST_KNOWN,
    NONE,
    Indices,
    Sliced,
    apply,
    common,
    dense,
    kept_or_none,
    made,
    merged,
    missing,
    part,
    restricted,
)

Rule = Callable[..., Sequence[Any]]


def reordered(x: Sliced, shape: Sequence[int], source: Sequence[int | None], array: Any, fill: Any) -> Sliced:
    """A value whose axes are axes of another one, or new ones of size one.

    Args:
        x: the value.
        shape: of the result.
        source: for each axis of the result the axis of ``x`` that it is, or None.
        array: what is left of the result.
        fill: the fill of the result.
    """
    return made(
        shape,
        array,
        [None if a is None else x.keep[a] for a in source],
        [a is not None and x.repeated[a] for a in source],
        fill,
        [NONE if a is None else x.void[a] for a in source],
        x.known,
        x.fill_known,
        tuple(None if a is None else x.leaf[a] for a in source) if x.leaf else (),
    )


def transpose(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    return [transposed(x, node.params["permutation"])]


def transposed(x: Sliced, order: Sequence[int]) -> Sliced:
    """The value with its axes in another order."""
    array = np.transpose(x.array, order) if x.known else lax.transpose(x.array, order)
    fill = np.transpose(x.fill, order) if x.fill_known else lax.transpose(x.fill, order)
    return reordered(x, [x.shape[a] for a in order], order, array, fill)


def broadcast(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    """New axes, and axes of size one that grow, are repeated and stored once."""
    shape, places = tuple(node.aval.shape), node.params["broadcast_dimensions"]
    source: list[int | None] = [None] * len(shape)
    for axis, place in enumerate(places):
        source[place] = axis
    stored = [1 if a is None else x.array.shape[a] for a in source]
    filled = [1 if a is None else np.shape(x.fill)[a] for a in source]
    grown = [n != 1 and (a is None or x.shape[a] != n) for n, a in zip(shape, source)]
    fill = x.fill.reshape(filled)
    if any(g and a is not None and x.keep[a] is not None for g, a in zip(grown, source)):
        # The only slice of an axis is missing, and it is to be repeated.
        return broadcast(domain, node, made(x.shape, dense(x, log=domain.log), (None,) * x.rank, known=x.known))
    found = reordered(x, shape, source, x.array.reshape(stored), fill)
    repeated = tuple(g or r for g, r in zip(grown, found.repeated))
    return [replace(found, repeated=repeated)]


# -- reshaping --------------------------------------------------------------------------------------------------------

Segment = tuple[tuple[int, ...], tuple[int, ...]]


def segments(old: Sequence[int], new: Sequence[int]) -> Iterator[Segment]:
    """The smallest runs of axes of two shapes that hold the same elements; axes of size one are left out."""
    a = [i for i, n in enumerate(old) if n != 1]
    b = [i for i, n in enumerate(new) if n != 1]
    while a or b:
        left, right = [a.pop(0)], [b.pop(0)]
        have, want = old[left[0]], new[right[0]]
        while have != want:
            if have < want:
                left.append(a.pop(0))
                have *= old[left[-1]]
            else:
                right.append(b.pop(0))
                want *= new[right[-1]]
        yield tuple(left), tuple(right)


def reshape(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    shape = tuple(node.aval.shape)
    if 0 in shape:
        return domain.plainly(node, x)
    if node.op == "reshape" and node.params["dimensions"] is not None:
        x = transposed(x, node.params["dimensions"])
    for axis, n in enumerate(x.shape):
        if n == 1 and x.keep[axis] is not None:
            x = restricted(x, axis, None)
    runs = list(segments(x.shape, shape))
    for left, right in runs:
        x = _fit(x, left, [shape[b] for b in right], domain.log)
    keep: list[Indices | None] = [None] * len(shape)
    void = [NONE] * len(shape)
    repeated = [False] * len(shape)
    filled = [1] * len(shape)
    stored = [1] * len(shape)
    leaf: list[tuple[int, int] | None] = [None] * len(shape)
    spread = list(np.shape(x.fill))
    for left, right in runs:
        sizes = [shape[b] for b in right]
        if len(left) == len(right) == 1:
            leaf[right[0]] = x.leaf[left[0]] if x.leaf else None
        moved = _moved(x, left, sizes)
        for b, (k, v, r) in zip(right, moved):
            keep[b], void[b], repeated[b] = k, v, r
            stored[b] = 1 if r else shape[b] if k is None else len(k)
        if any(spread[a] != 1 for a in left):
            for a in left:
                spread[a] = x.shape[a]
            for b in right:
                filled[b] = shape[b]
    on = np if x.fill_known else jnp
    fill = on.broadcast_to(x.fill, spread).reshape(filled)
    array = x.array.reshape(stored)
    leaves = tuple(leaf) if x.leaf else ()
    return [made(shape, array, keep, repeated, fill, void, x.known, x.fill_known, leaves)]


def _flat(x: Sliced, left: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the elements of a run of axes, which are kept and which are void, in order."""
    sizes = [x.shape[a] for a in left]
    kept, void = np.ones(sizes, bool), np.zeros(sizes, bool)
    for i, a in enumerate(left):
        along = [-1 if j == i else 1 for j in range(len(left))]
        kept &= np.isin(np.arange(x.shape[a]), x.kept(a)).reshape(along)
        void |= np.isin(np.arange(x.shape[a]), x.void[a]).reshape(along)
    return kept.ravel(), void.ravel()


def _box(kept: np.ndarray, sizes: Sequence[int]) -> list[Indices]:
    """The indices along each of several axes at which something is kept."""
    places = np.unravel_index(np.flatnonzero(kept), sizes)
    return [np.unique(p) for p in places]


def _fit(x: Sliced, left: Sequence[int], sizes: Sequence[int], log: Any) -> Sliced:
    """The value with as much of a run of axes filled in as needed for what is kept to be a box in its new form."""
    if all(x.keep[a] is None for a in left):
        if len(left) == len(sizes) == 1 or all(x.repeated[a] for a in left):
            return x
        return _in_full(x, [a for a in left if x.repeated[a]], log)
    if len(left) == len(sizes) == 1:
        return x
    kept, void = _flat(x, left)
    box = _box(kept, sizes)
    fits = kept.any() and math.prod(map(len, box)) == kept.sum()
    if fits and not (void & ~_void_there(void, sizes)).any():
        return _in_full(x, [a for a in left if x.repeated[a]], log)
    return _in_full(x, left, log)


def _in_full(x: Sliced, axes: Sequence[int], log: Any) -> Sliced:
    for a in axes:
        if x.keep[a] is not None:
            log(x, a, x.removed(a))
        if x.keep[a] is not None or x.repeated[a]:
            x = restricted(x, a, None)
    return x


def _void_there(void: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The elements that are void because all of their slice along some axis is."""
    table = void.reshape(sizes)
    found = np.zeros(sizes, bool)
    for i in range(len(sizes)):
        found |= table.all(axis=tuple(j for j in range(len(sizes)) if j != i), keepdims=True)
    return found.ravel()


def _moved(x: Sliced, left: Sequence[int], sizes: Sequence[int]) -> list[tuple[Indices | None, Indices, bool]]:
    """Kept indices, void indices and whether it is repeated, for each new axis of a run."""
    if all(x.repeated[a] for a in left):
        return [(None, NONE, True)] * len(sizes)
    if len(left) == len(sizes) == 1:
        return [(x.keep[left[0]], x.void[left[0]], False)]
    if all(x.keep[a] is None for a in left):
        return [(None, NONE, False)] * len(sizes)
    kept, void = _flat(x, left)
    table = void.reshape(sizes)
    rows = [np.flatnonzero(table.all(axis=tuple(j for j in range(len(sizes)) if j != i))) for i in range(len(sizes))]
    return [(k, np.setdiff1d(v, k), False) for k, v in zip(_box(kept, sizes), rows)]


# -- along one axis ---------------------------------------------------------------------------------------------------


def slice_(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    p, shape = node.params, tuple(node.aval.shape)
    strides = p["strides"] or (1,) * x.rank
    array, fill, keep, void, leaf = x.array, x.fill, list(x.keep), list(x.void), list(x.leaf)
    for axis, (start, limit, stride) in enumerate(zip(p["start_indices"], p["limit_indices"], strides)):
        if (start, limit, stride) == (0, x.shape[axis], 1):
            continue
        if leaf:
            leaf[axis] = None
        taken = np.arange(start, limit, stride)
        if x.repeated[axis]:
            continue
        if np.shape(fill)[axis] > 1:
            fill = picked_any(fill, taken, axis, x.fill_known)
        kept = x.kept(axis)
        array = picked_any(array, np.searchsorted(kept, taken[np.isin(taken, kept)]), axis, x.known)
        if keep[axis] is not None:
            keep[axis] = np.flatnonzero(np.isin(taken, kept))
            void[axis] = np.flatnonzero(np.isin(taken, x.void[axis]))
    repeated = [r and n != 1 for r, n in zip(x.repeated, shape)]
    return [made(shape, array, keep, repeated, fill, void, x.known, x.fill_known, tuple(leaf))]


def picked_any(x: Any, indices: Indices, axis: int, known: bool) -> Any:
    """The given positions along an axis of an array."""
    if known:
        return np.take(x, indices, axis)
    steps = np.diff(indices)
    if indices.size and (not steps.size or (steps[0] > 0 and np.all(steps == steps[0]))):
        stop = int(indices[-1]) + 1
        return lax.slice_in_dim(x, int(indices[0]), stop, int(steps[0]) if steps.size else 1, axis)
    return jnp.take(x, indices, axis, mode="clip") if indices.size else lax.slice_in_dim(x, 0, 0, axis=axis)


def reverse(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    dimensions = node.params["dimensions"]
    (array,) = apply(node, [x.array], x.known)
    fill = np.flip(x.fill, dimensions) if x.fill_known else lax.rev(x.fill, dimensions)

    def turned(indices: Indices | None, axis: int) -> Indices | None:
        if indices is None or axis not in dimensions:
            return indices
        return x.shape[axis] - 1 - indices[::-1]

    keep = [turned(k, a) for a, k in enumerate(x.keep)]
    void = [turned(v, a) for a, v in enumerate(x.void)]
    return [made(x.shape, array, keep, x.repeated, fill, void, x.known, x.fill_known)]  # type: ignore[arg-type]


def pad(domain: Any, node: Node, x: Sliced, value: Sliced) -> Sequence[Any]:
    """Along an axis of which something is missing, padding that equals the fill is missing, too."""
    shape, config = tuple(node.aval.shape), [tuple(c) for c in node.params["padding_config"]]
    same = value.known and x.fill_known and np.array_equal(np.broadcast_to(value.array, x.fill.shape), x.fill)
    for axis, c in enumerate(config):
        if c != (0, 0, 0) and (x.repeated[axis] or (x.keep[axis] is not None and (not same or min(c) < 0))):
            x = _in_full(x, [axis], domain.log)
    padded = [c if x.keep[a] is None else (0, 0, 0) for a, c in enumerate(config)]
    known = x.known and value.known and math.prod(shape) <= LARGEST_KNOWN
    (array,) = apply(node, [x.array, value.array], known, padding_config=tuple(padded))
    keep: list[Indices | None] = list(x.keep)
    void = list(x.void)
    changed = [a for a, c in enumerate(config) if c != (0, 0, 0)]
    for axis in changed:
        low, _, between = config[axis]
        if (kept := keep[axis]) is not None:
            keep[axis], void[axis] = low + kept * (between + 1), low + void[axis] * (between + 1)
    fill, fill_known = x.fill, x.fill_known
    others = [a for a, k in enumerate(x.keep) if k is not None and a not in changed]
    if others and changed and not same:
        # Where a channel is missing, the padding is there all the same.
        if not (value.known and x.fill_known):
            return pad(domain, node, _in_full(x, others, domain.log), value)
        spread = [x.shape[a] if a in changed else n for a, n in enumerate(np.shape(fill))]
        mixed = [c if a in changed else (0, 0, 0) for a, c in enumerate(config)]
        fill = apply(node, [np.broadcast_to(fill, spread), value.array], True, padding_config=tuple(mixed))[0]
    return [made(shape, array, keep, x.repeated, fill, void, known, fill_known)]


def concatenate(domain: Any, node: Node, *xs: Sliced) -> Sequence[Any]:
    shape, axis = tuple(node.aval.shape), node.params["dimension"]
    starts = np.cumsum([0, *(x.shape[axis] for x in xs)])
    gone, void = {}, {}
    for a in range(len(shape)):
        if a == axis:
            gone[a] = merged(*(start + x.removed(a) for x, start in zip(xs, starts)))
            void[a] = merged(*(start + x.void[a] for x, start in zip(xs, starts)))
            continue
        real = [x for x in xs if not x.repeated[a]]
        void[a] = merged(*(x.void[a] for x in real))
        # A part that is known may be left out where the others are.
        missing_in = [x.removed(a) for x in real if not (x.known and x.is_whole)]
        gone[a] = merged(common(missing_in), void[a])
    fill, fill_known = _joined_fill(xs, gone, void, axis, shape)
    if not fill_known:
        domain.note()
        gone, fill, fill_known = void, None, True
    keep = [kept_or_none(n, gone[a]) for a, n in enumerate(shape)]
    known = all(x.known for x in xs) and math.prod(shape) <= LARGEST_KNOWN
    arrays = []
    for x, start in zip(xs, starts):
        own = keep[axis]
        there = None if own is None else own[(own >= start) & (own < start + x.shape[axis])] - start
        wanted = {a: there if a == axis else k for a, k in enumerate(keep)}
        arrays.append(part(x, wanted, log=domain.log))
    (array,) = apply(node, arrays, known)
    voids = [void[a] for a in range(len(shape))]
    return [made(shape, array, keep, None, fill, voids, known, fill_known)]


def _joined_fill(
    xs: Sequence[Sliced],
    gone: Mapping[int, Indices],
    void: Mapping[int, Indices],
    axis: int,
    shape: Sequence[int],
) -> tuple[Any, bool]:
    """What is missing of parts that are joined; not known where it changes with the inputs."""
    along = [a for a in gone if a != axis]
    others = {a: np.setdiff1d(gone[a], void[a]) for a in along}
    parts = []
    for x in xs:
        own = dict(others)
        own[axis] = x.removed(axis)
        parts.append(missing(x, own))
    # A part of which nothing is missing stands only where something is kept.
    trivial = [x.is_whole and not any(o.size for o in others.values()) for x in xs]
    if not all(known or t for (_, known), t in zip(parts, trivial)):
        return None, False
    arrays = [nothing_like(x) if t else np.asarray(f) for (f, _), t, x in zip(parts, trivial, xs)]
    if not any(np.any(a) for a in arrays):
        return None, True
    sizes = [max(n) for n in zip(*(a.shape for a in arrays))]
    full = [
        np.broadcast_to(a, [x.shape[axis] if i == axis else n for i, n in enumerate(sizes)]) for a, x in zip(arrays, xs)
    ]
    return np.concatenate(full, axis), True


def nothing_like(x: Sliced) -> np.ndarray:
    """The fill zero of a value's type."""
    return np.zeros((1,) * x.rank, x.dtype)


def split(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    axis, start, found = node.params["axis"], 0, []
    if x.repeated[axis]:
        x = restricted(x, axis, None)
    kept = x.kept(axis)
    for size, aval in zip(node.params["sizes"], node.avals):
        inside = np.flatnonzero((kept >= start) & (kept < start + size))
        array = picked_any(x.array, inside, axis, x.known)
        fill = x.fill
        if np.shape(fill)[axis] > 1:
            fill = picked_any(fill, np.arange(start, start + size), axis, x.fill_known)
        void = list(x.void)
        void[axis] = void[axis][(void[axis] >= start) & (void[axis] < start + size)] - start
        keep = [kept[inside] - start if a == axis and k is not None else k for a, k in enumerate(x.keep)]
        found.append(made(aval.shape, array, keep, x.repeated, fill, void, x.known, x.fill_known))
        start += size
    return found


def unstack(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    """The slices along an axis, one by one."""
    axis = node.params["axis"]
    x = domain.full(x, axis)
    source = [a for a in range(x.rank) if a != axis]
    found = []
    for i, aval in enumerate(node.avals):
        array = picked_any(x.array, np.array([i]), axis, x.known)
        fill = x.fill if np.shape(x.fill)[axis] == 1 else picked_any(x.fill, np.array([i]), axis, x.fill_known)
        stored, filled = ([n for a, n in enumerate(np.shape(t)) if a != axis] for t in (array, fill))
        found.append(reordered(x, aval.shape, source, array.reshape(stored), fill.reshape(filled)))
    return found


RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": broadcast,
    "concatenate": concatenate,
    "pad": pad,
    "reshape": reshape,
    "rev": reverse,
    "slice": slice_,
    "split": split,
    "squeeze": reshape,
    "transpose": transpose,
    "unstack": unstack,
}
