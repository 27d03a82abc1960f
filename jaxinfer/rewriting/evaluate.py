"""Evaluation one operation at a time: on the arrays as they are, over the real numbers, and over the integers.

These are the prover's instruments. :class:`OpByOp` runs each operation by itself, so that what is bit for bit equal
does not depend on how a compiler fuses the rest. :class:`Reals` and :class:`Integers` run a program of any
floating-point dtype with float64 or with whole numbers modulo 2**64 in place of its floats, mostly in NumPy, which makes
them an oracle independent of XLA. Narrowing casts that the program writes are functions of their own and still round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Domain, Node, interpret
from jaxinfer.graph.emit import Emit


class NotExact(Exception):
    """A program is no polynomial with whole coefficients, so it cannot be run over the integers."""


class Stepwise(Domain[Any]):
    """Control flow on concrete values: loops loop, branches are chosen."""

    def empty(self, aval: Any) -> Any:
        """The stacked outputs of a scan of no steps."""
        return np.zeros(aval.shape, aval.dtype)

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
        fixed, carry = inputs[:consts], list(inputs[consts : consts + carries])
        xs, length = inputs[consts + carries :], node.params["length"]
        order = range(length - 1, -1, -1) if node.params["reverse"] else range(length)
        rows: dict[int, list[Any]] = {}
        for i in order:
            out = interpret(body, self, *fixed, *carry, *(x[i] for x in xs))
            carry, rows[i] = out[:carries], out[carries:]
        if not length:
            return [*carry, *(self.empty(aval) for aval in node.avals[carries:])]
        return [*carry, *(_stack(column) for column in zip(*(rows[i] for i in range(length))))]

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body, carry = inputs[:n_cond], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]
        while np.all(interpret(node.params["cond"], self, *for_cond, *carry)[0]):
            carry = tuple(interpret(node.params["body"], self, *for_body, *carry))
        return carry

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        branches = node.params["branches"]
        return interpret(branches[int(np.clip(index, 0, len(branches) - 1))], self, *inputs)


class OpByOp(Stepwise, Emit):
    """Each primitive bound by itself, in its own dtype."""

    def __init__(self) -> None:
        super().__init__({})

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return interpret(node.params["body"], self, *inputs)


class Reals(Stepwise):
    """Every floating-point number is a float64, whatever dtype the program gives it."""

    number: ClassVar[Any] = np.float64

    def lifted(self, dtype: Any) -> Any:
        """The dtype that stands for ``dtype`` here."""
        if _jax.is_extended(dtype):
            return dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return np.dtype(np.complex128)
        return np.dtype(self.number) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)

    def lift(self, value: Any) -> Any:
        """An array of the program as a value of this domain."""
        dtype = _jax.aval_of(value).dtype
        return value if _jax.is_extended(dtype) else np.asarray(value).astype(self.lifted(dtype))

    def constant(self, node: Node) -> Any:
        return self.lift(node.value)

    def empty(self, aval: Any) -> Any:
        return np.zeros(aval.shape, self.lifted(aval.dtype))

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        compute = _NUMPY.get(node.op) if _numpy_agrees(node) else None
        with np.errstate(all="ignore"):
            if compute is None:
                results = self._by_jax(node, *inputs)
            elif node.op == "split":
                results = compute(node, *inputs)
            else:
                results = [compute(node, *_together(node, self, inputs))]
            return [self._checked(node, i, y) for i, y in enumerate(results)]

    def _checked(self, node: Node, index: int, result: Any) -> Any:
        aval = node.avals[index]
        if _jax.is_extended(aval.dtype):
            return result
        result = np.asarray(result)
        if result.shape != aval.shape:
            raise AssertionError(f"{node!r} was evaluated to the shape {result.shape}")
        return result.astype(self.lifted(aval.dtype))

    def _by_jax(self, node: Node, *inputs: Any) -> Sequence[Any]:
        with jax.enable_x64(True):
            operands = [x if _is_key(x) else jnp.asarray(x) for x in inputs]
            if node.op in _SCATTERS:
                options = {k: node.params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
                return [_SCATTERS[node.op](*operands, node.params["dimension_numbers"], **options)]
            params = {name: self._param(node, value) for name, value in node.params.items()}
            return _jax.bind(node.primitive, operands, params)

    def _param(self, node: Node, value: Any) -> Any:
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            raise NotImplementedError(f"the prover cannot evaluate {node!r} over the reals: it holds a program")
        return self.lifted(value) if isinstance(value, np.dtype) else value


class Integers(Reals):
    """Every floating-point number is a whole number modulo 2**64.

    Two polynomials with whole coefficients that agree at random points are equal with high probability (Schwartz, 1980;
    Zippel, 1979), and no rounding blurs the comparison.
    """

    number: ClassVar[Any] = np.int64

    def lift(self, value: Any) -> Any:
        if jnp.issubdtype(_jax.aval_of(value).dtype, jnp.inexact):
            array = np.asarray(value).astype(np.complex128)
            if not np.all(array == np.rint(array.real)):
                raise NotExact("a constant is no whole number")
        return super().lift(value)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        avals = [*(v.aval for v in node.inputs), *node.avals]
        kinds = [jnp.result_type(a.dtype) for a in avals if not _jax.is_extended(a.dtype)]
        if any(jnp.issubdtype(k, jnp.complexfloating) for k in kinds):
            raise NotExact(f"{node.op} of complex numbers")
        if any(jnp.issubdtype(k, jnp.floating) for k in kinds) and not _is_ring_operation(node):
            raise NotExact(f"{node.op} is no ring operation")
        return super().default(node, *inputs)


_RING = frozenset(
    {
        "add",
        "add_any",
        "broadcast_in_dim",
        "concatenate",
        "conv_general_dilated",
        "copy",
        "copy_p",
        "cumsum",
        "dot_general",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "iota",
        "mul",
        "neg",
        "optimization_barrier",
        "pad",
        "reduce_sum",
        "reshape",
        "rev",
        "scatter",
        "scatter-add",
        "select_n",
        "slice",
        "split",
        "square",
        "squeeze",
        "stack",
        "sub",
        "tile",
        "transpose",
    }
)


def _is_ring_operation(node: Node) -> bool:
    if node.op == "integer_pow":
        return node.params["y"] >= 0
    if node.op == "convert_element_type":
        return _floating(node.aval) and not _narrows(node)
    return node.op in _RING


def _floating(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.floating))


def _narrows(node: Node) -> bool:
    """Whether a cast goes from one floating-point dtype to another that cannot hold all of its values."""
    source, target = node.inputs[0].aval, node.aval
    if not (_floating(source) and _floating(target)):
        return False
    return jnp.promote_types(source.dtype, target.dtype) != target.dtype


def _numpy_agrees(node: Node) -> bool:
    """Whether NumPy's operation means the same as JAX's: integers are divided differently, typed keys are unknown."""
    avals = (*(v.aval for v in node.inputs), *node.avals)
    if any(_jax.is_extended(a.dtype) for a in avals):
        return False
    return node.op not in ("div", "integer_pow") or _jax.is_inexact(node.aval.dtype)


# Their parameters hold the update as a program in the original dtype, so they are called by their public names.
_SCATTERS: dict[str, Callable[..., Any]] = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter-min": jax.lax.scatter_min,
    "scatter-max": jax.lax.scatter_max,
}


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and _jax.is_extended(value.dtype)


def _stack(rows: Sequence[Any]) -> Any:
    return np.stack(rows) if all(isinstance(r, np.ndarray) for r in rows) else jnp.stack(rows)


# -- operations in NumPy ----------------------------------------------------------------------------------------------


def _together(node: Node, domain: Reals, inputs: Sequence[Any]) -> Sequence[Any]:
    """Products of small integers into a wider dtype are taken in that dtype."""
    if node.op in ("dot_general", "conv_general_dilated"):
        return [x.astype(domain.lifted(node.aval.dtype)) for x in inputs]
    return inputs


def _convert(node: Node, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float64 and _narrows(node):
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

_NUMPY: dict[str, Callable[..., Any]] = {
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
