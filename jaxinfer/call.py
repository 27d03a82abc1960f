"""The primitive that makes an optimized function compose with every JAX transformation.

``optimized_call`` carries the program as it was written. Differentiation and batching act on that program and bind the
primitive again, so a derivative or a batched program is optimized as well; rewriting happens when the call is lowered,
for the platform it is lowered to. Tangents and primal values never meet in one program: differentiation first splits
the call into the function with its residuals and the linear map that uses them, and each is a call of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jaxinfer import _jax
from jaxinfer._jax import ad, batching, mlir
from jaxinfer.graph import emit, trace
from jaxinfer.pipeline import Settings, improve_or_keep

optimized_call_p = Primitive("optimized_call")
optimized_call_p.multiple_results = True
_jax.register_operation(optimized_call_p, "optimized_call")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def optimized_call(
    jaxpr: Any,
    operands: Sequence[Any],
    settings: Settings,
    *,
    derivative: Any = None,
    folded: int = 0,
    ready: bool = False,
) -> list[Any]:
    """Calls a program that is optimized where it is compiled.

    Args:
        jaxpr: the closed jaxpr to run.
        operands: its arguments; arrays or tracers.
        settings: how to optimize.
        derivative: a closed jaxpr over ``operands[folded:]`` with the same results, to differentiate instead of
            ``jaxpr`` as long as the first ``folded`` operands take no part in it.
        folded: how many leading operands are weights folded from the program's own.
        ready: the program was optimized before and runs as it is; what is derived from it is optimized again.

    Returns:
        The results, flat.
    """
    plain, consts = _jax.without_constvars(jaxpr)
    return optimized_call_p.bind(
        *consts,
        *operands,
        jaxpr=_jax.close_jaxpr(plain),
        settings=settings,
        derivative=derivative,
        folded=folded + len(consts) if derivative is not None else 0,
        ready=ready,
    )


def _implementation(*operands: Any, **params: Any) -> list[Any]:
    return _compiled(tuple(sorted(params.items())))(*operands)


@functools.lru_cache(maxsize=1024)
def _compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(lambda *operands: optimized_call_p.bind(*operands, **dict(params)))


def _abstract(*_: Any, jaxpr: Any, **__: Any) -> tuple[list[Any], Any]:
    open_, _consts = _jax.open_jaxpr(jaxpr)
    return [v.aval for v in open_.outvars], open_.effects


def _lowered(platform: str) -> Callable[..., Any]:
    def run(*operands: Any, jaxpr: Any, settings: Settings, ready: bool, **_: Any) -> list[Any]:
        if ready or _jax.uses_refs(jaxpr):
            return _jax.jaxpr_as_fun(jaxpr)(*operands)
        graph = improve_or_keep("an optimized call", trace(jaxpr), settings, platform)[0]
        return emit(graph)([w.value for w in graph.weights], *operands)

    lowered = mlir.lower_fun(run, multiple_results=True)

    def rule(ctx: Any, *operands: Any, settings: Settings, **params: Any) -> Any:
        settings = settings.portable() if _jax.is_export(ctx) else settings
        return lowered(ctx, *operands, settings=settings, **params)

    return rule


# -- differentiation --------------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    active = tuple(type(t) is not ad.Zero for t in tangents)
    jaxpr, skip = _program_to_differentiate(active, params)
    primals, active = primals[skip:], active[skip:]
    settings = params["settings"]
    with_residuals, linear, count, has_tangent = _linearized(jaxpr, active)
    results = optimized_call(with_residuals, primals, settings)
    outputs, residuals = results[:count], results[count:]
    nonzero = [t for t, a in zip(tangents[skip:], active) if a]
    moved = iter(optimized_call(linear, [*residuals, *nonzero], settings) if any(has_tangent) else ())
    return outputs, [
        next(moved) if has else ad.Zero(_jax.tangent_aval(_jax.aval_of(out))) for out, has in zip(outputs, has_tangent)
    ]


def _program_to_differentiate(active: Sequence[bool], params: dict[str, Any]) -> tuple[Any, int]:
    """The program to differentiate, and how many leading operands it does without."""
    folded = params["folded"]
    if params["derivative"] is not None and not any(active[:folded]):
        return params["derivative"], folded
    return params["jaxpr"], 0


@functools.lru_cache(maxsize=1024)
def _linearized(jaxpr: Any, active: tuple[bool, ...]) -> tuple[Any, Any, int, tuple[bool, ...]]:
    """Splits a program into (operands → results, residuals) and the linear map (residuals, tangents → tangents)."""
    open_, _ = _jax.open_jaxpr(jaxpr)
    avals = [v.aval for v in open_.invars]
    fun = _jax.jaxpr_as_fun(jaxpr)
    has_tangent = tuple(_jax.has_tangent(v.aval) for v in open_.outvars)

    def split(*primals: Any) -> Any:
        def of_active(*moving: Any) -> tuple[list[Any], list[Any]]:
            rest = iter(moving)
            results = fun(*(next(rest) if a else p for p, a in zip(primals, active)))
            return [r for r, t in zip(results, has_tangent) if t], [r for r, t in zip(results, has_tangent) if not t]

        smooth, linear, discrete = jax.linearize(of_active, *(p for p, a in zip(primals, active) if a), has_aux=True)
        smooth, discrete = iter(smooth), iter(discrete)
        return [next(smooth) if t else next(discrete) for t in has_tangent], linear

    with_residuals, shape = jax.make_jaxpr(split, return_shape=True)(*map(_jax.to_struct, avals))
    _, linear_shape = shape
    structs, tree = jax.tree.flatten(linear_shape)
    tangent_avals = [_jax.tangent_aval(aval) for aval, a in zip(avals, active) if a]

    def linear(*args: Any) -> list[Any]:
        return jax.tree.unflatten(tree, args[: len(structs)])(*args[len(structs) :])

    linear_jaxpr = _jax.make_jaxpr(linear, [*structs, *tangent_avals])
    return with_residuals, linear_jaxpr, len(open_.outvars), has_tangent


def _transpose(cotangents: Sequence[Any], *operands: Any, jaxpr: Any, settings: Any, **_: Any) -> list[Any]:
    linear = tuple(ad.is_undefined_primal(x) for x in operands)
    live = tuple(type(ct) is not ad.Zero for ct in cotangents)
    if not any(live):
        return [ad.Zero(x.aval) if is_linear else None for x, is_linear in zip(operands, linear)]
    known = [x for x, is_linear in zip(operands, linear) if not is_linear]
    back = optimized_call(
        _transposed(jaxpr, linear, live), [*known, *(c for c, a in zip(cotangents, live) if a)], settings
    )
    results = iter(back)
    return [next(results) if is_linear else None for is_linear in linear]


@functools.lru_cache(maxsize=1024)
def _transposed(jaxpr: Any, linear: tuple[bool, ...], live: tuple[bool, ...]) -> Any:
    """The transpose in the linear operands: (other operands, live cotangents) → cotangents of the linear operands."""
    open_, _ = _jax.open_jaxpr(jaxpr)
    fun = _jax.jaxpr_as_fun(jaxpr)
    avals = [v.aval for v in open_.invars]
    known_avals = [a for a, is_linear in zip(avals, linear) if not is_linear]
    linear_avals = [a for a, is_linear in zip(avals, linear) if is_linear]
    cotangent_avals = [_jax.tangent_aval(v.aval) for v, a in zip(open_.outvars, live) if a]

    def transposed(*args: Any) -> Sequence[Any]:
        known, cotangents = args[: len(known_avals)], args[len(known_avals) :]

        def of_linear(*moving: Any) -> list[Any]:
            rest, fixed = iter(moving), iter(known)
            results = fun(*(next(rest) if is_linear else next(fixed) for is_linear in linear))
            return [r for r, a in zip(results, live) if a]

        return jax.linear_transpose(of_linear, *map(_jax.to_struct, linear_avals))(list(cotangents))

    return _jax.make_jaxpr(transposed, [*known_avals, *cotangent_avals])


# -- batching ---------------------------------------------------------------------------------------------------------


def _batch(axis: Any, operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    derivative, folded = params["derivative"], params["folded"]
    if any(map(_jax.is_mapped, dims[:folded])):
        derivative, folded = None, 0
    batched, original, out_dims = _batched(params["jaxpr"], derivative, folded, axis, tuple(dims))
    results = optimized_call(batched, operands, params["settings"], derivative=original, folded=folded)
    return results, list(out_dims)


@functools.lru_cache(maxsize=1024)
def _batched(jaxpr: Any, derivative: Any, folded: int, axis: Any, dims: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """A program and the one to differentiate in its place, both with a batch axis at the same places of the results."""
    batched, out_dims = batching.batch_jaxpr2(jaxpr, axis, dims)
    if derivative is None:
        return batched, None, out_dims
    original, its_dims = batching.batch_jaxpr2(derivative, axis, dims[folded:])
    open_, _ = _jax.open_jaxpr(original)

    def aligned(*operands: Any) -> list[Any]:
        results = _jax.jaxpr_as_fun(original)(*operands)
        return [_move_batch(x, was, to, axis.size) for x, was, to in zip(results, its_dims, out_dims)]

    return batched, _jax.make_jaxpr(aligned, [v.aval for v in open_.invars]), out_dims


def _move_batch(x: Any, was: Any, to: Any, size: Any) -> Any:
    """A result with its batch axis at ``to``; both programs compute the same, but may know it to be equal or not."""
    if not _jax.is_mapped(to):
        return jax.lax.index_in_dim(x, 0, was, keepdims=False) if _jax.is_mapped(was) else x
    if not _jax.is_mapped(was):
        return jax.lax.broadcast_in_dim(x, (*x.shape[:to], size, *x.shape[to:]), [i + (i >= to) for i in range(x.ndim)])
    return jnp.moveaxis(x, was, to)


optimized_call_p.def_impl(_implementation)
_jax.define_effectful_abstract(optimized_call_p, _abstract)
ad.primitive_jvps[optimized_call_p] = _jvp
ad.primitive_transposes[optimized_call_p] = _transpose
batching.fancy_primitive_batchers[optimized_call_p] = _batch
for _platform in PLATFORMS:
    mlir.register_lowering(optimized_call_p, _lowered(_platform), platform=_platform)
mlir.register_lowering(optimized_call_p, _lowered("other"))
