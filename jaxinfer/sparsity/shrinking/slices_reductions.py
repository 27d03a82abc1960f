"""Reductions, and operations through which some axes run untouched: what is missing joins in as its fill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.axes import Way, resized, ways
from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.slices import (
    LARGEST_KNOWN,
    NONE,
    Indices,
    Sliced,
    Undefined,
    apply,
    common,
    dense,
    kept_or_none,
    made,
    merged,
    part,
    spread,
)

Rule = Callable[..., Sequence[Any]]
Combine = Callable[[Any, Any], Any]

_COMBINE: Mapping[str, Combine] = {
    "reduce_sum": lax.add,
    "reduce_prod": lax.mul,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
    "reduce_xor": lax.bitwise_xor,
}


def reduction(domain: Any, node: Node, x: Sliced) -> Sequence[Any]:
    """What is left is reduced, and then what is missing; results may be missing along the other axes."""
    axes = tuple(node.params["axes"])
    for a in axes:
        if x.void[a].size:
            raise Undefined(x, a, x.void[a])
    short = [a for a in axes if x.keep[a] is not None]
    if len(short) > 1 and not (node.op == "reduce_sum" and x.is_zero):
        for a in short[1:]:
            x = domain.full(x, a)
        short = short[:1]
    others = [a for a in range(x.rank) if a not in axes]
    x = _spread_repeated(x, axes)
    fill, fill_known = _fill(node, x, axes, others)
    if not fill_known and any(np.shape(fill)[i] > 1 and x.keep[a] is not None for i, a in enumerate(others)):
        for a in others:
            x = domain.full(x, a)
        fill, fill_known = None, True
    known = x.known and x.array.size <= LARGEST_KNOWN and (fill_known or x.is_whole)
    (array,) = apply(node, [x.array], known)
    if short and not (node.op == "reduce_sum" and x.is_zero):
        rest = _missing_slices(node, x, short[0], axes, others)
        on = _COMBINE[node.op]
        if x.array.size == 0 or x.array.shape[short[0]] == 0:
            array = jnp.broadcast_to(rest, array.shape)
        else:
            array = on(jnp.asarray(array), jnp.broadcast_to(rest, array.shape).astype(array.dtype))
        known = False
    keep = [x.keep[a] for a in others]
    void = [x.void[a] for a in others]
    repeated = [x.repeated[a] for a in others]
    return [made(node.aval.shape, array, keep, repeated, fill, void, known, fill_known)]


def _spread_repeated(x: Sliced, axes: Sequence[int]) -> Sliced:
    shape = [x.shape[a] if a in axes and x.repeated[a] else n for a, n in enumerate(x.array.shape)]
    repeated = tuple(r and a not in axes for a, r in enumerate(x.repeated))
    return replace(x, array=spread(x.array, shape, x.known), repeated=repeated)


def _fill(node: Node, x: Sliced, axes: Sequence[int], others: Sequence[int]) -> tuple[Any, bool]:
    """The reduction of what is missing along the other axes: all of it is missing there."""
    if all(x.keep[a] is None for a in others):
        return None, True
    if x.is_zero and node.op != "reduce_and" and all(x.shape[a] for a in axes):
        return None, True
    shape = [x.shape[a] if a in axes else n for a, n in enumerate(np.shape(x.fill))]
    known = x.fill_known and math.prod(shape) <= LARGEST_KNOWN
    return apply(node, [spread(x.fill, shape, known)], known)[0], known


def _missing_slices(node: Node, x: Sliced, axis: int, axes: Sequence[int], others: Sequence[int]) -> Any:
    """The reduction of what is missing along a reduced axis, at the kept indices of the other axes."""
    gone = x.removed(axis)
    domain_part = part(x, {axis: gone}, repeat=True)
    return apply(node, [domain_part], False)[0]


# -- axes that run through --------------------------------------------------------------------------------------------

# Where all operands are zero, so are the results.
_ZERO_STAYS = frozenset(
    "cumsum cummax cummin cumprod dynamic_slice dynamic_update_slice fft gather reduce_window_sum rev scatter "
    "scatter-add scatter-max scatter-min scatter-mul scatter-sub sort stack tile transpose unstack".split()
)


def _stays_zero(node: Node) -> bool:
    """Whether an operation of zeros is zero."""
    if node.op in ("reduce_window_max", "reduce_window_min"):
        # Every window holds something besides padding.
        p = node.params
        plain = all(d == 1 for d in (*p["base_dilation"], *p["window_dilation"]))
        return plain and all(max(pads) < size for pads, size in zip(p["padding"], p["window_dimensions"]))
    return node.op in _ZERO_STAYS


def along(domain: Any, node: Node, *xs: Any) -> Sequence[Any]:
    """An operation of which only the axes that run through it untouched may miss something.

    With one such axis missing, its fill is the operation on the fills; with several, only zero stays what it is.
    """
    if not all(isinstance(x, Sliced) for x in xs):
        return domain.plainly(node, *xs)
    xs = tuple(_unstored(x) for x in xs)
    found = _missing_ways(node, xs)
    if len(found) > 1 and not (_stays_zero(node) and _all_zero(xs, found)):
        found = found[:1]
    if not found:
        return domain.plainly(node, *xs)
    removal = [_removal(way, xs) for way in found]
    params, arrays = node.params, list(xs)
    on_way = {
        (i, a): gone for way, (gone, _) in zip(found, removal) for i, a in enumerate(way.operands) if a is not None
    }
    for way, (gone, _) in zip(found, removal):
        n = node.avals[0].shape[way.results[0]]
        params = resized(replace(node, params=params), way, n, n - len(gone))
    for i, x in enumerate(xs):
        wanted = {a: kept_or_none(x.shape[a], on_way.get((i, a), NONE)) for a in range(x.rank)}
        arrays[i] = part(x, wanted, log=domain.log)
    with_zero = _stays_zero(node) and _all_zero(xs, found)
    fills: list[tuple[Any, bool]] = [(None, True)] * len(node.avals)
    if not with_zero:
        got = _fills(node, xs, found[0], removal[0][0])
        if got is None:
            return domain.plainly(node, *xs)
        fills = got
    results = _jax.bind(node.primitive, arrays, dict(params))
    made_ = []
    for i, (aval, y) in enumerate(zip(node.avals, results)):
        keep: list[Indices | None] = [None] * len(aval.shape)
        void = [NONE] * len(aval.shape)
        for way, (gone, nothing_known) in zip(found, removal):
            keep[way.results[i]] = kept_or_none(aval.shape[way.results[i]], gone)
            void[way.results[i]] = nothing_known
        made_.append(made(aval.shape, y, keep, None, fills[i][0], void, fill_known=fills[i][1]))
    return made_


def _unstored(x: Sliced) -> Sliced:
    """The value with nothing repeated."""
    if not any(x.repeated):
        return x
    shape = [n if r else s for n, s, r in zip(x.shape, x.array.shape, x.repeated)]
    return replace(x, array=spread(x.array, shape, x.known), repeated=(False,) * x.rank)


def _missing_ways(node: Node, xs: Sequence[Sliced]) -> list[Way]:
    """The ways along axes of which something can be left out."""
    found = []
    for way in ways(node, 1):
        places = [(x, a) for x, a in zip(xs, way.operands) if a is not None]
        sizes = {x.shape[a] for x, a in places} | {node.avals[i].shape[a] for i, a in enumerate(way.results)}
        if len(sizes) == 1 and places and _removal(way, xs)[0].size:
            found.append(way)
    return found


def _removal(way: Way, xs: Sequence[Sliced]) -> tuple[Indices, Indices]:
    places = [(x, a) for x, a in zip(xs, way.operands) if a is not None]
    void = merged(*(x.void[a] for x, a in places))
    return merged(common(x.removed(a) for x, a in places if not (x.known and x.is_whole)), void), void


def _all_zero(xs: Sequence[Sliced], found: Sequence[Way]) -> bool:
    """Whether every operand that runs along is zero wherever it is missing."""
    along_ = {i for way in found for i, a in enumerate(way.operands) if a is not None}
    return all(not np.any(xs[i].array) if xs[i].known and xs[i].is_whole else xs[i].is_zero for i in along_)


def _fills(node: Node, xs: Sequence[Sliced], way: Way, gone: Indices) -> list[tuple[Any, bool]] | None:
    """The operation on the fills, whose axis has one index where they are the same for all; None if they are not."""
    parts = [_part_of_fill(x, a) for x, a in zip(xs, way.operands)]
    size = max(f.shape[a] for (f, _), a in zip(parts, way.operands) if a is not None)
    shapes = [[size if i == a else n for i, n in enumerate(x.shape)] for x, a in zip(xs, way.operands)]
    known = all(k for _, k in parts) and sum(map(math.prod, shapes)) <= 8 * LARGEST_KNOWN
    if size > 1 and not known:
        return None
    ready = [spread(f, shape, k) for (f, k), shape in zip(parts, shapes)]
    n = node.avals[0].shape[way.results[0]]
    params = resized(node, way, n, size) if size != n else node.params
    changes = {k: v for k, v in params.items() if node.params.get(k) is not v}
    results = apply(node, ready, known, **changes)
    return [(y, known) for y in results]


def _part_of_fill(x: Sliced, axis: int | None) -> tuple[Any, bool]:
    """What an operand is where slices along its axis are missing in others."""
    if axis is None:
        return dense(x, anything=True), x.known
    if not x.is_whole:
        return x.fill, x.fill_known
    first = np.take(x.array, [0], axis) if x.known and x.shape[axis] else None
    if first is not None and np.array_equal(np.broadcast_to(first, x.shape), x.array):
        return first, True
    return x.array, x.known


RULES: Mapping[str, Rule] = dict.fromkeys(_COMBINE, reduction)
