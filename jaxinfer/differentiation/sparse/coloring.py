"""Which columns and rows of a sparse matrix can share one pass of forward or reverse mode.

Columns may share a pass where no row has entries in two of them, which is a distance-1 colouring of the graph that
joins such columns; rows likewise. A symmetric matrix needs less: a star colouring of its graph, where every entry can
still be read off one of its two columns. Colours are given greedily in several orders, and the best result is kept.

Reference: Gebremedhin, Manne, Pothen, What color is your Jacobian? SIAM Review 47 (2005); Gebremedhin, Tarafdar, Manne,
Pothen, New acyclic and star coloring algorithms, SIAM J. Sci. Comput. 29 (2007); Culberson, Iterated greedy graph
coloring (1992).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from jaxinfer.differentiation.sparse.pattern import Pattern

# A reverse pass takes about this many times as long as a forward one.
REVERSE_COST = 1.5
# Orders that need the graph itself are tried up to this many edges, repeated ones up to so many visited entries.
_MOST_EDGES = 2_000_000
_MOST_VISITS = 2_000_000
_MOST_ROUNDS = 30
# Dense rows that are tried as reverse passes of their own.
_MOST_DENSE_ROWS = 64


@dataclass(frozen=True, eq=False)
class Coloring:
    """A plan of passes from which a sparse matrix can be read.

    Attributes:
        pattern: the matrix's.
        columns: the forward pass that each column takes part in, -1 for none.
        rows: the reverse pass that each row takes part in, -1 for none.
        forward, reverse: numbers of passes.
        source: for each entry its place in the results of the passes: forward ones, each as long as a column, then
            reverse ones, each as long as a row, all one after the other.
        symmetric: whether entries may stand for their mirror images.
    """

    pattern: Pattern
    columns: np.ndarray
    rows: np.ndarray
    forward: int
    reverse: int
    source: np.ndarray
    symmetric: bool = False

    @property
    def passes(self) -> int:
        """Number of passes."""
        return self.forward + self.reverse

    @property
    def cost(self) -> float:
        """Time of all passes, in forward passes."""
        return self.forward + REVERSE_COST * self.reverse

    @property
    def taken_from(self) -> np.ndarray:
        """The pass that each entry is read from: forward ones from 0, then reverse ones."""
        m, n = self.pattern.shape
        return np.searchsorted(np.cumsum([*[m] * self.forward, *[n] * self.reverse]), self.source, "right")

    @classmethod
    def empty(cls, pattern: Pattern) -> Coloring:
        """No passes, for a matrix without entries."""
        m, n = pattern.shape
        return cls(pattern, np.full(n, -1), np.full(m, -1), 0, 0, np.zeros(0, np.int64))

    def __repr__(self) -> str:
        kinds = [f"{n} {name}" for n, name in ((self.forward, "forward"), (self.reverse, "reverse")) if n]
        shape = "×".join(map(str, self.pattern.shape))
        return f"Coloring({shape}, {self.pattern.nnz} entries, {' and '.join(kinds) or 'no'} passes)"


def color(pattern: Pattern, forward: bool = True, reverse: bool = True) -> Coloring:
    """The cheapest plan of forward passes, of reverse passes, or of both for the entries of a matrix.

    Args:
        pattern: the matrix's.
        forward: whether forward passes are possible.
        reverse: whether reverse passes are possible.

    Raises:
        ValueError: neither is possible.
    """
    plans = []
    if forward:
        plans.append(_assembled(pattern, color_columns(pattern), None))
    # No colouring has fewer colours than the longest row, or column, has entries.
    if reverse and (not plans or REVERSE_COST * _longest(pattern.cols) < plans[0].cost):
        plans.append(_assembled(pattern, None, color_columns(pattern.transposed())))
    if forward and reverse:
        plans += _mixed(pattern, min(plan.cost for plan in plans))
    if not plans:
        raise ValueError("there is nothing to colour for: neither forward nor reverse passes are possible")
    return min(plans, key=lambda plan: plan.cost)


def _longest(numbers: np.ndarray) -> int:
    return int(np.bincount(numbers).max()) if len(numbers) else 0


def _assembled(pattern: Pattern, columns: np.ndarray | None, rows: np.ndarray | None) -> Coloring:
    """The plan in which rows with a colour are taken from reverse passes, all others from forward ones."""
    m, n = pattern.shape
    columns = np.full(n, -1) if columns is None else columns
    rows = np.full(m, -1) if rows is None else rows
    forward, reverse = int(columns.max(initial=-1)) + 1, int(rows.max(initial=-1)) + 1
    i, j = pattern.rows.astype(np.int64), pattern.cols.astype(np.int64)
    source = np.where(rows[i] >= 0, forward * m + rows[i] * n + j, columns[j] * m + i)
    return Coloring(pattern, columns, rows, forward, reverse, source)


def _mixed(pattern: Pattern, best: float) -> Iterator[Coloring]:
    """Plans that take the few longest rows in reverse and the rest forward."""
    lengths = np.bincount(pattern.rows, minlength=pattern.shape[0])
    for limit in np.unique(lengths)[::-1][1:]:
        dense = lengths > limit
        if dense.sum() > _MOST_DENSE_ROWS or REVERSE_COST + limit >= best:
            if dense.sum() > _MOST_DENSE_ROWS:
                return
            continue
        taken = dense[pattern.rows]
        columns = color_columns(_subset(pattern, ~taken))
        rows = color_columns(_subset(pattern, taken).transposed())
        yield _assembled(pattern, columns, rows)


def _subset(pattern: Pattern, kept: np.ndarray) -> Pattern:
    return Pattern(pattern.rows[kept], pattern.cols[kept], pattern.shape)


# -- columns ----------------------------------------------------------------------------------------------------------


def color_columns(pattern: Pattern) -> np.ndarray:
    """Colours for the columns, from 0; -1 for columns without entries. No row has two entries of one colour."""
    bound = _longest(pattern.rows)
    if bound == pattern.shape[1]:
        return np.arange(pattern.shape[1])
    by_column = sparse.csc_array(pattern.matrix())
    rows_of = [r.tolist() for r in np.split(by_column.indices, by_column.indptr[1:-1])]

    def greedy(order: Sequence[int]) -> np.ndarray:
        # A colour is a bit; each row remembers the colours that occur in it.
        used, colors = [0] * pattern.shape[0], np.full(pattern.shape[1], -1)
        for v in order:
            forbidden = 0
            for r in rows_of[v]:
                forbidden |= used[r]
            bit = ~forbidden & (forbidden + 1)
            for r in rows_of[v]:
                used[r] |= bit
            colors[v] = bit.bit_length() - 1
        return colors

    active = [v for v, r in enumerate(rows_of) if r]
    return _best(active, greedy, bound, lambda: _column_graph(pattern), pattern.nnz)


def _column_graph(pattern: Pattern) -> sparse.csr_array | None:
    """The graph that joins columns with entries in one row, or None where it is too large to be written down."""
    lengths = np.bincount(pattern.rows, minlength=pattern.shape[0]).astype(np.int64)
    if (lengths**2).sum() > _MOST_EDGES:
        return None
    matrix = pattern.matrix()
    graph = sparse.csr_array(matrix.T @ matrix)
    graph.setdiag(0)
    graph.eliminate_zeros()
    return graph


# -- symmetric matrices -----------------------------------------------------------------------------------------------


def color_symmetric(pattern: Pattern) -> Coloring:
    """A plan of forward passes for a symmetric matrix, each entry read off itself or its mirror image.

    Args:
        pattern: of a square matrix, symmetric itself.

    Raises:
        ValueError: the pattern is not symmetric.
    """
    matrix = pattern.matrix()
    if pattern.shape[0] != pattern.shape[1] or (matrix != matrix.T).nnz:
        raise ValueError(f"a star colouring needs a symmetric pattern, not this one of shape {pattern.shape}")
    if not pattern.nnz:
        return Coloring.empty(pattern)
    colors = star_coloring(pattern)
    # Columns that share no row are a special case of a star colouring, which greedy orders may miss.
    if _longest(pattern.rows) <= colors.max(initial=-1):
        other = color_columns(pattern)
        colors = other if other.max(initial=-1) < colors.max(initial=-1) else colors
    return _read_symmetric(pattern, colors)


def star_coloring(pattern: Pattern) -> np.ndarray:
    """Colours such that neighbours differ and every path of four vertices has three colours; -1 without entries."""
    graph = pattern.matrix()
    graph.setdiag(0)
    graph.eliminate_zeros()
    neighbours = [x.tolist() for x in np.split(graph.indices, graph.indptr[1:-1])]

    def greedy(order: Sequence[int]) -> np.ndarray:
        colors = [-1] * len(neighbours)
        around = [0] * len(neighbours)  # the colours of a vertex's neighbours, as bits
        counts: list[Counter[int]] = [Counter() for _ in neighbours]
        for v in order:
            forbidden = 0
            for w in neighbours[v]:
                c = colors[w]
                if c < 0:
                    continue
                forbidden |= 1 << c
                if counts[v][c] > 1:
                    # v between two vertices of one colour: what lies beyond them must differ from v.
                    forbidden |= around[w]
                else:
                    # v at the end of a path: the third vertex must differ from v if the fourth is like the second.
                    for x in neighbours[w]:
                        if colors[x] >= 0 and counts[x][c] > 1:
                            forbidden |= 1 << colors[x]
            bit = ~forbidden & (forbidden + 1)
            colors[v] = bit.bit_length() - 1
            for w in neighbours[v]:
                around[w] |= bit
                counts[w][colors[v]] += 1
        return np.asarray(colors, int)

    active = np.unique(pattern.rows).tolist()
    visits = int((np.diff(graph.indptr).astype(np.int64) ** 2).sum()) + 1
    return _best(active, greedy, 2 if graph.nnz else 1, lambda: graph, visits)


def _read_symmetric(pattern: Pattern, colors: np.ndarray) -> Coloring:
    """Chooses for each entry which of its two columns it is read off, and drops the passes that nothing is read off."""
    n = pattern.shape[0]
    i, j = pattern.rows.astype(np.int64), pattern.cols.astype(np.int64)
    shared = sparse.csr_array((np.ones(len(i), int), (i, colors[j])), shape=(n, max(1, colors.max(initial=0) + 1)))
    shared.sum_duplicates()
    upper = i <= j
    a, b = i[upper], j[upper]
    alone_b = np.asarray(shared[a, colors[b]]).ravel() == 1  # H[a, b] stands alone in its row of the pass of b
    alone_a = np.asarray(shared[b, colors[a]]).ravel() == 1
    if not (alone_a | alone_b).all():
        raise AssertionError("an entry cannot be read off this colouring")
    needed = np.zeros(colors.max(initial=-1) + 1, bool)
    needed[colors[b[~alone_a]]] = True
    needed[colors[a[~alone_b]]] = True
    for x, y in zip(colors[a].tolist(), colors[b].tolist()):
        if not (needed[x] or needed[y]):
            needed[x] = True
    renumbered = np.append(np.where(needed, np.cumsum(needed) - 1, -1), -1)
    new = renumbered[colors]
    off_b = alone_b & (new[b] >= 0)
    place = np.where(off_b, new[b] * n + a, new[a] * n + b)
    position = sparse.csr_array((np.arange(1, len(place) + 1), (a, b)), shape=(n, n))
    numbered = np.asarray(position[np.minimum(i, j), np.maximum(i, j)]).ravel() - 1
    return Coloring(pattern, new, np.full(n, -1), int(needed.sum()), 0, place[numbered], symmetric=True)


# -- orders -----------------------------------------------------------------------------------------------------------


def _best(
    active: Sequence[int],
    greedy: Callable[[Sequence[int]], np.ndarray],
    bound: int,
    graph_of: Callable[[], sparse.csr_array | None],
    visits: int,
) -> np.ndarray:
    """The colouring with the fewest colours over several orders of the vertices.

    Args:
        active: the vertices to colour.
        greedy: gives each vertex in order the first colour that it may have.
        bound: a number of colours that cannot be bettered.
        graph_of: the graph that orders are made by.
        visits: the work of one colouring.
    """
    best = greedy(active)
    if best.max(initial=-1) + 1 <= bound:
        return best
    graph = graph_of()
    orders = [] if graph is None else [_largest_first, _smallest_last, _incidence]
    for order_of in orders:
        found = greedy(order_of(graph, active))
        if found.max() < best.max():
            best = found
        if best.max() + 1 <= bound:
            return best
    # Taking the classes of a colouring one after the other never needs more colours, and often fewer.
    rng, current = np.random.default_rng(0), best
    for i in range(min(_MOST_ROUNDS, _MOST_VISITS // max(1, visits))):
        current = greedy(_by_class(current, active, i, rng))
        if current.max() <= best.max():
            best = current
        else:
            current = best
        if best.max() + 1 <= bound:
            break
    return best


def _largest_first(graph: sparse.csr_array, active: Sequence[int]) -> list[int]:
    """Vertices with many neighbours first."""
    degrees = np.diff(graph.indptr)
    return sorted(active, key=lambda v: -degrees[v])


def _smallest_last(graph: sparse.csr_array, active: Sequence[int]) -> list[int]:
    """The vertex with the fewest neighbours among those left goes last, and so on."""
    return _by_changing_degree(graph, active, start=lambda d: d, step=-1)[::-1]


def _incidence(graph: sparse.csr_array, active: Sequence[int]) -> list[int]:
    """The vertex with the most neighbours among those taken goes next."""
    return _by_changing_degree(graph, active, start=lambda d: 0 * d, step=-1)


def _by_changing_degree(
    graph: sparse.csr_array, active: Sequence[int], start: Callable[[np.ndarray], np.ndarray], step: int
) -> list[int]:
    """Takes the vertex with the smallest key; the keys of its neighbours then change by a step."""
    keys = start(np.diff(graph.indptr)).tolist()
    neighbours = [x.tolist() for x in np.split(graph.indices, graph.indptr[1:-1])]
    heap = [(keys[v], v) for v in active]
    heapq.heapify(heap)
    taken: dict[int, None] = {}
    while heap:
        key, v = heapq.heappop(heap)
        if v in taken or key != keys[v]:
            continue
        taken[v] = None
        for w in neighbours[v]:
            if w not in taken:
                keys[w] += step
                heapq.heappush(heap, (keys[w], w))
    return list(taken)


def _by_class(colors: np.ndarray, active: Sequence[int], round_: int, rng: np.random.Generator) -> list[int]:
    """Classes in reversed order, by size, or at random."""
    count = int(colors.max()) + 1
    sizes = np.bincount(colors[colors >= 0], minlength=count)
    rank = (-np.arange(count), sizes, rng.permutation(count))[round_ % 3]
    vertices = np.asarray(active)
    return vertices[np.argsort(rank[colors[vertices]], kind="stable")].tolist()
