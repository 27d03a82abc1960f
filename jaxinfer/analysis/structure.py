"""What operations are, which values are known, and how a value is laid out over the axes of its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.graph import Graph, Node, Value

T = TypeVar("T")

UNARY = frozenset(
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj convert_element_type cos cosh "
    "digamma erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p log2 logistic neg not "
    "population_count real reduce_precision round rsqrt sign sin sinh sqrt square tan tanh".split()
)
BINARY = frozenset(
    "add and atan2 div eq ge gt le lt max min mul ne nextafter or pow rem shift_left shift_right_arithmetic "
    "shift_right_logical sub xor".split()
)
# The operands of these may differ in size where one of them is 1, or be scalars.
ELEMENTWISE = UNARY | BINARY
# Operations that only move elements.
MOVEMENT = frozenset({"reshape", "transpose", "broadcast_in_dim", "squeeze", "copy"})
# Results of these carry no rounding error beyond their operands'.
_EXACT = MOVEMENT | {
    "input",
    "const",
    "abs",
    "clamp",
    "concatenate",
    "dynamic_slice",
    "gather",
    "iota",
    "max",
    "min",
    "neg",
    "pad",
    "reduce_max",
    "reduce_min",
    "rev",
    "select_n",
    "slice",
    "stack",
    "stop_gradient",
}
_DEPTH = 16


def again(found: T | None) -> T:
    """What a replacement looks up again after its finder has found it."""
    assert found is not None
    return found


def rebind(node: Node, *inputs: Any, **changes: Any) -> Any:
    """The operation of a node on other operands, with some parameters changed."""
    (result,) = _jax.bind(node.primitive, inputs, {**node.params, **changes})
    return result


def is_static(*values: Value) -> bool:
    """Whether the shapes are known numbers: no symbolic dimensions, no tokens or typed keys."""
    # JAX's own dtypes, such as those of typed keys, are no NumPy dtypes.
    return all(
        isinstance(getattr(v.aval, "dtype", None), np.dtype) and all(type(d) is int for d in v.shape) for v in values
    )


def size(value: Value) -> int:
    """Number of elements."""
    return math.prod(value.shape)


def is_rounded(value: Value) -> bool:
    """Whether a floating-point value already carries a rounding error relative to its own size.

    A large known shift may be moved past a linear operation on such a value: the rounding this adds is of the order of
    the one that is there. On exact data (inputs, table entries) it could be much larger.
    """
    if not _jax.is_inexact(value.dtype):
        return True
    stack, depth = [value.node], 0
    while stack and depth < _DEPTH:
        node, depth = stack.pop(), depth + 1
        if node.op == "convert_element_type" or node.op in _EXACT:
            stack.extend(v.node for v in node.inputs if not v.node.is_const)
        else:
            return True
    return False


# -- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A value seen as a smaller one, repeated.

    Attributes:
        source: the smaller value; every axis of it longer than one stands in ``axes`` exactly once.
        axes: for each axis of the value, the axis of ``source`` it runs along, or None where all elements are equal.
    """

    source: Value
    axes: tuple[int | None, ...]

    @property
    def varies(self) -> frozenset[int]:
        """The axes of the value along which its elements may differ."""
        return frozenset(i for i, a in enumerate(self.axes) if a is not None)

    def spread(self, source: Any, places: Sequence[int] | None = None, rank: int | None = None) -> Any:
        """The source with its axes where they belong and length one along the others.

        Args:
            source: the array that ``self.source`` stands for.
            places: for each axis of the value, where it goes in the result; by default it stays.
            rank: rank of the result; by default the value's.
        """
        places = range(len(self.axes)) if places is None else places
        rank = len(self.axes) if rank is None else rank
        along = sorted((places[i], a) for i, a in enumerate(self.axes) if a is not None)
        shape = [1] * rank
        for place, axis in along:
            shape[place] = source.shape[axis]
        used = [axis for _, axis in along]
        rest = [axis for axis in range(source.ndim) if axis not in used]
        order = (*rest, *used)
        if order != tuple(range(source.ndim)):
            source = lax.transpose(source, order)
        return source if source.shape == tuple(shape) else lax.reshape(source, shape)


def layout(value: Value) -> Layout:
    """Looks through operations that only move or repeat elements."""
    axes: list[int | None] = [i if d != 1 else None for i, d in enumerate(value.shape)]
    while value.node.op in MOVEMENT and is_static(value):
        node = value.node
        inner = node.inputs[0]
        step = _axes_of(node, inner)
        if step is None:
            break
        axes = [None if a is None else step[a] for a in axes]
        value = inner
    return Layout(value, tuple(axes))


def _axes_of(node: Node, inner: Value) -> list[int | None] | None:
    """For each axis of the result the operand's axis it runs along, or None; None where elements change order."""
    if len(node.inputs) > 1 or not is_static(inner):
        return None
    if node.op == "copy":
        return list(range(len(inner.shape)))
    if node.op == "transpose":
        return list(node.params["permutation"])
    if node.op == "broadcast_in_dim":
        found: list[int | None] = [None] * len(node.aval.shape)
        for axis, place in enumerate(node.params["broadcast_dimensions"]):
            if inner.shape[axis] == node.aval.shape[place] and inner.shape[axis] != 1:
                found[place] = axis
        return found
    return aligned_axes(node.aval.shape, inner.shape) if moves_units(inner.shape, node.aval.shape) else None


def moves_units(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether a reshape only adds or drops axes of length one."""
    return [d for d in old if d != 1] == [d for d in new if d != 1]


def aligned_axes(shape: Sequence[int], other: Sequence[int]) -> list[int | None]:
    """For each axis of ``shape`` the axis of ``other``, a reshaped form, that runs through the same elements."""
    if 0 in shape:
        order = iter([i for i, d in enumerate(other) if d != 1])
        return [None if d == 1 else next(order) for d in shape] if moves_units(shape, other) else [None] * len(shape)
    starts, before = {}, 1
    for i, d in enumerate(other):
        if d != 1:
            starts[before, d] = i
        before *= d
    found, before = [], 1
    for d in shape:
        found.append(starts.get((before, d)) if d != 1 else None)
        before *= d
    return found


# -- known numbers ----------------------------------------------------------------------------------------------------


def known_number(graph: Graph, value: Value) -> np.ndarray | None:
    """The number that a scalar is known to be, computed from constants by a few scalar operations; else None."""
    needed: dict[Node, None] = {}
    stack = [value.node]
    while stack:
        node = stack.pop()
        if node in needed or node.is_const:
            continue
        scalar = len(node.avals) == 1 and node.aval.shape == () and not _jax.is_extended(node.aval.dtype)
        if node not in graph.known or not scalar or len(needed) == _DEPTH or any(True for _ in node.subgraphs):
            return None
        needed[node] = None
        stack.extend(v.node for v in node.inputs)
    if value.shape != ():
        return None
    results: dict[Node, Any] = {}
    with jax.ensure_compile_time_eval():
        for node in graph.nodes if needed else ():
            if node in needed:
                operands = [v.node.value if v.node.is_const else results[v.node] for v in node.inputs]
                results[node] = _of_integers(node, operands)
                if results[node] is None:
                    results[node] = rebind(node, *operands)
    return np.asarray(results[value.node] if needed else value.node.value)


# What need not be compiled to be known.
_OF_INTEGERS: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
}


def _of_integers(node: Node, operands: Sequence[Any]) -> np.ndarray | None:
    """The result of an operation on a few integers or truth values; None for other operations and numbers."""
    arrays = [np.asarray(x) for x in operands]
    if node.op not in _OF_INTEGERS or any(x.dtype.kind not in "iub" for x in arrays):
        return None
    if node.op == "select_n" and (len(arrays) != 3 or arrays[0].dtype.kind != "b"):
        return None
    # Arrays, unlike scalars, wrap around in silence.
    result = _OF_INTEGERS[node.op](*(x.reshape(1) for x in arrays))
    return np.asarray(result.reshape(()), node.aval.dtype)
