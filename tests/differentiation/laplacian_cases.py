"""Functions that reach every rule of the Laplacian, with the shapes of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_RNG = np.random.default_rng(3)


def array(*shape: int) -> np.ndarray:
    """Fixed numbers."""
    return _RNG.normal(size=shape)


W3, W4, W5 = array(3, 4), array(4, 4), array(4, 3)
KERNEL = array(2, 2, 3, 3)


def attention(x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ W3)
    heads = [h @ w for w in (W4, W4.T, W4 + 1)]
    q, k, v = (a.reshape(a.shape[0], 2, 2) for a in heads)
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), -1)
    y = h + jnp.einsum("hts,shd->thd", weights, v).reshape(h.shape)
    centred = y - y.mean(-1, keepdims=True)
    return jnp.sum(jnp.tanh(centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-2)) @ W5, -1)


def _slater(x: jax.Array) -> jax.Array:
    return jnp.linalg.slogdet(jnp.tanh(x @ W3) @ W4)[1]


def _backflow(x: jax.Array) -> jax.Array:
    return jnp.linalg.slogdet(jnp.tanh(x @ W3 + jnp.sum(jnp.cos(x))) @ W4)[1]


def _scan(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(carry: Any, row: jax.Array) -> tuple[Any, jax.Array]:
        a, b, i = carry
        return (jnp.tanh(a * row + b), b * 0.5, i + 1), a * jnp.sin(row) * i

    (a, _, _), ys = lax.scan(step, (jnp.ones(3), x[0], 0), x, reverse=True)
    return jnp.sum(a**2), ys


def _chain_scan(x: jax.Array) -> jax.Array:
    """What depends on what grows from step to step."""
    return lax.scan(lambda c, _: (c * jnp.roll(c, 1), None), x, None, length=2)[0]


def _while(x: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1]) * x + c[1]), (0, x))[1]


def _traced_bound(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, jnp.where(x[0] > 9.0, 1, 3), lambda i, c: c + jnp.cos(c * x[i]), jnp.zeros(()))


def _cond(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.cond(x[0] > -9.0, lambda y: (y[0] * y[1] ** 2, y), lambda y: (jnp.sin(y[2]), y * 0), x)


def _switch(x: jax.Array) -> jax.Array:
    branches = [lambda y: y**2, lambda y: jnp.flip(y) ** 3, jnp.ones_like]
    return sum(lax.switch(i, branches, x) for i in range(3)) * lax.switch(jnp.argmax(x) * 0 + 1, branches, x)


@jax.custom_jvp
def _doubled_slope(x: jax.Array) -> jax.Array:
    return x**2


_doubled_slope.defjvp(lambda p, t: (_doubled_slope(*p), 4 * p[0] * t[0]))


@jax.custom_jvp
def _mixed(x: jax.Array) -> jax.Array:
    return jnp.cumsum(x**2)


_mixed.defjvp(lambda p, t: (_mixed(*p), jnp.cumsum(3 * p[0] * t[0]) * p[0][0]))


@jax.custom_vjp
def _pulled(x: jax.Array) -> jax.Array:
    return jnp.sum(x**3)


_pulled.defvjp(lambda x: (_pulled(x), x), lambda x, g: (5 * g * jnp.sin(x),))

Case = tuple[Callable[..., Any], tuple[int, ...]]

ELEMENTWISE: dict[str, Case] = {
    name: (fun, (3,))
    for name, fun in {
        "tanh": jnp.tanh,
        "exp": jnp.exp,
        "log": lambda x: jnp.log(x**2 + 1),
        "logistic": lax.logistic,
        "sin, cos": lambda x: lax.sin(x) * lax.cos(2 * x),
        "sqrt": lambda x: jnp.sqrt(x**2 + 1),
        "rsqrt": lambda x: lax.rsqrt(x * x + 1),
        "square": lax.square,
        "powers": lambda x: x**3 + lax.integer_pow(x, -2) + lax.integer_pow(x, 1),
        "erf": lax.erf,
        "unary by JAX": lambda x: lax.log1p(x * x) + lax.expm1(x) + lax.atan(x) + lax.cbrt(x) + lax.lgamma(2 + x * x),
        "pow": lambda x: (x**2 + 1) ** x,
        "atan2": lambda x: jnp.arctan2(x, jnp.flip(x) + 3),
        "abs": lambda x: jnp.abs(x) * x,
        "max, min": lambda x: jnp.maximum(x * x, jnp.sin(x)) * jnp.minimum(x, 0.1),
        "clamp": lambda x: jnp.clip(x**2, 0.1, 0.8) * x,
        "steps": lambda x: x**2 * jnp.floor(3 * x) + jnp.sign(x) * x**3 + lax.stop_gradient(x) * x**2,
        "rem": lambda x: lax.rem(x**3, 0.3) * x,
        "div": lambda x: jnp.sin(x) / (2 + jnp.cos(jnp.flip(x))) + 1 / x + x / 3,
        "x/x": lambda x: (x * x) / (1 + x),
        "neg, sub": lambda x: (-x) ** 2 - (1 - x) ** 3 - jnp.sin(x),
        "select": lambda x: jnp.where(x > 0, jnp.exp(x), jnp.sin(x)) + jnp.where(x > 0.2, x**2, 1.0),
        "select of two": lambda x: jnp.where(jnp.arange(3) > 1, jnp.flip(x) ** 2, x[0] ** 3),
        "convert": lambda x: (x**2).astype(jnp.float64) * lax.reduce_precision(x, 11, 52),
        "silu, gelu, elu": lambda x: jax.nn.silu(x) * jax.nn.gelu(x) + jax.nn.elu(x) + jax.nn.leaky_relu(x**3),
        "relu": lambda x: jax.nn.relu(x**3) + jax.nn.relu6(x) * x,
        "softplus": jax.nn.softplus,
        "scalar": lambda x: x[0] * jnp.sin(x) + 2 * x[1] ** 2,
        "custom_jvp, pointwise": lambda x: _doubled_slope(jnp.sin(x)) * x,
    }.items()
}

MOVES: dict[str, Case] = {
    "broadcast": (lambda x: (x[:, None] - x[None]) ** 3, (4,)),
    "reshape": (lambda x: (x.reshape(2, 6) * jnp.sin(x.reshape(3, 4)).reshape(2, 6)).reshape(3, 2, 2), (4, 3)),
    "transpose": (lambda x: x.T[:, :, None] ** 2 * x[None], (3, 2)),
    "slice": (lambda x: x[1:] * x[:-1] ** 2 + x[::2][:1], (4,)),
    "rev, roll": (lambda x: jnp.flip(x) * jnp.roll(x, 1) ** 2, (4,)),
    "concatenate": (lambda x: jnp.concatenate([x**2, jnp.ones(2), jnp.sin(x[:2]), x[:1] * x]) ** 2, (4,)),
    "unstack": (lambda x: [a**2 * a[0] for a in jnp.unstack(x * x[0, 0], axis=1)], (2, 3)),
    "stack": (lambda x: jnp.stack([x, jnp.sum(x) * x, jnp.zeros(4)], 1) ** 2, (4,)),
    "pad": (lambda x: jnp.pad(x**2, (1, 2)) * jnp.pad(jnp.sum(x) * x, (2, 1), constant_values=2.0), (4,)),
    "pad with a value": (lambda x: lax.pad(x**2, x[0] ** 2, ((1, 0, 1),)) ** 2, (3,)),
    "nothing": (lambda x: jnp.concatenate([x[:0] ** 2, x**2]) + jnp.sum(jnp.sin(x[4:])), (4,)),
    "split": (lambda x: [a**2 * a[0] for a in jnp.split(x, [1, 3])], (4,)),
    "gather": (lambda x: x[np.array([0, 2, 2])] * x[1:] ** 2, (4,)),
    "gather, traced": (lambda x: (x**2)[jnp.argsort(x)] * x, (4,)),
    "gather, two axes": (lambda x: x[np.array([0, 1]), np.array([1, 0])] ** 3, (2, 3)),
    "gather, outside": (lambda x: x.at[np.array([1, 9])].get(mode="fill", fill_value=0.0) ** 2, (4,)),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x**2, (jnp.argmin(x) // 9 + 1,), (2,)) * x[:2], (4,)),
    "dynamic_slice, known": (lambda x: lax.dynamic_slice(x, (1,), (2,)) ** 3, (4,)),
    "update": (lambda x: lax.dynamic_update_slice(x**2, jnp.sin(x[:2]), (jnp.argmax(x) * 0 + 1,)) ** 2, (4,)),
    "scatter": (lambda x: (x**2).at[1].set(x[0] * x[2]) ** 2 + x.at[np.array([0, 0])].add(x[:2] ** 2), (4,)),
    "sum": (lambda x: jnp.sum(x**3, 0) * jnp.sum(jnp.sin(x), 1)[:2] + jnp.sum(x) ** 2, (3, 2)),
    "mean, variance": (lambda x: jnp.var(x**2, -1) * jnp.mean(x), (3, 4)),
    "sum of pairs": (lambda x: jnp.sum(jnp.sin(x[:, None] * x[None]), 1), (4,)),
    "largest": (lambda x: jnp.max(x**3, 0) * jnp.min(jnp.sin(x), 1)[0] + jax.nn.logsumexp(x), (3, 2)),
    "sort": (lambda x: jnp.sort(x**2, 0) * x, (3, 2)),
    "sort by key": (lambda x: lax.sort((x, x**2 * x[0]), num_keys=1)[1] * x, (4,)),
    "top_k": (lambda x: lax.top_k(jnp.sin(x) * x[0], 2)[0] ** 2, (4,)),
    "cumsum": (lambda x: jnp.cumsum(x**2, 0) * jnp.cumsum(x, 1), (3, 2)),
    "repeat, tile": (lambda x: jnp.tile(x, 2) * jnp.repeat(x, 2) ** 2, (3,)),
    "triu": (lambda x: jnp.triu(jnp.outer(x, x)) @ x, (3,)),
    "distances": (lambda x: 1 / jnp.sqrt(jnp.sum((x[:, None] - x[None]) ** 2, -1) + np.eye(3)), (3, 2)),
}

PRODUCTS: dict[str, Case] = {
    "matrix, fixed": (lambda x: jnp.tanh(x @ W3) @ W5, (2, 3)),
    "fixed, matrix": (lambda x: W4 @ (W3.T @ x**2), (3, 2)),
    "quadratic form": (lambda x: x @ W4 @ x, (4,)),
    "both": (lambda x: jnp.sin(x) @ jnp.cos(x).T, (3, 2)),
    "dense both": (lambda x: jnp.tanh(jnp.sum(x) * x) @ W3 @ jnp.sin(jnp.cumsum(x) @ x.reshape(6) * W4), (2, 3)),
    "batches": (lambda x: jnp.einsum("bij,bjk->kbi", x**2, jnp.sin(x)), (2, 2, 2)),
    "outer": (lambda x: jnp.outer(x, x[:2]) ** 2, (3,)),
    "inner": (lambda x: jnp.vdot(jnp.sin(x), x**2), (4,)),
    "dense times sparse": (lambda x: jax.nn.softmax(x @ x.T, -1) @ (x**2), (4, 2)),
    "sparse times dense": (lambda x: (x**2).T @ jax.nn.softmax(x @ x.T, -1), (4, 2)),
    "three axes": (lambda x: jnp.einsum("ij,jk,kl->il", x, x.T, jnp.sin(x)), (2, 3)),
    "attention": (attention, (4, 3)),
    "conv, fixed kernel": (
        lambda x: lax.conv_general_dilated(jnp.tanh(x), KERNEL[..., :2, :2], (1, 1), "SAME") ** 2,
        (1, 2, 3, 3),
    ),
    "conv, fixed image": (
        lambda x: lax.conv_general_dilated(KERNEL, x**2, (1, 1), "VALID") ** 2,
        (1, 2, 2, 2),
    ),
    "conv, both": (lambda x: lax.conv_general_dilated(jnp.sin(x), x[..., :2, :2], (1, 1), "SAME"), (1, 1, 3, 3)),
    "triangular_solve": (
        lambda x: lax.linalg.triangular_solve(np.tril(W4) + 3 * np.eye(4), x**2, left_side=True, lower=True) ** 2,
        (4, 2),
    ),
    "slogdet, rows": (_slater, (4, 3)),
    "slogdet, columns": (lambda x: jnp.linalg.slogdet((jnp.tanh(x @ W3) @ W4).T)[1] ** 2, (4, 3)),
    "slogdet, dense": (_backflow, (4, 3)),
    "slogdet, batches": (lambda x: jnp.linalg.slogdet(x.reshape(2, 2, 2) ** 2 + x[0] * np.eye(2))[1], (8,)),
    "slogdet, batches of rows": (lambda x: jnp.linalg.slogdet(jnp.tanh(x @ W3)[None] * W4[:2, None])[1], (4, 3)),
    "slogdet under vmap": (
        lambda x: jax.vmap(lambda w: jnp.linalg.slogdet(jnp.tanh(x @ W3) @ w)[1])(np.stack([W4, W4.T])),
        (4, 3),
    ),
    "slogdet, elements": (lambda x: jnp.linalg.slogdet(x)[1], (3, 3)),
    "slogdet, sign": (lambda x: jnp.prod(jnp.stack(jnp.linalg.slogdet(x))), (3, 3)),
}

CONTROL: dict[str, Case] = {
    "scan": (_scan, (3, 3)),
    "scan that mixes": (_chain_scan, (5,)),
    "while": (_while, (3,)),
    "while with a traced bound": (_traced_bound, (3,)),
    "cond": (_cond, (3,)),
    "switch": (_switch, (3,)),
    "checkpoint": (jax.checkpoint(lambda x: jnp.sin(x) * jnp.sum(x)), (3,)),
    "jit": (lambda x: jax.jit(lambda y: y**2 * y[0])(x) ** 2, (3,)),
    "scan in cond": (lambda x: lax.cond(x[0] > 99, lambda y: y * 0, lambda y: _chain_scan(y) ** 2, x), (4,)),
    "vmap of scan": (jax.vmap(lambda r: lax.scan(lambda c, y: (c * jnp.sin(y), c), 1.0, r)), (2, 3)),
}

FALLBACKS: dict[str, Case] = {
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ x.T + 4 * np.eye(3)), (3, 2)),
    "eigh": (lambda x: jnp.linalg.eigvalsh(x + x.T), (3, 3)),
    "reduce_prod": (lambda x: jnp.prod(x), (4,)),
    "triangular_solve": (
        lambda x: lax.linalg.triangular_solve(x + 3 * np.eye(3), x[:, :1] ** 2, left_side=True, lower=True),
        (3, 3),
    ),
    "custom_jvp_call": (lambda x: _mixed(jnp.sin(x)) * x, (3,)),
    "cumprod": (lambda x: jnp.cumprod(x) * x, (4,)),
}
# There is no forward derivative of it: the oracle is reverse over reverse.
PULLED: Case = (lambda x: _pulled(jnp.sin(x)) * x[0], (3,))
