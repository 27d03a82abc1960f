"""Which outputs of a linear program may depend on which elements of its inputs.

A derivative is asked of the program that computes tangents (or cotangents), which JAX's own rules have made linear in
them: what flows along an edge that depends on a tangent is the matrix of its dependence, each entry a known
coefficient or "something", and every operation multiplies it by a sparse local matrix. So a coefficient known to be
zero cuts, ``x - x`` cancels, and the derivative of a custom rule is that rule's. Values that do not depend on tangents
carry what is known of them: the array, or the places where it is zero.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy import sparse

from jaxinfer import _jax
from jaxinfer.differentiation.sparse.moves import zero_places
from jaxinfer.differentiation.sparse.pattern import (
    NOTHING,
    Flow,
    Known,
    Pattern,
    Rows,
    TooDense,
    blurred,
    combined,
    is_array,
    join_rows,
    size,
    take,
)
from jaxinfer.differentiation.sparse.rules import RULES, whole
from jaxinfer.graph import Domain, Graph, Node, interpret
from jaxinfer.rewriting.numpy_operations import NUMPY

# Operations that are walked through when loops are followed step by step.
_MOST_STEPS = 20_000
# In NumPy these give the very same bits as in XLA, so that what is compared with a known value comes out the same.
_EXACT_IN_NUMPY = frozenset(
    "abs add and broadcast_in_dim clamp concatenate copy eq ge gt iota le lt max min mul ne neg not or pad reshape rev "
    "select_n slice split squeeze stack sub tile transpose xor".split()
)


class Dependence(Domain[Flow]):
    """Follows the dependence on the elements of some inputs through a program.

    Attributes:
        coarse: operations that had no rule, with counts.
    """

    def __init__(self) -> None:
        self.coarse: Counter[str] = Counter()
        self._steps = _MOST_STEPS

    def constant(self, node: Node) -> Flow:
        if not _jax.is_concrete(node.value) or not is_array(node.aval):
            return NOTHING
        return Flow(known=Known(lambda: np.asarray(node.value)))

    def default(self, node: Node, *inputs: Flow) -> Sequence[Flow]:
        if any(x.rows is not None for x in inputs):
            return self._linear(node, inputs)
        if all(x.known is not None for x in inputs) and node.is_pure and all(map(is_array, node.avals)):
            return _lazily(node, inputs)
        return [Flow(zeros=zeros) for zeros in zero_places(node, inputs)]

    def _linear(self, node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
        rule = RULES.get(node.op)
        found = rule(node, inputs) if rule is not None and all(map(is_array, node.avals)) else None
        if found is None:
            self.coarse[node.op] += 1
            return whole(node, inputs)
        return found

    def join(self, a: Flow, b: Flow) -> Flow:
        if a is b:
            return a
        known = a.known
        if a.known is not b.known and not (
            a.known is not None and b.known is not None and np.array_equal(a.known.array, b.known.array)
        ):
            known = None
        rows = a.rows if Flow(a.rows) == Flow(b.rows) else join_rows(a.rows, b.rows)
        return Flow(rows, known)

    # -- control flow --

    def scan(self, node: Node, *inputs: Flow) -> Sequence[Flow]:
        if all(x.rows is None for x in inputs):
            return self.default(node, *inputs)
        body, length = node.params["body"], node.params["length"]
        if not self._affords(body, length):
            return self._scan_fixpoint(node, *inputs)
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        fixed, carry, xs = inputs[:consts], list(inputs[consts : consts + carries]), inputs[consts + carries :]
        avals = [n.aval for n in body.inputs[consts + carries :]]
        order = range(length - 1, -1, -1) if node.params["reverse"] else range(length)
        steps: dict[int, list[Flow]] = {}
        for i in order:
            out = interpret(body, self, *fixed, *carry, *(_step(x, a, i) for x, a in zip(xs, avals)))
            carry, steps[i] = out[:carries], out[carries:]
        stacked = [
            _stacked([steps[i][j] for i in range(length)], size(aval) // max(length, 1), self._width(inputs))
            for j, aval in enumerate(node.avals[carries:])
        ]
        return [*carry, *stacked]

    def _scan_fixpoint(self, node: Node, *inputs: Flow) -> Sequence[Flow]:
        """Any step may be any other: elements of scanned arrays are joined, and so are carries until they stay."""
        body, length = node.params["body"], node.params["length"]
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        fixed, carry, xs = inputs[:consts], list(inputs[consts : consts + carries]), inputs[consts + carries :]
        steps = [_any_step(x, n.aval, length) for x, n in zip(xs, body.inputs[consts + carries :])]
        while True:
            out = interpret(body, self, *fixed, *carry, *steps)
            joined = [self.join(a, b) for a, b in zip(carry, out)]
            if joined == carry:
                return [*carry, *(_repeated(y, length) for y in out[carries:])]
            carry = joined

    def while_loop(self, node: Node, *inputs: Flow) -> Sequence[Flow]:
        """Followed step by step while the condition is known, then joined until nothing changes."""
        if all(x.rows is None for x in inputs):
            return self.default(node, *inputs)
        cond, body = node.params["cond"], node.params["body"]
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        carry = list(inputs[n_cond + n_body :])
        while self._affords(body, 1):
            goes_on = interpret(cond, self, *for_cond, *carry)[0].array()
            if goes_on is None:
                break
            if not np.all(goes_on):
                return carry
            carry = interpret(body, self, *for_body, *carry)
        return super().while_loop(node, *for_cond, *for_body, *carry)

    def cond(self, node: Node, index: Flow, *inputs: Flow) -> Sequence[Flow]:
        branches = node.params["branches"]
        if index.known is not None:
            chosen = int(np.clip(index.known.array, 0, len(branches) - 1))
            return interpret(branches[chosen], self, *inputs)
        return super().cond(node, index, *inputs)

    def _affords(self, body: Graph, times: int) -> bool:
        self._steps -= times * (body.size + 1)
        if self._steps < 0:
            self._steps += times * (body.size + 1)
            return False
        return True

    def _width(self, inputs: Sequence[Flow]) -> int:
        return next(x.rows.shape[1] for x in inputs if x.rows is not None)


def _lazily(node: Node, inputs: Sequence[Flow]) -> list[Flow]:
    """The results of an operation on known arrays, computed when one is looked at."""
    results = functools.cache(lambda: _evaluated(node, [x.known.array for x in inputs if x.known is not None]))
    return [Flow(known=Known(functools.partial(lambda i: results()[i], i))) for i in range(len(node.avals))]


def _evaluated(node: Node, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The results of an operation on known arrays, in the program's own dtypes."""
    with np.errstate(all="ignore"):
        if node.op in _EXACT_IN_NUMPY:
            found = NUMPY[node.op](node, *arrays)
            return [np.asarray(y, a.dtype) for y, a in zip(found if node.op == "split" else [found], node.avals)]
    with jax.ensure_compile_time_eval():
        params = dict(node.params.get("_original", node.params))
        return [np.asarray(y) for y in _jax.bind(node.primitive, [jax.numpy.asarray(x) for x in arrays], params)]


def _step(flow: Flow, aval: Any, i: int) -> Flow:
    """One step of a scanned array."""
    step, known, zeros = size(aval), flow.known, flow.zeros
    rows = None if flow.rows is None else take(flow.rows, np.arange(i * step, (i + 1) * step))
    element = None if known is None else Known(lambda: known.array[i])
    return Flow(rows, element, None if zeros is None else zeros[i])


def _stacked(steps: Sequence[Flow], step: int, width: int) -> Flow:
    if all(x.known is not None for x in steps) and steps:
        return Flow(known=Known(lambda: np.stack([x.known.array for x in steps if x.known is not None])))
    if all(x.rows is None for x in steps):
        return NOTHING
    empty = sparse.csr_array((step, width))
    return Flow(sparse.csr_array(sparse.vstack([empty if x.rows is None else x.rows for x in steps], "csr")))


def _any_step(flow: Flow, aval: Any, length: int) -> Flow:
    """What describes each step of a scanned array."""
    if flow.rows is None or not length:
        return NOTHING
    step = size(aval)
    index = np.arange(step * length)
    return Flow(combined(blurred(flow.rows), index % step, index, step, 1.0))


def _repeated(flow: Flow, length: int) -> Flow:
    if flow.rows is None:
        return NOTHING
    return Flow(take(flow.rows, np.tile(np.arange(flow.rows.shape[0]), length)))


# -- programs ---------------------------------------------------------------------------------------------------------


def linear_pattern(graph: Graph, linear: Sequence[bool]) -> Pattern:
    """The pattern of the matrix that a program multiplies some of its inputs by.

    Args:
        graph: a program, linear in some of its inputs.
        linear: for each input whether it is one of those.

    Returns:
        A row for each element of the outputs, a column for each element of those inputs, in order; dense where a
        matrix of dependence on the way grew too large.
    """
    sizes = [size(n.aval) if is_linear else 0 for n, is_linear in zip(graph.inputs, linear, strict=True)]
    columns, starts = sum(sizes), np.cumsum([0, *sizes])
    shape = (sum(size(v.aval) for v in graph.outputs), columns)
    domain = Dependence()
    inputs = [Flow(_unit_rows(a, n, columns)) if n else NOTHING for a, n in zip(starts, sizes)]
    try:
        outputs = interpret(graph, domain, *inputs)
        rows = [
            sparse.csr_array((size(v.aval), columns)) if y.rows is None else y.rows
            for y, v in zip(outputs, graph.outputs)
        ]
        matrix = sparse.csr_array(sparse.vstack(rows, "csr")) if rows else sparse.csr_array(shape)
    except TooDense:
        return Pattern.dense(shape, {**domain.coarse, "too many entries": 1})
    return Pattern.of(matrix, domain.coarse)


def _unit_rows(start: int, count: int, columns: int) -> Rows:
    return sparse.csr_array((np.ones(count), np.arange(start, start + count), np.arange(count + 1)), (count, columns))
