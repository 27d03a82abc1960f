"""JAX's common operations in NumPy, by name: an oracle that shares no code with XLA and compiles nothing.

Each entry is called as ``NUMPY[op](node, *inputs)`` with arrays whose floats are all float64 (or all int64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Node


def is_floating(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


def narrows(node: Node) -> bool:
    """Whether a cast goes from one floating-point dtype to another that cannot hold all of its values."""
    source, target = node.inputs[0].aval, node.aval
    if not (is_floating(source) and is_floating(target)):
        return False
    return jnp.promote_types(source.dtype, target.dtype) != target.dtype


def _convert(node: Node, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float64 and narrows(node):
        return x.astype(node.aval.dtype)
    if node.aval.dtype == np.bool_:
        return x != 0
    return x.astype(node.aval.dtype) if not _jax.is_inexact(node.aval.dtype) else x


def _dot(node: Node, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (contract_x, contract_y), (batch_x, batch_y) = node.params["dimension_numbers"]
    letters = iter(range(x.ndim + y.ndim))
    names_x = [next(letters) for _ in range(x.ndim)]
    names_y = [next(letters) for _ in range(y.ndim)]
    for i, j in [*zip(contract_x, contract_y), *zip(batch_x, batch_y)]:
        names_y[j] = names_x[i]
    out = [names_x[i] for i in batch_x]
    out += [n for i, n in enumerate(names_x) if i not in (*contract_x, *batch_x)]
    out += [n for j, n in enumerate(names_y) if j not in (*contract_y, *batch_y)]
    return np.einsum(x, names_x, y, names_y, out)


def _padded(x: np.ndarray, value: Any, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
    for axis, (low, high, interior) in enumerate(config):
        size = x.shape[axis]
        spread = size + max(size - 1, 0) * interior
        shape = list(x.shape)
        shape[axis] = max(low, 0) + spread + max(high, 0)
        wide = np.full(shape, value, x.dtype)
        place = [slice(None)] * x.ndim
        place[axis] = slice(max(low, 0), max(low, 0) + spread, interior + 1)
        wide[tuple(place)] = x
        place[axis] = slice(max(-low, 0), shape[axis] - max(-high, 0))
        x = wide[tuple(place)]
    return x


def _conv(node: Node, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    p = node.params
    spec = p["dimension_numbers"]
    x, w = x.transpose(spec.lhs_spec), w.transpose(spec.rhs_spec)
    rank = x.ndim - 2
    sides = [(low, high, step - 1) for (low, high), step in zip(p["padding"], p["lhs_dilation"])]
    x = _padded(x, 0, [(0, 0, 0)] * 2 + sides)
    w = _padded(w, 0, [(0, 0, 0)] * 2 + [(0, 0, step - 1) for step in p["rhs_dilation"]])
    spatial = tuple(range(2, 2 + rank))
    out_shape = [node.aval.shape[spec.out_spec[a]] for a in spatial]
    if 0 in (*out_shape, *x.shape, *w.shape):
        return np.zeros(node.aval.shape, x.dtype)
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=spatial)
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in p["window_strides"]))]
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    w = w.reshape(groups * batches, -1, *w.shape[1:])
    if batches > 1:
        windows = windows.reshape(batches, -1, *windows.shape[1:])
    else:
        windows = np.moveaxis(windows.reshape(len(x), groups, -1, *windows.shape[2:]), 1, 0)
    outer, inner = list(range(4, 4 + rank)), list(range(4 + rank, 4 + 2 * rank))
    y = np.einsum(windows, [0, 1, 2, *outer, *inner], w, [0, 3, 2, *inner], [1, 0, 3, *outer])
    return y.reshape(y.shape[0], -1, *out_shape).transpose(np.argsort(spec.out_spec))


def _broadcast(node: Node, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(node.aval.shape)
    for axis, size in zip(node.params["broadcast_dimensions"], x.shape):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), node.aval.shape)


def _iota(node: Node) -> np.ndarray:
    shape, axis = node.aval.shape, node.params["dimension"]
    return np.broadcast_to(np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def _slice(node: Node, x: np.ndarray) -> np.ndarray:
    p = node.params
    steps = p["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], steps))]


def _extremum(reduce: Any, empty: Callable[[Any], Any]) -> Callable[..., np.ndarray]:
    def compute(node: Node, x: np.ndarray) -> np.ndarray:
        return reduce(x, axis=tuple(node.params["axes"]), initial=empty(x.dtype))

    return compute


def _least(dtype: Any) -> Any:
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _greatest(dtype: Any) -> Any:
    return np.inf if dtype.kind == "f" else np.iinfo(dtype).max


def _select(node: Node, which: np.ndarray, *options: np.ndarray) -> np.ndarray:
    which = np.broadcast_to(which.astype(np.int64), node.aval.shape)
    return functools.reduce(lambda y, i: np.where(which == i, options[i], y), range(1, len(options)), options[0])


def _cumsum(node: Node, x: np.ndarray) -> np.ndarray:
    axis = node.params["axis"]
    if node.params["reverse"]:
        return np.flip(np.cumsum(np.flip(x, axis), axis, dtype=x.dtype), axis)
    return np.cumsum(x, axis, dtype=x.dtype)


def _elementwise(fun: Callable[..., Any]) -> Callable[..., Any]:
    def compute(node: Node, *xs: np.ndarray) -> Any:
        y = fun(*xs)
        return y if np.shape(y) == node.aval.shape else np.broadcast_to(y, node.aval.shape)

    return compute


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "div": np.divide,
    "square": lambda x: x * x,
    "max": np.maximum,
    "min": np.minimum,
    "abs": np.abs,
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "floor": np.floor,
    "ceil": np.ceil,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "copy": np.copy,
    "copy_p": np.copy,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}

NUMPY: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(fun) for name, fun in _ELEMENTWISE.items()},
    "convert_element_type": _convert,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "pad": lambda node, x, value: _padded(x, value, node.params["padding_config"]),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "slice": _slice,
    "select_n": _select,
    "cumsum": _cumsum,
    "reshape": lambda node, x: x.reshape(node.aval.shape),
    "squeeze": lambda node, x: x.reshape(node.aval.shape),
    "transpose": lambda node, x: x.transpose(node.params["permutation"]),
    "rev": lambda node, x: np.flip(x, node.params["dimensions"]),
    "concatenate": lambda node, *xs: np.concatenate(xs, node.params["dimension"]),
    "stack": lambda node, *xs: np.stack(xs, node.params["axis"]),
    "split": lambda node, x: np.split(x, np.cumsum(node.params["sizes"])[:-1], node.params["axis"]),
    "tile": lambda node, x: np.tile(x, node.params["reps"]),
    "reduce_sum": lambda node, x: np.sum(x, axis=tuple(node.params["axes"]), dtype=x.dtype),
    "reduce_max": _extremum(np.max, _least),
    "reduce_min": _extremum(np.min, _greatest),
    "integer_pow": lambda node, x: x ** node.params["y"] if node.params["y"] >= 0 else 1 / x ** -node.params["y"],
}
