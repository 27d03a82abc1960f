"""Products of several matrices: flattened, and put in the order that takes the fewest operations.

A chain is the list of factors that nested matrix products multiply, with transposes pushed down to the factors. Its
best order is found by dynamic programming over its segments, where a segment that equals another one, or its transpose,
costs nothing the second time, and products of known factors cost nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value

# Longer chains are left alone: the search over shared segments grows quickly with the length.
_LONGEST = 12


@dataclass(frozen=True)
class Factor:
    """A matrix of a chain: a value with the axes that are its rows and those that are its columns."""

    value: Value
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def transposed(self) -> Factor:
        """The same value the other way round."""
        return Factor(self.value, self.columns, self.rows)


@dataclass(frozen=True)
class Chain:
    """A product of factors.

    Attributes:
        factors: the matrices, from left to right.
        products: the product nodes it stands for.
    """

    factors: tuple[Factor, ...]
    products: tuple[Node, ...]


# -- flattening -------------------------------------------------------------------------------------------------------


def is_matrix_product(node: Node) -> bool:
    """Whether a node contracts one axis of each operand, in one dtype and without batch axes."""
    if node.op != "dot_general" or not is_static(*node.inputs, Value(node, 0)) or 0 in node.aval.shape:
        return False
    (lhs, rhs), (batch, _) = node.params["dimension_numbers"]
    plain = node.params.get("out_sharding") is None and all(v.dtype == node.aval.dtype for v in node.inputs)
    return plain and len(lhs) == len(rhs) == 1 and not batch


def is_turn(node: Node) -> bool:
    """Whether a node transposes a matrix."""
    return node.op == "transpose" and tuple(node.params["permutation"]) == (1, 0)


def flatten(graph: Graph, root: Node, shortest: int = 3) -> Chain | None:
    """The longest chain that ends in a product; None if it has fewer than ``shortest`` factors.

    A product inside is taken apart if nothing outside the chain uses it.
    """
    if not is_matrix_product(root):
        return None
    kept: set[Node] = set()
    while True:
        products: dict[Node, None] = {}
        factors = tuple(_factors(root, root, kept, products))
        needed = {n for n in products if n is not root and not _users(graph, n) <= products.keys()}
        if not needed:
            break
        kept |= needed
    return Chain(factors, tuple(products)) if shortest <= len(factors) <= _LONGEST else None


def _users(graph: Graph, node: Node) -> set[Node | None]:
    """Who needs a product, as it is or transposed."""
    found: set[Node | None] = set()
    for user, _ in graph.uses.get(Value(node, 0), ()):
        found |= _users(graph, user) if user is not None and is_turn(user) else {user}
    return found


def _factors(node: Node, root: Node, kept: set[Node], products: dict[Node, None]) -> Iterator[Factor]:
    """Factors of a product, whose result's axes are the rows of the left operand and the columns of the right."""
    products[node] = None
    (left,), (right,) = node.params["dimension_numbers"][0]
    rows, columns = free_axes(node)
    yield from _expanded(Factor(node.inputs[0], tuple(rows), (left,)), root, kept, products)
    yield from _expanded(Factor(node.inputs[1], (right,), tuple(columns)), root, kept, products)


def _expanded(factor: Factor, root: Node, kept: set[Node], products: dict[Node, None]) -> list[Factor]:
    node = factor.value.node
    if is_turn(node):
        rows, columns = (tuple(1 - i for i in axes) for axes in (factor.rows, factor.columns))
        return _expanded(Factor(node.inputs[0], rows, columns), root, kept, products)
    if node in kept or not is_matrix_product(node) or not multiply_alike(root, node):
        return [factor]
    split, rank = len(free_axes(node)[0]), len(node.aval.shape)
    rows, columns = tuple(range(split)), tuple(range(split, rank))
    if (factor.rows, factor.columns) == (rows, columns):
        return list(_factors(node, root, kept, products))
    if (factor.rows, factor.columns) == (columns, rows):
        return [f.transposed for f in reversed(list(_factors(node, root, kept, products)))]
    return [factor]


def multiply_alike(a: Node, b: Node) -> bool:
    """Whether two products have the same precision and types."""
    return a.aval.dtype == b.aval.dtype and all(
        a.params.get(k) == b.params.get(k) for k in ("precision", "preferred_element_type", "out_sharding")
    )


# -- the best order ---------------------------------------------------------------------------------------------------

# How to compute a segment: the number of a factor, a pair of orders, or a shared one.
Order = Any


@dataclass(frozen=True)
class Shared:
    """The order of a segment that stands in a chain more than once.

    Attributes:
        order: how it is computed.
        turned: whether its transpose is meant.
    """

    order: Order
    turned: bool


@dataclass(frozen=True)
class _Item:
    """A factor, or a shared segment in the place of one."""

    name: Any
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    height: int
    width: int
    known: bool
    order: Order

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, self.rows, self.columns)

    @property
    def turned_key(self) -> tuple[Any, ...]:
        return (self.name, self.columns, self.rows)


_Items = tuple[_Item, ...]


def product_flops(node: Node) -> int:
    """Operations of a matrix product; a multiply-add counts as two."""
    ((left,), _), _ = node.params["dimension_numbers"]
    return 2 * math.prod(node.aval.shape) * node.inputs[0].shape[left]


def written_flops(graph: Graph, chain: Chain) -> int:
    """Operations of a chain as the program has it."""
    return sum(product_flops(n) for n in chain.products if n not in graph.known)


def best_order(graph: Graph, factors: tuple[Factor, ...]) -> tuple[int, Order]:
    """The cheapest order of a chain.

    Returns:
        Operations, and the order, for :func:`multiply`.
    """

    def size(factor: Factor, axes: tuple[int, ...]) -> int:
        return math.prod(factor.value.shape[i] for i in axes)

    return _search(
        tuple(
            _Item(f.value, f.rows, f.columns, size(f, f.rows), size(f, f.columns), graph.is_known(f.value), i)
            for i, f in enumerate(factors)
        )
    )


def _search(items: _Items) -> tuple[int, Order]:
    """The best order without sharing, or with a segment that occurs again computed first."""
    best = _parenthesise(items)
    for start, stop in _repeated(items):
        part = items[start:stop]
        cost, order = _parenthesise(part)
        total, whole = _search(_substitute(items, part, order))
        if cost + total < best[0]:
            best = (cost + total, whole)
    return best


def _parenthesise(items: _Items) -> tuple[int, Order]:
    """Dynamic programming over where a segment is split last."""
    count = len(items)
    table: dict[tuple[int, int], tuple[int, Order]] = {(i, i + 1): (0, items[i].order) for i in range(count)}
    for length in range(2, count + 1):
        for i in range(count - length + 1):
            j = i + length
            known = all(item.known for item in items[i:j])
            best: tuple[int, Order] | None = None
            for k in range(i + 1, j):
                flops = 0 if known else 2 * items[i].height * items[k].height * items[j - 1].width
                cost = table[i, k][0] + table[k, j][0] + flops
                if best is None or cost < best[0]:
                    best = (cost, (table[i, k][1], table[k, j][1]))
            assert best is not None
            table[i, j] = best
    return table[0, count]


def _key(items: _Items) -> tuple[Any, ...]:
    return tuple(item.key for item in items)


def _turned_key(items: _Items) -> tuple[Any, ...]:
    return tuple(item.turned_key for item in reversed(items))


def _repeated(items: _Items) -> Iterator[tuple[int, int]]:
    """Segments that occur again, as they are or transposed, without overlap."""
    for length in range(2, len(items) // 2 + 1):
        for i in range(len(items) - 2 * length + 1):
            part = items[i : i + length]
            keys = (_key(part), _turned_key(part))
            if any(_key(items[j : j + length]) in keys for j in range(i + length, len(items) - length + 1)):
                yield i, i + length


def _substitute(items: _Items, part: _Items, order: Order) -> _Items:
    """Every occurrence of a segment, as it is or transposed, as one item."""
    height, width, known = part[0].height, part[-1].width, all(item.known for item in part)
    name, length, i = ("segment", _key(part)), len(part), 0
    found: list[_Item] = []
    while i < len(items):
        key = _key(items[i : i + length])
        if key == _key(part):
            found.append(_Item(name, (0,), (1,), height, width, known, Shared(order, False)))
        elif key == _turned_key(part):
            found.append(_Item(name, (1,), (0,), width, height, known, Shared(order, True)))
        else:
            found.append(items[i])
        i += length if found[-1].name == name else 1
    return tuple(found)


# -- computing --------------------------------------------------------------------------------------------------------

# An array with the axes that are its rows and its columns.
Matrix = tuple[Any, tuple[int, ...], tuple[int, ...]]


def multiply(order: Order, factors: tuple[Factor, ...], arrays: list[Any], dot: Callable[..., Any]) -> Matrix:
    """Computes a chain.

    Args:
        order: what :func:`best_order` gave.
        factors: the factors.
        arrays: their arrays.
        dot: ``dot(a, b, i, j)`` contracts axis ``i`` of ``a`` with axis ``j`` of ``b``.
    """
    if isinstance(order, int):
        return arrays[order], factors[order].rows, factors[order].columns
    if isinstance(order, Shared):
        array, rows, columns = multiply(order.order, factors, arrays, dot)
        return (array, columns, rows) if order.turned else (array, rows, columns)
    (a, rows, (i,)), (b, (j,), columns) = (multiply(part, factors, arrays, dot) for part in order)
    count = len(rows)
    return dot(a, b, i, j), tuple(range(count)), tuple(range(count, count + len(columns)))
