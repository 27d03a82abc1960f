"""Products with identities and diagonal matrices, traces of products, and known detours beside a known product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.chains import Chain, Factor, best_order, flatten, is_matrix_product, multiply, written_flops
from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import Layout, again, is_static, layout, rebind
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule


def _once(graph: Graph, value: Value) -> bool:
    return len(graph.uses[value]) == 1


# -- diagonals --------------------------------------------------------------------------------------------------------


def _is_diagonal_mask(value: Value) -> bool:
    """Whether a square boolean matrix is true on its diagonal alone: equal row and column numbers."""
    node = value.node
    if node.op != "eq" or len(value.shape) != 2 or value.shape[0] != value.shape[1] or not is_static(value):
        return False
    found = [layout(v) for v in node.inputs]
    if any(f.source.node.op != "iota" for f in found):
        return False
    return sorted(_counting(f) for f in found) == [0, 1]


def _counting(found: Layout) -> int:
    """The axis of a matrix along which numbers count up, or -1."""
    dimension = found.source.node.params["dimension"]
    return found.axes.index(dimension) if len(found.axes) == 2 and dimension in found.axes else -1


def _is_zero(value: Value) -> bool:
    source = layout(value).source.node
    return source.is_const and source.aval.shape == () and source.value == 0


def _diagonal(value: Value) -> Value | None:
    """What stands on the diagonal of a matrix that is zero elsewhere: a matrix with the right values there."""
    node = value.node
    if (
        node.op == "select_n"
        and len(node.inputs) == 3
        and _is_diagonal_mask(node.inputs[0])
        and _is_zero(node.inputs[1])
    ):
        return node.inputs[2]
    return None


def _is_identity(value: Value) -> bool:
    node = value.node
    return node.op == "convert_element_type" and node.inputs[0].dtype == bool and _is_diagonal_mask(node.inputs[0])


def _diagonal_side(graph: Graph, node: Node, accepts: Callable[[Value], bool]) -> int | None:
    """Which operand of a product is a diagonal matrix."""
    if not is_matrix_product(node):
        return None
    return next((side for side, v in enumerate(node.inputs) if len(v.shape) == 2 and accepts(v)), None)


def _has_diagonal(value: Value) -> bool:
    """Whether a value is a diagonal matrix whose diagonal repeats along an axis (and so is a vector)."""
    inside = _diagonal(value)
    return inside is not None and is_static(inside) and len(inside.shape) == 2 and len(layout(inside).varies) <= 1


def _find_identity(graph: Graph, node: Node) -> Match | None:
    side = _diagonal_side(graph, node, _is_identity)
    return None if side is None else Match(graph, (Value(node, 0),), {"x": node.inputs[1 - side]})


def _reorder(node: Node, x: Any, side: int) -> Any:
    """The other operand of a product, with its contracted axis where the diagonal matrix's free axis was."""
    contracted = node.params["dimension_numbers"][0][1 - side][0]
    free = free_axes(node)[1 - side]
    return lax.transpose(x, (contracted, *free) if side == 0 else (*free, contracted))


def _without_identity(m: Match, x: Any) -> Any:
    node = m.roots[0].node
    return _reorder(node, x, _diagonal_side(m.graph, node, _is_identity) or 0)


def _find_diagonal(graph: Graph, node: Node) -> Match | None:
    side = _diagonal_side(graph, node, _has_diagonal)
    if side is None:
        return None
    source = layout(again(_diagonal(node.inputs[side]))).source
    return Match(graph, (Value(node, 0),), {"d": source, "x": node.inputs[1 - side]})


def _scale_rows(m: Match, d: Any, x: Any) -> Any:
    node = m.roots[0].node
    side = _diagonal_side(m.graph, node, _has_diagonal) or 0
    found = layout(again(_diagonal(node.inputs[side])))
    moved = _reorder(node, x, side)
    axis = 0 if side == 0 else moved.ndim - 1
    return lax.mul(moved, found.spread(d, (axis, axis), moved.ndim))


def _find_trace(graph: Graph, node: Node) -> Match | None:
    """The sum of the diagonal of a product of two matrices."""
    inside = _diagonal(node.inputs[0])
    if inside is None or node.params["axes"] != (0, 1) or not _once(graph, node.inputs[0]):
        return None
    product = inside.node
    if not _once(graph, inside) or not is_matrix_product(product) or any(len(v.shape) != 2 for v in product.inputs):
        return None
    return Match(graph, (Value(node, 0),), dict(zip("ab", product.inputs)), {"product": product})


def _trace(m: Match, a: Any, b: Any) -> Any:
    product = m.nodes["product"]
    contract = product.params["dimension_numbers"][0]
    free = tuple(map(tuple, free_axes(product)))
    both = tuple((*c, *f) for c, f in zip(contract, free))
    return rebind(product, a, b, dimension_numbers=(both, ((), ())))


# -- detours ----------------------------------------------------------------------------------------------------------


def _ends(graph: Graph, node: Node) -> tuple[int, list[Chain]] | None:
    """For x K ± x L M, or K x ± L M x, with all but x known: where x stands in the chains (0 or -1), and the chains."""
    chains = [c for v in node.inputs if _once(graph, v) and (c := flatten(graph, v.node, 2)) is not None]
    if len(chains) != 2 or node in graph.known or max(len(c.factors) for c in chains) < 3:
        return None
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        ends = [c.factors[end] for c in chains]
        if ends[0] != ends[1] or graph.is_known(ends[0].value):
            continue
        if all(graph.is_known(f.value) for c in chains for f in c.factors[rest]):
            met = math.prod(ends[0].value.shape[i] for i in _met(ends[0], end))
            flops = 2 * math.prod(node.aval.shape) * met
            if flops < sum(written_flops(graph, c) for c in chains):
                return end, chains
    return None


def _met(x: Factor, end: int) -> tuple[int, ...]:
    return x.columns if end == 0 else x.rows


def _find_detour(graph: Graph, node: Node) -> Match | None:
    if any(v.node.op != "dot_general" or v.shape != node.aval.shape for v in node.inputs):
        return None
    found = _ends(graph, node)
    if found is None:
        return None
    values = [f.value for c in found[1] for f in c.factors]
    return Match(graph, (Value(node, 0),), {f"f{i}": v for i, v in enumerate(values)})


def _merge_detour(m: Match, **arrays: Any) -> Any:
    node = m.roots[0].node
    end, chains = again(_ends(m.graph, node))
    product = node.inputs[0].node

    def dot(a: Any, b: Any, i: int, j: int) -> Any:
        return rebind(product, a, b, dimension_numbers=(((i,), (j,)), ((), ())))

    values, terms = list(arrays.values()), []
    x = values[0] if end == 0 else values[len(chains[0].factors) - 1]
    for chain in chains:
        own, values = values[: len(chain.factors)], values[len(chain.factors) :]
        factors, own = (chain.factors[1:], own[1:]) if end == 0 else (chain.factors[:-1], own[:-1])
        array, rows, columns = multiply(best_order(m.graph, factors)[1], factors, own, dot)
        terms.append(lax.transpose(array, (*rows, *columns)))
    known = rebind(node, *terms)
    (axis,) = _met(chains[0].factors[end], end)
    return dot(x, known, axis, 0) if end == 0 else dot(known, x, known.ndim - 1, axis)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Any], *shapes: Sequence[int]) -> Callable[[Any], Iterator[Any]]:
    return lambda s: iter([(function, tuple(s.array(*shape) for shape in shapes))])


def _eye(n: int, dtype: Any) -> Any:
    return lax.convert_element_type(_mask(n), dtype)


def _mask(n: int) -> Any:
    return lax.eq(lax.broadcasted_iota("int32", (n, n), 0), lax.broadcasted_iota("int32", (n, n), 1))


def _diagonal_matrix(d: Any) -> Any:
    n = d.shape[0]
    return lax.select_n(_mask(n), jnp.zeros((n, n), d.dtype), jnp.broadcast_to(d[:, None], (n, n)))


def _case_detour(s: Any) -> Iterator[Any]:
    inner, columns = s.integers(3, 7), s.integers(3, 7)
    x, w, a, b = s.array(4, inner), s.frozen(inner, columns), s.frozen(inner, 2), s.frozen(2, columns)
    yield lambda x, w, a, b: x @ w + (x @ a) @ b, (x, w, a, b)
    yield lambda x, w, a, b: b.T @ (a.T @ x.T) - w.T @ x.T, (x, w, a, b)


def _find_scalar(graph: Graph, node: Node) -> Match | None:
    """A product with a number: nothing is contracted, nothing summed."""
    a, b = node.inputs
    if () not in (a.shape, b.shape) or a.dtype != b.dtype or node.aval.dtype != a.dtype or not is_static(a, b):
        return None
    return Match(graph, (Value(node, 0),), {"a": a, "b": b})


def _case_scalar(s: Any) -> Iterator[Any]:
    numbers = (((), ()), ((), ()))
    yield lambda a, b: lax.dot_general(a, b, numbers), (s.array(), s.array(s.dim(), s.dim()))
    yield lambda a, b: lax.dot_general(b, a, numbers), (s.array(), s.array(s.dim()))


RULES: tuple[Rule, ...] = (
    Rule(
        "product-with-number",
        "a B as a matrix product, a a number → a · B",
        Find(("dot_general",), _find_scalar),
        lambda m, a, b: jnp.multiply(a, b),
        "reassociate",
        cases=_case_scalar,
    ),
    Rule(
        "product-with-identity",
        "I A → A",
        Find(("dot_general",), _find_identity),
        _without_identity,
        "reassociate",
        finite=True,
        cases=_case(lambda x: _eye(3, x.dtype) @ x, (3, 4)),
    ),
    Rule(
        "product-with-diagonal",
        "diag(d) A → d · A, row by row",
        Find(("dot_general",), _find_diagonal),
        _scale_rows,
        "reassociate",
        finite=True,
        cases=_case(lambda x, d: x @ _diagonal_matrix(d), (4, 3), (3,)),
    ),
    Rule(
        "trace-of-product",
        "tr(A B) → Σ A · Bᵀ",
        Find(("reduce_sum",), _find_trace),
        _trace,
        "reassociate",
        finite=True,
        cases=_case(
            lambda a, b: lax.reduce_sum(lax.select_n(_mask(4), jnp.zeros((4, 4), a.dtype), a @ b), (0, 1)),
            (4, 3),
            (3, 4),
        ),
    ),
    Rule(
        "known-detour",
        "x W + (x A) B → x (W + A B), and so -, all but x known",
        Find(("add", "sub"), _find_detour),
        _merge_detour,
        "reassociate",
        finite=True,
        cases=_case_detour,
    ),
)
