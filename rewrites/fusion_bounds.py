"""Where XLA's CPU backend fuses what runs faster apart.

A sum or an extremum goes to a library, and with it the elementwise operations before it. The library reads arrays, so
every slice that these operations take part in is written out first, spread to the full size: a stencil of n taps,
summed, writes n arrays and reads them again. Computed apart, the same operations are one loop over one array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.structure import ELEMENTWISE, is_static, rebind
from jaxinfer.graph import Node, Value
from jaxinfer.rewriting import Match, Rule, op, var

_REDUCTIONS = tuple("reduce_max reduce_min reduce_sum reduce_window_max reduce_window_min reduce_window_sum".split())
# Other types are summed by XLA itself, which fuses slices as it should.
_DTYPES = ("bfloat16", "float32", "float64")
# What is read without being written out first, or seen through.
_VIEWS = frozenset("broadcast_in_dim expand_dims reshape squeeze".split())
_PARTS = frozenset("dynamic_slice pad rev slice transpose".split())
# From so many parts on; a part counts if it is no more than so many times smaller than what is reduced.
_SEVERAL, _SMALLER = 2, 256
# Operations looked at.
_FAR = 128


def _reads_parts(m: Match) -> bool:
    x = m["x"]
    if not is_static(x) or str(x.dtype) not in _DTYPES or x.node.op not in ELEMENTWISE:
        return False
    least = math.prod(x.shape) / _SMALLER
    parts: set[Value] = set()
    seen: set[Node] = set()
    stack = [x]
    while stack and len(seen) < _FAR:
        value = stack.pop()
        node = value.node
        if node.op in _PARTS and math.prod(value.shape) >= least and not m.graph.is_known(value):
            parts.add(value)
            if len(parts) == _SEVERAL:
                return True
        elif (node.op in ELEMENTWISE or node.op in _VIEWS) and node not in seen:
            seen.add(node)
            stack.extend(v for v in node.inputs if is_static(v))
    return False


def _apart(m: Match, x: Any) -> Any:
    return rebind(m.roots[0].node, lax.optimization_barrier(x))


def _cases(s: Any) -> Iterator[Any]:
    s.only(*_DTYPES)
    k = s.array(3, 3)

    def stencil(x: Any, k: Any) -> Any:
        return sum(k[i, j] * x[i : i + 4, j : j + 4] for i in range(3) for j in range(3))

    reduce = s.choice((jnp.sum, jnp.max, jnp.min))
    axis = s.choice((None, 0, 1))
    yield lambda x, k: reduce(stencil(x, k), axis=axis), (s.array(6, 6), k)
    yield lambda x, k: lax.reduce_window(stencil(x, k), -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"), (s.array(6, 6), k)
    yield lambda x: jnp.sum((x[2:] - 2 * x[1:-1] + x[:-2]) ** 2), (s.array(9, 3),)


RULES: tuple[Rule, ...] = (
    Rule(
        "parts-before-reduction",
        "sum or extremum of what is computed from several slices → the same, of an array that is written first",
        op(_REDUCTIONS, var("x")),
        _apart,
        "bitwise",
        when=_reads_parts,
        cases=_cases,
        platforms=frozenset({"cpu"}),
    ),
)
