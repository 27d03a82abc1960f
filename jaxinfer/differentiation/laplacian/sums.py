"""The Laplacian through sums over axes, and through operations along one.

Rows of the Jacobian that are each named once along an axis are not added up: they become rows of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.differentiation.laplacian.blocks import Block, is_disjoint
from jaxinfer.differentiation.laplacian.terms import Term, Triple, is_active, primal, triple
from jaxinfer.graph import Node

Rule = Callable[..., Sequence[Any]]


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


RULES: Mapping[str, Rule] = {
    "reduce_sum": reduce_sum,
    "reduce_max": reduce_extremum,
    "reduce_min": reduce_extremum,
    "sort": sort,
    "top_k": top_k,
    "cumsum": along_axis,
}
