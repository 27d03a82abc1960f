"""Products that sum over the rows of their first matrix, written so that XLA's CPU backend takes its fast path.

That path wants the first operand's summed axis last. What a product sums over first, as the gradient of a weight does
(AᵀG), goes to a slower routine; turning the smaller side around first costs less than it saves where there is enough
to multiply. XLA would put the turn back into the product, so a barrier stands between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax import lax

from jaxinfer.analysis.structure import is_static, rebind
from jaxinfer.rewriting import Match, Rule, op, var

# An element is turned around for this many multiplications or more; with 64 the turn was still the slower way.
_LEAST_REUSE = 128


def _sizes(m: Match) -> tuple[int, int, int, int] | None:
    """(summed, rows, columns, axis of the second operand that is summed) of a product A[k, m] ᵀ B, or None."""
    a, b, params = m["a"], m["b"], m.params("dot")
    (sums, batch) = params["dimension_numbers"]
    if len(a.shape) != 2 or len(b.shape) != 2 or batch != ((), ()) or len(sums[0]) != 1 or sums[0][0] != 0:
        return None
    (axis,) = sums[1]
    return a.shape[0], a.shape[1], b.shape[1 - axis], axis


def _reuse(m: Match) -> tuple[float, float]:
    """Multiplications for each element turned around: if A is, and if B and the result are."""
    summed, rows, columns, axis = _sizes(m)  # type: ignore[misc]
    work = summed * rows * columns
    turned = rows * columns + (summed * columns if axis == 0 else 0)
    return work / (summed * rows), work / turned


def _when(m: Match) -> bool:
    if not is_static(m["a"], m["b"]) or m.params("dot").get("out_sharding") is not None:
        return False
    if m.graph.is_known(m["a"]) or m.graph.is_known(m["b"]) or _sizes(m) is None or 0 in (*m["a"].shape, *m["b"].shape):
        return False
    types = {str(v.aval.dtype) for v in (m["a"], m["b"], m.roots[0])}
    return len(types) == 1 and types <= {"float32", "float64"} and max(_reuse(m)) >= _LEAST_REUSE


def _turned(m: Match, a: Any, b: Any) -> Any:
    node = m.roots[0].node
    *_, axis = _sizes(m)  # type: ignore[misc]
    first, second = _reuse(m)
    if first >= second:
        left = lax.optimization_barrier(lax.transpose(a, (1, 0)))
        return rebind(node, left, b, dimension_numbers=(((1,), (axis,)), ((), ())))
    left = b if axis else lax.optimization_barrier(lax.transpose(b, (1, 0)))
    precision = node.params["precision"]
    if isinstance(precision, tuple):
        precision = precision[::-1]
    numbers = (((1,), (0,)), ((), ()))
    return lax.transpose(
        lax.optimization_barrier(rebind(node, left, a, dimension_numbers=numbers, precision=precision)), (1, 0)
    )


def _cases(s: Any) -> Iterator[Any]:
    s.only("float32", "float64")

    def product(axis: int) -> Any:
        return lambda a, b: lax.dot_general(a, b, (((0,), (axis,)), ((), ())))

    k, n = s.choice((3, 5)), s.choice((128, 150))
    yield product(0), (s.array(k, 4), s.array(k, n))
    yield product(1), (s.array(k, 4), s.array(n, k))
    yield product(0), (s.array(260, 270), s.array(260, 2))
    yield product(1), (s.array(260, 270), s.array(2, 260))


RULES: tuple[Rule, ...] = (
    Rule(
        "turn-first",
        "AᵀB → Aᵀ written out, then the product; or (BᵀA)ᵀ with Bᵀ and the result written out",
        op("dot_general", var("a"), var("b"), name="dot"),
        _turned,
        "reassociate",
        when=_when,
        cases=_cases,
        platforms=frozenset({"cpu"}),
    ),
)
