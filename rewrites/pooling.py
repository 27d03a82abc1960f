"""Pooling as operations on the elements of shifted slices.

XLA:CPU walks the windows of a ``reduce_window`` position by position; maxima or sums of whole slices run over
contiguous channels. The order of a window's elements stays the same.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Value
from jaxinfer.rewriting import Match, Rule, op, var

# One slice for each position of the window; beyond this many the program would be slow to compile.
_MOST_POSITIONS = 16


def _lowest(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


# How two elements of a window are joined, and what stands around an array that is padded.
_JOINED: Mapping[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "reduce_window_max": (lax.max, _lowest),
    "reduce_window_min": (lax.min, _highest),
    "reduce_window_sum": (lax.add, lambda dtype: 0),
}


def _few_positions(m: Match) -> bool:
    x, p = m["x"], m.params("pool")
    number = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    plain = all(n == 1 for n in p["base_dilation"]) and all(min(edge) >= 0 for edge in p["padding"])
    positions = math.prod(p["window_dimensions"])
    return is_static(x, m.roots[0]) and number and plain and 1 < positions <= _MOST_POSITIONS and 0 not in x.shape


def _over_slices(m: Match, x: Any) -> Any:
    join, around = _JOINED[m.nodes["pool"].op]
    p = m.params("pool")
    if any(map(any, p["padding"])):
        x = lax.pad(x, jnp.asarray(around(x.dtype), x.dtype), [(low, high, 0) for low, high in p["padding"]])
    # Without the barrier XLA computes what the array is made of once for each position.
    x = lax.optimization_barrier(x)
    places = itertools.product(*map(range, p["window_dimensions"]))
    return functools.reduce(join, [_at(m.roots[0], p, x, place) for place in places])


def _at(result: Value, p: Mapping[str, Any], x: Any, place: Sequence[int]) -> Any:
    """The elements at one position of all windows."""
    start = [i * dilation for i, dilation in zip(place, p["window_dilation"])]
    stop = [i + (n - 1) * stride + 1 for i, n, stride in zip(start, result.shape, p["window_strides"])]
    return lax.slice(x, start, stop, p["window_strides"])


def _cases(s: Any) -> Iterator[Any]:
    """Windows of several sizes, strides, dilations and paddings, over one and two axes."""
    rank = s.choice((1, 2))
    window, stride, dilation = s.choice((2, 3)), s.choice((1, 2)), s.choice((1, 1, 2))
    padding = s.choice(((0, 0), (1, 1), (0, 1)))
    name = s.choice(("max", "min", "sum"))
    join = {"max": lax.max, "min": lax.min, "sum": lax.add}[name]
    space = tuple(s.choice((6, 7)) for _ in range(rank))

    def program(x: Any) -> Any:
        start = {"max": _lowest, "min": _highest, "sum": lambda dtype: 0}[name](x.dtype)
        return lax.reduce_window(
            x,
            np.asarray(start, x.dtype),
            join,
            (1, *(window,) * rank, 1),
            (1, *(stride,) * rank, 1),
            ((0, 0), *(padding,) * rank, (0, 0)),
            window_dilation=(1, *(dilation,) * rank, 1),
        )

    yield program, (s.array(2, *space, 3),)


RULES: tuple[Rule, ...] = (
    Rule(
        "pool-over-slices",
        "maximum, minimum or sum over windows of x → that of slices of x, one for each position of the window",
        op(tuple(_JOINED), var("x"), name="pool"),
        _over_slices,
        "reassociate",
        kind="offer",
        when=_few_positions,
        cases=_cases,
    ),
)
