"""Is the rewritten program right? Comparing results, and finding the rule that made them wrong.

Results of a reordered computation differ by rounding. How much rounding can matter in a given program is measured on
the program itself: its inputs are moved by one unit in the last place, and what comes out moves by so much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, GraphBuilder, Value

# A difference is rounding if it is below this many units in the last place of the largest result ...
_UNITS = {"bitwise": 64.0, "reassociate": 1024.0, "lossy": 16384.0}
# ... or below this many times what one unit in the last place of the inputs does to the results.
_SENSITIVITY = 16.0


@dataclass(frozen=True)
class Agreement:
    """How two results compare.

    Attributes:
        passed: whether they differ by no more than rounding.
        max_absolute_error: largest difference between finite results.
        max_relative_error: that difference relative to the largest result of its array.
        reason: what is wrong, where something is.
    """

    passed: bool
    max_absolute_error: float
    max_relative_error: float
    reason: str = ""


def agree(
    reference: Sequence[Any], candidate: Sequence[Any], moved: Sequence[Any] | None = None, tier: str = "reassociate"
) -> Agreement:
    """Compares results with a reference.

    Args:
        reference: results of the original program.
        candidate: results of the rewritten one, in the same order.
        moved: results of the original for inputs moved by one unit in the last place (:func:`nudge`).
        tier: weakest tier of the rules that were used.

    Returns:
        Whether all agree; integers, booleans and keys exactly, floats within rounding, with NaN and ±Inf where the
        reference has them.
    """
    worst_absolute = worst_relative = 0.0
    reasons = []
    for i, (want, have) in enumerate(zip(reference, candidate, strict=True)):
        if not _jax.is_inexact(want.dtype):
            if not np.array_equal(_bits(want), _bits(have)):
                share = float(np.mean(_bits(want) != _bits(have)))
                reasons.append(f"result {i} ({want.dtype}) differs in {share:.2%} of its elements")
            continue
        want64, have64 = _wide(want), _wide(have)
        finite = np.isfinite(want64)
        if (
            not np.array_equal(want64[~finite], have64[~finite], equal_nan=True)
            or not np.isfinite(have64[finite]).all()
        ):
            reasons.append(f"result {i} is NaN or infinite at other places")
            continue
        if not finite.any():
            continue
        error = float(np.max(np.abs(want64[finite] - have64[finite])))
        scale = float(np.max(np.abs(want64[finite])))
        limit = _UNITS[tier] * float(jnp.finfo(want.dtype).eps) * scale
        if moved is not None:
            shift = np.abs(_wide(moved[i]) - want64)[finite]
            limit += _SENSITIVITY * float(np.max(shift[np.isfinite(shift)], initial=0.0))
        worst_absolute = max(worst_absolute, error)
        worst_relative = max(worst_relative, error / scale if scale else float(error > 0))
        if error > limit:
            reasons.append(f"result {i} is off by {error:.3g} where rounding explains {limit:.3g}")
    return Agreement(not reasons, worst_absolute, worst_relative, "; ".join(reasons))


def nudge(values: Sequence[Any]) -> list[Any]:
    """Floating-point arrays moved by one unit in the last place, up and down at random; the others unchanged."""
    rng = np.random.default_rng(0)

    def move(x: Any) -> Any:
        aval = _jax.aval_of(x)
        if not hasattr(aval, "dtype") or _jax.is_extended(aval.dtype) or not _jax.is_inexact(aval.dtype):
            return x
        signs = rng.integers(0, 2, aval.shape) * 2 - 1
        moved = jnp.asarray(x) * (1 + signs.astype(aval.dtype) * jnp.finfo(aval.dtype).eps).astype(aval.dtype)
        return _jax.with_aval(moved, aval)

    return [move(x) for x in values]


def guilty(names: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> str | None:
    """The rule that makes a program wrong, by bisection.

    Args:
        names: rules that fired.
        passes: whether the program comes out right with only the given rules.

    Returns:
        The first rule in ``names`` with which results go wrong, or None where even all of them pass.
    """
    low, high = 0, len(names)
    if passes(names):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if passes(names[:middle]):
            low = middle
        else:
            high = middle
    return names[high - 1] if names else None


def split_at_decisions(graph: Graph) -> tuple[Graph, Graph] | None:
    """Splits a program where it turns floats into something else: an index, a count, a truth value.

    Returns:
        The program that gives the floating-point results, and after them the floats that decisions look at; and the
        program that takes the inputs and those floats and gives the other results. None where nothing is decided.
    """
    smooth = [v for v in graph.outputs if _is_smooth(v)]
    others = [v for v in graph.outputs if not _is_smooth(v)]
    looked_at: dict[Value, None] = {}
    stack, seen = list(others), set(others)
    while stack:
        value = stack.pop()
        for operand in value.node.inputs:
            if _is_smooth(operand) and not _is_smooth(value):
                if not operand.node.is_const:
                    looked_at[operand] = None
            elif operand not in seen:
                seen.add(operand)
                stack.append(operand)
    if not looked_at:
        return None
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    moved = {value: builder.input(value.aval) for value in looked_at}
    for node in graph.nodes:
        new = builder.copy(node, [moved.get(v, v) for v in node.inputs])
        for i in range(len(node.avals)):
            moved.setdefault(Value(node, i), Value(new, i))
    decided = builder.build([moved.get(v, v) for v in others])
    return _part(graph, (*smooth, *looked_at)), decided


def _part(graph: Graph, outputs: Sequence[Value]) -> Graph:
    """The program that gives only some values, without the operations that only others need."""
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    for node in graph.nodes:
        builder.add(node)
    return builder.build(outputs)


def _is_smooth(value: Value) -> bool:
    return hasattr(value.aval, "dtype") and _jax.is_inexact(value.dtype)


def _wide(x: Any) -> np.ndarray:
    array = np.asarray(x)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _bits(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if _jax.is_extended(x.dtype) else x)
