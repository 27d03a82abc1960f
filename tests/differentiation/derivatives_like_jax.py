"""Compares the graph's derivatives with JAX's: forward and reverse, to order 2."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.reverse import vjp
from jaxinfer.graph import interpret, trace

# Correctness only: compiling is most of the time.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_like(seed, x):
    """A random array of the same type, without equal elements."""
    draw = np.random.default_rng(seed).uniform(-1, 1, (2, *x.shape))
    value = draw[0] + 1j * draw[1] if jnp.issubdtype(x.dtype, jnp.complexfloating) else draw[0]
    return np.asarray(value, x.dtype)


def flat(fun):
    """The same function with a tuple of arrays as its result."""
    return lambda *args: tuple(jax.tree.leaves(fun(*args)))


def _moves(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def our_jvp(fun, primals, tangents, borrowed):
    """``jax.jvp`` of a function of arrays by the graph; zeros instead of None, tangents of floats only."""
    graph = trace(jax.make_jaxpr(fun)(*primals), keep_custom=True)
    found = interpret(graph, Forward({}, borrowed), *map(Dual, primals, tangents))
    outs = [d.primal for d in found]
    return outs, [jnp.zeros_like(d.primal) if d.tangent is None else d.tangent for d in found if _moves(d.primal)]


def our_vjp(fun, primals, cotangents, borrowed):
    """Results and ``jax.vjp``'s cotangents of a function of arrays by the graph."""
    graph = trace(jax.make_jaxpr(fun)(*primals), keep_custom=True)
    active = [_moves(x) for x in primals]
    useful = [_moves(a) for a in graph.out_avals]
    outs, pull = vjp(graph, {}, active, useful, *primals, borrowed=borrowed)
    given = iter(cotangents)
    back = pull([next(given) if u else None for u in useful])
    return outs, [jnp.zeros_like(x) if ct is None else ct for x, ct in zip(primals, back) if _moves(x)]


def _jax_jvp(fun, primals, tangents, borrowed):
    full = [np.zeros(x.shape, jax.dtypes.float0) if t is None else jnp.asarray(t) for x, t in zip(primals, tangents)]
    outs, moved = jax.jvp(fun, tuple(primals), tuple(full))
    return list(outs), [t for x, t in zip(outs, moved) if _moves(x)]


def _jax_vjp(fun, primals, cotangents, borrowed):
    outs, pull = jax.vjp(fun, *primals)
    given = iter(cotangents)
    back = pull(tuple(next(given) if _moves(x) else np.zeros(x.shape, jax.dtypes.float0) for x in outs))
    return list(outs), [ct for x, ct in zip(primals, back) if _moves(x)]


_OURS, _JAX = (our_jvp, our_vjp), (_jax_jvp, _jax_vjp)


def _derivatives(jvp, vjp, fun, args, order, reverse, mixed, borrowed):
    """All first derivatives of random directions, and with ``order=2`` those of the first derivatives."""
    tangents = [random_like(i, x) if _moves(x) else None for i, x in enumerate(args)]
    outs = jax.eval_shape(fun, *args)
    cotangents = [random_like(100 + i, x) for i, x in enumerate(outs) if _moves(x)]
    found = {"forward": jvp(fun, args, tangents, borrowed)}
    if reverse:
        found["reverse"] = vjp(fun, args, cotangents, borrowed)
    if order < 2:
        return found

    def pushed(*args):
        return tuple(jvp(fun, args, tangents, borrowed)[1])

    def pulled(*args):
        return tuple(vjp(fun, args[: len(tangents)], args[len(tangents) :], borrowed)[1])

    if not reverse:
        found["forward over forward"] = jvp(pushed, args, tangents, borrowed)
    else:
        both = [*args, *cotangents]
        more = [*tangents, *(random_like(200 + i, x) for i, x in enumerate(cotangents))]
        back = [random_like(300 + i, x) for i, x in enumerate(a for a in args if _moves(a))]
        if mixed:
            found["forward over reverse"] = jvp(pulled, both, more, borrowed)
        found["reverse over reverse"] = vjp(pulled, both, back, borrowed)
    return found


def check(fun, *args, order=2, reverse=True, mixed=True, ours=(), rtol=1e-9, atol=1e-11):
    """Asserts that all derivatives are JAX's.

    Args:
        fun: takes arrays, gives a pytree of arrays.
        *args: where to differentiate; integers are not differentiated.
        order: of the derivatives.
        reverse: whether JAX has reverse mode there.
        mixed: forward mode over reverse mode too, besides reverse over reverse.
        ours: operations that must not have been left to JAX.
        rtol: relative to the largest element of each result.
        atol: absolute.

    Returns:
        How often which operations were left to JAX.
    """
    args = [jnp.asarray(x) for x in args]
    fun = flat(fun)
    borrowed = Counter()

    def run(pair, *args):
        return _derivatives(*pair, fun, args, order, reverse, mixed, borrowed)

    got = jax.jit(functools.partial(run, _OURS), compiler_options=_FAST)(*args)
    want = jax.jit(functools.partial(run, _JAX), compiler_options=_FAST)(*args)
    for kind, (outs, derivatives) in want.items():
        for name, a, b in (("results", got[kind][0], outs), ("derivatives", got[kind][1], derivatives)):
            assert len(a) == len(b)
            for i, (x, y) in enumerate(zip(a, b)):
                x, y = np.asarray(x), np.asarray(y)
                assert x.shape == y.shape and x.dtype == y.dtype, f"{kind}: {name} {i}: {x.dtype}{x.shape}"
                finite = np.abs(y[np.isfinite(y)]) if y.size else y
                scale = rtol * float(finite.max()) if finite.size and y.dtype.kind in "fc" else 0
                np.testing.assert_allclose(x, y, rtol=rtol, atol=atol + scale, err_msg=f"{kind}: {name} {i}")
    left = {op: n for op, n in borrowed.items() if op in ours}
    assert not left, f"left to JAX: {left}"
    return borrowed
