"""The Laplacian through operations that move, repeat or add up elements.

All are linear: Jacobian and Laplacian go through them as the value does, and the table of rows moves with the elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.structure import aligned_axes
from jaxinfer.differentiation.laplacian_blocks import (
    Block,
    compress,
    is_disjoint,
    moved,
    occurring,
    uniform_rows,
)
from jaxinfer.differentiation.laplacian_terms import Term, Triple, is_active, primal, triple
from jaxinfer.graph import Node
from jaxinfer.graph.node import params_key

Rule = Callable[..., Sequence[Any]]
# Moves a table (k, *axes) that belongs to values of a shape; axes of length one may stand for longer ones.
Move = Callable[[Any, tuple[int, ...]], Any]


def through_moves(x: Triple, value: Any, key: Any, move: Move) -> Any:
    """A value whose elements are elements of another."""
    shape = jnp.shape(value)

    def block(old: Block) -> Block:
        if key not in old.derived:
            rows = compress(np.asarray(move(old.rows, old.shape)))
            old.derived[key] = Block(move(old.data, old.shape), rows, shape)
        return old.derived[key]

    terms = [Term(None if t.factor is None else move(t.factor[None], x.shape)[0], block(t.block)) for t in x.terms]
    lap = None if x.laplacian is None else _whole(move(x.laplacian[None], x.shape)[0], shape)
    return triple(value, terms, lap)


def _whole(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else jnp.broadcast_to(x, shape)


def spread(x: Triple, shape: Sequence[int]) -> Triple:
    """A value repeated to a shape, as elementwise operations do with scalars and axes of length one."""
    shape = tuple(shape)
    if x.shape == shape:
        return x
    lead = len(shape) - len(x.shape)

    def move(table: Any, _: Any) -> Any:
        return table.reshape(table.shape[0], *(1,) * lead, *table.shape[1:])

    return through_moves(x, jnp.broadcast_to(x.value, shape), ("spread", shape), move)


def _broadcast(node: Node) -> Move:
    places, rank = node.params["broadcast_dimensions"], len(node.aval.shape)

    def move(table: Any, _: Any) -> Any:
        axes = [1] * rank
        for axis, place in enumerate(places):
            axes[place] = table.shape[1 + axis]
        return table.reshape(table.shape[0], *axes)

    return move


def _reshape(node: Node) -> Move:
    new = node.aval.shape

    def move(table: Any, old: tuple[int, ...]) -> Any:
        found = aligned_axes(new, old)
        kept = {a for a in found if a is not None}
        rest = [a for a in range(len(old)) if a not in kept]
        repeated = all(table.shape[1 + a] == 1 for a in rest)
        if not repeated:
            axes = [old[a] if a in rest else table.shape[1 + a] for a in range(len(old))]
            table = _spread_table(table, (table.shape[0], *axes))
        shape = [(1 if repeated else d) if a is None else table.shape[1 + a] for a, d in zip(found, new)]
        return table.reshape(table.shape[0], *shape)

    return move


def _spread_table(table: Any, shape: Sequence[int]) -> Any:
    return (np if isinstance(table, np.ndarray) else jnp).broadcast_to(table, tuple(shape))


def _squeeze(node: Node) -> Move:
    dropped = {d % len(node.inputs[0].shape) for d in node.params["dimensions"]}

    def move(table: Any, _: Any) -> Any:
        return table.reshape(table.shape[0], *(d for i, d in enumerate(table.shape[1:]) if i not in dropped))

    return move


def _transpose(node: Node) -> Move:
    order = node.params["permutation"]
    return lambda table, _: table.transpose(0, *(1 + a for a in order))


def _slice(node: Node) -> Move:
    p = node.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    cuts = [slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], strides)]

    def move(table: Any, shape: tuple[int, ...]) -> Any:
        chosen = [slice(None) if table.shape[1 + i] == 1 else cut for i, cut in enumerate(cuts)]
        return table[(slice(None), *chosen)] if 0 not in node.aval.shape else _empty(table, node.aval.shape)

    return move


def _empty(table: Any, shape: Sequence[int]) -> Any:
    return (np if isinstance(table, np.ndarray) else jnp).zeros((table.shape[0], *shape), table.dtype)


def _reverse(node: Node) -> Move:
    flips = tuple(1 + d for d in node.params["dimensions"])
    return lambda table, _: (np if isinstance(table, np.ndarray) else jnp).flip(table, flips)


def _moving(of: Callable[[Node], Move]) -> Rule:
    def rule(domain: Any, node: Node, x: Any, *rest: Any) -> Sequence[Any]:
        value = domain.bind(node, primal(x), *rest)[0]
        return [through_moves(x, value, (node.op, params_key(node.params), node.aval.shape), of(node))]

    return rule


def split(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Pieces along an axis."""
    values, axis, start, results = domain.bind(node, x.value), node.params["axis"], 0, []
    for value, length in zip(values, node.params["sizes"]):

        def move(table: Any, _: Any, start: int = start, stop: int = start + length) -> Any:
            cut = (slice(None),) * (1 + axis) + (slice(start, stop),)
            return table if table.shape[1 + axis] == 1 else table[cut]

        results.append(through_moves(x, value, ("split", axis, start, length), move))
        start += length
    return results


def concatenate(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Pieces put together; pieces with few rows keep them where all have few."""
    axis = node.params["dimension"]
    value = domain.bind(node, *map(primal, inputs))[0]
    blocks = [x.block if is_active(x) else None for x in inputs]
    names = np.unique(np.concatenate([occurring(b.rows) for b in blocks if b is not None]))
    count = max(b.count for b in blocks if b is not None)
    if 2 * count > names.size:
        count = names.size
        blocks = [b if b is None else b.as_uniform(names) for b in blocks]
    dtype = jnp.result_type(value)
    rows, data = [], []
    for x, block in zip(inputs, blocks):
        shape = jnp.shape(primal(x))
        have = np.full((count, *shape), -1, np.int32)
        if block is None:
            data.append(jnp.zeros((count, *shape), dtype))
        else:
            have[: block.count] = block.rows
            missing = [(0, count - block.count)] + [(0, 0)] * len(shape)
            data.append(jnp.pad(block.full, missing) if count > block.count else block.full)
        rows.append(have)
    if all(b is None or b.is_uniform for b in blocks) and count == names.size:
        table = uniform_rows(names, len(jnp.shape(value)))
    else:
        table = compress(np.concatenate(rows, 1 + axis))
    bent = any(is_active(x) and x.laplacian is not None for x in inputs)
    pieces = [x.curvature if is_active(x) else jnp.zeros_like(x) for x in inputs]
    lap = lax.concatenate(pieces, axis) if bent else None
    return [triple(value, [Term(None, Block(lax.concatenate(data, 1 + axis), table, jnp.shape(value)))], lap)]


def pad(domain: Any, node: Node, x: Any, filling: Any) -> Sequence[Any]:
    """A border of a constant."""
    if is_active(filling):
        return [
            domain.jointly(
                domain.bind(node, primal(x), filling.value)[0], lambda *v: domain.bind(node, *v)[0], x, filling
            )
        ]
    value = domain.bind(node, x.value, filling)[0]
    config, block = node.params["padding_config"], x.block
    zero = jnp.zeros((), jnp.result_type(value))

    def bordered(data: Any) -> Any:
        return lax.pad(data, zero, ((0, 0, 0), *config))

    if block.is_uniform:
        rows = block.rows
    else:
        with jax.ensure_compile_time_eval():
            table = np.broadcast_to(block.rows, (block.count, *x.shape))
            rows = compress(np.asarray(lax.pad(table, np.int32(-1), ((0, 0, 0), *config))))
    lap = None if x.laplacian is None else lax.pad(x.laplacian, zero, config)
    return [triple(value, [Term(None, Block(bordered(block.full), rows, jnp.shape(value)))], lap)]


def _indexed(domain: Any, node: Node, x: Any, *indices: Any) -> Sequence[Any]:
    """Elements picked by index. Where the indices are known, the table of rows is picked from as well."""
    if any(map(is_active, indices)) or not is_active(x):
        return domain.opaque(node, x, *indices)
    value = domain.bind(node, x.value, *indices)[0]
    block = x.block
    known = all(_jax.is_concrete(i) for i in indices)
    if not known:
        block = block.as_uniform()

    def picked(table: Any) -> Any:
        if node.op == "dynamic_slice":
            sizes = (table.shape[0], *node.params["slice_sizes"])
            return lax.dynamic_slice(table, (jnp.zeros_like(indices[0]), *indices), sizes)
        return jax.vmap(lambda t: domain.bind(node, t, *indices)[0])(table)

    rows = block.rows
    if not block.is_uniform:
        with jax.ensure_compile_time_eval():
            # What is out of bounds is filled with a negative number: no row.
            rows = np.maximum(moved(rows, x.shape, lambda t: picked(jnp.asarray(t))), -1)
    lap = None if x.laplacian is None else domain.bind(node, x.laplacian, *indices)[0]
    shape = jnp.shape(value)
    rows = rows.reshape(rows.shape[0], *(1,) * len(shape)) if block.is_uniform else rows
    return [triple(value, [Term(None, Block(picked(block.full), rows, shape))], lap)]


# -- sums -------------------------------------------------------------------------------------------------------------


def over_axes(
    term: Term, axes: Sequence[int], add_up: Callable[[Any], Any], outer: Callable[[Any], Any]
) -> list[Block]:
    """A term after a linear operation that contracts some of its axes.

    Rows that do not vary along those axes are contracted; rows that are each named once along them are not added to
    anything, and become rows of the result; others are first brought to a common set.

    Args:
        term: of the operand, not repeated along `axes`.
        axes: of the operand.
        add_up: (k, *operand) -> (k, *result), the operation on rows.
        outer: (k, *operand) -> (k, *axes, *result), the operation without the sum.

    Returns:
        Blocks of the result whose sum is its Jacobian. Axes that `add_up` puts into the result are taken as new ones.
    """
    block = term.whole
    varying = np.array([any((row != row.take([0], a)).any() for a in axes) for row in block.rows], bool)
    parts = []
    if (~varying).any():
        part = block.take(np.flatnonzero(~varying)) if varying.any() else block
        parts.append((add_up(part.full), part.rows))
    if varying.any():
        part = block.take(np.flatnonzero(varying)) if not varying.all() else block
        if is_disjoint(part.rows, axes):
            data = outer(part.full)
            lengths = [block.shape[a] for a in axes]
            kept = [d for a, d in enumerate(part.rows.shape[1:]) if a not in axes]
            table = np.broadcast_to(part.rows, _with(part.rows.shape, axes, block.shape))
            table = np.moveaxis(table, [1 + a for a in axes], range(1, 1 + len(axes)))
            table = table.reshape(part.count * math.prod(lengths), *kept)
            parts.append((data.reshape(-1, *data.shape[1 + len(axes) :]), np.expand_dims(table, _after(axes))))
        else:
            part = part.aligned(axes)
            parts.append((add_up(part.full), part.rows))
    return [Block(data, rows, data.shape[1:]) for data, rows in parts]


def _after(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 + a for a in axes)


def _with(table: Sequence[int], axes: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The shape of a table of rows with some axes as long as the value's."""
    return [table[0], *(shape[a] if a in axes else d for a, d in enumerate(table[1:]))]


def without_axes(rows: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A table without axes of length one."""
    return rows.reshape(*(d for i, d in enumerate(rows.shape) if i - 1 not in axes))


def reduce_sum(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Sums over axes."""
    axes = node.params["axes"]
    return [summed(x, domain.bind(node, x.value)[0], axes)]


def summed(x: Triple, value: Any, axes: Sequence[int]) -> Any:
    """A value that is the sum of another over axes."""
    shape, after = jnp.shape(value), _after(axes)
    order = [a for a in range(len(x.shape)) if a not in axes]
    terms: list[Term] = []
    for term in x.terms:
        if term.repeats(axes):
            length = math.prod(x.shape[a] for a in axes)
            if term.factor is None:
                factor = jnp.full((), length, term.block.data.dtype)
            else:
                repeated = [a for a in axes if term.factor.shape[a] == 1]
                factor = jnp.sum(term.factor, tuple(axes)) * math.prod(x.shape[a] for a in repeated)
            block = term.block
            kept = block.data.reshape(*(d for i, d in enumerate(block.data.shape) if i - 1 not in axes))
            terms.append(
                Term(factor, _again(block, ("drop", tuple(axes)), kept, without_axes(block.rows, axes), shape))
            )
            continue
        found = over_axes(
            term, axes, lambda d: jnp.sum(d, after), lambda d: jnp.transpose(d, (0, *after, *(1 + a for a in order)))
        )
        terms += [Term(None, Block(b.data, without_axes(b.rows, axes), shape)) for b in found]
    lap = None if x.laplacian is None else jnp.sum(x.laplacian, tuple(axes))
    return triple(value, terms, lap)


def _again(old: Block, key: Any, data: Any, rows: np.ndarray, shape: tuple[int, ...]) -> Block:
    """The block derived from another in a way that has a name: the same object each time."""
    if key not in old.derived:
        old.derived[key] = Block(data, rows, shape)
    return old.derived[key]


def reduce_extremum(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Largest and least elements: the mean over those that are equal, as JAX differentiates them."""
    axes = node.params["axes"]
    value = domain.bind(node, x.value)[0]
    chosen = (x.value == jnp.expand_dims(value, axes)).astype(x.value.dtype)
    weight = chosen / jnp.sum(chosen, tuple(axes), keepdims=True)
    lap = None if x.laplacian is None else weight * x.laplacian
    return [summed(Triple(x.value, tuple(t.times(weight) for t in x.terms), lap), value, axes)]


def sort(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """The permutation that sorts the values is applied to all they carry."""
    axis = node.params["dimension"]
    values = [primal(x) for x in inputs]
    order = lax.broadcasted_iota(jnp.int32, jnp.shape(values[0]), axis)
    *results, order = domain.bind(node, *values, order)
    return [permuted(x, y, order, axis) if is_active(x) else y for x, y in zip(inputs, results, strict=True)]


def top_k(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Values and their places along an axis."""
    value, places = domain.bind(node, x.value)
    axis = node.params.get("axis", -1) % len(x.shape)
    return [permuted(x, value, places, axis), places]


def permuted(x: Triple, value: Any, places: Any, axis: int) -> Any:
    """Elements taken along an axis, at traced places."""
    block = x.block.aligned([axis])
    data = jnp.take_along_axis(block.full, places[None], 1 + axis)
    lap = None if x.laplacian is None else jnp.take_along_axis(x.laplacian, places, axis)
    return triple(value, [Term(None, Block(data, block.rows, jnp.shape(value)))], lap)


def along_axis(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Linear operations along one axis, such as cumulative sums."""
    value = domain.bind(node, x.value)[0]
    block = x.block.aligned([node.params["axis"]])
    data = jax.vmap(lambda t: domain.bind(node, t)[0])(block.full)
    lap = None if x.laplacian is None else domain.bind(node, x.laplacian)[0]
    return [triple(value, [Term(None, Block(data, block.rows, jnp.shape(value)))], lap)]


def update_slice(domain: Any, node: Node, x: Any, part: Any, *start: Any) -> Sequence[Any]:
    """A part put in place of another, at traced places: linear in both."""

    def updated(operand: Any, update: Any) -> Any:
        lead = [jnp.zeros_like(start[0])] * (operand.ndim - len(start))
        return lax.dynamic_update_slice(operand, update, (*lead, *start))

    return [domain.jointly(domain.bind(node, primal(x), primal(part), *start)[0], updated, x, part, batched=True)]


RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": _moving(_broadcast),
    "reshape": _moving(_reshape),
    "squeeze": _moving(_squeeze),
    "transpose": _moving(_transpose),
    "slice": _moving(_slice),
    "rev": _moving(_reverse),
    "split": split,
    "concatenate": concatenate,
    "pad": pad,
    "gather": _indexed,
    "dynamic_slice": _indexed,
    "dynamic_update_slice": update_slice,
    "reduce_sum": reduce_sum,
    "reduce_max": reduce_extremum,
    "reduce_min": reduce_extremum,
    "sort": sort,
    "top_k": top_k,
    "cumsum": along_axis,
}
