"""Primitives that are kernels where XLA compiles for this machine, in float32, and JAX's own operations elsewhere.

What is exported may run anywhere, so it is in JAX's own operations, unless :func:`exports_with_kernels` says otherwise.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer._jax import ad, batching, mlir
from jaxinfer.native.library import library

# The names of all there are.
NAMES: list[str] = []
_with_kernels = contextvars.ContextVar("exports with kernels", default=False)


@contextlib.contextmanager
def exports_with_kernels() -> Iterator[None]:
    """What is exported inside calls kernels: it is for machines like this one, with this library."""
    token = _with_kernels.set(True)
    try:
        yield
    finally:
        _with_kernels.reset(token)


def is_portable(ctx: Any) -> bool:
    """Whether what is lowered here must do without kernels, since it may run anywhere."""
    return library() is None or (_jax.is_export(ctx) and not _with_kernels.get())


def kernel_primitive(
    name: str,
    plain: Callable[..., Any],
    abstract: Callable[..., Any],
    kernel: Callable[..., Any],
    multiple_results: bool = False,
    dtype: Any = np.float32,
) -> Any:
    """Makes a primitive.

    Args:
        name: what rules know it by.
        plain: ``plain(*operands, **params)`` in JAX's own operations; what is differentiated and batched, exported, and
            computed in other dtypes.
        abstract: ``abstract(*avals, **params)`` gives the results' types.
        kernel: ``kernel(ctx, operands, **params)`` lowers a call to the kernel.
        multiple_results: whether results are lists.
        dtype: that of the first operand, if the kernel is to be called.
    """
    primitive = _jax.Primitive(name)
    primitive.multiple_results = multiple_results
    _jax.register_operation(primitive, name)
    NAMES.append(name)
    lowered_plain = mlir.lower_fun(plain, multiple_results=multiple_results)

    def lowered(ctx: Any, *operands: Any, **params: Any) -> Any:
        empty = any(0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out))
        if is_portable(ctx) or empty or ctx.avals_in[0].dtype != dtype:
            return lowered_plain(ctx, *operands, **params)
        return kernel(ctx, operands, **params)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        filled = tuple(map(ad.instantiate_zeros, tangents))
        return jax.jvp(functools.partial(plain, **params), tuple(primals), filled)

    def batch(operands: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        axes = [d if _jax.is_mapped(d) else None for d in dims]
        results = jax.vmap(functools.partial(plain, **params), axes)(*operands)
        return results, [0] * len(results) if multiple_results else 0

    @functools.lru_cache(maxsize=1024)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(lambda *operands: primitive.bind(*operands, **dict(params)))

    def run(*operands: Any, **params: Any) -> Any:
        if _jax.jit_disabled():
            return plain(*operands, **params)
        return compiled(tuple(sorted(params.items())))(*operands)

    primitive.def_impl(run)
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lowered_plain)
    mlir.register_lowering(primitive, lowered, platform="cpu")
    return primitive
