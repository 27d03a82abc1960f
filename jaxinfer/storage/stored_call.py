"""Calls of a stored program that there is with kernels and without: which it is, is decided where it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer._jax import mlir
from jaxinfer.native import is_portable

STORED_CALL = "stored_call"

_stored_call_p = _jax.Primitive(STORED_CALL)
_stored_call_p.multiple_results = True
_jax.register_operation(_stored_call_p, STORED_CALL)


def stored_call(with_kernels: jax.export.Exported, without: jax.export.Exported) -> Callable[..., list[Any]]:
    """A function of the flat operands of a program that is stored in two ways.

    Args:
        with_kernels: what runs here.
        without: what is exported and differentiated.
    """

    @jax.custom_vjp
    def call(*operands: Any) -> list[Any]:
        return _stored_call_p.bind(*operands, with_kernels=with_kernels, without=without)

    # Of both, derivatives are those that the program was stored with.
    call.defvjp(lambda *operands: jax.vjp(_flat(without), *operands), lambda vjp, cotangents: vjp(cotangents))
    return call


def _flat(program: jax.export.Exported) -> Callable[..., list[Any]]:
    def run(*operands: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(program.in_tree, operands)
        return jax.tree.leaves(program.call(*args, **kwargs))

    return run


def _run(*operands: Any, with_kernels: Any, without: Any) -> list[Any]:
    return _flat(with_kernels)(*operands)


def _lowered(ctx: Any, *operands: Any, with_kernels: Any, without: Any) -> Any:
    program = without if is_portable(ctx) else with_kernels
    return mlir.lower_fun(_flat(program), multiple_results=True)(ctx, *operands)


def _abstract(*avals: Any, with_kernels: Any, without: Any) -> list[Any]:
    shapes = jax.eval_shape(_flat(without), *map(_jax.to_struct, avals))
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]


_stored_call_p.def_impl(_run)
_stored_call_p.def_abstract_eval(_abstract)
mlir.register_lowering(_stored_call_p, _lowered)
