"""Matrix products in a better order, taken apart or put together where that saves operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.chains import (
    Factor,
    best_order,
    flatten,
    is_matrix_product,
    is_turn,
    multiply,
    multiply_alike,
    product_flops,
    written_flops,
)
from jaxinfer.analysis.products import free_axes, same_product
from jaxinfer.analysis.structure import again, is_static, layout, rebind, size
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule

# An element read and written costs about as much as this many operations of a product.
_COPY_FLOPS = 16


def _once(graph: Graph, value: Value) -> bool:
    return len(graph.uses[value]) == 1


def _dot(node: Node) -> Callable[..., Any]:
    """The product of a node on other matrices: ``dot(a, b, i, j)`` contracts axis i of a with axis j of b."""
    return lambda a, b, i, j: rebind(node, a, b, dimension_numbers=(((i,), (j,)), ((), ())))


# -- chains -----------------------------------------------------------------------------------------------------------


def _find_chain(graph: Graph, node: Node) -> Match | None:
    if node in graph.known:
        return None
    chain = flatten(graph, node)
    if chain is None or best_order(graph, chain.factors)[0] >= written_flops(graph, chain):
        return None
    return Match(graph, (Value(node, 0),), {f"x{i}": f.value for i, f in enumerate(chain.factors)})


def _multiply_chain(m: Match, **arrays: Any) -> Any:
    node = m.roots[0].node
    chain = again(flatten(m.graph, node))
    _, order = best_order(m.graph, chain.factors)
    return multiply(order, chain.factors, list(arrays.values()), _dot(node))[0]


def _find_turned_product(graph: Graph, node: Node) -> Match | None:
    """The transpose of a product that swaps the axes of its operands."""
    product = node.inputs[0].node
    if product.op != "dot_general" or not _once(graph, node.inputs[0]) or node in graph.known:
        return None
    if product.params.get("out_sharding") is not None or product.params["dimension_numbers"][1][0]:
        return None
    split, rank = len(free_axes(product)[0]), len(product.aval.shape)
    if tuple(node.params["permutation"]) != (*range(split, rank), *range(split)):
        return None
    return Match(graph, (Value(node, 0),), dict(zip("ab", product.inputs)), {"product": product})


def _swap_operands(m: Match, a: Any, b: Any) -> Any:
    product = m.nodes["product"]
    (lhs, rhs), _ = product.params["dimension_numbers"]
    precision = product.params["precision"]
    if isinstance(precision, tuple):
        precision = precision[::-1]
    return rebind(product, b, a, dimension_numbers=((rhs, lhs), ((), ())), precision=precision)


# -- distributivity ---------------------------------------------------------------------------------------------------


def _shared_side(graph: Graph, node: Node) -> int | None:
    """Which operand two products that are added have in common."""
    a, b = (v.node for v in node.inputs)
    if a is b or a.op != "dot_general" or not same_product(a, b) or not is_static(*node.inputs, *a.inputs, *b.inputs):
        return None
    if not all(_once(graph, v) for v in node.inputs) or a.params.get("out_sharding") is not None:
        return None
    for side in (0, 1):
        x, y = a.inputs[1 - side], b.inputs[1 - side]
        if a.inputs[side] == b.inputs[side] and x.aval.shape == y.aval.shape and x.dtype == y.dtype == node.aval.dtype:
            saved = 2 * math.prod(node.aval.shape) * _contracted(a)
            if saved >= _COPY_FLOPS * size(x) or (graph.is_known(x) and graph.is_known(y)):
                return side
    return None


def _contracted(node: Node) -> int:
    return math.prod(node.inputs[0].shape[i] for i in node.params["dimension_numbers"][0][0])


def _find_common_operand(graph: Graph, node: Node) -> Match | None:
    side = _shared_side(graph, node)
    if side is None:
        return None
    a, b = (v.node.inputs for v in node.inputs)
    return Match(graph, (Value(node, 0),), {"shared": a[side], "a": a[1 - side], "b": b[1 - side]})


def _add_first(m: Match, shared: Any, a: Any, b: Any) -> Any:
    node = m.roots[0].node
    total = rebind(node, a, b)
    side = _shared_side(m.graph, node)
    return rebind(node.inputs[0].node, *((shared, total) if side == 0 else (total, shared)))


def _split_sum(graph: Graph, node: Node) -> tuple[int, int, tuple[Factor, ...]] | None:
    """For (M ± L R) · x: the position of the sum, that of L R in it, and the factors of L R · x."""
    if not is_matrix_product(node) or node in graph.known:
        return None
    for side in (0, 1):
        total = node.inputs[side].node
        if total.op not in ("add", "sub") or not _once(graph, node.inputs[side]):
            continue
        for i in (1, 0):
            found = _product_inside(graph, total.inputs[i])
            if found is None or total.inputs[1 - i].shape != total.aval.shape or not multiply_alike(found[0], node):
                continue
            factors, before = _distributed(node, side, found), product_flops(node)
            if found[0] in graph.known or len(factors) != 3:
                continue
            after = before + best_order(graph, factors)[0]
            if after < before + product_flops(found[0]) + size(total.inputs[i]):
                return side, i, factors
    return None


def _product_inside(graph: Graph, value: Value) -> tuple[Node, bool] | None:
    """A product of two matrices that is used once, and whether it is transposed."""
    turned = False
    while is_turn(value.node) and _once(graph, value):
        value, turned = value.node.inputs[0], not turned
    node = value.node
    if not is_matrix_product(node) or not _once(graph, value) or len(node.aval.shape) != 2:
        return None
    return (node, turned) if all(len(v.shape) == 2 for v in node.inputs) else None


def _distributed(node: Node, side: int, found: tuple[Node, bool]) -> tuple[Factor, ...]:
    product, turned = found
    (left,), (right,) = product.params["dimension_numbers"][0]
    pair = [Factor(product.inputs[0], (1 - left,), (left,)), Factor(product.inputs[1], (right,), (1 - right,))]
    if turned:
        pair = [f.transposed for f in reversed(pair)]
    axis = node.params["dimension_numbers"][0][side][0]
    free = tuple(free_axes(node)[1 - side])
    (other_axis,) = node.params["dimension_numbers"][0][1 - side]
    if axis != 1 - side:
        pair = [f.transposed for f in reversed(pair)]
    if side == 0:
        return (*pair, Factor(node.inputs[1], (other_axis,), free))
    return (Factor(node.inputs[0], free, (other_axis,)), *pair)


def _find_product_in_sum(graph: Graph, node: Node) -> Match | None:
    found = _split_sum(graph, node)
    if found is None:
        return None
    side, i, factors = found
    values = {"other": node.inputs[side].node.inputs[1 - i], "x": node.inputs[1 - side]}
    values.update({f"f{j}": f.value for j, f in enumerate(factors)})
    return Match(graph, (Value(node, 0),), values)


def _distribute(m: Match, other: Any, x: Any, **arrays: Any) -> Any:
    node = m.roots[0].node
    side, i, factors = again(_split_sum(m.graph, node))
    direct = rebind(node, *((other, x) if side == 0 else (x, other)))
    _, order = best_order(m.graph, factors)
    chained = multiply(order, factors, list(arrays.values()), _dot(node))[0]
    return rebind(node.inputs[side].node, *((direct, chained) if i == 1 else (chained, direct)))


# -- parts of products ------------------------------------------------------------------------------------------------


def _windows(node: Node) -> tuple[dict[int, int], dict[int, int]]:
    """For each operand of a product, its axes that reach the result, and where."""
    (_, (batch, rhs_batch)) = node.params["dimension_numbers"]
    lhs, rhs = free_axes(node)
    shared = len(batch)
    left = {a: i for i, a in enumerate((*batch, *lhs))}
    right = {a: i for i, a in enumerate(rhs_batch)}
    right.update({a: shared + len(lhs) + i for i, a in enumerate(rhs)})
    return left, right


def _find_part(graph: Graph, node: Node) -> Match | None:
    """A slice, or a dynamic one, of a product, where what is copied is less than what is saved."""
    value = node.inputs[0]
    product = value.node
    if product.op != "dot_general" or product.params.get("out_sharding") is not None or not _once(graph, value):
        return None
    if not is_static(value, *product.inputs) or 0 in value.shape:
        return None
    kept = [new / old for new, old in zip(node.aval.shape, value.shape)]
    copied = 0.0
    for operand, places in zip(product.inputs, _windows(product)):
        part = math.prod(kept[i] for i in places.values())
        copied += size(operand) * part if part < 1 and not graph.is_known(operand) else 0
    saved = 2 * (size(value) - math.prod(node.aval.shape)) * _contracted(product)
    if saved == 0 or (saved < _COPY_FLOPS * copied and 3 * math.prod(node.aval.shape) > size(value)):
        return None
    values = {"a": product.inputs[0], "b": product.inputs[1]}
    values.update({f"i{k}": v for k, v in enumerate(node.inputs[1:])})
    return Match(graph, (Value(node, 0),), values)


def _part_of_operands(m: Match, a: Any, b: Any, **starts: Any) -> Any:
    node = m.roots[0].node
    product = node.inputs[0].node
    at = list(starts.values())

    def part(x: Any, places: dict[int, int]) -> Any:
        if node.op == "dynamic_slice":
            zero = jnp.zeros((), at[0].dtype) if at else 0
            sizes = [node.aval.shape[places[i]] if i in places else d for i, d in enumerate(x.shape)]
            return lax.dynamic_slice(x, [at[places[i]] if i in places else zero for i in range(x.ndim)], sizes)
        begin, end = node.params["start_indices"], node.params["limit_indices"]
        strides = node.params["strides"] or (1,) * len(begin)
        return lax.slice(
            x,
            [begin[places[i]] if i in places else 0 for i in range(x.ndim)],
            [end[places[i]] if i in places else d for i, d in enumerate(x.shape)],
            [strides[places[i]] if i in places else 1 for i in range(x.ndim)],
        )

    left, right = _windows(product)
    return rebind(product, part(a, left), part(b, right))


def _find_summed(graph: Graph, node: Node) -> Match | None:
    """A sum over free axes of a product."""
    value = node.inputs[0]
    product = value.node
    if product.op != "dot_general" or product.params.get("out_sharding") is not None or not _once(graph, value):
        return None
    if not is_static(value, *product.inputs) or any(v.dtype != value.dtype for v in product.inputs):
        return None
    batches = len(product.params["dimension_numbers"][1][0])
    if not node.params["axes"] or any(i < batches for i in node.params["axes"]):
        return None
    return Match(graph, (Value(node, 0),), dict(zip("ab", product.inputs)))


def _sum_operands(m: Match, a: Any, b: Any) -> Any:
    node = m.roots[0].node
    product = node.inputs[0].node
    contract, batch = product.params["dimension_numbers"]
    operands, numbers = [], []
    for side, (x, places) in enumerate(zip((a, b), _windows(product))):
        gone = tuple(sorted(i for i, place in places.items() if place in node.params["axes"]))
        left = [i for i in range(x.ndim) if i not in gone]
        operands.append(lax.reduce_sum(x, gone) if gone else x)
        numbers.append(tuple(tuple(left.index(i) for i in axes[side]) for axes in (contract, batch)))
    (left_contract, left_batch), (right_contract, right_batch) = numbers
    return rebind(product, *operands, dimension_numbers=((left_contract, right_contract), (left_batch, right_batch)))


def _repeated_axes(value: Value, free: Sequence[int]) -> list[int]:
    """Free axes along which an operand repeats, if it repeats along no other."""
    found = layout(value)
    repeated = [i for i, d in enumerate(value.shape) if d != 1 and i not in found.varies]
    return repeated if all(i in free for i in repeated) else []


def _find_repeated(graph: Graph, node: Node) -> Match | None:
    """A product with an operand that repeats along free axes."""
    if not is_static(*node.inputs) or 0 in node.aval.shape or node.params.get("out_sharding") is not None:
        return None
    for side, free in enumerate(free_axes(node)):
        if _repeated_axes(node.inputs[side], free):
            source = layout(node.inputs[side]).source
            return Match(graph, (Value(node, 0),), {"x": source, "y": node.inputs[1 - side]}, {"repeated": source.node})
    return None


def _repeat_product(m: Match, x: Any, y: Any) -> Any:
    node = m.roots[0].node
    side = next(s for s, free in enumerate(free_axes(node)) if _repeated_axes(node.inputs[s], free))
    small = layout(node.inputs[side]).spread(x)
    result = rebind(node, *((small, y) if side == 0 else (y, small)))
    return lax.broadcast_in_dim(result, node.aval.shape, range(result.ndim))


# -- cases ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Any], *shapes: Sequence[int]) -> Callable[[Any], Iterator[Any]]:
    return lambda s: iter([(function, tuple(s.array(*shape) for shape in shapes))])


def _case_chain(s: Any) -> Iterator[Any]:
    inner, outer = s.integers(2, 4), s.integers(5, 8)
    yield lambda a, b, x: a @ b @ x, (s.array(outer, outer), s.array(outer, outer), s.array(outer))
    yield lambda a, x, y: a.T @ x @ y.T @ a, (s.array(inner, outer), s.array(inner, 1), s.array(inner, 1))
    yield lambda a, b: b.T @ a @ a.T @ b, (s.array(outer, outer), s.array(outer, outer))


def _case_vmapped_part(s: Any) -> Iterator[Any]:
    rows, inner, columns = s.integers(3, 6), s.dim(), s.integers(3, 6)
    i = jnp.asarray(s.integers(0, 3), "int32")
    yield lambda a, b: (a @ b)[1:2, 0], (s.array(rows, inner), s.array(inner, columns))
    yield lambda a, b, i: lax.dynamic_slice(a @ b, (i, i), (1, 2)), (s.array(rows, inner), s.array(inner, columns), i)
    yield lambda a, b: jnp.matmul(a, b)[1:, :1], (s.array(3, rows, inner), s.array(3, inner, columns))


RULES: tuple[Rule, ...] = (
    Rule(
        "matrix-chain",
        "A B C → the order with the fewest operations",
        Find(("dot_general",), _find_chain),
        _multiply_chain,
        "reassociate",
        finite=True,
        cases=_case_chain,
    ),
    Rule(
        "transpose-of-product",
        "(A B)ᵀ → Bᵀ Aᵀ",
        Find(("transpose",), _find_turned_product),
        _swap_operands,
        "reassociate",
        cases=_case(lambda a, b: (a @ b).T, (2, 3), (3, 4)),
    ),
    Rule(
        "common-operand",
        "A B + A C → A (B + C), and so -, and on the other side",
        Find(("add", "sub"), _find_common_operand),
        _add_first,
        "reassociate",
        finite=True,
        cases=_case(lambda a, x, y: a @ x - a @ y, (9, 9), (9, 2), (9, 2)),
    ),
    Rule(
        "product-in-sum",
        "(A ± B C) x → A x ± B (C x) where that takes fewer operations",
        Find(("dot_general",), _find_product_in_sum),
        _distribute,
        "reassociate",
        finite=True,
        cases=_case(lambda a, h, x: (a - h.T @ h) @ x, (5, 5), (4, 5), (5,)),
    ),
    Rule(
        "part-of-product",
        "(A B)[i:j, k:l] → A[i:j] B[:, k:l]",
        Find(("slice", "dynamic_slice"), _find_part),
        _part_of_operands,
        "reassociate",
        cases=_case_vmapped_part,
    ),
    Rule(
        "sum-of-product",
        "Σ (A B) over rows → (Σ A) B, and so over columns",
        Find(("reduce_sum",), _find_summed),
        _sum_operands,
        "reassociate",
        finite=True,
        cases=_case(lambda a, b: lax.reduce_sum(a @ b, (0, 1)), (4, 3), (3, 5)),
    ),
    Rule(
        "product-of-repeated",
        "broadcast(A) B → broadcast(A B), repeated along a free axis",
        Find(("dot_general",), _find_repeated),
        _repeat_product,
        "reassociate",
        cases=_case(lambda a, b: jnp.broadcast_to(a, (4, 3)) @ b, (3,), (3, 5)),
    ),
)
