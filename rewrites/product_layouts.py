"""Products that sum over the rows of their first matrix, written so that XLA's CPU backend takes its fast path.

That path wants the first operand's summed axis last. What a product sums over first (AᵀG, as the gradient of a weight,
or of what an adjacency matrix was multiplied with) goes to a routine that writes A anew on the way. Where A is much
larger than G and the result, GᵀA is computed instead and turned around. XLA would put the turn back into the product,
so a barrier stands between.

A small product is given to one core. Where x A + h B was computed, as in a recurrent cell's gates, the gradients of A
and B are xᵀG and hᵀG; as one product, [x h]ᵀG, two such are enough for several cores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax import lax

from jaxinfer.analysis.products import same_product
from jaxinfer.analysis.structure import is_static, rebind
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule, op, var

# A is so many times as large as all that is turned around: at 2 a whole program was slower, at 4 faster.
_LARGER = 3
# An element is turned around for this many multiplications or more; with 64 the turn was still the slower way.
_LEAST_REUSE = 128
# Over fewer rows a product is a few multiply-adds for each element of the result, which XLA writes out.
_LEAST_ROWS = 8
# Multiplications of products worth joining: fewer go to one core all together, more go to several cores one by one.
_JOINED = range(6_000_000, 17_000_000)
# The results are copied out of the joint one; more elements cost what is won.
_MOST_RESULTS = 1 << 17
# Over fewer rows there is too little to do for each element that is copied.
_LEAST_JOINED_ROWS = 64


class _Product(NamedTuple):
    """A product as one of matrices: A[summed, rows] on the left, on the right B with its summed axis first or last."""

    summed: int
    rows: int
    columns: int
    last: bool

    @property
    def turned(self) -> int:
        """Elements to turn around: of the result, and of B where its summed axis is first."""
        return self.rows * self.columns + (0 if self.last else self.summed * self.columns)


def _product(m: Match) -> _Product | None:
    """The product where it sums over the first operand's first axes, and over the first or the last of the other."""
    a, b = m["a"], m["b"]
    (sums, other), (batch, _) = m.params("dot")["dimension_numbers"]
    count, ndim = len(sums), len(b.shape)
    first, last = tuple(range(count)), tuple(range(ndim - count, ndim))
    if batch or not sums or tuple(sums) != first or tuple(other) not in (first, last):
        return None
    summed = math.prod(a.shape[:count])
    return _Product(summed, math.prod(a.shape) // summed, math.prod(b.shape) // summed, tuple(other) == last)


def _when(m: Match) -> bool:
    a, b = m["a"], m["b"]
    if not is_static(a, b) or 0 in (*a.shape, *b.shape) or m.params("dot").get("out_sharding") is not None:
        return False
    types = {str(v.aval.dtype) for v in (a, b, m.roots[0])}
    if len(types) > 1 or not types <= {"float32", "float64"} or m.graph.is_known(a) or m.graph.is_known(b):
        return False
    product = _product(m)
    if product is None or product.summed < _LEAST_ROWS:
        return False
    summed, rows, columns, _ = product
    return summed * rows >= _LARGER * product.turned and summed * rows * columns >= _LEAST_REUSE * product.turned


def _turned(m: Match, a: Any, b: Any) -> Any:
    node, product = m.roots[0].node, _product(m)
    assert product is not None
    summed, rows, columns, last = product
    a = lax.reshape(a, (summed, rows))
    b = lax.reshape(b, (columns, summed) if last else (summed, columns))
    left = b if last else lax.optimization_barrier(lax.transpose(b, (1, 0)))
    precision = node.params["precision"]
    if isinstance(precision, tuple):
        precision = precision[::-1]
    right = rebind(node, left, a, dimension_numbers=(((1,), (0,)), ((), ())), precision=precision)
    return lax.reshape(lax.transpose(lax.optimization_barrier(right), (1, 0)), m.roots[0].shape)


# -- products with one right operand ----------------------------------------------------------------------------------


def _sums_first(node: Node) -> bool:
    """Whether a product sums over the first axes of two matrices of single precision."""
    (sums, other), (batch, _) = node.params["dimension_numbers"]
    first = tuple(range(len(sums)))
    return (
        not batch
        and bool(sums)
        and tuple(sums) == tuple(other) == first
        and is_static(Value(node, 0), *node.inputs)
        and all(str(v.dtype) == "float32" for v in (node.aval, *node.inputs))
        and node.params.get("out_sharding") is None
    )


def _find_joined(graph: Graph, node: Node) -> Match | None:
    shared = node.inputs[1]
    if not _sums_first(node):
        return None
    users = dict.fromkeys(user for user, position in graph.uses[shared] if user is not None and position == 1)
    found = [u for u in users if u.op == node.op and same_product(node, u) and _sums_first(u)]
    if len(found) < 2 or found[0] is not node or not _pays(found):
        return None
    values = {"g": shared, **{f"a{i}": n.inputs[0] for i, n in enumerate(found)}}
    return Match(graph, tuple(Value(n, 0) for n in found), values)


def _pays(nodes: Sequence[Node]) -> bool:
    summed = _summed(nodes[0])
    results = sum(n.aval.size for n in nodes)
    return summed >= _LEAST_JOINED_ROWS and results <= _MOST_RESULTS and summed * results in _JOINED


def _summed(node: Node) -> int:
    """How many rows a product sums over."""
    return math.prod(node.inputs[0].shape[: len(node.params["dimension_numbers"][0][0])])


def _joined(m: Match, g: Any, **operands: Any) -> list[Any]:
    nodes = [root.node for root in m.roots]
    summed = _summed(nodes[0])
    rows = [lax.reshape(a, (summed, a.size // summed)) for a in operands.values()]
    left = lax.optimization_barrier(lax.transpose(lax.concatenate(rows, 1), (1, 0)))
    right = lax.reshape(g, (summed, g.size // summed))
    whole = lax.optimization_barrier(rebind(nodes[0], left, right, dimension_numbers=(((1,), (0,)), ((), ()))))
    places = itertools.pairwise(itertools.accumulate((r.shape[1] for r in rows), initial=0))
    return [
        lax.reshape(lax.slice_in_dim(whole, start, stop), node.aval.shape) for node, (start, stop) in zip(nodes, places)
    ]


# -- cases ------------------------------------------------------------------------------------------------------------


def _cases(s: Any) -> Iterator[Any]:
    s.only("float32", "float64")

    def product(axis: int) -> Any:
        return lambda a, b: lax.dot_general(a, b, (((0,), (axis,)), ((), ())))

    k, n = s.choice((260, 300)), s.choice((2, 3))
    yield product(0), (s.array(k, 270), s.array(k, n))
    yield product(1), (s.array(k, 270), s.array(n, k))
    several = (((0, 1), (0, 1)), ((), ()))
    yield lambda a, b: lax.dot_general(a, b, several), (s.array(2, k, 2, 135), s.array(2, k, n))


def _joined_cases(s: Any) -> Iterator[Any]:
    s.only("float32")

    def products(*axes: int) -> Any:
        return lambda a, b, g: tuple(lax.dot_general(x, g, ((axes, axes), ((), ()))) for x in (a, b))

    rows, width, columns = s.choice((64, 96)), s.choice((260, 300)), s.choice((200, 240))
    yield products(0), (s.array(rows, width), s.array(rows, 240), s.array(rows, columns))
    yield products(0, 1), (s.array(rows, 1, 20, 13), s.array(rows, 1, 240), s.array(rows, 1, columns))


RULES: tuple[Rule, ...] = (
    Rule(
        "joint-adjoints",
        "AᵀG, BᵀG → [A B]ᵀG, taken apart, where both are small",
        Find(("dot_general",), _find_joined),
        _joined,
        "reassociate",
        cases=_joined_cases,
        platforms=frozenset({"cpu"}),
    ),
    Rule(
        "turn-first",
        "AᵀB → (BᵀA)ᵀ with Bᵀ and the result written out, where A is much larger than both",
        op("dot_general", var("a"), var("b"), name="dot"),
        _turned,
        "reassociate",
        when=_when,
        cases=_cases,
        platforms=frozenset({"cpu"}),
    ),
)
