"""The Laplacian through operations that move or repeat elements.

All are linear: Jacobian and Laplacian go through them as the value does, and the table of rows moves with the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.structure import aligned_axes
from jaxinfer.differentiation.laplacian.blocks import (
    Block,
    compress,
    moved,
    occurring,
    uniform_rows,
)
from jaxinfer.differentiation.laplacian.terms import Term, Triple, is_active, primal, triple
from jaxinfer.graph import Node
from jaxinfer.graph.node import params_key

Rule = Callable[..., Sequence[Any]]
# Moves a table (k, *axes) that belongs to values of a shape; axes of length one may stand for longer ones.
Move = Callable[[Any, tuple[int, ...]], Any]


def through_moves(x: Triple, value: Any, key: Any, move: Move) -> Any:
    """A value whose elements are elements of another."""
    shape = jnp.shape(value)
    if 0 in shape:
        return value

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
        return table[(slice(None), *chosen)]

    return move


def _tile(node: Node) -> Move:
    reps = node.params["reps"]

    def move(table: Any, _: Any) -> Any:
        times = [1 if d == 1 else r for d, r in zip(table.shape[1:], reps)]
        return (np if isinstance(table, np.ndarray) else jnp).tile(table, (1, *times))

    return move


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


def unstack(domain: Any, node: Node, x: Triple) -> Sequence[Any]:
    """Slices along an axis, without it."""
    axis = node.params["axis"] % len(x.shape)
    results = []
    for i, value in enumerate(domain.bind(node, x.value)):

        def move(table: Any, _: Any, i: int = i) -> Any:
            return table[(slice(None),) * (1 + axis) + (0 if table.shape[1 + axis] == 1 else i,)]

        results.append(through_moves(x, value, ("unstack", axis, i), move))
    return results


def concatenate(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Pieces put together along an axis."""
    value = domain.bind(node, *map(primal, inputs))[0]
    return [_put_together(value, inputs, node.params["dimension"])]


def stack(domain: Any, node: Node, *inputs: Any) -> Sequence[Any]:
    """Pieces put together along a new axis."""
    value = domain.bind(node, *map(primal, inputs))[0]
    axis = node.params["axis"] % len(node.aval.shape)

    def raised(x: Any) -> Any:
        if not is_active(x):
            return jnp.expand_dims(x, axis)
        new = jnp.expand_dims(x.value, axis)
        return through_moves(
            x, new, ("raise", axis), lambda t, _: t.reshape(*t.shape[: 1 + axis], 1, *t.shape[1 + axis :])
        )

    return [_put_together(value, [raised(x) for x in inputs], axis)]


def _put_together(value: Any, inputs: Sequence[Any], axis: int) -> Any:
    """Pieces along an axis; pieces with few rows keep them where all have few."""
    blocks = [x.block if is_active(x) else None for x in inputs]
    names = np.unique(np.concatenate([occurring(b.rows) for b in blocks if b is not None]))
    count = max(b.count for b in blocks if b is not None)
    if dense := 2 * count > names.size:
        count = names.size
        blocks = [b if b is None else b.as_uniform(names) for b in blocks]
    dtype, rows, data = jnp.result_type(value), [], []
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
    table = uniform_rows(names, jnp.ndim(value)) if dense else compress(np.concatenate(rows, 1 + axis))
    bent = any(is_active(x) and x.laplacian is not None for x in inputs)
    pieces = [x.curvature if is_active(x) else jnp.zeros_like(x) for x in inputs]
    lap = lax.concatenate(pieces, axis) if bent else None
    return triple(value, [Term(None, Block(lax.concatenate(data, 1 + axis), table, jnp.shape(value)))], lap)


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
        return domain.unknown(node, x, *indices)
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
    "tile": _moving(_tile),
    "split": split,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "pad": pad,
    "gather": _indexed,
    "dynamic_slice": _indexed,
    "dynamic_update_slice": update_slice,
}
