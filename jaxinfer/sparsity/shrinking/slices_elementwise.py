"""Operations that act on each element by itself: they act on what is left and on the fill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.analysis.structure import ELEMENTWISE
from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.slices import (
    LARGEST_KNOWN,
    NONE,
    Indices,
    Sliced,
    apply,
    common,
    kept_or_none,
    made,
    merged,
    missing,
    part,
    spread,
)

Rule = Callable[..., Sequence[Any]]

# What is zero in such an operand is zero in the result, whatever the others are.
ABSORBING: Mapping[str, Callable[[int], range]] = {
    "mul": lambda count: range(count),
    "and": lambda count: range(count),
    "div": lambda count: range(1),
}


@dataclass
class _Removal:
    """What the result of an operation on elements leaves out.

    Attributes:
        gone: for each axis the indices that are not kept.
        void: for each axis those of them at which nothing is known.
        absorbed: for each axis those of them at which the result is zero whatever other operands are.
    """

    gone: dict[int, Indices]
    void: dict[int, Indices]
    absorbed: dict[int, Indices]


def elementwise(domain: Any, node: Node, *inputs: Sliced) -> Sequence[Any]:
    """Any number of operands of one shape; scalars and axes of length one are repeated."""
    shape = tuple(node.aval.shape)
    xs = [aligned(x, shape) for x in inputs]
    known = all(x.known for x in xs) and _size(xs) <= LARGEST_KNOWN
    if known:
        xs = [_known(x) for x in xs]
    removal = _removal(node, xs, shape)
    fill, fill_known = _fill(node, xs, removal, shape)
    leaf = next((x.leaf for x in xs if not x.known and x.leaf), ()) if len(inputs) == 1 else ()
    keep = [kept_or_none(n, removal.gone[a]) for a, n in enumerate(shape)]
    wanted = dict(enumerate(keep))
    arrays = [
        _scalar(x) if not given.shape and _takes_scalars(node) else part(x, wanted, repeat=True, log=domain.log)
        for x, given in zip(xs, inputs)
    ]
    (array,) = apply(node, _together(arrays, known), known)
    repeated = [n != 1 and all(x.repeated[a] for x in xs) for a, n in enumerate(shape)]
    void = [removal.void[a] for a in range(len(shape))]
    return [made(shape, array, keep, repeated, fill, void, known, fill_known, leaf)]


def _size(xs: Sequence[Sliced]) -> int:
    return math.prod(max((x.array.shape[a] for x in xs), default=1) for a in range(xs[0].rank)) if xs else 0


def _takes_scalars(node: Node) -> bool:
    return node.op in ("clamp", "select_n") or len(node.inputs) > 1


def _scalar(x: Sliced) -> Any:
    return x.array.reshape(())


def aligned(x: Sliced, shape: Sequence[int]) -> Sliced:
    """An operand with the rank of the result, repeated along the axes that it does not have."""
    if x.rank == len(shape):
        grown = [n != s for n, s in zip(shape, x.shape)]
        if not any(grown):
            return x
        repeated = tuple(g or r for g, r in zip(grown, x.repeated))
        return replace(x, shape=tuple(shape), repeated=repeated)
    rank = len(shape)
    array = x.array.reshape((1,) * rank)
    return made(shape, array, (None,) * rank, [n != 1 for n in shape], known=x.known)


def _known(x: Sliced) -> Sliced:
    """A known value with nothing missing, if it is not void somewhere."""
    if x.is_whole or any(v.size for v in x.void) or not x.fill_known:
        return x
    array = part(x, dict.fromkeys(range(x.rank)), repeat=True)
    return made(x.shape, array, (None,) * x.rank, x.repeated, known=True)


def _removal(node: Node, xs: Sequence[Sliced], shape: Sequence[int]) -> _Removal:
    """What may be left out: what is missing in all operands that vary there, and what is absorbed or void."""
    found = _Removal({}, {}, {})
    for axis in range(len(shape)):
        real = [x for x in xs if not x.repeated[axis]]
        binding = [x for x in real if not (x.known and x.is_whole)]
        gone = common(x.removed(axis) for x in binding)
        absorbed = _absorbed(node, xs, axis)
        void = np.setdiff1d(merged(*(x.void[axis] for x in real)), absorbed)
        found.gone[axis] = merged(gone, absorbed, void)
        found.void[axis], found.absorbed[axis] = void, absorbed
    return found


def _absorbed(node: Node, xs: Sequence[Sliced], axis: int) -> Indices:
    if node.op in ABSORBING:
        return merged(*(xs[i].zero_at(axis) for i in ABSORBING[node.op](len(xs)) if not xs[i].repeated[axis]))
    if node.op == "select_n":
        return common(NONE if x.repeated[axis] else x.zero_at(axis) for x in xs[1:])
    return NONE


def _fill(node: Node, xs: Sequence[Sliced], removal: _Removal, shape: Sequence[int]) -> tuple[Any, bool]:
    """What the result is where something is missing; keeps more where that would be as much as the result itself."""
    axes = [a for a in range(len(shape)) if removal.gone[a].size]
    # Where the fill would change with the inputs and from slice to slice, some axes are kept in full instead.
    for count in range(len(axes) + 1):
        for given_up in itertools.combinations(axes, count):
            gone = {a: _sure(removal, a) if a in given_up else g for a, g in removal.gone.items()}
            found = _fill_for(node, xs, gone, removal, shape)
            if found is not None:
                removal.gone = gone
                return found
    removal.gone = dict(removal.void)
    return None, True


def _sure(removal: _Removal, axis: int) -> Indices:
    """The missing indices along an axis that need no fill of their own."""
    return merged(removal.absorbed[axis], removal.void[axis])


def _fill_for(
    node: Node, xs: Sequence[Sliced], gone: Mapping[int, Indices], removal: _Removal, shape: Sequence[int]
) -> tuple[Any, bool] | None:
    """The fill of a result that misses given indices, and whether it is known; None where it would be too much."""
    rank = len(shape)
    # Where something is absorbed or void, the others may still be there.
    both = {a: np.setdiff1d(g, _sure(removal, a)) for a, g in gone.items()}
    if not any(b.size for b in both.values()):
        return None, True
    parts = [missing(x, both) for x in xs]
    for i in ABSORBING[node.op](len(xs)) if node.op in ABSORBING else ():
        if parts[i][1] and not np.any(parts[i][0]):
            return None, True
    size = math.prod(max(np.shape(f)[a] for f, _ in parts) for a in range(rank))
    known = all(k for _, k in parts) and size <= LARGEST_KNOWN
    if known:
        arrays = _together([np.asarray(f) for f, _ in parts], True)
        return _absorb(apply(node, arrays, True)[0], removal.absorbed, shape), True
    uniform = all(np.shape(f)[a] == 1 for f, _ in parts for a in range(rank) if gone[a].size)
    if uniform and not any(z.size for z in removal.absorbed.values()):
        return apply(node, _together([f for f, _ in parts], False), False)[0], False
    return None


def _absorb(fill: np.ndarray, absorbed: Mapping[int, Indices], shape: Sequence[int]) -> np.ndarray:
    """A known fill with zeros where they were absorbed."""
    for axis, zeros in absorbed.items():
        if zeros.size and np.any(fill):
            full = list(fill.shape)
            full[axis] = shape[axis]
            fill = np.broadcast_to(fill, full).copy()
            fill[(slice(None),) * axis + (zeros,)] = 0
    return fill


def _together(arrays: Sequence[Any], known: bool) -> list[Any]:
    """Arrays of one shape; scalars stay scalars."""
    shapes = [a.shape for a in arrays if len(a.shape)]
    if not shapes:
        return list(arrays)
    shape = [max(sizes) if 0 not in sizes else 0 for sizes in zip(*shapes)]
    on = np if known else jnp
    return [spread(a, shape, known) if len(a.shape) else on.asarray(a) for a in arrays]


_OTHERS = (
    "add_any clamp complex copy copy_p igamma igammac name polygamma regularized_incomplete_beta select_n "
    "stop_gradient zeta"
)
RULES: Mapping[str, Rule] = dict.fromkeys((*ELEMENTWISE, *_OTHERS.split()), elementwise)
