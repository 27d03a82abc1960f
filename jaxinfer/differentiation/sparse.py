"""Sparse Jacobians and Hessians as BCOO arrays with a static pattern."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxinfer import _jax
from jaxinfer.differentiation.checks import check_argnums, check_inputs
from jaxinfer.differentiation.coloring import REVERSE_COST, Coloring, color, color_symmetric
from jaxinfer.differentiation.direct import Declined, entries
from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.pattern import Pattern, size
from jaxinfer.differentiation.program import Derivation, Traced
from jaxinfer.differentiation.reverse import vjp as run_vjp
from jaxinfer.differentiation.rules import filled
from jaxinfer.differentiation.sparsity import linear_pattern
from jaxinfer.differentiation.transform import grad
from jaxinfer.graph import Graph, emit, interpret, run, trace_function

Method = Literal["auto", "direct", "forward", "reverse", "passes"]
_METHODS = ("auto", "direct", "forward", "reverse", "passes")
# Signatures whose plans are kept, for each function.
_MOST_PLANS = 32


class Program:
    """A call of a function as a program, its tangents, and its cotangents.

    Args:
        fun: the function.
        args, kwargs: of the call; arrays among them are inputs, everything else is used as it is.
        argnums: positions of the arguments to differentiate.
        has_aux: whether the function returns a pair.

    Attributes:
        traced: the function over (chosen leaves, other arrays).
        chosen: how many leaves are differentiated.
    """

    def __init__(self, fun: Callable[..., Any], call: Call, has_aux: bool):
        self.call = call
        self.traced = Traced(call.bound(fun), (call.chosen, call.others), {}, (0, 1), has_aux)
        self.chosen = len(call.chosen)

    @property
    def outputs(self) -> Sequence[Any]:
        """Avals of the leaves of the result."""
        return self.traced.graph.out_avals[: self.traced.outputs]

    @property
    def inputs(self) -> Sequence[Any]:
        """Avals of the leaves that are differentiated."""
        first = self.traced.captured
        return [n.aval for n in self.traced.graph.inputs[first : first + self.chosen]]

    def push(self, borrowed: Any, operands: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Tangents of the result from tangents of the chosen leaves."""
        first = self.traced.captured
        moving = [*[None] * first, *tangents, *[None] * (len(operands) - first - self.chosen)]
        found = interpret(self.traced.graph, Forward({}, borrowed), *map(Dual, operands, moving))
        return [filled(d.tangent, d.primal) for d in found[: self.traced.outputs]]

    def pull(self, borrowed: Any, operands: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        """Cotangents of the chosen leaves from cotangents of the result."""
        first, graph = self.traced.captured, self.traced.graph
        active = [first <= i < first + self.chosen for i in range(len(operands))]
        outs, back = run_vjp(graph, {}, active, self.traced.useful, *operands, borrowed=borrowed)
        found = back([*cotangents, *[None] * (len(outs) - self.traced.outputs)])
        return [filled(ct, x) for ct, x, a in zip(found, operands, active) if a]

    def aux(self, operands: Sequence[Any]) -> list[Any]:
        """Arrays of the auxiliary part."""
        if len(self.traced.graph.outputs) == self.traced.outputs:
            return []
        return run(self.traced.graph, {}, *operands)[self.traced.outputs :]

    def linear_program(self, reverse: bool) -> tuple[Graph, list[bool]]:
        """The program of tangents, or of cotangents, and which of its inputs they are."""
        count, move = len(self.traced.operands), self.pull if reverse else self.push

        def fun(*values: Any) -> list[Any]:
            return move(Counter(), values[:count], values[count:])

        seeds = self.outputs if reverse else self.inputs
        graph = trace_function(fun, *(n.aval for n in self.traced.graph.inputs), *seeds)
        return graph, [i >= count for i in range(len(graph.inputs))]


class Call:
    """Arguments of a call, taken apart into what is differentiated, other arrays, and the rest."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], argnums: Sequence[int]):
        trees = [(args[i] if i in argnums else None) for i in argnums]
        self.chosen, self.chosen_tree = jax.tree.flatten(trees)
        rest = ([None if i in argnums else a for i, a in enumerate(args)], kwargs)
        leaves, self._rest_tree = jax.tree.flatten(rest)
        self._is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
        self.others = [x for x, is_array in zip(leaves, self._is_array) if is_array]
        self._static = [x for x, is_array in zip(leaves, self._is_array) if not is_array]
        self._argnums = argnums

    @property
    def key(self) -> Any:
        """Equal for calls with the same kinds of arrays and the same of everything else."""
        static = tuple((type(x), x if _is_hashable(x) else id(x)) for x in self._static)
        types = tuple(_jax.type_key(x) for x in (*self.chosen, *self.others))
        return (self.chosen_tree, self._rest_tree, tuple(self._is_array), types, static, _jax.settings_key())

    def bound(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The function of (chosen leaves, other arrays)."""

        def call(chosen: Sequence[Any], others: Sequence[Any]) -> Any:
            arrays, static = iter(others), iter(self._static)
            leaves = [next(arrays) if is_array else next(static) for is_array in self._is_array]
            args, kwargs = jax.tree.unflatten(self._rest_tree, leaves)
            for i, arg in zip(self._argnums, jax.tree.unflatten(self.chosen_tree, chosen)):
                args[i] = arg
            return fun(*args, **kwargs)

        return call


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


# -- plans ------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, eq=False)
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
        for b, (start, stop) in enumerate(zip(ends, ends[1:])):
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
    try:
        pattern, can_push = linear_pattern(*program.linear_program(reverse=False)), True
    except TypeError:
        # Some custom rules are there for reverse mode only.
        pattern, can_push = linear_pattern(*program.linear_program(reverse=True)).transposed(), False
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
    plan.__dict__["coloring"] = coloring
    plan.derivation = plan.program.traced.derive(build)
    return plan


# -- the public face --------------------------------------------------------------------------------------------------


class SparseDerivative:
    """A function that computes a sparse Jacobian or Hessian. Made by :func:`sparse_jacobian` and its like."""

    def __init__(
        self,
        fun: Callable[..., Any],
        argnums: int | Sequence[int],
        has_aux: bool,
        holomorphic: bool,
        symmetric: bool,
        method: Method,
    ):
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: use one of {', '.join(map(repr, _METHODS))}")
        functools.update_wrapper(self, fun, updated=())
        self._name = "hessian" if symmetric else "jacobian"
        self.__name__ = f"sparse_{self._name}_{getattr(fun, '__name__', type(fun).__name__)}"
        self._argnums, self._has_aux, self._holomorphic = argnums, has_aux, holomorphic
        self._symmetric, self._method = symmetric, method
        self._fun = grad(fun, argnums, has_aux, holomorphic) if symmetric else fun
        self._plans: dict[Any, Plan] = {}
        self._indices: dict[Plan, list[Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan, operands = self._plan(args, kwargs)
        assert plan.derivation is not None
        traced = plan.program.traced
        inside = _jax.under_trace() or _jax.jit_disabled() or not all(map(_jax.is_concrete, operands))
        values = run(plan.derivation.graph, {}, *operands) if inside else plan.compiled(*operands)
        extra = len(traced.graph.outputs) - traced.outputs
        found = self._tree(plan, values[extra:], inside)
        return (found, traced.aux(values[:extra])) if self._has_aux else found

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def pattern(self, *args: Any, **kwargs: Any) -> Pattern:
        """Where the matrix may differ from zero.

        Rows are the elements of the result's leaves, one leaf after the other; columns those of the chosen arguments.
        """
        return self._plan(args, kwargs)[0].pattern

    def coloring(self, *args: Any, **kwargs: Any) -> Coloring:
        """The cheapest plan of passes; what is used, unless :meth:`method` is ``"direct"``."""
        return self._plan(args, kwargs)[0].coloring

    def method(self, *args: Any, **kwargs: Any) -> str:
        """How entries are computed.

        Returns:
            ``"direct"`` (one by one, without passes), ``"forward"``, ``"reverse"`` or ``"both"`` (by passes), or
            ``"empty"``.
        """
        return self._plan(args, kwargs)[0].method

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The derivative's program for these arguments."""
        derivation = self._plan(args, kwargs)[0].derivation
        assert derivation is not None
        return derivation.graph

    def plot(self, *args: Any, axes: Any = None, **kwargs: Any) -> Any:
        """Draws the pattern, entries of one pass in one colour.

        Args:
            *args, **kwargs: arguments of the function.
            axes: Matplotlib axes to draw on; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
        """
        from jaxinfer.report.pattern import plot_pattern

        coloring = self.coloring(*args, **kwargs)
        passes = np.searchsorted(_pass_ends(coloring), coloring.source, "right")
        pattern = coloring.pattern
        return plot_pattern(pattern.rows, pattern.cols, pattern.shape, passes, repr(coloring), axes)

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Plan, list[Any]]:
        argnums = check_argnums(self._argnums, len(args), self._name)
        for i in argnums:
            check_inputs(args[i], self._name, self._holomorphic, allow_int=False)
        call = Call(args, kwargs, argnums)
        values = [*call.chosen, *call.others]
        if (plan := self._plans.get(key := call.key)) is not None:
            return plan, values
        program = Program(self._fun, call, self._has_aux)
        _check_results(program, self._name, self._holomorphic)
        plan = make_plan(program, self._symmetric, self._method)
        if not program.traced.captured:
            # What a trace has captured belongs to it alone.
            if len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return plan, [*program.traced.operands[: program.traced.captured], *values]

    def _tree(self, plan: Plan, data: Sequence[Any], inside: bool) -> Any:
        """Blocks as a pytree of pytrees."""
        blocks, program = plan.blocks, plan.program
        indices = blocks.indices
        if not inside:
            if plan.__dict__.get("held") is None:
                plan.__dict__["held"] = [jnp.asarray(x) for x in indices]
            indices = plan.__dict__["held"]
        arrays = [
            BCOO((x, jnp.asarray(i)), shape=shape, indices_sorted=True, unique_indices=True)
            for x, i, shape in zip(data, indices, blocks.shapes)
        ]
        width, rows = len(program.inputs), []
        for o in range(len(program.outputs)):
            found = jax.tree.unflatten(program.call.chosen_tree, arrays[o * width : (o + 1) * width])
            rows.append(found[0] if isinstance(self._argnums, int) else tuple(found))
        return program.traced.unflatten(rows)


def _pass_ends(coloring: Coloring) -> np.ndarray:
    m, n = coloring.pattern.shape
    return np.cumsum([*[m] * coloring.forward, *[n] * coloring.reverse])


def _check_results(program: Program, name: str, holomorphic: bool) -> None:
    wanted = jnp.complexfloating if holomorphic else jnp.floating
    for aval in (*program.inputs, *program.outputs):
        if not jnp.issubdtype(aval.dtype, wanted):
            kind = "complex" if holomorphic else "real"
            raise TypeError(
                f"a sparse {name} requires {kind}-valued inputs and outputs here, but got {aval.dtype}. Return other "
                "results as auxiliary data with has_aux=True; for holomorphic functions pass holomorphic=True"
            )


def sparse_jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    method: Method = "auto",
) -> SparseDerivative:
    """A function that computes a sparse Jacobian.

    Which elements may differ from zero is found from the program alone, so it is the same for all values of arrays of
    the same types; what the function closes over counts as known. Columns, or rows, that do not meet share a pass.

    Args:
        fun: a function of pytrees of arrays, or of such that returns a pair (result, auxiliary data).
        argnums: which positional arguments to differentiate.
        has_aux: whether ``fun`` returns a pair.
        holomorphic: promises that ``fun`` is holomorphic; arguments and result are complex then.
        method: ``"direct"`` (entries one by one), ``"forward"`` or ``"reverse"`` (passes over columns or rows),
            ``"passes"`` (the cheapest of those, or both), or ``"auto"``: the cheapest of all.

    Returns:
        A function with ``fun``'s arguments that returns what :func:`jaxinfer.autoinfer.jacobian` returns, with a
        ``jax.experimental.sparse.BCOO`` (indices sorted and unique, no batch dimensions) in the place of each array.

    Raises:
        TypeError: when called, if an argument or a result has no derivative.
        ValueError: when called, if the method that was asked for does not do.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer.differentiation.sparse import sparse_jacobian
        >>> difference = sparse_jacobian(lambda x: (x[1:] - x[:-1]) ** 2)
        >>> difference.coloring(jnp.ones(50))
        Coloring(49×50, 98 entries, 2 forward passes)
        >>> difference(jnp.arange(50.0)).nse
        98

    Reference: Griewank, Walther, Evaluating derivatives (2008), chapters 7 and 8.
    """
    return SparseDerivative(fun, argnums, has_aux, holomorphic, False, method)


def sparse_hessian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    method: Method = "auto",
) -> SparseDerivative:
    """A function that computes the sparse Hessian of a scalar function, of whose symmetry it makes use.

    Args, returns, errors: those of :func:`sparse_jacobian`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer.differentiation.sparse import sparse_hessian
        >>> sparse_hessian(lambda x: (x[0] * x[1] + x[2] ** 2) / 2)(jnp.ones(3)).todense().tolist()
        [[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return SparseDerivative(fun, argnums, has_aux, holomorphic, True, method)
