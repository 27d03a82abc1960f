"""Matrix products and convolutions: what is zero in one operand need not be there in the other.

The indices that are summed over fall into those where one operand is zero, which are left out; those that both keep,
which the smaller product sums over; and those that both miss although neither is zero, whose sum is computed once and
added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.slices import (
    NONE,
    Indices,
    Sliced,
    Undefined,
    apply,
    kept_or_none,
    made,
    merged,
    part,
    picked,
    spread,
    without,
)

Rule = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Summed:
    """The indices of a pair of axes that are summed over.

    Attributes:
        kept: those that stay in the product.
        constant: those that both operands miss although neither is zero there.
    """

    kept: Indices
    constant: Indices


def summed(x: Sliced, a: int, w: Sliced, b: int, alone: bool) -> Summed:
    """How axis ``a`` of one operand and ``b`` of another, summed over together, fall apart.

    Args:
        x, w: the operands.
        a, b: their axes.
        alone: whether what both miss may be summed by itself.

    Raises:
        Undefined: if something void meets something that is not zero.
    """
    size = x.shape[a]
    zero = merged(x.zero_at(a), w.zero_at(b))
    rest = without(size, zero)
    for y, axis in ((x, a), (w, b)):
        if np.isin(rest, y.void[axis]).any():
            raise Undefined(y, axis, np.intersect1d(rest, y.void[axis]))
    both = np.intersect1d(x.removed(a), w.removed(b)) if alone else NONE
    constant = np.intersect1d(rest, both)
    return Summed(np.setdiff1d(rest, constant), constant)


def side(x: Sliced, axes: Sequence[int], sums: Mapping[int, Summed]) -> dict[int, Indices]:
    """For each free axis of an operand the indices that are missing there and where the product is zero or void."""
    found = {}
    for axis in axes:
        gone = x.removed(axis)
        zero = np.setdiff1d(gone, x.void[axis])
        if zero.size and not x.is_zero:
            zero = _zero_slabs(x, axis, zero, sums)
        found[axis] = merged(zero, x.void[axis])
    return found


def _zero_slabs(x: Sliced, axis: int, gone: Indices, sums: Mapping[int, Summed]) -> Indices:
    """The missing indices along a free axis at which the operand is zero wherever the product still sums."""
    if not x.fill_known:
        return NONE
    fill = x.fill
    for a, s in sums.items():
        if fill.shape[a] > 1:
            fill = np.take(fill, s.kept, a)
        elif not s.kept.size:
            return gone
    if fill.shape[axis] == 1:
        return NONE if np.any(fill) else gone
    others = tuple(a for a in range(x.rank) if a != axis)
    return gone[~np.any(np.take(fill, gone, axis) != 0, axis=others)]


def dot_general(domain: Any, node: Node, x: Sliced, w: Sliced) -> Sequence[Any]:
    (cx, cw), (bx, bw) = node.params["dimension_numbers"]
    free_x = [a for a in range(x.rank) if a not in (*cx, *bx)]
    free_w = [a for a in range(w.rank) if a not in (*cw, *bw)]
    sums = _sums(x, w, cx, cw)
    sums_x, sums_w = dict(zip(cx, sums)), dict(zip(cw, sums))
    gone_x, gone_w = side(x, free_x, sums_x), side(w, free_w, sums_w)
    batch = [_batch_gone(x, a, w, b) for a, b in zip(bx, bw)]

    extra = _constant(node, x, w, sums_x, sums_w)
    if extra is not None and not extra[1]:
        # What both miss changes with the inputs, so results that are otherwise zero are not.
        gone_x, gone_w = ({a: y.void[a] for a in gone} for y, gone in ((x, gone_x), (w, gone_w)))

    shape = tuple(node.aval.shape)
    kept_x = {a: kept_or_none(x.shape[a], g) for a, g in gone_x.items()}
    kept_w = {a: kept_or_none(w.shape[a], g) for a, g in gone_w.items()}
    kept_b = [kept_or_none(x.shape[a], zero_or_void) for a, (zero_or_void, _) in zip(bx, batch)]
    keep = [*kept_b, *(kept_x[a] for a in free_x), *(kept_w[a] for a in free_w)]
    void = [*(v for _, v in batch), *(x.void[a] for a in free_x), *(w.void[a] for a in free_w)]
    repeated = [
        *(x.repeated[a] and w.repeated[b] for a, b in zip(bx, bw)),
        *(x.repeated[a] for a in free_x),
        *(w.repeated[a] for a in free_w),
    ]
    wanted_x = {**{a: s.kept for a, s in sums_x.items()}, **kept_x, **dict(zip(bx, kept_b))}
    wanted_w = {**{a: s.kept for a, s in sums_w.items()}, **kept_w, **dict(zip(bw, kept_b))}
    left = _stored(x, wanted_x, free_x, bx, bw, w, domain.log)
    right = _stored(w, wanted_w, free_w, bw, bx, x, domain.log)
    (array,) = apply(node, [left, right], False)
    if extra is None:
        return [made(shape, array, keep, repeated, None, void)]
    constant, known = extra
    # A repeated result stays so only where what is added is, too.
    repeated = [r and constant.shape[a] == 1 for a, r in enumerate(repeated)]
    array = _added(array, constant, keep, shape, known)
    return [made(shape, array, keep, repeated, constant, void, fill_known=known)]


def _sums(x: Sliced, w: Sliced, cx: Sequence[int], cw: Sequence[int]) -> list[Summed]:
    found = [summed(x, a, w, b, alone=True) for a, b in zip(cx, cw)]
    if sum(bool(s.constant.size) for s in found) > 1:
        # Along several axes what both miss is no box.
        found = [summed(x, a, w, b, alone=False) for a, b in zip(cx, cw)]
    return found


def _batch_gone(x: Sliced, a: int, w: Sliced, b: int) -> tuple[Indices, Indices]:
    """The missing indices of a batch axis at which the product is zero or void, and those at which it is void."""
    zero = merged(x.zero_at(a), w.zero_at(b))
    void = np.setdiff1d(merged(x.void[a], w.void[b]), zero)
    return merged(zero, void), void


def _stored(
    x: Sliced,
    wanted: Mapping[int, Indices | None],
    free: Sequence[int],
    batch: Sequence[int],
    other_batch: Sequence[int],
    other: Sliced,
    log: Any,
) -> Any:
    """An operand as the product takes it: free axes, and batch axes that both repeat, are left at size one."""
    array = part(x, wanted, repeat=True, log=log)
    shape = list(array.shape)
    for a in range(x.rank):
        if not x.repeated[a] or a in free:
            continue
        if a in batch and other.repeated[other_batch[batch.index(a)]]:
            continue
        want = wanted[a]
        shape[a] = x.shape[a] if want is None else len(want)
    return spread(array, shape, False)


def _constant(
    node: Node, x: Sliced, w: Sliced, sums_x: Mapping[int, Summed], sums_w: Mapping[int, Summed]
) -> tuple[Any, bool] | None:
    """The product over what both operands miss, for every index of the free axes that it depends on, and if known."""
    if not any(s.constant.size for s in sums_x.values()):
        return None
    known = x.fill_known and w.fill_known
    _, (bx, bw) = node.params["dimension_numbers"]
    parts = []
    for y, sums in ((x, sums_x), (w, sums_w)):
        fill = y.fill
        for a in range(y.rank):
            if a in sums:
                indices = sums[a].constant if sums[a].constant.size else np.arange(y.shape[a])
                if fill.shape[a] > 1:
                    fill = picked(fill, indices, a, y.fill_known)
                else:
                    sizes = list(fill.shape)
                    sizes[a] = len(indices)
                    fill = spread(fill, sizes, y.fill_known)
        parts.append(fill)
    for a, b in zip(bx, bw):
        n = max(parts[0].shape[a], parts[1].shape[b])
        parts = [
            spread(p, [n if i == axis else s for i, s in enumerate(p.shape)], y.fill_known)
            for p, axis, y in zip(parts, (a, b), (x, w))
        ]
    return apply(node, parts, known)[0], known


def _added(array: Any, constant: Any, keep: Sequence[Indices | None], shape: Sequence[int], known: bool) -> Any:
    """A product and the constant beside it, at the kept indices."""
    for a, k in enumerate(keep):
        if k is not None and constant.shape[a] > 1:
            constant = picked(constant, k, a, known)
    return jnp.add(array, jnp.asarray(constant, array.dtype))


# -- convolutions -----------------------------------------------------------------------------------------------------


def convolution(domain: Any, node: Node, x: Sliced, w: Sliced) -> Sequence[Any]:
    lhs, rhs, out = node.params["dimension_numbers"]
    if node.params["batch_group_count"] != 1:
        return domain.plainly(node, x, w)
    for a in (*lhs[2:], lhs[0]):
        x = domain.full(x, a) if a != lhs[0] or x.keep[a] is not None else x
    for a in rhs[2:]:
        w = domain.full(w, a)
    if node.params["feature_group_count"] != 1:
        return _grouped(domain, node, x, w)
    sums = summed(x, lhs[1], w, rhs[1], alone=True)
    gone = side(w, [rhs[0]], {rhs[1]: sums})[rhs[0]]
    extra = _constant_image(node, x, w, sums) if sums.constant.size else None
    if extra is not None and not extra[1]:
        gone = w.void[rhs[0]]
    keep: list[Indices | None] = [None] * len(node.aval.shape)
    keep[out[1]] = kept_or_none(w.shape[rhs[0]], gone)
    void = [NONE] * len(keep)
    void[out[1]] = w.void[rhs[0]]
    array = _convolved(node, x, w, {lhs[1]: sums.kept}, {rhs[1]: sums.kept, rhs[0]: keep[out[1]]}, keep, domain.log)
    repeated = [False] * len(keep)
    repeated[out[0]] = x.repeated[lhs[0]]
    shape = node.aval.shape
    if extra is None:
        return [made(shape, array, keep, repeated, None, void)]
    image, known = extra
    repeated[out[0]] = repeated[out[0]] and image.shape[out[0]] == 1
    return [made(shape, _added(array, image, keep, shape, known), keep, repeated, image, void, fill_known=known)]


def _convolved(
    node: Node,
    x: Sliced,
    w: Sliced,
    wanted_x: Mapping[int, Indices | None],
    wanted_w: Mapping[int, Indices | None],
    keep: Sequence[Indices | None],
    log: Any,
    groups: int = 1,
) -> Any:
    """The convolution of what is left; zeros where there is nothing to sum."""
    lhs, _, out = node.params["dimension_numbers"]
    left, right = part(x, wanted_x, repeat=True, log=log), part(w, wanted_w, log=log)
    shape = [n if k is None else len(k) for n, k in zip(node.aval.shape, keep)]
    shape[out[0]] = left.shape[lhs[0]]
    if 0 in left.shape or 0 in right.shape or 0 in shape:
        return jnp.zeros(shape, node.aval.dtype)
    return apply(node, [left, right], False, feature_group_count=groups)[0]


def _constant_image(node: Node, x: Sliced, w: Sliced, sums: Summed) -> tuple[Any, bool]:
    """The convolution of the channels that both operands miss; at the borders it differs from inside."""
    lhs, rhs, _ = node.params["dimension_numbers"]
    known = x.fill_known and w.fill_known
    image = _on(x, {lhs[1]: sums.constant}, lhs[2:])
    kernel = _on(w, {rhs[1]: sums.constant}, (*rhs[2:], rhs[0]))
    return apply(node, [image, kernel], known)[0], known


def _on(x: Sliced, chosen: Mapping[int, Indices], full: Sequence[int]) -> Any:
    """The fill of a value at chosen indices, with some axes at their full size."""
    fill = x.fill
    for a in range(x.rank):
        sizes = list(fill.shape)
        if a in chosen:
            if sizes[a] > 1:
                fill = picked(fill, chosen[a], a, x.fill_known)
                continue
            sizes[a] = len(chosen[a])
        elif a in full:
            sizes[a] = x.shape[a]
        fill = spread(fill, sizes, x.fill_known)
    return fill


def _grouped(domain: Any, node: Node, x: Sliced, w: Sliced) -> Sequence[Any]:
    """Groups of channels that see nothing of each other: whole groups go."""
    lhs, rhs, out = node.params["dimension_numbers"]
    groups, wide = node.params["feature_group_count"], x.shape[lhs[1]] // node.params["feature_group_count"]
    deep = w.shape[rhs[0]] // groups
    gone_in, gone_out = x.removed(lhs[1]), w.removed(rhs[0])
    # Of a group, everything that comes in or everything that goes out is missing.
    lost = {
        "zero in": _whole_groups(x.zero_at(lhs[1]), wide, groups),
        "zero out": _whole_groups(w.zero_at(rhs[0]), deep, groups),
        "void in": _whole_groups(merged(x.void[lhs[1]], x.zero_at(lhs[1])), wide, groups),
        "void out": _whole_groups(merged(w.void[rhs[0]], w.zero_at(rhs[0])), deep, groups),
        "known": np.intersect1d(_whole_groups(gone_in, wide, groups), _whole_groups(gone_out, deep, groups)),
    }
    zero = merged(lost["zero in"], lost["zero out"])
    # Where what goes out is void, so is what comes of it; where only what comes in is, zero weights meet it.
    void = np.setdiff1d(merged(lost["void in"], lost["void out"]), zero)
    known = np.setdiff1d(lost["known"], merged(zero, void))
    if known.size and not (x.fill_known and w.fill_known):
        known = NONE
    kept = without(groups, merged(zero, void, known))
    inner = _inner(x, lhs[1], w, rhs[1], kept, wide)
    channels_in = (kept[:, None] * wide + inner).ravel()
    channels_out, void_out = _outputs(w, rhs[0], kept, deep)
    count = node.aval.shape[out[1]]
    keep: list[Indices | None] = [None] * len(node.aval.shape)
    keep[out[1]] = kept_or_none(count, without(count, channels_out))
    voids = [NONE] * len(keep)
    voids[out[1]] = merged(_members(void, deep), void_out)
    array = _convolved(
        node,
        x,
        w,
        {lhs[1]: channels_in},
        {rhs[0]: channels_out, rhs[1]: inner},
        keep,
        domain.log,
        groups=max(len(kept), 1),
    )
    repeated = [False] * len(keep)
    repeated[out[0]] = x.repeated[lhs[0]]
    fill = _grouped_constant(node, x, w, known, wide, deep) if known.size else None
    return [made(node.aval.shape, array, keep, repeated, fill, voids)]


def _whole_groups(indices: Indices, each: int, groups: int) -> Indices:
    """The groups all of whose members are among the given ones."""
    if not indices.size:
        return NONE
    return np.flatnonzero(np.bincount(indices // each, minlength=groups) == each)


def _members(groups: Indices, each: int) -> Indices:
    return (groups[:, None] * each + np.arange(each)).ravel()


def _inner(x: Sliced, a: int, w: Sliced, b: int, kept: Indices, wide: int) -> Indices:
    """Which channels of each kept group count: those that are not zero in all of them, nor in the kernel."""
    zero = np.zeros(x.shape[a], bool)
    zero[x.zero_at(a)] = True
    everywhere = np.flatnonzero(zero.reshape(-1, wide)[kept].all(axis=0)) if kept.size else NONE
    return without(wide, merged(everywhere, w.zero_at(b)))


def _outputs(w: Sliced, axis: int, kept: Indices, deep: int) -> tuple[Indices, Indices]:
    """What the kept groups give: of each group as many channels as of any other; and what of the rest is void."""
    keeps = np.zeros((w.shape[axis] // deep, deep), bool)
    zero = np.zeros_like(keeps)
    keeps.ravel()[w.kept(axis)] = True
    zero.ravel()[merged(w.zero_at(axis), w.void[axis])] = True
    wanted = keeps | ~zero
    void = np.zeros_like(keeps)
    void.ravel()[w.void[axis]] = True
    most = max((int(wanted[g].sum()) for g in kept), default=0)
    for g in kept:
        # A group with fewer channels gets some back: none that is void, if there are others.
        order = np.argsort(wanted[g] * -2 + void[g], kind="stable")
        if void[g][order[:most]].any():
            raise Undefined(w, axis, g * deep + order[:most][void[g][order[:most]]])
        wanted[g][order[:most]] = True
    chosen = np.zeros_like(keeps)
    chosen[kept] = wanted[kept]
    left_out = np.zeros_like(keeps)
    left_out[kept] = void[kept]
    return np.flatnonzero(chosen), np.flatnonzero(left_out & ~chosen)


def _grouped_constant(node: Node, x: Sliced, w: Sliced, known: Indices, wide: int, deep: int) -> np.ndarray:
    """What missing groups give, in an image with all channels of the result."""
    lhs, rhs, out = node.params["dimension_numbers"]
    image = _on(x, {lhs[1]: _members(known, wide)}, lhs[2:])
    kernel = _on(w, {rhs[0]: _members(known, deep)}, (*rhs[2:], rhs[1]))
    (given,) = apply(node, [image, kernel], True, feature_group_count=len(known))
    shape = list(given.shape)
    shape[out[1]] = node.aval.shape[out[1]]
    full = np.zeros(shape, given.dtype)
    place = [slice(None)] * full.ndim
    place[out[1]] = _members(known, deep)  # type: ignore[call-overload]
    full[tuple(place)] = given
    return full


RULES: Mapping[str, Rule] = {"dot_general": dot_general, "conv_general_dilated": convolution}
