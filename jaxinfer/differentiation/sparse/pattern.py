"""Sparse matrices of dependence: the finished pattern, and what flows along the edges while it is being found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse

# Entries of one matrix of dependence; a program that needs more is treated as dense.
_MOST_ENTRIES = 30_000_000
# Arrays with more elements are not looked at.
_MOST_KNOWN = 10_000_000
# Coefficients are known where they are multiples of 2**-8 below 2**12: float64 adds and multiplies those exactly.
_UNIT, _LARGEST = 256.0, 4096.0
SOMETHING = np.nan


Rows = sparse.csr_array


class TooDense(Exception):
    """A matrix of dependence has more entries than are worth having."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where a matrix may differ from zero.

    Attributes:
        rows, cols: the entries, sorted by row and then by column, each once.
        shape: of the matrix.
        coarse: operations whose dependence was not resolved (everything depends on everything), with counts.
    """

    rows: np.ndarray
    cols: np.ndarray
    shape: tuple[int, int]
    coarse: Mapping[str, int] = field(default_factory=dict)

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return len(self.rows)

    @property
    def density(self) -> float:
        """Share of the matrix's elements that are entries."""
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def is_dense(self) -> bool:
        """Whether every element is an entry."""
        return self.nnz == math.prod(self.shape)

    def matrix(self) -> sparse.csr_array:
        """The entries as a matrix of ones."""
        return sparse.csr_array((np.ones(self.nnz, np.int32), (self.rows, self.cols)), shape=self.shape)

    def transposed(self) -> Pattern:
        """The pattern of the transposed matrix."""
        return Pattern.of(sparse.csr_array(self.matrix().T), self.coarse)

    def symmetric(self) -> Pattern:
        """The entries whose mirror image is one too, of a matrix that is known to be symmetric."""
        matrix = self.matrix()
        return Pattern.of(sparse.csr_array(matrix.multiply(matrix.T)), self.coarse)

    def todense(self) -> np.ndarray:
        """A boolean array, true at the entries."""
        dense = np.zeros(self.shape, bool)
        dense[self.rows, self.cols] = True
        return dense

    @classmethod
    def of(cls, matrix: sparse.csr_array, coarse: Mapping[str, int] | None = None) -> Pattern:
        """The stored entries of a matrix."""
        matrix.sum_duplicates()
        rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
        return cls(rows, matrix.indices.astype(np.int32), matrix.shape, dict(coarse or {}))

    @classmethod
    def dense(cls, shape: tuple[int, int], coarse: Mapping[str, int] | None = None) -> Pattern:
        """Every element an entry."""
        rows, cols = np.divmod(np.arange(math.prod(shape), dtype=np.int64), max(1, shape[1]))
        return cls(rows.astype(np.int32), cols.astype(np.int32), shape, dict(coarse or {}))


# -- what flows -------------------------------------------------------------------------------------------------------


class Known:
    """An array that is known, computed when it is first looked at."""

    def __init__(self, compute: Callable[[], np.ndarray]):
        self._compute: Callable[[], np.ndarray] | None = compute
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        """The array."""
        if self._compute is not None:
            self._array, self._compute = self._compute(), None
        assert self._array is not None
        return self._array


@dataclass(frozen=True, eq=False)
class Flow:
    """What is known of a value.

    Attributes:
        rows: for each element a row of coefficients, one for each input element; None where it depends on none.
        known: the array, if it is known.
        zeros: the elements that are zero for certain, as a boolean array, if there are any.
    """

    rows: sparse.csr_array | None = None
    known: Known | None = None
    zeros: np.ndarray | None = None

    def array(self) -> np.ndarray | None:
        """The known array, or None."""
        return None if self.known is None else self.known.array

    def zero_places(self) -> np.ndarray | None:
        """Where the value is zero for certain, or None where nothing is known of that."""
        return self.known.array == 0 if self.known is not None else self.zeros

    def __eq__(self, other: object) -> bool:
        """Whether two values are the same in a loop that is repeated until nothing changes."""
        if not isinstance(other, Flow) or self.known is not other.known or self.zeros is not other.zeros:
            return False
        if self.rows is None or other.rows is None:
            return self.rows is other.rows
        a, b = self.rows, other.rows
        return (
            np.array_equal(a.indptr, b.indptr)
            and np.array_equal(a.indices, b.indices)
            and np.array_equal(a.data, b.data, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]


NOTHING = Flow()


def size(aval: Any) -> int:
    """Number of elements."""
    return math.prod(aval.shape)


def is_array(aval: Any) -> bool:
    """Whether values of a type are ordinary arrays of a size that is worth looking at."""
    return isinstance(getattr(aval, "dtype", None), np.dtype) and size(aval) <= _MOST_KNOWN


def tidy(rows: sparse.csr_array) -> sparse.csr_array:
    """Without zeros, with "something" in the place of coefficients that float64 may have rounded.

    Raises:
        TooDense: there are too many entries.
    """
    if rows.nnz > _MOST_ENTRIES:
        raise TooDense
    # Matrices share arrays, so nothing is changed in place; products leave room for sums that turned out to be zero.
    data, indices = rows.data[: rows.nnz], rows.indices[: rows.nnz]
    exact = (np.abs(data) <= _LARGEST) & (data * _UNIT == np.rint(data * _UNIT))
    if not exact.all():
        data = np.where(exact, data, SOMETHING)
    kept = data != 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[rows.indptr]
    found = sparse.csr_array((data[kept], indices[kept], indptr), shape=rows.shape)
    found.sort_indices()
    return found


def blurred(rows: sparse.csr_array) -> sparse.csr_array:
    """The same entries, each multiplied by something."""
    return sparse.csr_array((np.full(rows.nnz, SOMETHING), rows.indices, rows.indptr), shape=rows.shape)


def take(rows: sparse.csr_array, index: np.ndarray) -> sparse.csr_array:
    """Rows by number, empty ones where the number is negative."""
    index = index.reshape(-1)
    if not rows.nnz:
        return sparse.csr_array((len(index), rows.shape[1]))
    counts = np.where(index < 0, 0, np.diff(rows.indptr)[index])
    total = int(counts.sum())
    if total > _MOST_ENTRIES:
        raise TooDense
    ends = np.cumsum(counts)
    places = np.repeat(rows.indptr[index] - (ends - counts), counts) + np.arange(total)
    indptr = np.concatenate([[0], ends])
    return sparse.csr_array((rows.data[places], rows.indices[places], indptr), shape=(len(index), rows.shape[1]))


def scaled(rows: sparse.csr_array, factors: np.ndarray) -> sparse.csr_array:
    """Each row multiplied by its factor."""
    each = np.repeat(factors.reshape(-1), np.diff(rows.indptr))
    # Zero times something is zero, although zero times NaN is not.
    data = np.where(each == 0, 0.0, rows.data * each)
    return tidy(sparse.csr_array((data, rows.indices, rows.indptr), shape=rows.shape))


def combined(
    rows: sparse.csr_array, to: np.ndarray, of: np.ndarray, count: int, coefficients: np.ndarray | float
) -> sparse.csr_array:
    """Sums of rows: row ``to[i]`` of the result gets ``coefficients[i]`` times row ``of[i]``."""
    data = np.broadcast_to(np.asarray(coefficients, np.float64), to.shape)
    if not data.all():
        to, of, data = to[data != 0], of[data != 0], data[data != 0]
    local = sparse.csr_array((data, (to, of)), shape=(count, rows.shape[0]))
    # The product visits this many pairs before equal ones are added up.
    if np.diff(rows.indptr)[of].sum(dtype=np.int64) > 8 * _MOST_ENTRIES:
        raise TooDense
    return tidy(local @ rows)


def total(parts: Sequence[sparse.csr_array | None]) -> sparse.csr_array | None:
    """The sum of matrices of the same shape, None standing for zero."""
    found: sparse.csr_array | None = None
    for part in parts:
        if part is not None:
            found = part if found is None else tidy(sparse.csr_array(found + part))
    return found


def join_rows(a: sparse.csr_array | None, b: sparse.csr_array | None) -> sparse.csr_array | None:
    """The entries of either."""
    if a is None or b is None:
        return a if b is None else b
    return total([blurred(a), blurred(b)])
