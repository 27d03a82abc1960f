"""Products with known weights that share an input, done as one; and tables that products look up in.

Query, key and value projections, the gates of a recurrent cell and the branches of an inception block multiply the same
input by several known matrices. One product with the matrices side by side reads the input once and fills the machine
better. Whether it pays depends on the sizes, so these are offers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax import lax

from jaxinfer.analysis.products import free_axes, same_product
from jaxinfer.analysis.structure import again, is_static, rebind, size
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule, is_float

# A product with a table becomes a table where that takes no more memory than both; it is offered up to this many times.
_TABLE_GROWTH = 8


def _siblings(graph: Graph, node: Node, side: int, joins: Callable[[Graph, Node, int], bool]) -> list[Node]:
    """Products alike that share an operand with a node and have known operands on ``side``; none if it is not the first
    of them."""
    if not joins(graph, node, side):
        return []
    users = dict.fromkeys(user for user, position in graph.uses[node.inputs[1 - side]] if position == 1 - side)
    found = [
        user
        for user in users
        if user is not None
        and user.op == node.op
        and user.inputs[1 - side] == node.inputs[1 - side]
        and same_product(node, user)
        and joins(graph, user, side)
        and user.inputs[side].dtype == node.inputs[side].dtype
        and _window(user) == _window(node)
    ]
    return found if len(found) > 1 and found[0] is node else []


def _window(node: Node) -> tuple[int, ...]:
    """The shape of a convolution's kernel without its output axis, which is the one that is joined."""
    if node.op != "conv_general_dilated":
        return ()
    axis = node.params["dimension_numbers"].rhs_spec[0]
    return tuple(d for i, d in enumerate(node.inputs[1].shape) if i != axis)


def _match(graph: Graph, nodes: Sequence[Node], side: int) -> Match:
    values = {"x": nodes[0].inputs[1 - side]}
    values.update({f"w{i}": n.inputs[side] for i, n in enumerate(nodes)})
    return Match(graph, tuple(Value(n, 0) for n in nodes), values)


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


# -- matrix products --------------------------------------------------------------------------------------------------


def _joins_dot(graph: Graph, node: Node, side: int) -> bool:
    return (
        node.op == "dot_general"
        and is_static(Value(node, 0), *node.inputs)
        and not node.params["dimension_numbers"][1][0]
        and node.params.get("out_sharding") is None
        and graph.is_known(node.inputs[side])
        and not graph.is_known(node.inputs[1 - side])
        and 0 not in node.aval.shape
        and bool(free_axes(node)[side])
    )


def _find_dots(side: int) -> Callable[[Graph, Node], Match | None]:
    def find(graph: Graph, node: Node) -> Match | None:
        found = _siblings(graph, node, side, _joins_dot)
        return _match(graph, found, side) if found else None

    return find


def one_dot(nodes: Sequence[Node], side: int, x: Any, weights: Sequence[Any]) -> list[Any]:
    """Products as one: the weights' free axes are made one axis, joined, and taken apart again in the result.

    Args:
        nodes: products alike of one operand.
        side: which operand the weights are.
        x: the operand that they share.
        weights: the other operand of each.
    """
    flat, widths = [], []
    for node, w in zip(nodes, weights):
        contract, free = node.params["dimension_numbers"][0][side], free_axes(node)[side]
        width = math.prod(w.shape[i] for i in free)
        inner = [w.shape[i] for i in contract]
        order = (*contract, *free) if side else (*free, *contract)
        flat.append(lax.reshape(lax.transpose(w, order), (*inner, width) if side else (width, *inner)))
        widths.append(width)
    first = nodes[0]
    joined = lax.concatenate(flat, flat[0].ndim - 1 if side else 0)
    contract = first.params["dimension_numbers"][0]
    meets = tuple(range(len(contract[side]))) if side else tuple(range(1, joined.ndim))
    if side:
        whole = rebind(first, x, joined, dimension_numbers=((contract[0], meets), ((), ())))
    else:
        whole = rebind(first, joined, x, dimension_numbers=((meets, contract[1]), ((), ())))
    axis = whole.ndim - 1 if side else 0
    return [
        lax.reshape(lax.slice_in_dim(whole, start, stop, axis=axis), node.aval.shape)
        for node, (start, stop) in zip(nodes, itertools.pairwise(_offsets(widths)))
    ]


def _join_dots(side: int) -> Callable[..., Any]:
    def after(m: Match, x: Any, **weights: Any) -> list[Any]:
        return one_dot([root.node for root in m.roots], side, x, list(weights.values()))

    return after


# -- convolutions -----------------------------------------------------------------------------------------------------


def _joins_convolution(graph: Graph, node: Node, side: int) -> bool:
    return (
        side == 1
        and node.op == "conv_general_dilated"
        and is_static(Value(node, 0), *node.inputs)
        and node.params["feature_group_count"] == node.params["batch_group_count"] == 1
        and node.params.get("out_sharding") is None
        and graph.is_known(node.inputs[1])
        and not graph.is_known(node.inputs[0])
        and 0 not in node.aval.shape
    )


def _find_convolutions(graph: Graph, node: Node) -> Match | None:
    found = _siblings(graph, node, 1, _joins_convolution)
    return _match(graph, found, 1) if found else None


def _one_convolution(m: Match, x: Any, **weights: Any) -> list[Any]:
    nodes = [root.node for root in m.roots]
    numbers = nodes[0].params["dimension_numbers"]
    into, out = numbers.rhs_spec[0], numbers.out_spec[1]
    whole = rebind(nodes[0], x, lax.concatenate(list(weights.values()), into))
    offsets = _offsets([w.shape[into] for w in weights.values()])
    return [lax.slice_in_dim(whole, start, stop, axis=out) for start, stop in itertools.pairwise(offsets)]


# -- tables -----------------------------------------------------------------------------------------------------------


def _lookup_side(graph: Graph, node: Node) -> int | None:
    """Which operand of a product is rows of a known table, looked up at unknown places."""
    (contract, batch) = node.params["dimension_numbers"]
    if batch[0] or not is_static(Value(node, 0), *node.inputs) or not is_float(Value(node, 0)):
        return None
    if any(v.dtype != node.aval.dtype for v in node.inputs) or node.params.get("out_sharding") is not None:
        return None
    for side in (0, 1):
        lookup, weights = node.inputs[side].node, node.inputs[1 - side]
        if lookup.op != "gather" or not graph.is_known(weights) or not graph.is_known(lookup.inputs[0]):
            continue
        if graph.is_known(lookup.inputs[1]) or len(lookup.inputs[0].shape) != 2:
            continue
        numbers, table = lookup.params["dimension_numbers"], lookup.inputs[0]
        rows = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
        fills = lookup.params["fill_value"]
        if not rows or lookup.params["slice_sizes"] != (1, table.shape[1]) or (fills is not None and fills == fills):
            continue
        if contract[side] != numbers.offset_dims:
            continue
        return side
    return None


def _find_lookup(above: float, limit: float) -> Callable[[Graph, Node], Match | None]:
    """Finds products of lookups whose table grows by more than ``above`` and at most ``limit``."""

    def find(graph: Graph, node: Node) -> Match | None:
        side = _lookup_side(graph, node)
        if side is None:
            return None
        table, places = node.inputs[side].node.inputs
        weights = node.inputs[1 - side]
        growth = table.shape[0] * size(weights) / max(table.shape[1] * (size(table) + size(weights)), 1)
        if not above < growth <= limit:
            return None
        return Match(graph, (Value(node, 0),), {"table": table, "places": places, "w": weights})

    return find


def _multiply_table(m: Match, table: Any, places: Any, w: Any) -> Any:
    node = m.roots[0].node
    side = again(_lookup_side(m.graph, node))
    lookup = node.inputs[side].node
    (other,) = (node.params["dimension_numbers"][0][1 - side],)
    dims = ((1,), other) if side == 0 else (other, (1,))
    product = rebind(node, *((table, w) if side == 0 else (w, table)), dimension_numbers=(dims, ((), ())))
    count = product.ndim - 1
    if side == 1:
        product = lax.transpose(product, (count, *range(count)))
    indices = len(node.aval.shape) - count
    offsets = tuple(range(indices, indices + count)) if side == 0 else tuple(range(count))
    numbers = lax.GatherDimensionNumbers(offset_dims=offsets, collapsed_slice_dims=(0,), start_index_map=(0,))
    return rebind(lookup, product, places, dimension_numbers=numbers, slice_sizes=(1, *product.shape[1:]))


def _find_lookups(graph: Graph, node: Node) -> Match | None:
    """Lookups in several known tables at the same places; nothing else uses the tables."""

    def joins(user: Node | None) -> bool:
        if user is None or user.op != "gather" or user.inputs[1] != places or not is_static(*user.inputs):
            return False
        numbers, table = user.params["dimension_numbers"], user.inputs[0]
        alike = all(user.params[k] == node.params[k] for k in node.params if k not in ("slice_sizes", "fill_value"))
        # No fill value and NaN are the same, and NaN differs from itself.
        alike = alike and str(user.params["fill_value"]) == str(node.params["fill_value"])
        whole = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
        return (
            alike
            and whole
            and graph.is_known(table)
            and not graph.is_known(places)
            and len(table.shape) == 2
            and user.params["slice_sizes"] == (1, table.shape[1])
            and (table.shape[0], table.dtype) == (node.inputs[0].shape[0], node.inputs[0].dtype)
            and len(graph.uses[table]) == 1
        )

    places = node.inputs[1]
    if not joins(node):
        return None
    found = [u for u in dict.fromkeys(u for u, position in graph.uses[places] if position == 1) if u and joins(u)]
    if len(found) < 2 or found[0] is not node:
        return None
    tables = {f"e{i}": n.inputs[0] for i, n in enumerate(found)}
    return Match(graph, tuple(Value(n, 0) for n in found), {"places": places, **tables})


def _look_up_once(m: Match, places: Any, **tables: Any) -> list[Any]:
    node = m.roots[0].node
    (axis,) = node.params["dimension_numbers"].offset_dims
    joined = lax.concatenate(list(tables.values()), 1)
    whole = rebind(node, joined, places, slice_sizes=(1, joined.shape[1]))
    offsets = _offsets([e.shape[1] for e in tables.values()])
    return [lax.slice_in_dim(whole, start, stop, axis=axis) for start, stop in itertools.pairwise(offsets)]


def _find_moved_lookup(graph: Graph, node: Node) -> Match | None:
    """Rows of a table, looked up at many places and then put into another order."""
    (rows,) = node.inputs
    lookup, order = rows.node, node.params["permutation"]
    if lookup.op != "gather" or not is_static(rows, *lookup.inputs) or len(graph.uses[rows]) != 1:
        return None
    numbers, (table, places) = lookup.params["dimension_numbers"], lookup.inputs
    last = len(order) - 1
    whole = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
    if len(table.shape) != 2 or not whole or numbers.offset_dims != (last,) or order[last] != last:
        return None
    return Match(graph, (Value(node, 0),), {"table": table, "places": places})


def _look_up_moved(m: Match, table: Any, places: Any) -> Any:
    # The last axis of the places holds the index itself, as that of the result holds the row.
    node = m.roots[0].node
    return rebind(node.inputs[0].node, table, lax.transpose(places, node.params["permutation"]))


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_right(s: Any) -> Iterator[Any]:
    rows, inner, heads = s.dim(), s.dim(), s.dim()
    yield lambda x, a, b, c: (x @ a, x @ b, x @ c), (s.array(rows, inner), *(s.frozen(inner, s.dim()) for _ in "abc"))
    numbers = (((1,), (0,)), ((), ()))

    def split(x: Any, a: Any, b: Any) -> Any:
        return lax.dot_general(x, a, numbers), lax.dot_general(x, b, numbers)

    yield split, (s.array(rows, inner), s.frozen(inner, heads, 2), s.frozen(inner, 3))


def _case_left(s: Any) -> Iterator[Any]:
    inner, columns = s.shape(2)
    yield lambda a, b, x: (a @ x, b @ x), (s.frozen(s.dim(), inner), s.frozen(s.dim(), inner), s.array(inner, columns))


def _case_convolutions(s: Any) -> Iterator[Any]:
    s.floating_only()

    def branches(x: Any, a: Any, b: Any) -> Any:
        return lax.conv(x, a, (1, 1), "SAME"), lax.conv(x, b, (1, 1), "SAME")

    yield branches, (s.array(1, 2, 5, 5), s.frozen(3, 2, 3, 3), s.frozen(4, 2, 3, 3))


def _case_lookup(growth: int) -> Callable[[Any], Iterator[Any]]:
    def cases(s: Any) -> Iterator[Any]:
        s.floating_only()
        inner = s.dim(2)
        rows, columns = s.dim(2) + 4 * growth * (growth > 1), inner * growth
        numbers = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,))
        places = s.rng.integers(0, rows, (2, 3, 1)).astype("int32")

        def look_up(e: Any, w: Any, i: Any) -> Any:
            found = lax.gather(e, i, numbers, (1, inner), mode="clip")
            return found @ w, lax.dot_general(w, found, (((0,), (2,)), ((), ())))

        yield look_up, (s.frozen(rows, inner), s.frozen(inner, columns), places)

    return cases


def _case_lookups(s: Any) -> Iterator[Any]:
    rows = s.dim(2)
    places = s.rng.integers(0, rows, (2, 3)).astype("int32")
    yield lambda e, f, i: (e[i], f[i] + 1), (s.frozen(rows, s.dim()), s.frozen(rows, s.dim()), places)


def _case_moved_lookup(s: Any) -> Iterator[Any]:
    rows, columns = s.dim(2), s.dim()
    places = s.rng.integers(0, rows, (2, 3)).astype("int32")
    yield lambda e, i: e[i].transpose(1, 0, 2), (s.array(rows, columns), places)


RULES: tuple[Rule, ...] = (
    Rule(
        "transpose-of-lookup",
        "transpose(E[i]) → E[transpose(i)]",
        Find(("transpose",), _find_moved_lookup),
        _look_up_moved,
        "bitwise",
        cases=_case_moved_lookup,
    ),
    Rule(
        "parallel-products",
        "x A, x B, known A and B → x [A B], taken apart",
        Find(("dot_general",), _find_dots(1)),
        _join_dots(1),
        "reassociate",
        kind="offer",
        cases=_case_right,
    ),
    Rule(
        "parallel-products-left",
        "A x, B x, known A and B → [A; B] x, taken apart",
        Find(("dot_general",), _find_dots(0)),
        _join_dots(0),
        "reassociate",
        kind="offer",
        cases=_case_left,
    ),
    Rule(
        "parallel-convolutions",
        "conv(x, A), conv(x, B), known A and B of one window → conv(x, [A B]), taken apart",
        Find(("conv_general_dilated",), _find_convolutions),
        _one_convolution,
        "reassociate",
        kind="offer",
        cases=_case_convolutions,
    ),
    Rule(
        "parallel-lookups",
        "E[i], F[i], known E and F → [E F][i], taken apart",
        Find(("gather",), _find_lookups),
        _look_up_once,
        "bitwise",
        cases=_case_lookups,
    ),
    Rule(
        "product-of-lookup",
        "E[i] W → (E W)[i], E and W known",
        Find(("dot_general",), _find_lookup(0, 1)),
        _multiply_table,
        "reassociate",
        cases=_case_lookup(1),
    ),
    Rule(
        "large-product-of-lookup",
        "E[i] W → (E W)[i], E and W known, where that takes much memory",
        Find(("dot_general",), _find_lookup(1, _TABLE_GROWTH)),
        _multiply_table,
        "reassociate",
        kind="offer",
        cases=_case_lookup(4),
    ),
)
