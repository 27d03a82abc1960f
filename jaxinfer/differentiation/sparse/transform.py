"""Sparse Jacobians and Hessians as BCOO arrays with a static pattern."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from jaxinfer import _jax
from jaxinfer.differentiation.checks import check_argnums, check_inputs
from jaxinfer.differentiation.sparse.coloring import Coloring
from jaxinfer.differentiation.sparse.pattern import Pattern
from jaxinfer.differentiation.sparse.plan import Method, Plan, make_plan
from jaxinfer.differentiation.sparse.program import Call, Program
from jaxinfer.differentiation.transform import grad
from jaxinfer.graph import Graph, run
from jaxinfer.report.derivation import DerivationReport

# Signatures whose plans are kept, for each function.
_MOST_PLANS = 32


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
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: use one of {', '.join(map(repr, get_args(Method)))}")
        functools.update_wrapper(self, fun, updated=())
        self._name = "hessian" if symmetric else "jacobian"
        self.__name__ = f"sparse_{self._name}_{getattr(fun, '__name__', type(fun).__name__)}"
        self._argnums, self._has_aux, self._holomorphic = argnums, has_aux, holomorphic
        self._symmetric, self._method = symmetric, method
        self._fun = grad(fun, argnums, has_aux, holomorphic) if symmetric else fun
        self._plans: dict[Any, Plan] = {}

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

    def explain(self, *args: Any, **kwargs: Any) -> DerivationReport:
        """What the derivative's program for these arguments is made of, and what was left to JAX's own rules."""
        derivation = self._plan(args, kwargs)[0].derivation
        assert derivation is not None
        return DerivationReport.of(self.__name__, derivation)

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
        pattern = coloring.pattern
        return plot_pattern(pattern.rows, pattern.cols, pattern.shape, coloring.taken_from, repr(coloring), axes)

    def plot_coloring(self, *args: Any, axes: Any = None, corner: int | None = None, **kwargs: Any) -> Any:
        """Draws which columns and rows share a pass: as stripes in the colour of the pass, with the entries on them.

        Args:
            *args, **kwargs: arguments of the function.
            axes: Matplotlib axes to draw on; new ones by default.
            corner: how many leading rows and columns to draw; all by default.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
        """
        from jaxinfer.report.pattern import plot_coloring

        coloring = self.coloring(*args, **kwargs)
        rows, cols = coloring.pattern.rows, coloring.pattern.cols
        m, n = (length if corner is None else min(length, corner) for length in coloring.pattern.shape)
        drawn = (rows < m) & (cols < n)
        columns_of, rows_of = coloring.columns[:n], coloring.rows[:m]
        rows_of = np.where(rows_of < 0, -1, coloring.forward + rows_of)
        entries = (rows[drawn], cols[drawn], (m, n), coloring.taken_from[drawn])
        return plot_coloring(*entries, columns_of, rows_of, repr(coloring), axes)

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
        indices: Sequence[Any] = blocks.indices
        if not inside:
            indices = plan.blocks.placed
        arrays = [
            BCOO((x, jnp.asarray(i)), shape=shape, indices_sorted=True, unique_indices=True)
            for x, i, shape in zip(data, indices, blocks.shapes)
        ]
        width, rows = len(program.inputs), []
        for o in range(len(program.outputs)):
            found = jax.tree.unflatten(program.call.chosen_tree, arrays[o * width : (o + 1) * width])
            rows.append(found[0] if isinstance(self._argnums, int) else tuple(found))
        return program.traced.unflatten(rows)


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
    the same types; what the function closes over counts as known, as it is at the first such call. Columns, or rows,
    that do not meet share a pass.

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
        >>> from jaxinfer.differentiation.sparse.transform import sparse_jacobian
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
        >>> from jaxinfer.differentiation.sparse.transform import sparse_hessian
        >>> sparse_hessian(lambda x: (x[0] * x[1] + x[2] ** 2) / 2)(jnp.ones(3)).todense().tolist()
        [[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return SparseDerivative(fun, argnums, has_aux, holomorphic, True, method)
