"""Products that sum over the rows of their first matrix, written so that XLA's CPU backend takes its fast path.

That path wants the first operand's summed axis last. What a product sums over first (AᵀG, as the gradient of a weight,
or of what an adjacency matrix was multiplied with) goes to a routine that writes A anew on the way. Where A is much
larger than G and the result, GᵀA is computed instead and turned around. XLA would put the turn back into the product,
so a barrier stands between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax import lax

from jaxinfer.analysis.structure import is_static, rebind
from jaxinfer.rewriting import Match, Rule, op, var

# A is so many times as large as all that is turned around: at 2 a whole program was slower, at 4 faster.
_LARGER = 3
# An element is turned around for this many multiplications or more; with 64 the turn was still the slower way.
_LEAST_REUSE = 128
# Over fewer rows a product is a few multiply-adds for each element of the result, which XLA writes out.
_LEAST_ROWS = 8


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


def _cases(s: Any) -> Iterator[Any]:
    s.only("float32", "float64")

    def product(axis: int) -> Any:
        return lambda a, b: lax.dot_general(a, b, (((0,), (axis,)), ((), ())))

    k, n = s.choice((260, 300)), s.choice((2, 3))
    yield product(0), (s.array(k, 270), s.array(k, n))
    yield product(1), (s.array(k, 270), s.array(n, k))
    several = (((0, 1), (0, 1)), ((), ()))
    yield lambda a, b: lax.dot_general(a, b, several), (s.array(2, k, 2, 135), s.array(2, k, n))


RULES: tuple[Rule, ...] = (
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
