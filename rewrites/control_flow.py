"""Loops and branches whose course is known, and the bounds of what chooses between branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.structure import again, is_static, known_number
from jaxinfer.graph import Graph, Node, Value, run
from jaxinfer.rewriting import Find, Match, Rule
from jaxinfer.rewriting.sampler import Frozen


def _match(graph: Graph, node: Node, operands: tuple[Value, ...]) -> Match:
    roots = tuple(Value(node, i) for i in range(len(node.avals)))
    return Match(graph, roots, {f"x{i}": v for i, v in enumerate(operands)})


# -- bounds -----------------------------------------------------------------------------------------------------------

# How many operations deep bounds of an index are looked for.
_DEPTH = 4
_WIDEST = (-(2**63), 2**64)


def _bounds(graph: Graph, value: Value, depth: int = _DEPTH) -> tuple[int, int]:
    """The least and the largest number that a scalar integer may be."""
    if (number := known_number(graph, value)) is not None:
        return int(number), int(number)
    node, inputs = value.node, value.node.inputs
    if depth and node.op == "convert_element_type" and inputs[0].dtype == bool:
        return 0, 1
    if depth and node.op in ("max", "min"):
        (low, high), (other_low, other_high) = (_bounds(graph, v, depth - 1) for v in inputs)
        choose = max if node.op == "max" else min
        return choose(low, other_low), choose(high, other_high)
    return _WIDEST


def _find_bounded(graph: Graph, node: Node) -> Match | None:
    """A maximum or minimum of scalar integers one of which is never less, or more, than the other."""
    if node.aval.shape != () or not jnp.issubdtype(node.aval.dtype, jnp.integer):
        return None
    a, b = node.inputs
    for one, other in ((a, b), (b, a)):
        (low, high), (other_low, other_high) = _bounds(graph, one), _bounds(graph, other)
        if low >= other_high if node.op == "max" else high <= other_low:
            return Match(graph, (Value(node, 0),), {"x": one})
    return None


# -- cond -------------------------------------------------------------------------------------------------------------


def _find_known_branch(graph: Graph, node: Node) -> Match | None:
    return None if known_number(graph, node.inputs[0]) is None else _match(graph, node, node.inputs[1:])


def _run_branch(m: Match, **operands: Any) -> Any:
    node = m.roots[0].node
    branches = node.params["branches"]
    index = int(again(known_number(m.graph, node.inputs[0])))
    return run(branches[min(max(index, 0), len(branches) - 1)], {}, *operands.values())


# -- scan -------------------------------------------------------------------------------------------------------------


def _find_short_scan(graph: Graph, node: Node) -> Match | None:
    length = node.params["length"]
    if not isinstance(length, int) or length > 1 or not is_static(*node.inputs):
        return None
    return _match(graph, node, node.inputs)


def _run_short_scan(m: Match, **operands: Any) -> Any:
    node = m.roots[0].node
    values, consts = list(operands.values()), node.params["num_consts"]
    first = consts + node.params["num_carry"]
    if node.params["length"] == 0:
        return [*values[consts:first], *(jnp.zeros(a.shape, a.dtype) for a in node.avals[first - consts :])]
    steps = [lax.squeeze(x, (0,)) for x in values[first:]]
    out = run(node.params["body"], {}, *values[:first], *steps)
    carries = first - consts
    return [*out[:carries], *(lax.expand_dims(y, (0,)) for y in out[carries:])]


# -- while ------------------------------------------------------------------------------------------------------------


def _find_idle_while(graph: Graph, node: Node) -> Match | None:
    """A loop whose condition is known to fail at once."""
    cond, n_cond = node.params["cond"], node.params["cond_nconsts"]
    carry = node.inputs[n_cond + node.params["body_nconsts"] :]
    operands = (*node.inputs[:n_cond], *carry)
    needed = {v.node for n in cond.nodes for v in n.inputs} | {v.node for v in cond.outputs}
    read = [i for i, n in enumerate(cond.inputs) if n in needed]
    if cond.has_effects or not is_static(*operands) or any(v.shape != () for v in cond.outputs):
        return None
    numbers = {i: known_number(graph, operands[i]) for i in read}
    if any(number is None for number in numbers.values()):
        return None
    with jax.ensure_compile_time_eval():
        values = [numbers.get(i, np.zeros(v.shape, v.dtype)) for i, v in enumerate(operands)]
        (goes_on,) = run(cond, {}, *values)
        return None if bool(goes_on) else _match(graph, node, carry)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case_branch(s: Any) -> Iterator[Any]:
    index = Frozen(jnp.asarray(s.integers(0, 3), "int32"))
    branches = [lambda x, y: x + y, lambda x, y: x * y, lambda x, y: x - y]
    shape = s.shape(2)
    yield lambda i, x, y: lax.switch(i, branches, x, y), (index, s.array(*shape), s.array(*shape))


def _case_bounded(s: Any) -> Iterator[Any]:
    yield lambda p: jnp.clip(p.astype("int32"), 0, 1), (s.array(dtype=bool),)
    i = s.array(dtype="int32")
    yield lambda i: jnp.clip(jnp.clip(i, 0, 3), 0, 3), (i,)


def _case_scan(s: Any) -> Iterator[Any]:
    def step(carry: Any, x: Any) -> Any:
        return carry + x, carry * x

    size = s.dim()
    for length in (0, 1):
        yield lambda c, xs: lax.scan(step, c, xs), (s.array(size), s.array(length, size))


def _case_while(s: Any) -> Iterator[Any]:
    def loop(x: Any) -> Any:
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (5, x))[1]

    yield loop, (s.array(s.dim()),)


RULES: tuple[Rule, ...] = (
    Rule(
        "known-branch",
        "switch(known i, branches, x) → branches[i](x)",
        Find(("cond",), _find_known_branch),
        _run_branch,
        "bitwise",
        reads_values=True,
        cases=_case_branch,
    ),
    Rule(
        "within-bounds",
        "max(i, least i), min(i, largest i) → i",
        Find(("max", "min"), _find_bounded),
        lambda m, x: x,
        "bitwise",
        reads_values=True,
        cases=_case_bounded,
    ),
    Rule(
        "short-scan",
        "scan of one step or none → the step, or nothing",
        Find(("scan",), _find_short_scan),
        _run_short_scan,
        "bitwise",
        cases=_case_scan,
    ),
    Rule(
        "idle-while",
        "while(known to be false at first) x → x",
        Find(("while",), _find_idle_while),
        lambda m, **carry: list(carry.values()),
        "bitwise",
        reads_values=True,
        cases=_case_while,
    ),
)
