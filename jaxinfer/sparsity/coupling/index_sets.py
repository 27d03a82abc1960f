"""Sets of indices that can only be removed together, as a union-find that also knows products of axes.

Along each axis of each value runs a vector with an id, or a code, for each index. Ids that must go together are made
one. An id may be *composed* of two others: an index of a flattened axis goes when its part on either of the axes it was
made of goes. So columns that are reshaped into (heads, features of a head) belong to a head and to a feature, and both
can be removed whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import sparse

FREE = -1
"""Code of an index along which nothing varies that could be removed: constants, broadcast axes."""
GIVEN = -2
"""Code of an index of data that removing parameters does not make zero: inputs and what stems from them."""

Vector = np.ndarray
"""int[size of an axis]: ids (from 0), or codes (negative)."""


def free(size: int) -> Vector:
    """An axis of a constant."""
    return np.broadcast_to(np.int64(FREE), (size,))


def given(size: int) -> Vector:
    """An axis of data."""
    return np.broadcast_to(np.int64(GIVEN), (size,))


class IndexSets:
    """Ids, which of them are one, what they are composed of, and what is known of them.

    Attributes:
        locked: for each id that can never be removed, why.
        marks: what was noted of ids: pairs (what, ids). Notes may be taken back by shortening the list.
    """

    def __init__(self) -> None:
        self.locked: dict[int, str] = {}
        self.marks: list[tuple[str, Vector]] = []
        self._parent = np.arange(1024)
        self._weight = np.ones(1024, np.int64)
        self._count = 0
        self._parts: dict[int, tuple[int, int]] = {}
        self._composed: dict[tuple[int, int], int] = {}

    def fresh(self, size: int) -> Vector:
        """New ids."""
        start, self._count = self._count, self._count + size
        if self._count > len(self._parent):
            old = len(self._parent)
            new = max(2 * old, self._count)
            self._parent = np.concatenate([self._parent, np.arange(old, new)])
            self._weight = np.concatenate([self._weight, np.ones(new - old, np.int64)])
        return np.arange(start, self._count)

    def roots(self, vector: Vector) -> Vector:
        """The vector with one id for all that are one."""
        real = is_real(vector)
        if not real.any():
            return vector
        found = np.array(vector)
        ids = found[real]
        while True:
            up = self._parent[ids]
            if np.array_equal(up, ids):
                break
            ids = up
        found[real] = ids
        return found

    def root(self, one: int) -> int:
        """The id that stands for this one."""
        while (up := int(self._parent[one])) != one:
            one = up
        return one

    def unify(self, a: Vector, b: Vector, *, zeroing: bool = False) -> Vector:
        """Makes two axes go together, index by index.

        Args:
            a, b: of equal length.
            zeroing: whether a zero on either side makes a zero, as in a product; else an index that meets data is not
                zero when its unit is removed, and marked as ``"given"``.

        Returns:
            For each index the id, or the code that says more.
        """
        if a is b:
            return a
        a, b = self.roots(a), self.roots(b)
        real_a, real_b = is_real(a), is_real(b)
        both = real_a & real_b & (a != b)
        if both.any():
            pairs = np.unique(np.stack([a[both], b[both]]), axis=1)
            self._unite(zip(*pairs.tolist()))
        if not zeroing:
            self.mark("given", np.concatenate([a[b == GIVEN], b[a == GIVEN]]))
        return self.roots(np.where(real_a, a, np.where(real_b, b, np.minimum(a, b))))

    def _unite(self, pairs: Iterable[tuple[int, int]]) -> None:
        stack = list(pairs)
        while stack:
            x, y = map(self.root, stack.pop())
            if x == y:
                continue
            if self._weight[x] < self._weight[y]:
                x, y = y, x
            self._parent[y] = x
            self._weight[x] += self._weight[y]
            if y in self.locked:
                self.locked.setdefault(x, self.locked[y])
            parts = self._parts.pop(y, None)
            if parts is not None:
                # What is composed in two ways goes with the first parts together, and with the second ones.
                stack.extend(zip(self._parts.setdefault(x, parts), parts))

    def compose(self, outer: Vector, inner: Vector) -> Vector:
        """The axis that two axes are merged to."""
        return self.either(np.repeat(outer, len(inner)), np.tile(inner, len(outer)))

    def _pair(self, a: int, b: int) -> int:
        known = self._composed.get((a, b))
        if known is None:
            known = self._composed[a, b] = int(self.fresh(1)[0])
            self._parts[known] = (a, b)
        return self.root(known)

    def split(self, vector: Vector, outer: int, inner: int) -> tuple[Vector, Vector]:
        """The two axes, of ``outer`` and ``inner`` indices, that an axis is split to."""
        grid = self.roots(vector).reshape(outer, inner)
        real = is_real(grid)
        if not real.any():
            return _codes(grid, 1), _codes(grid, 0)
        if inner == 1 or (grid == grid[:, :1]).all():
            return grid[:, 0], free(inner)
        if outer == 1 or (grid == grid[:1]).all():
            return free(outer), grid[0]
        first, second = self._factors(grid, real)
        rows, columns = np.nonzero(grid == GIVEN)
        self.mark("given", np.concatenate([first[rows], second[columns]]))
        return self.roots(first), self.roots(second)

    def _factors(self, grid: np.ndarray, real: np.ndarray) -> tuple[Vector, Vector]:
        """Ids of the rows and of the columns of a grid of ids that each go when their row or their column goes."""
        rows, columns = map(np.asarray, np.indices(grid.shape))
        composed = np.isin(grid, list(self._parts))
        first, second = _codes(grid, 1), _codes(grid, 0)
        i, j = rows[composed], columns[composed]
        if composed.any():
            parts = np.array([self._parts[one] for one in grid[composed].tolist()])
            outer, inner = self.roots(parts[:, 0]), self.roots(parts[:, 1])
            # What can go must be whole parts and also whole rows or columns.
            outer_i, outer_j = self._joined(outer, i), self._joined(outer, j)
            inner_i, inner_j = self._joined(inner, i), self._joined(inner, j)
            self._equate(outer, self.either(outer_i, outer_j))
            self._equate(inner, self.either(inner_i, inner_j))
            first[i], second[j] = self.either(outer_i, inner_i), self.either(outer_j, inner_j)
        new = real.any(1) & ~composed.any(1)
        first[new] = self.fresh(int(new.sum()))
        new = real.any(0) & ~composed.any(0)
        second[new] = self.fresh(int(new.sum()))
        rest = real & ~composed
        self._equate(grid[rest], self.either(first[rows[rest]], second[columns[rest]]))
        return first, second

    def _joined(self, a: Vector, b: Vector) -> Vector:
        """An id for each smallest set of places that is made of whole sets of equal entries, in ``a`` and in ``b``."""
        a, b = np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]
        size = a.max() + 1
        links = sparse.coo_array((np.ones(len(a)), (a, b + size)), (size + b.max() + 1,) * 2)
        count, labels = sparse.csgraph.connected_components(links, directed=False)
        # A single set would be all or nothing: what stands there stays.
        return self.fresh(count)[labels[a]] if count > 1 else given(len(a))

    def _equate(self, a: Vector, b: Vector) -> None:
        """Makes ids the same as others; where there is no other they cannot go."""
        self.lock(a[~is_real(b)], "reshaped across what goes together")
        self.unify(a, b, zeroing=True)

    def either(self, a: Vector, b: Vector) -> Vector:
        """Ids that go when either of two goes."""
        a, b = self.roots(a), self.roots(b)
        real_a, real_b = is_real(a), is_real(b)
        found = np.where(real_a, a, np.where(real_b, b, np.minimum(a, b)))
        for k in np.flatnonzero(real_a & real_b & (a != b)):
            found[k] = self._pair(int(a[k]), int(b[k]))
        return found

    def lock(self, vector: Vector, why: str) -> None:
        """Says that indices can never be removed."""
        for one in np.unique(self.roots(vector)).tolist():
            if one >= 0:
                self.locked.setdefault(one, why)

    def mark(self, what: str, vector: Vector) -> None:
        """Notes something of the ids in a vector."""
        ids = vector[is_real(vector)]
        if len(ids):
            self.marks.append((what, ids))

    def marked(self, what: str) -> set[int]:
        """The atoms that were noted as something, in themselves or in what they compose."""
        ids = [v for name, v in self.marks if name == what]
        found = np.unique(self.roots(np.concatenate(ids))).tolist() if ids else []
        return {atom for one in found for atom in self.atoms(one)}

    # -- once everything is known --

    def atoms(self, one: int) -> tuple[int, ...]:
        """The ids that an id is composed of in the end: it goes when any of them goes."""
        found: dict[int, None] = {}
        seen: set[int] = set()
        stack = [one]
        while stack:
            here = self.root(stack.pop())
            if here in seen:
                continue
            seen.add(here)
            if here in self._parts:
                stack.extend(reversed(self._parts[here]))
            else:
                found[here] = None
        return tuple(found)

    def settle(self) -> dict[int, str]:
        """Unites what is composed of itself.

        Returns:
            The atoms that cannot be removed, and why.
        """
        while cycle := self._cycle():
            for one in cycle:
                self._parts.pop(self.root(one), None)
            self._unite((cycle[0], other) for other in cycle[1:])
        locked: dict[int, str] = {}
        for one, why in list(self.locked.items()):
            for atom in self.atoms(one):
                locked.setdefault(atom, why)
        for atom in self.marked("given") & self.marked("mixed"):
            locked.setdefault(atom, "data is added to it, and it is summed over")
        return locked

    def _cycle(self) -> list[int]:
        """Ids that are composed of each other, all of their parts included; none if there are none."""
        done: set[int] = set()
        for start in list(self._parts):
            path: list[int] = []
            stack = [(start, False)]
            while stack:
                one, leaving = stack.pop()
                here = self.root(one)
                if leaving:
                    path.pop()
                    done.add(here)
                elif here in path:
                    inside = path[path.index(here) :]
                    return list(dict.fromkeys(p for x in inside for p in (x, *map(self.root, self._parts[x]))))
                elif here not in done and here in self._parts:
                    path.append(here)
                    stack.append((here, True))
                    stack.extend((p, False) for p in self._parts[here])
        return []


def is_real(vector: Vector) -> np.ndarray:
    """Where a vector has ids."""
    return np.asarray(vector >= 0)


def _codes(grid: np.ndarray, axis: int) -> Vector:
    """The codes along one side of a grid, that of data where there is any."""
    return np.asarray(np.minimum(grid, FREE).min(axis=axis, initial=FREE))
