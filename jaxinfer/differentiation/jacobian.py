"""Jacobians and Hessians: forward or reverse mode over a basis, whichever needs fewer directions.

One leaf of the arguments is moved at a time, so what does not depend on it is a symbolic zero, and a basis is a known
identity matrix: a product with it disappears. ``tanh(W x)`` costs no product at all, ``xᵀ A x`` has the Hessian A + Aᵀ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from jaxinfer import _jax
from jaxinfer.differentiation.checks import check_inputs
from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.program import Derivation, Traced
from jaxinfer.differentiation.reverse import vjp as run_vjp
from jaxinfer.differentiation.rules import filled
from jaxinfer.differentiation.sparse.transform import SparseDerivative, sparse_hessian, sparse_jacobian
from jaxinfer.differentiation.transform import Derivative, grad
from jaxinfer.graph import interpret

Mode = Literal["auto", "forward", "reverse"]


def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    sparse: bool = False,
    mode: Mode = "auto",
) -> Derivative | SparseDerivative:
    """A function that computes a Jacobian; as ``jax.jacobian``.

    Args:
        fun: a function of pytrees of arrays, or of such that returns a pair (result, auxiliary data).
        argnums: which positional arguments to differentiate.
        has_aux: whether ``fun`` returns a pair.
        holomorphic: promises that ``fun`` is holomorphic; arguments and result are complex then.
        allow_int: permits integer arguments, whose derivatives are zeros of dtype float0.
        sparse: return ``jax.experimental.sparse.BCOO`` arrays with a static pattern; see
            :func:`jaxinfer.differentiation.sparse.sparse_jacobian` for what can be inspected.
        mode: ``"forward"`` (a direction for each element of the arguments), ``"reverse"`` (one for each element of the
            result), or ``"auto"``: whichever needs fewer.

    Returns:
        A function with ``fun``'s arguments that returns the Jacobian: the result's pytree, with the chosen arguments'
        pytree in the place of each leaf, and arrays of shape ``result.shape + argument.shape``; or a pair with the
        auxiliary data.

    Raises:
        TypeError: when called, if a chosen argument has no derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> autoinfer.jacobian(lambda x: x**2)(jnp.array([1.0, 2.0])).tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    if mode not in ("auto", "forward", "reverse"):
        raise ValueError(f"mode={mode!r}: use 'auto', 'forward' or 'reverse'")
    if sparse:
        return sparse_jacobian(fun, argnums, has_aux, holomorphic, mode)

    def derive(traced: Traced) -> Derivation:
        build = _forward if mode == "forward" or (mode == "auto" and _forward_is_less(traced)) else _reverse
        return traced.derive(functools.partial(build, traced))

    def finish(traced: Traced, values: Sequence[Any]) -> Any:
        extra = len(traced.graph.outputs) - traced.outputs
        found = _tree(traced, values[extra:], argnums)
        return (found, traced.aux(values[:extra])) if has_aux else found

    check = functools.partial(check_inputs, what="jacobian" if allow_int else "grad", holomorphic=holomorphic)
    return Derivative(fun, "jacobian", argnums, has_aux, derive, finish, functools.partial(check, allow_int=allow_int))


def hessian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    sparse: bool = False,
) -> Derivative | SparseDerivative:
    """A function that computes the Hessian of a scalar function, forward over reverse; as ``jax.hessian``.

    Args, errors: those of :func:`jacobian`.

    Returns:
        A function with ``fun``'s arguments that returns the Hessian: for each pair of leaves of the chosen arguments an
        array of both shapes, as a pytree of pytrees; or a pair with the auxiliary data.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> autoinfer.hessian(lambda x: x[0] ** 2 * x[1])(jnp.array([1.0, 2.0])).tolist()
        [[4.0, 2.0], [2.0, 0.0]]
    """
    if sparse:
        return sparse_hessian(fun, argnums, has_aux, holomorphic)
    gradient = grad(fun, argnums, has_aux, holomorphic)
    return jacobian(gradient, argnums, has_aux, holomorphic, mode="forward")


def _forward_is_less(traced: Traced) -> bool:
    size_in = sum(math.prod(n.aval.shape) for n, a in zip(traced.graph.inputs, traced.active) if a)
    size_out = sum(math.prod(a.shape) for a in traced.graph.out_avals[: traced.outputs])
    return size_in <= size_out


def _results(traced: Traced) -> list[int]:
    """Which outputs have derivatives."""
    return [i for i, a in enumerate(traced.graph.out_avals[: traced.outputs]) if _jax.has_tangent(a)]


def _forward(traced: Traced, borrowed: Any, *operands: Any) -> list[Any]:
    """Auxiliary arrays, then for each active leaf and each output that has derivatives the Jacobian."""
    blocks: dict[tuple[int, int], Any] = {}
    aux: list[Any] = []
    for i, leaf in enumerate(operands):
        if not traced.active[i]:
            continue

        def push(direction: Any, i: int = i) -> list[Any]:
            duals = [Dual(x, direction if k == i else None) for k, x in enumerate(operands)]
            found = interpret(traced.graph, Forward({}, borrowed), *duals)
            return [filled(found[o].tangent, found[o].primal) for o in _results(traced)]

        for o, moved in zip(_results(traced), jax.vmap(push, out_axes=-1)(_basis(leaf))):
            blocks[o, i] = lax.reshape(moved, (*moved.shape[:-1], *leaf.shape))
    if len(traced.graph.outputs) > traced.outputs:
        found = interpret(traced.graph, Forward({}, borrowed), *map(Dual, operands))
        aux = [d.primal for d in found[traced.outputs :]]
    return [*aux, *(blocks[key] for key in sorted(blocks))]


def _reverse(traced: Traced, borrowed: Any, *operands: Any) -> list[Any]:
    """As :func:`_forward`, an output at a time."""
    blocks: list[Any] = []
    aux: list[Any] = []
    for o in _results(traced):
        useful = [k == o for k in range(len(traced.graph.outputs))]
        outs, pull = run_vjp(traced.graph, {}, traced.active, useful, *operands, borrowed=borrowed)
        aux = outs[traced.outputs :]

        def back(direction: Any, o: int = o, pull: Any = pull) -> list[Any]:
            found = pull([direction if k == o else None for k in range(len(traced.graph.outputs))])
            return [filled(ct, x) for ct, x, a in zip(found, operands, traced.active) if a]

        shape = _jax.aval_of(outs[o]).shape
        for moved in jax.vmap(back)(_basis(outs[o])):
            blocks.append(lax.reshape(moved, (*shape, *moved.shape[1:])))
    return [*aux, *blocks]


def _basis(like: Any) -> Any:
    """The unit directions of an array, along a leading axis: an identity matrix that rules recognise."""
    aval = _jax.aval_of(like)
    size = math.prod(aval.shape)
    rows, columns = (lax.broadcasted_iota(np.int32, (size, size), axis) for axis in (0, 1))
    identity = lax.convert_element_type(lax.eq(rows, columns), aval.dtype)
    return lax.reshape(identity, (size, *aval.shape)) if len(aval.shape) != 1 else identity


def _tree(traced: Traced, blocks: Sequence[Any], argnums: int | Sequence[int]) -> Any:
    """Blocks, output by output, as a pytree of pytrees."""
    rest = iter(blocks)
    results = set(_results(traced))
    leaves = traced.graph.inputs[traced.captured :]
    rows = []
    for o, out in enumerate(traced.graph.out_avals[: traced.outputs]):
        row = [
            next(rest)
            if o in results and _jax.has_tangent(n.aval)
            else np.zeros((*out.shape, *n.aval.shape), jax.dtypes.float0)
            for n in leaves
        ]
        found = jax.tree.unflatten(traced.in_tree, row)
        rows.append(found[0] if isinstance(argnums, int) else found)
    return jax.tree.unflatten(traced.out_tree, rows)
