"""Operations that are linear in their array operands: structure, sums, conversions, complex parts, choices.

Forward mode applies the operation to tangents; reverse mode applies its transpose, written out here. The adjoint of a
slice is a pad, so that the adjoints of slices that do not overlap can be made one concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule, filled, unbroadcast
from jaxinfer.differentiation.tables.elementwise import broadcast
from jaxinfer.graph import Node


def operation_on(node: Node, *operands: Any) -> list[Any]:
    """The same operation on other operands."""
    return _jax.bind(node.primitive, operands, dict(node.params))


def zero(like: Any) -> Any:
    """A scalar zero of the dtype of a value."""
    return np.zeros((), _jax.aval_of(like).dtype)


# -- one operand ------------------------------------------------------------------------------------------------------


def _applied(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    """The operation itself; operands after the first, such as indices, have no tangents."""
    return operation_on(node, tangents[0], *primals[1:])


def _passed(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    return [tangents[0]]


def _by(transpose: Callable[[Node, Any, Any], Any]) -> PullbackRule:
    """The rule of an operation whose first operand alone is differentiated, from ``transpose(node, operand, ct)``."""

    def rule(
        node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
    ) -> list[Any]:
        return [transpose(node, primals[0], cotangents[0]), *[None] * (len(primals) - 1)]

    return rule


def _unreshaped(node: Node, x: Any, ct: Any) -> Any:
    order = node.params.get("dimensions")
    if order is None:
        return lax.reshape(ct, jnp.shape(x))
    back = lax.reshape(ct, tuple(jnp.shape(x)[d] for d in order))
    return lax.transpose(back, tuple(map(int, np.argsort(order))))


def _untransposed(node: Node, x: Any, ct: Any) -> Any:
    return lax.transpose(ct, tuple(map(int, np.argsort(node.params["permutation"]))))


def _unbroadcast_in_dim(node: Node, x: Any, ct: Any) -> Any:
    """Sums over what is repeated; axes of size one are dropped or put in without a sum."""
    shape, places = jnp.shape(x), node.params["broadcast_dimensions"]
    kept = {place for place, size in zip(places, shape) if size != 1}
    repeated = tuple(i for i, size in enumerate(ct.shape) if size != 1 and i not in kept)
    total = jnp.sum(ct, repeated) if repeated else ct
    return total if total.shape == shape else lax.reshape(total, shape)


def _unsliced(node: Node, x: Any, ct: Any) -> Any:
    if ct.size == 0:
        return None
    starts = node.params["start_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    last = [start + (size - 1) * stride for start, size, stride in zip(starts, ct.shape, strides)]
    after = [size - 1 - end for size, end in zip(jnp.shape(x), last)]
    return lax.pad(ct, zero(ct), [(a, b, stride - 1) for a, b, stride in zip(starts, after, strides)])


def _unsummed(node: Node, x: Any, ct: Any) -> Any:
    axes = node.params["axes"]
    return lax.broadcast_in_dim(ct, jnp.shape(x), tuple(i for i in range(jnp.ndim(x)) if i not in axes))


def _untiled(node: Node, x: Any, ct: Any) -> Any:
    shape, repetitions = jnp.shape(x), node.params["reps"]
    apart = lax.reshape(ct, tuple(size for pair in zip(repetitions, shape) for size in pair))
    return jnp.sum(apart, tuple(range(0, 2 * len(shape), 2)))


def _real_if(dtype: Any, ct: Any) -> Any:
    """A cotangent in another dtype; of complex ones the real part goes to a real dtype."""
    if jnp.iscomplexobj(ct) and not jnp.issubdtype(dtype, jnp.complexfloating):
        ct = lax.real(ct)
    return lax.convert_element_type(ct, dtype)


def _undynamic_slice(node: Node, primals: Sequence[Any], ct: Any) -> Any:
    return _put(lax.full(jnp.shape(primals[0]), 0, ct.dtype), ct, primals[1:])


def _dynamic_slice_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    return [_undynamic_slice(node, primals, cotangents[0]), *[None] * (len(primals) - 1)]


def _put(x: Any, update: Any, starts: Sequence[Any]) -> Any:
    # Indices of the operation count from the front and are clamped; Python's meaning of negative ones is gone.
    return lax.dynamic_update_slice(x, update, starts, allow_negative_indices=False)


# -- several operands or results --------------------------------------------------------------------------------------


def _all_filled(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    return operation_on(node, *map(filled, tangents, primals))


def _joined(pieces: Sequence[Any], likes: Sequence[Any], axis: int) -> Any:
    """A concatenation in which None stands for zeros of the shape of ``likes``; a lone piece is padded."""
    sizes = [jnp.shape(x)[axis] for x in likes]
    present = [i for i, piece in enumerate(pieces) if piece is not None]
    if len(present) > 1:
        return lax.concatenate([filled(p, x) for p, x in zip(pieces, likes)], axis)
    (i,) = present
    around = [(0, 0, 0)] * jnp.ndim(likes[0])
    around[axis] = (sum(sizes[:i]), sum(sizes[i + 1 :]), 0)
    return lax.pad(pieces[i], zero(pieces[i]), around)


def _concatenate_tangent(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]
) -> Sequence[Any]:
    return [_joined(tangents, primals, node.params["dimension"])]


def _concatenate_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (ct,), axis = cotangents, node.params["dimension"]
    ends = np.cumsum([jnp.shape(x)[axis] for x in primals]).tolist()
    starts = [0, *ends[:-1]]
    return [lax.slice_in_dim(ct, a, b, axis=axis) if mark else None for a, b, mark in zip(starts, ends, active)]


def _split_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    return [_joined(cotangents, outs, node.params["axis"])]


def _stack_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (ct,), axis = cotangents, node.params["axis"]
    if all(active):
        return list(lax.unstack(ct, axis))
    return [lax.index_in_dim(ct, i, axis, keepdims=False) if mark else None for i, mark in enumerate(active)]


def _unstack_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    axis = node.params["axis"]
    if sum(ct is not None for ct in cotangents) > 1:
        return [lax.stack([filled(ct, x) for ct, x in zip(cotangents, outs)], axis=axis)]
    wide = [None if ct is None else lax.expand_dims(ct, [axis]) for ct in cotangents]
    like = next(x for x in wide if x is not None)
    return [_joined(wide, [like] * len(wide), axis)]


def _each(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    """Result i is operand i, whatever the operation does besides."""
    found = iter(operation_on(node, *(t for t in tangents if t is not None)))
    return [None if t is None else next(found) for t in tangents]


def _each_back(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> Sequence[Any]:
    return _each(node, primals, outs, cotangents)


def _pad_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    moving, value = tangents
    return operation_on(node, filled(moving, primals[0]), zero(primals[1]) if value is None else value)


def _pad_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (x, _), (ct,), config = primals, cotangents, node.params["padding_config"]
    found: list[Any] = [None, None]
    if active[0]:
        found[0] = _unpadded(ct, jnp.shape(x), config)
    if active[1]:
        inside = lax.pad(lax.full(jnp.shape(x), True), np.False_, config)
        found[1] = jnp.sum(lax.select(inside, lax.full(ct.shape, 0, ct.dtype), ct))
    return found


def _unpadded(ct: Any, shape: Sequence[int], config: Sequence[tuple[int, int, int]]) -> Any:
    """What of a padded array came from the operand; zeros where the operand was cut off."""
    if math.prod(shape) == 0:
        return None
    cut = [(min(0, a), min(0, b), 0) for a, b, _ in config]
    if any(a or b for a, b, _ in cut):
        ct = lax.pad(ct, zero(ct), [(-a, -b, 0) for a, b, _ in cut])
    starts = [max(0, a) for a, _, _ in config]
    ends = [size - max(0, b) for size, (_, b, _) in zip(ct.shape, config)]
    strides = [between + 1 for _, _, between in config]
    return lax.slice(ct, starts, ends, strides)


def _select_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (which, *cases), (ct,) = primals, cotangents
    if len(cases) == 1:
        return [None, ct]
    nothing = lax.full(ct.shape, 0, ct.dtype)
    found: list[Any]
    if _jax.aval_of(which).dtype == bool:
        found = [lax.select_n(which, ct, nothing), lax.select_n(which, nothing, ct)]
    else:  # an index out of range means the nearest case
        last = len(cases) - 1
        tests = [lax.le, *[lax.eq] * (last - 1), lax.ge]
        found = [
            lax.select_n(test(which, np.asarray(i, which.dtype)), nothing, ct) if mark else None
            for i, (test, mark) in enumerate(zip(tests, active[1:]))
        ]
    return [None, *(x if mark else None for x, mark in zip(found, active[1:]))]


def _select_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    return operation_on(node, primals[0], *map(filled, tangents[1:], primals[1:]))


def _update_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    """Of dynamic_update_slice: what was overwritten gets nothing."""
    (_, update, *starts), (ct,) = primals, cotangents
    size = jnp.shape(update)
    found: list[Any] = [None] * len(primals)
    if active[0]:
        found[0] = _put(ct, lax.full(size, 0, ct.dtype), starts)
    if active[1]:
        found[1] = lax.dynamic_slice(ct, starts, size, allow_negative_indices=False)
    return found


def _update_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    return operation_on(node, *map(filled, tangents[:2], primals[:2]), *primals[2:])


# -- complex numbers --------------------------------------------------------------------------------------------------


def _complex_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
    re, im = (zero(x) if t is None else t for t, x in zip(tangents, primals))
    return [broadcast(lax.complex(re, im), outs[0])]


def _complex_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (x, y), (ct,) = primals, cotangents
    return [
        unbroadcast(lax.real(ct), x) if active[0] else None,
        lax.neg(unbroadcast(lax.imag(ct), y)) if active[1] else None,
    ]


def _unconjugated(node: Node, x: Any, ct: Any) -> Any:
    return lax.conj(ct) if jnp.iscomplexobj(x) else lax.real(ct)


_ONE_OPERAND: Mapping[str, Callable[[Node, Any, Any], Any]] = {
    "broadcast_in_dim": _unbroadcast_in_dim,
    "conj": _unconjugated,
    "convert_element_type": lambda node, x, ct: _real_if(_jax.aval_of(x).dtype, ct),
    "cumsum": lambda node, x, ct: lax.cumsum(ct, node.params["axis"], reverse=not node.params["reverse"]),
    "imag": lambda node, x, ct: lax.complex(zero(ct), lax.neg(ct)),
    "layout_constraint": lambda node, x, ct: operation_on(node, ct)[0],
    "real": lambda node, x, ct: lax.complex(ct, zero(ct)),
    "reduce_sum": _unsummed,
    "reshape": _unreshaped,
    "rev": lambda node, x, ct: lax.rev(ct, node.params["dimensions"]),
    "sharding_constraint": lambda node, x, ct: operation_on(node, ct)[0],
    "slice": _unsliced,
    "squeeze": lambda node, x, ct: lax.reshape(ct, jnp.shape(x)),
    "tile": _untiled,
    "transpose": _untransposed,
}
# Operations that give their operand back: a copy of a derivative serves nobody.
_SAME = ("copy", "copy_p", "name", "stage", "xla_metadata_value")

TANGENTS: Mapping[str, TangentRule] = {
    **dict.fromkeys(_ONE_OPERAND, _applied),
    **dict.fromkeys(_SAME, _passed),
    "complex": _complex_tangent,
    "concatenate": _concatenate_tangent,
    "dynamic_slice": _applied,
    "dynamic_update_slice": _update_tangent,
    "optimization_barrier": _each,
    "pad": _pad_tangent,
    "select_n": _select_tangent,
    "split": _applied,
    "stack": _all_filled,
    "tie": lambda node, primals, outs, tangents: [tangents[1]],
    "unstack": _applied,
}
PULLBACKS: Mapping[str, PullbackRule] = {
    **{op: _by(transpose) for op, transpose in _ONE_OPERAND.items()},
    **dict.fromkeys(_SAME, _by(lambda node, x, ct: ct)),
    "complex": _complex_pullback,
    "concatenate": _concatenate_pullback,
    "dynamic_slice": _dynamic_slice_pullback,
    "dynamic_update_slice": _update_pullback,
    "optimization_barrier": _each_back,
    "pad": _pad_pullback,
    "select_n": _select_pullback,
    "split": _split_pullback,
    "stack": _stack_pullback,
    "tie": lambda node, primals, outs, active, cotangents: [None, cotangents[0]],
    "unstack": _unstack_pullback,
}
