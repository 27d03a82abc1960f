"""How a sparse derivative is computed: its pattern, and the program for its entries that is the least work."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.differentiation.program import Derivation
from jaxinfer.differentiation.sparse.coloring import REVERSE_COST, Coloring, color, color_symmetric
from jaxinfer.differentiation.sparse.dependence import linear_pattern
from jaxinfer.differentiation.sparse.direct import Declined, entries
from jaxinfer.differentiation.sparse.pattern import Pattern, size
from jaxinfer.differentiation.sparse.program import Program
from jaxinfer.graph import emit

Method = Literal["auto", "direct", "forward", "reverse", "passes"]


@dataclass(eq=False)
class Plan:
    """How the sparse derivative of one kind of call is computed.

    Attributes:
        program: the call.
        pattern: of the whole matrix, all leaves of the result below each other, all chosen leaves side by side.
        symmetric: whether it is a Hessian.
        can_push, can_pull: whether forward and reverse mode can go through the function.
        method: what was chosen: ``"direct"``, ``"forward"``, ``"reverse"``, ``"both"`` or ``"empty"``.
        derivation: the program that computes the auxiliary arrays and the entries.
    """

    program: Program
    pattern: Pattern
    symmetric: bool
    can_push: bool
    can_pull: bool
    method: str = ""
    derivation: Derivation | None = None

    @functools.cached_property
    def coloring(self) -> Coloring:
        """The cheapest plan of passes."""
        if self.symmetric and self.can_push:
            return color_symmetric(self.pattern)
        return color(self.pattern, self.can_push, self.can_pull)

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The entries by leaf of the result and chosen leaf."""
        return Blocks.of(self.pattern, self.program)

    @functools.cached_property
    def compiled(self) -> Callable[..., list[Any]]:
        """The program compiled, called with its operands."""
        assert self.derivation is not None
        graph = self.derivation.graph
        function, weights = jax.jit(emit(graph)), [w.value for w in graph.weights]
        return functools.partial(function, weights)


@dataclass(eq=False)
class Blocks:
    """Entries sorted by block: one for each pair of a leaf of the result and a chosen leaf.

    Attributes:
        order: for each entry in the order of blocks its place in the pattern, None where that is the same order.
        slices: for each block where its entries are.
        indices: for each block the coordinates of its entries, (entries, rank of the result + rank of the argument).
        shapes: the result's shape and the argument's, one after the other.
    """

    order: np.ndarray | None
    slices: list[slice]
    indices: list[np.ndarray]
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, pattern: Pattern, program: Program) -> Blocks:
        """The blocks of a pattern."""
        outs, ins = [a.shape for a in program.outputs], [a.shape for a in program.inputs]
        row_starts = np.cumsum([0, *map(math.prod, outs)])
        col_starts = np.cumsum([0, *map(math.prod, ins)])
        o = np.searchsorted(row_starts, pattern.rows, "right") - 1
        i = np.searchsorted(col_starts, pattern.cols, "right") - 1
        block = o * len(ins) + i
        order = np.argsort(block, kind="stable") if len(outs) * len(ins) > 1 else np.arange(pattern.nnz)
        ends = np.searchsorted(block[order], np.arange(len(outs) * len(ins) + 1))
        slices, indices, shapes = [], [], []
        for b, (start, stop) in enumerate(itertools.pairwise(ends)):
            k, l = divmod(b, len(ins))
            at = order[start:stop]
            row = np.unravel_index(pattern.rows[at] - row_starts[k], outs[k]) if outs[k] else ()
            col = np.unravel_index(pattern.cols[at] - col_starts[l], ins[l]) if ins[l] else ()
            slices.append(slice(int(start), int(stop)))
            indices.append(
                np.stack([*row, *col], 1).astype(np.int32) if row or col else np.zeros((len(at), 0), np.int32)
            )
            shapes.append((*outs[k], *ins[l]))
        moved = order if (np.diff(order) != 1).any() else None
        return cls(moved, slices, indices, shapes)

    @functools.cached_property
    def placed(self) -> list[jax.Array]:
        """The coordinates on the device."""
        with jax.ensure_compile_time_eval():
            return [jnp.asarray(x) for x in self.indices]


def _common_dtype(program: Program) -> Any:
    return jnp.result_type(*(a.dtype for a in (*program.outputs, *program.inputs)))


def _by_passes(plan: Plan, coloring: Coloring, borrowed: Any, operands: Sequence[Any]) -> Any:
    """The entries, from forward and reverse passes over the colours."""
    program, dtype = plan.program, _common_dtype(plan.program)

    def seeds(colors: np.ndarray, avals: Sequence[Any], color: Any) -> list[Any]:
        parts = np.split(colors, np.cumsum([size(a) for a in avals])[:-1])
        return [(p.reshape(a.shape) == color).astype(a.dtype) for p, a in zip(map(jnp.asarray, parts), avals)]

    def swept(move: Callable[..., list[Any]], colors: np.ndarray, avals: Sequence[Any], passes: int) -> Any:
        def one(color: Any) -> Any:
            found = move(borrowed, operands, seeds(colors, avals, color))
            return jnp.concatenate([x.astype(dtype).reshape(-1) for x in found])

        return jax.vmap(one)(jnp.arange(passes, dtype=np.int32)).reshape(-1)

    results = []
    if coloring.forward:
        results.append(swept(program.push, coloring.columns.astype(np.int32), program.inputs, coloring.forward))
    if coloring.reverse:
        results.append(swept(program.pull, coloring.rows.astype(np.int32), program.outputs, coloring.reverse))
    if not results:
        return jnp.zeros(plan.pattern.nnz, dtype)
    values = jnp.concatenate(results) if len(results) > 1 else results[0]
    if np.array_equal(coloring.source, np.arange(values.size)):
        return values
    return values.at[coloring.source].get(mode="promise_in_bounds")


def _directly(plan: Plan) -> tuple[Derivation, bool] | None:
    """The program that computes entries without passes, and whether it takes less work than passes would."""
    graph, linear = plan.program.linear_program(reverse=False)
    dtype, work = _common_dtype(plan.program), [0, 0]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None

    def build(borrowed: Any, *operands: Any) -> list[Any]:
        found = entries(graph, linear, operands, plan.pattern, dtype)
        work[:] = found.work, found.single
        return [*plan.program.aux(operands), *_split(plan, found.data)]

    try:
        derivation = plan.program.traced.derive(build)
    except Declined:
        return None
    # A row with so many entries needs as many passes, or half of them where the matrix is symmetric.
    longest = int(np.bincount(plan.pattern.rows).max())
    fewest = (longest + 1) // 2 if plan.symmetric else longest
    return derivation, work[0] <= fewest * work[1] or work[0] <= plan.coloring.cost * work[1]


def _split(plan: Plan, data: Any) -> list[Any]:
    """Entries by block, in the dtype of the argument's leaf, as ``jax.jacobian`` gives them."""
    blocks, avals = plan.blocks, plan.program.inputs
    if blocks.order is not None:
        data = data.at[blocks.order].get(mode="promise_in_bounds")
    return [data[s].astype(avals[b % len(avals)].dtype) for b, s in enumerate(blocks.slices)]


def make_plan(program: Program, symmetric: bool, method: Method) -> Plan:
    """Finds the pattern and chooses how to compute the entries.

    Raises:
        ValueError: the method that was asked for does not do for this function.
    """
    graph, linear = program.linear_program(reverse=False)
    # This stands for a custom rule that is there for reverse mode only.
    can_push = not graph.count("custom_lin")
    if can_push:
        pattern = linear_pattern(graph, linear)
    else:
        pattern = linear_pattern(*program.linear_program(reverse=True)).transposed()
    if symmetric and can_push:
        pattern = pattern.symmetric()
    plan = Plan(program, pattern, symmetric and can_push, can_push, True)
    if not pattern.nnz:
        return _with_passes(plan, "empty", Coloring.empty(pattern))
    if can_push and not symmetric and method in ("auto", "reverse", "passes"):
        plan.can_pull = _reverse_may_help(pattern, method) and _can_pull(program)
    if can_push and method in ("auto", "direct"):
        found = _directly(plan)
        if found is not None and (found[1] or method == "direct"):
            plan.method, plan.derivation = "direct", found[0]
            return plan
        if method == "direct":
            raise ValueError("the entries of this function's derivative cannot be followed one by one: use passes")
    if (method == "forward" and not can_push) or (method == "reverse" and not plan.can_pull):
        raise ValueError(f"{method} mode cannot go through this function")
    if method in ("forward", "reverse"):
        coloring = color(pattern, method == "forward", method == "reverse")
    else:
        coloring = plan.coloring
    return _with_passes(plan, "both" if coloring.forward and coloring.reverse else "", coloring)


def _reverse_may_help(pattern: Pattern, method: Method) -> bool:
    longest_row = np.bincount(pattern.rows).max()
    return method == "reverse" or bool(longest_row > min(2, REVERSE_COST * np.bincount(pattern.cols).max()))


def _can_pull(program: Program) -> bool:
    """Whether reverse mode goes through the function: not through loops of unknown length."""
    try:
        program.linear_program(reverse=True)
    except (ValueError, TypeError, NotImplementedError):
        return False
    return True


def _with_passes(plan: Plan, method: str, coloring: Coloring) -> Plan:
    def build(borrowed: Any, *operands: Any) -> list[Any]:
        data = _by_passes(plan, coloring, borrowed, operands)
        return [*plan.program.aux(operands), *_split(plan, data)]

    plan.method = method or ("forward" if coloring.forward else "reverse")
    plan.coloring = coloring
    plan.derivation = plan.program.traced.derive(build)
    return plan
