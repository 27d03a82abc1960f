"""Jacobians stored by the inputs they depend on: the few rows that are not zero, and which rows those are.

A :class:`Block` holds the Jacobian of a value of shape `s` with respect to n inputs as `data` of shape (k, *s) and a
static table `rows` of the same shape: `data[j, p]` is the derivative of element p with respect to input `rows[j, p]`.
A dense Jacobian has k = n and the same rows everywhere; that of the inputs themselves k = 1. Axes along which either
table does not vary have length one in it. At each element the rows are distinct, or -1, where data is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

# Rows are told apart no longer where they are this share of all that occur: dense products beat sparse ones there.
_DENSE = 0.7
# Up to so many sources for a row are picked by masks, which fuse; more by a gather.
_MASKS = 2
# Stands for no row while tables are sorted.
_NONE = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Block:
    """The rows of a Jacobian that are not zero.

    Attributes:
        data: (k, *axes), each axis as long as the value's or 1.
        rows: (k, *axes), int32, each axis as long as the value's or 1; -1 where data is zero.
        shape: of the value.
        derived: blocks made of this one by moving its elements, by what was done.
    """

    data: Any
    rows: np.ndarray
    shape: tuple[int, ...]
    derived: dict[Any, Block] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """How many rows are stored."""
        return self.rows.shape[0]

    @property
    def is_uniform(self) -> bool:
        """Whether all elements depend on the same inputs."""
        return all(d == 1 for d in self.rows.shape[1:])

    @cached_property
    def full(self) -> Any:
        """The data with every axis as long as the value's."""
        shape = (self.count, *self.shape)
        return self.data if self.data.shape == shape else jnp.broadcast_to(self.data, shape)

    @cached_property
    def squares(self) -> Any:
        """Σᵢ Jᵢ², with axes of length one where data does not vary."""
        return jnp.sum(self.data * self.data, 0)

    def repeats(self, axes: Sequence[int]) -> bool:
        """Whether neither data nor rows vary along some axes of the value."""
        return all(self.data.shape[1 + a] == 1 and self.rows.shape[1 + a] == 1 for a in axes)

    def at(self, rows: np.ndarray) -> Any:
        """The data for given rows, zero where an element does not depend on an input; rows not named are lost."""
        return _pick(self.data, self.rows, rows)

    def as_uniform(self, rows: np.ndarray | None = None) -> Block:
        """The same with rows that are equal for all elements: those that occur, or a sorted set that holds them."""
        if rows is None and self.is_uniform:
            return self
        names = occurring(self.rows) if rows is None else rows
        target = uniform_rows(names, len(self.shape))
        return Block(self.at(target), target, self.shape)

    def aligned(self, axes: Sequence[int]) -> Block:
        """The same with rows that do not vary along some axes of the value."""
        target = rows_over(self.rows, axes)
        return self if target is self.rows else Block(self.at(target), target, self.shape)

    def take(self, which: np.ndarray) -> Block:
        """Some of the stored rows."""
        return Block(self.data[which], compress(self.rows[which]), self.shape)


def identity(shape: Sequence[int], dtype: Any, first: int) -> Block:
    """The Jacobian of an input whose elements are inputs number `first` and following."""
    shape = tuple(shape)
    rows = np.arange(first, first + math.prod(shape), dtype=np.int32).reshape(1, *shape)
    return Block(jnp.ones((1,) * (1 + len(shape)), dtype), rows, shape)


# -- tables of rows ---------------------------------------------------------------------------------------------------


def compress(table: np.ndarray, first: int = 1) -> np.ndarray:
    """Shortens to length one the axes, from `first` on, along which a table does not vary."""
    for axis in range(first, table.ndim):
        if table.shape[axis] > 1:
            start = table[(slice(None),) * axis + (slice(0, 1),)]
            if (table == start).all():
                table = start
    return table


def occurring(rows: np.ndarray) -> np.ndarray:
    """The inputs named in a table, sorted."""
    names = np.unique(rows)
    return names[names >= 0]


def uniform_rows(names: np.ndarray, rank: int) -> np.ndarray:
    """The table in which all elements depend on the given inputs."""
    return np.asarray(names, np.int32).reshape(-1, *(1,) * rank)


def same_rows(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables, compressed, are equal."""
    return a is b or (a.shape == b.shape and bool((a == b).all()))


def union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A table that names at each element what either of two tables names there."""
    if same_rows(a, b):
        return a
    names = np.union1d(occurring(a), occurring(b))
    for table in (a, b):
        if table.shape[0] == names.size and all(d == 1 for d in table.shape[1:]):
            return table
    fresh = []
    for row in b:
        known = (a == row).any(0)
        rest = np.where(known, np.int32(-1), row)
        if (rest >= 0).any():
            fresh.append(rest)
    axes = np.broadcast_shapes(a.shape[1:], *(r.shape for r in fresh))
    parts = [np.broadcast_to(a, (a.shape[0], *axes)), *(np.broadcast_to(r, axes)[None] for r in fresh)]
    return _or_uniform(compress(np.concatenate(parts)), names)


def rows_over(rows: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A table, constant along some axes of the value, that names at each element what is named along those axes."""
    varying = [1 + a for a in axes if rows.shape[1 + a] > 1]
    if not varying:
        return rows
    kept = [i for i in range(1, rows.ndim) if i not in varying]
    columns = np.transpose(rows, (0, *varying, *kept)).reshape(-1, math.prod(rows.shape[i] for i in kept))
    # What is named comes first, each input once; the longest column says how many rows there are.
    found = np.sort(np.where(columns < 0, _NONE, columns), 0)
    found[1:][found[1:] == found[:-1]] = _NONE
    found = np.sort(found, 0)
    found = found[: max(1, int((found < _NONE).sum(0).max(initial=0)))]
    ordered = np.where(found == _NONE, -1, found).astype(np.int32)
    shape = [d if i in kept else 1 for i, d in enumerate(rows.shape)]
    return _or_uniform(compress(ordered.reshape(-1, *shape[1:])), occurring(rows))


def _or_uniform(rows: np.ndarray, names: np.ndarray) -> np.ndarray:
    """The table itself, or the dense one over `names` where it would be about as long."""
    return uniform_rows(names, rows.ndim - 1) if rows.shape[0] >= _DENSE * names.size else rows


def is_disjoint(rows: np.ndarray, axes: Sequence[int]) -> bool:
    """Whether no input is named twice along some axes of the value, at any place of the others."""
    moved = [1 + a for a in axes]
    kept = [i for i in range(1, rows.ndim) if i not in moved]
    columns = np.transpose(rows, (0, *moved, *kept)).reshape(-1, math.prod(rows.shape[i] for i in kept))
    found = np.sort(columns, 0)
    return not ((found[1:] == found[:-1]) & (found[1:] >= 0)).any()


def moved(table: Any, shape: Sequence[int], move: Callable[[Any], Any]) -> Any:
    """A table of rows after the elements of the value have been moved."""
    return compress(np.asarray(move(np.broadcast_to(table, (table.shape[0], *shape)))).astype(np.int32))


def _pick(data: Any, have: np.ndarray, want: np.ndarray) -> Any:
    """Data stored for the rows `have`, for the rows `want`."""
    if same_rows(have, want):
        return data
    index = _places(have, want)
    if index is not None and all(d == 1 for d in index.shape[1:]):
        return _along(data, index.reshape(-1))
    sources = _sources(have, want)
    most = max(map(len, sources), default=0)
    if most > _MASKS:
        index = _index(have, want) if index is None else index
        axes = np.broadcast_shapes(data.shape[1:], index.shape[1:])
        spread = jnp.broadcast_to(data, (data.shape[0], *axes))
        place = np.broadcast_to(np.where(index < 0, 0, index), (index.shape[0], *axes))
        found = jnp.take_along_axis(spread, place, 0)
        return found if (index >= 0).all() else jnp.where(compress(index >= 0, 0), found, jnp.zeros((), data.dtype))
    total = None
    for turn in range(most):
        chosen = np.array([s[turn] if turn < len(s) else -1 for s in sources])
        mask = compress((want == have[np.maximum(chosen, 0)]) & (want >= 0), 0)
        mask = mask & (chosen >= 0).reshape(-1, *(1,) * (want.ndim - 1))
        part = _along(data, np.maximum(chosen, 0))
        part = part if mask.all() else jnp.where(compress(mask, 0), part, jnp.zeros((), data.dtype))
        total = part if total is None else total + part
    if total is None:
        return jnp.zeros((want.shape[0], *(1,) * (data.ndim - 1)), data.dtype)
    return total


def _along(data: Any, chosen: np.ndarray) -> Any:
    """Rows of data by number; zero for -1."""
    if data.shape[0] == 1:
        picked = jnp.broadcast_to(data, (chosen.size, *data.shape[1:]))
    elif np.array_equal(chosen, np.arange(data.shape[0])):
        picked = data
    elif chosen.size % data.shape[0] == 0 and np.array_equal(chosen, np.arange(chosen.size) % data.shape[0]):
        times = chosen.size // data.shape[0]
        picked = jnp.broadcast_to(data[None], (times, *data.shape)).reshape(-1, *data.shape[1:])
    else:
        picked = data[np.maximum(chosen, 0)]
    if (chosen >= 0).all():
        return picked
    return jnp.where((chosen >= 0).reshape(-1, *(1,) * (data.ndim - 1)), picked, jnp.zeros((), data.dtype))


def _places(have: np.ndarray, want: np.ndarray) -> np.ndarray | None:
    """Where uniform rows hold each wanted one (-1: nowhere); None for rows that are not uniform."""
    if any(d != 1 for d in have.shape[1:]):
        return None
    names = have.reshape(-1)
    table = np.full(max(int(names.max(initial=0)), int(want.max(initial=0))) + 2, -1, np.int32)
    table[names] = np.arange(names.size)
    table[-1] = -1
    return compress(table[want])


def _sources(have: np.ndarray, want: np.ndarray) -> list[list[int]]:
    """For each wanted row the stored ones that hold it at some element."""
    if want.shape[0] > 4 * have.shape[0]:
        found: list[list[int]] = [[] for _ in want]
        for j, row in enumerate(have):
            hits = ((want == row) & (want >= 0)).reshape(want.shape[0], -1).any(1)
            for i in np.flatnonzero(hits):
                found[i].append(j)
        return found
    return [
        [int(j) for j in np.flatnonzero(((have == row) & (row >= 0)).reshape(have.shape[0], -1).any(1))] for row in want
    ]


def _index(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """For each wanted row and element the stored row that holds it, or -1."""
    index = np.full((want.shape[0], *np.broadcast_shapes(have.shape[1:], want.shape[1:])), -1, np.int32)
    for j, row in enumerate(have):
        index = np.where((want == row) & (want >= 0), np.int32(j), index)
    return compress(index)
