"""Values of which some slices are not there: what is left of them, and what stood in the rest.

Along each axis a value keeps some indices; what is left is the array at the kept indices of all axes. Everywhere else
it equals a *fill*, which is known or at least the same for all that is missing; or it is *void*: left out because
nothing depends on it. Rules compute with what is left, and with the fill beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.graph import Node

Indices = np.ndarray
"""Increasing positions along an axis, int64."""


class Undefined(Exception):
    """Something that was left out because nothing seemed to depend on it is needed after all.

    Attributes:
        value: the value.
        axis: along which it is missing.
        indices: the slices that are missing.
        leaf: the number of the parameter and its axis that this is, if it is one.
        where: the operation that needs them.
    """

    def __init__(self, x: Sliced, axis: int, indices: Indices, where: str = ""):
        place = f" in {where}" if where else ""
        super().__init__(f"slices {indices.tolist()} of axis {axis} of an array of shape {x.shape}{place}")
        self.value, self.axis, self.indices, self.where = x, axis, indices, where
        self.leaf = x.leaf[axis] if x.leaf else None


@dataclass(frozen=True, eq=False)
class Sliced:
    """A value some slices of which are not there.

    Attributes:
        shape: of the whole value.
        array: what is left. Along an axis it has the kept indices, or one where the value is repeated.
        keep: for each axis the kept indices, or None where all are.
        repeated: for each axis whether all its slices are equal and only one is stored; nothing is missing there.
        fill: what stands at every index that is not kept along some axis; its axes have the full size, or one where it
            is the same for all. Of an axis of full size, entries at places that are kept mean nothing.
        void: for each axis the indices, none of them kept, at which the value is not even known.
        known: whether ``array`` is a known number, computed when the program is made.
        fill_known: whether ``fill`` is.
        leaf: for each axis the number of the parameter and its axis that this axis is, if it is one.
    """

    shape: tuple[int, ...]
    array: Any
    keep: tuple[Indices | None, ...]
    repeated: tuple[bool, ...]
    fill: Any
    void: tuple[Indices, ...]
    known: bool = False
    fill_known: bool = True
    leaf: tuple[tuple[int, int] | None, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return all(k is None for k in self.keep)

    @property
    def is_dense(self) -> bool:
        """Whether the array is the whole value."""
        return self.is_whole and not any(self.repeated)

    @property
    def is_zero(self) -> bool:
        """Whether what is missing is zero."""
        return self.fill_known and not np.any(self.fill)

    def removed(self, axis: int) -> Indices:
        """The indices that are missing along an axis."""
        keep = self.keep[axis]
        return NONE if keep is None else without(self.shape[axis], keep)

    def kept(self, axis: int) -> Indices:
        """The indices that are there along an axis."""
        keep = self.keep[axis]
        return np.arange(self.shape[axis]) if keep is None else keep

    def zero_at(self, axis: int) -> Indices:
        """The missing indices along an axis at which the value is known to be zero."""
        gone = self.removed(axis)
        if not gone.size or not self.fill_known:
            return NONE
        if np.shape(self.fill)[axis] == 1:
            return NONE if np.any(self.fill) else np.setdiff1d(gone, self.void[axis])
        others = tuple(a for a in range(self.rank) if a != axis)
        return np.setdiff1d(gone[~np.any(np.take(self.fill, gone, axis) != 0, axis=others)], self.void[axis])


NONE: Indices = np.zeros(0, np.int64)
LARGEST_KNOWN = 1 << 16
"""Known values with more elements than this are computed by the program."""


def without(size: int, indices: Indices) -> Indices:
    """The indices of an axis that are not among the given ones."""
    left = np.ones(size, bool)
    left[indices] = False
    return np.flatnonzero(left)


def merged(*indices: Indices) -> Indices:
    """All indices that occur."""
    found = [i for i in indices if i.size]
    return np.unique(np.concatenate(found)) if found else NONE


def common(indices: Iterable[Indices]) -> Indices:
    """The indices that occur in all."""
    found: Indices | None = None
    for i in indices:
        found = i if found is None else np.intersect1d(found, i)
    return NONE if found is None else found


def kept_or_none(size: int, removed: Indices) -> Indices | None:
    """The kept indices where some are removed, else None."""
    return without(size, removed) if removed.size else None


def whole(array: Any, known: bool = False) -> Sliced:
    """A value of which nothing is missing."""
    shape = tuple(np.shape(array))
    rank = len(shape)
    none = (None,) * rank
    return Sliced(shape, array, none, (False,) * rank, nothing(array.dtype, rank), (NONE,) * rank, known)


def nothing(dtype: Any, rank: int) -> np.ndarray:
    """The fill zero."""
    return np.zeros((1,) * rank, dtype)


def made(
    shape: Sequence[int],
    array: Any,
    keep: Sequence[Indices | None],
    repeated: Sequence[bool] | None = None,
    fill: Any = None,
    void: Sequence[Indices] | None = None,
    known: bool = False,
    fill_known: bool = True,
    leaf: tuple[tuple[int, int] | None, ...] = (),
) -> Sliced:
    """A value with everything that is not said left at nothing; a fill that is zero is stored as one number."""
    rank = len(shape)
    keep = tuple(k if k is not None and len(k) < n else None for k, n in zip(keep, shape, strict=True))
    if all(k is None for k in keep):
        fill, fill_known, void = None, True, None
    elif fill is not None and fill_known:
        fill = _condensed(np.asarray(fill), keep)
    return Sliced(
        tuple(shape),
        array,
        keep,
        tuple(repeated or (False,) * rank),
        nothing(array.dtype, rank) if fill is None else fill,
        tuple(void or (NONE,) * rank),
        known,
        fill_known,
        leaf,
    )


def _condensed(fill: np.ndarray, keep: Sequence[Indices | None]) -> np.ndarray:
    """A known fill, as one number where all of it that counts is equal."""
    axes = [a for a, k in enumerate(keep) if k is not None]
    counts = fill
    if len(axes) == 1 and fill.shape[axes[0]] > 1:
        kept = keep[axes[0]]
        assert kept is not None
        counts = np.take(fill, without(fill.shape[axes[0]], kept), axes[0])
    if not counts.size:
        return np.zeros((1,) * fill.ndim, fill.dtype)
    first = counts.ravel()[:1]
    # Compared as bytes: NaN equals itself, and −0 is not 0.
    if first.tobytes() * counts.size == np.ascontiguousarray(counts).tobytes():
        return first.reshape((1,) * fill.ndim)
    return fill


# -- parts of values --------------------------------------------------------------------------------------------------


def picked(x: Any, indices: Indices, axis: int, known: bool = False) -> Any:
    """The given positions along an axis of an array: a slice where they are evenly spaced."""
    size = x.shape[axis]
    if len(indices) == size:
        return x
    if known:
        return np.take(x, indices, axis)
    steps = np.diff(indices)
    if not indices.size:
        return lax.slice_in_dim(x, 0, 0, axis=axis)
    if not steps.size or np.all(steps == steps[0]):
        return lax.slice_in_dim(x, int(indices[0]), int(indices[-1]) + 1, int(steps[0]) if steps.size else 1, axis)
    return jnp.take(x, indices, axis, unique_indices=True, indices_are_sorted=True, mode="clip")


def part(
    x: Sliced,
    wanted: Mapping[int, Indices | None],
    *,
    repeat: bool = False,
    anything: bool = False,
    log: Any = None,
) -> Any:
    """What a value is at the given indices of each axis; what is missing there comes from its fill.

    Args:
        x: the value.
        wanted: for an axis the indices, or None for all of them; axes that are not named stay as they are kept.
        repeat: leave axes along which the value is repeated at size one.
        anything: let void slices be anything.
        log: told of indices that were missing, as ``log(x, axis, indices)``.

    Raises:
        Undefined: if void slices are among the wanted ones.
    """
    array, masks, fill = x.array, {}, x.fill
    on = np if x.known else jnp
    for axis in range(x.rank):
        size = x.shape[axis]
        want = wanted[axis] if axis in wanted else x.kept(axis)
        want = np.arange(size) if want is None else want
        if x.repeated[axis]:
            if not repeat:
                shape = list(array.shape)
                shape[axis] = len(want)
                array = on.broadcast_to(array, shape)
            continue
        keep = x.kept(axis)
        inside = np.isin(want, keep)
        if not inside.all():
            if not anything and np.isin(want, x.void[axis]).any():
                raise Undefined(x, axis, np.intersect1d(want, x.void[axis]))
            if log is not None:
                log(x, axis, want[~inside])
            masks[axis] = inside
            if np.shape(fill)[axis] == size:
                fill = picked(fill, want, axis, x.fill_known)
        elif not x.is_whole and np.shape(fill)[axis] == size and size > 1:
            fill = picked(fill, want, axis, x.fill_known)
        if keep.size:
            # What is missing is read from somewhere and replaced below.
            places = np.minimum(np.searchsorted(keep, want), len(keep) - 1)
            array = _taken(array, places, axis, x.known)
        else:
            shape = list(array.shape)
            shape[axis] = len(want)
            array = on.zeros(shape, array.dtype)
    return _filled(array, masks, fill, x.known and x.fill_known) if masks else array


def _taken(array: Any, places: Indices, axis: int, known: bool) -> Any:
    if len(places) == array.shape[axis] and np.array_equal(places, np.arange(len(places))):
        return array
    if np.all(np.diff(places) > 0):
        return picked(array, places, axis, known)
    return np.take(array, places, axis) if known else jnp.take(array, places, axis, mode="clip")


def _filled(array: Any, masks: Mapping[int, np.ndarray], fill: Any, known: bool) -> Any:
    """The array where all masks are true, else the fill."""
    there: Any = True
    for axis, mask in masks.items():
        there = there & mask.reshape([-1 if a == axis else 1 for a in range(len(array.shape))])
    if known:
        return np.where(there, array, fill).astype(array.dtype)
    if array.size == 0:
        return jnp.asarray(array)
    return jnp.where(there, array, jnp.asarray(fill).astype(array.dtype))


def dense(x: Any, *, repeat: bool = False, anything: bool = False, log: Any = None) -> Any:
    """The whole value; what is no :class:`Sliced` comes back as it is."""
    if not isinstance(x, Sliced):
        return x
    if x.is_dense:
        return x.array
    return part(x, dict.fromkeys(range(x.rank)), repeat=repeat, anything=anything, log=log)


def missing(x: Sliced, gone: Mapping[int, Indices]) -> tuple[Any, bool]:
    """What a value is wherever an index is among ``gone`` along some axis: a fill for those axes, and if it is known.

    A value that keeps more than that says it by itself, with axes of size one where it is repeated.
    """
    if all(not r.size or (x.keep[a] is not None and np.isin(r, x.removed(a)).all()) for a, r in gone.items()):
        return x.fill, x.fill_known
    return dense(x, repeat=True, anything=True), x.known and (x.is_whole or x.fill_known)


def restricted(x: Sliced, axis: int, indices: Indices | None) -> Sliced:
    """The value with one axis in full, or with the given indices."""
    array = part(x, {axis: indices})
    keep = tuple(indices if a == axis else k for a, k in enumerate(x.keep))
    void = tuple(NONE if a == axis else v for a, v in enumerate(x.void))
    repeated = tuple(False if a == axis else r for a, r in enumerate(x.repeated))
    return replace(x, array=array, keep=keep, void=void, repeated=repeated)


# -- computing with them ----------------------------------------------------------------------------------------------


def evaluate(node: Node, *arrays: Any, **changes: Any) -> list[np.ndarray]:
    """The operation of a node on known arrays, now."""
    with jax.ensure_compile_time_eval():
        out = _jax.bind(node.primitive, [jnp.asarray(a) for a in arrays], {**node.params, **changes})
        return [np.asarray(y) for y in out]


def apply(node: Node, arrays: Sequence[Any], known: bool, **changes: Any) -> list[Any]:
    """The operation of a node on other operands: now where they are known."""
    if known:
        return list(evaluate(node, *arrays, **changes))
    return _jax.bind(node.primitive, arrays, {**node.params, **changes})


def spread(x: Any, shape: Sequence[int], known: bool) -> Any:
    """An array of the same rank broadcast to a shape."""
    if tuple(x.shape) == tuple(shape):
        return x
    return np.broadcast_to(x, shape) if known else jnp.broadcast_to(x, shape)
