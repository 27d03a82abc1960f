"""Derivatives behind JAX's own signatures, computed on the graph and simplified before they run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation.checks import check_argnums, check_inputs, check_scalar, check_tangents
from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.program import Derivation, Traced, execute
from jaxinfer.differentiation.reverse import vjp as run_vjp
from jaxinfer.differentiation.rules import filled
from jaxinfer.differentiation.split import split
from jaxinfer.graph import Graph, interpret
from jaxinfer.report.derivation import DerivationReport


class Derivative:
    """A function that computes derivatives of another. Made by :func:`grad` and its like.

    Args:
        fun: the function.
        argnums: positions of the arguments to differentiate.
        has_aux: whether ``fun`` returns a pair whose second part is passed on.
        derive: from a traced call to its derivation.
        finish: from a traced call and the derivation's values to what the caller gets.
        check: looks at the chosen arguments, raises where they cannot be differentiated.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        name: str,
        argnums: int | Sequence[int],
        has_aux: bool,
        derive: Callable[[Traced], Derivation],
        finish: Callable[[Traced, Sequence[Any]], Any],
        check: Callable[[Any], None],
    ):
        functools.update_wrapper(self, fun, updated=())
        self.__name__ = f"{name}_{getattr(fun, '__name__', type(fun).__name__)}"
        self._fun, self._argnums, self._has_aux = fun, argnums, has_aux
        self._derive, self._finish, self._check = derive, finish, check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = self._trace(args, kwargs)
        return self._finish(traced, execute(self._derive(traced).graph, *traced.operands))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The derivative's program for these arguments."""
        return self._derive(self._trace(args, kwargs)).graph

    def explain(self, *args: Any, **kwargs: Any) -> DerivationReport:
        """What the derivative's program for these arguments is made of, and what was left to JAX's own rules."""
        derivation = self._derive(self._trace(args, kwargs))
        return DerivationReport.of(self.__name__, derivation)

    def _trace(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Traced:
        argnums = check_argnums(self._argnums, len(args), self.__name__)
        for i in argnums:
            self._check(args[i])
        return Traced(self._fun, args, kwargs, argnums, self._has_aux)


# -- gradients --------------------------------------------------------------------------------------------------------


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Derivative:
    """A function that computes a scalar function and its gradient; as ``jax.value_and_grad``.

    Args:
        fun: a function of pytrees that returns a scalar, or a pair (scalar, auxiliary data).
        argnums: which positional arguments to differentiate.
        has_aux: whether ``fun`` returns a pair.
        holomorphic: promises that ``fun`` is holomorphic; arguments and result are complex then.
        allow_int: permits integer arguments, whose gradient is a zero of dtype float0.

    Returns:
        A function with ``fun``'s arguments that returns ``(value, gradient)``, or ``((value, aux), gradient)``; the
        gradient has the structure, shapes and dtypes of the chosen arguments.

    Raises:
        TypeError: when called, if a chosen argument has no derivative, or the result is no real scalar.

    Example:
        >>> from jaxinfer import autoinfer
        >>> value, slope = autoinfer.value_and_grad(lambda x: x**3)(2.0)
        >>> float(value), float(slope)
        (8.0, 12.0)
    """

    def finish(traced: Traced, values: Sequence[Any]) -> Any:
        count = len(traced.graph.outputs)
        result = traced.unflatten(values[:1])
        gradient = _chosen(traced, _with_float0(traced, values[count:]), argnums)
        return ((result, traced.aux(values[1:count])) if has_aux else result), gradient

    derive = functools.partial(_gradient_program, holomorphic=holomorphic, with_value=True)
    check = functools.partial(check_inputs, what="grad", holomorphic=holomorphic, allow_int=allow_int)
    return Derivative(fun, "value_and_grad", argnums, has_aux, derive, finish, check)


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Derivative:
    """A function that computes the gradient of a scalar function; as ``jax.grad``.

    Args, errors: those of :func:`value_and_grad`.

    Returns:
        A function with ``fun``'s arguments that returns the gradient, or ``(gradient, aux)``.

    Example:
        >>> from jaxinfer import autoinfer
        >>> float(autoinfer.grad(autoinfer.grad(lambda x: x**3))(2.0))
        12.0
    """

    def finish(traced: Traced, values: Sequence[Any]) -> Any:
        count = len(traced.graph.outputs) - 1
        gradient = _chosen(traced, _with_float0(traced, values[count:]), argnums)
        return (gradient, traced.aux(values[:count])) if has_aux else gradient

    derive = functools.partial(_gradient_program, holomorphic=holomorphic, with_value=False)
    check = functools.partial(check_inputs, what="grad", holomorphic=holomorphic, allow_int=allow_int)
    return Derivative(fun, "grad", argnums, has_aux, derive, finish, check)


def _gradient_program(traced: Traced, holomorphic: bool, with_value: bool) -> Derivation:
    """(value if asked for, auxiliary arrays, gradient) of a scalar function."""
    check_scalar(traced, holomorphic)

    def build(borrowed: Any, *operands: Any) -> list[Any]:
        outs, pull = run_vjp(traced.graph, {}, traced.active, traced.useful, *operands, borrowed=borrowed)
        seed = jnp.ones((), _jax.aval_of(outs[0]).dtype)
        back = pull([seed, *[None] * (len(outs) - 1)])
        return [*(outs if with_value else outs[1:]), *_gradients(traced, operands, back)]

    return traced.derive(build)


def _gradients(traced: Traced, operands: Sequence[Any], back: Sequence[Any]) -> list[Any]:
    """Cotangents of the leaves that have any, as arrays."""
    return [filled(ct, x) for ct, x, a in zip(back, operands, traced.active) if a]


def _with_float0(traced: Traced, values: Sequence[Any]) -> list[Any]:
    """Cotangents of all leaves; those of integers are zeros of the type float0."""
    rest, leaves = iter(values), traced.graph.inputs[traced.captured :]
    return [next(rest) if _jax.has_tangent(n.aval) else np.zeros(n.aval.shape, jax.dtypes.float0) for n in leaves]


def _chosen(traced: Traced, leaves: Sequence[Any], argnums: int | Sequence[int]) -> Any:
    """Leaves in the structure of the chosen arguments: of the one, or of the tuple."""
    found = jax.tree.unflatten(traced.in_tree, leaves)
    return found[0] if isinstance(argnums, int) else found


# -- forward and reverse mode -----------------------------------------------------------------------------------------


def jvp(fun: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any], has_aux: bool = False) -> Any:
    """Value and directional derivative; as ``jax.jvp``.

    Args:
        fun: a function of pytrees of arrays.
        primals: its positional arguments, as a tuple or list.
        tangents: directions, of the structure, shapes and dtypes of ``primals``; float0 for integers.
        has_aux: whether ``fun`` returns a pair whose second part is passed on.

    Returns:
        ``(value, tangent)`` or ``(value, tangent, aux)``.

    Raises:
        TypeError: if primals and tangents do not match.
    """
    traced = Traced(fun, primals, {}, range(len(primals)), has_aux)
    directions = check_tangents(primals, tangents)
    active = traced.active
    moving = [t for t, a in zip(directions, active[traced.captured :]) if a]
    has: list[bool] = []

    def build(borrowed: Any, *args: Any) -> list[Any]:
        given = iter(args[len(traced.operands) :])
        duals = [Dual(x, next(given) if a else None) for x, a in zip(args, active)]
        found = interpret(traced.graph, Forward({}, borrowed), *duals)
        has[:] = [d.tangent is not None for d in found[: traced.outputs]]
        return [*(d.primal for d in found), *(d.tangent for d in found[: traced.outputs] if d.tangent is not None)]

    derivation = traced.derive(build, *map(_jax.aval_of, moving))
    values = execute(derivation.graph, *traced.operands, *moving)
    count = len(traced.graph.outputs)
    rest = iter(values[count:])
    outs = values[: traced.outputs]
    moved = [next(rest) if h else _zero(x) for x, h in zip(outs, has)]
    found = (traced.unflatten(outs), traced.unflatten(moved))
    return (*found, traced.aux(values[traced.outputs : count])) if has_aux else found


def _zero(out: Any) -> Any:
    """A tangent that is zero, of the type that JAX gives it."""
    aval = _jax.aval_of(out)
    return jnp.zeros(aval.shape, aval.dtype) if _jax.has_tangent(aval) else np.zeros(aval.shape, jax.dtypes.float0)


def vjp(fun: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Value and pullback; as ``jax.vjp``.

    Args:
        fun: a function of pytrees of arrays.
        *primals: its positional arguments.
        has_aux: whether ``fun`` returns a pair whose second part is passed on.

    Returns:
        ``(value, pullback)`` or ``(value, pullback, aux)``. The pullback is a pytree (its leaves are the residuals) and
        goes from a cotangent of the value's structure to a tuple of cotangents of the primals.
    """
    traced = Traced(fun, primals, {}, range(len(primals)), has_aux)
    outs = traced.graph.out_avals[: traced.outputs]
    cotangents = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outs if _jax.has_tangent(a)]

    def build(borrowed: Any, *args: Any) -> list[Any]:
        operands, given = args[: len(traced.operands)], iter(args[len(traced.operands) :])
        values, pull = run_vjp(traced.graph, {}, traced.active, traced.useful, *operands, borrowed=borrowed)
        seeds = [next(given) if _jax.has_tangent(a) else None for a in outs]
        return [*values, *_gradients(traced, operands, pull([*seeds, *[None] * (len(values) - len(seeds))]))]

    derivation = traced.derive(build, *cotangents)
    count = len(traced.graph.outputs)
    parts = split(derivation.graph, len(traced.operands), count)
    early = execute(parts.early, *traced.operands)
    held = [*(traced.operands[i] for i in parts.again), *early[count:]]
    value = traced.unflatten(early[: traced.outputs])
    pullback = jax.tree_util.Partial(_Pullback(traced, parts.late, outs), held)
    return (value, pullback, traced.aux(early[traced.outputs : count])) if has_aux else (value, pullback)


class _Pullback:
    """The late stage of a derivative: from residuals and a cotangent to cotangents of the arguments."""

    def __init__(self, traced: Traced, late: Graph, outs: Sequence[Any]):
        self._traced, self._late, self._outs = traced, late, outs

    def __call__(self, held: Sequence[Any], cotangent: Any) -> tuple[Any, ...]:
        tree: Any
        leaves, tree = jax.tree.flatten(cotangent)
        if tree != self._traced.out_tree:
            raise TypeError(f"the cotangent has the structure {tree}, the function's result {self._traced.out_tree}")
        seeds = []
        for leaf, aval in zip(leaves, self._outs):
            if not _jax.has_tangent(aval):
                continue
            have = _jax.aval_of(leaf)
            if have.shape != aval.shape or have.dtype != aval.dtype:
                raise ValueError(f"a cotangent of type {have.str_short()} was given for a result of {aval.str_short()}")
            seeds.append(leaf)
        values = execute(self._late, *held, *seeds)
        return jax.tree.unflatten(self._traced.in_tree, _with_float0(self._traced, values))


def hvp(fun: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The Hessian of a scalar function times a vector, forward over reverse, without the Hessian.

    Args:
        fun: a function of pytrees that returns a real scalar.
        primals: its positional arguments, as a tuple or list.
        tangents: the vector, of the structure of ``primals``.

    Returns:
        The product, a tuple of the structure of ``primals``.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> (product,) = autoinfer.hvp(lambda x: jnp.sum(x**3), (jnp.array([1.0, 2.0]),), (jnp.array([1.0, 1.0]),))
        >>> product.tolist()
        [6.0, 12.0]
    """
    return jvp(grad(fun, argnums=tuple(range(len(primals)))), primals, tangents)[1]
