"""Which programs compute their results example by example, and along which axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinfer.analysis.batch import MIXED, BatchAxes, Spread, Spreads, batch_axes
from jaxinfer.graph import interpret, run, trace_function
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.rewriting.mapping import map_batch
from jaxinfer.rewriting.rebatch import rebatch

N = 4
rng = np.random.default_rng(0)
WEIGHTS = rng.normal(size=(6, 5))
TABLE = rng.normal(size=(7, 3))


def graph_of(fun: Callable[..., Any], *args: Any) -> Any:
    return trace_function(lambda *a: jax.tree.leaves(fun(*a)), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))


def floats(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def numbers(*shape: int, high: int = 5) -> jax.Array:
    return jnp.asarray(rng.integers(0, high, size=shape), jnp.int32)


def recurrent(x: jax.Array) -> jax.Array:
    start = jnp.zeros((x.shape[0], 5))
    return lax.scan(lambda h, v: (jnp.tanh(h + v @ jnp.ones((6, 5))), h), start, x.swapaxes(0, 1))[1]


def branches(x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(jnp.asarray(WEIGHTS)) > 0, lambda v: jnp.ones_like(v), lambda v: v * 2, x)


def counted(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, v: jnp.sin(v) + i, x)


def attention(x: jax.Array) -> jax.Array:
    scores = jnp.einsum("btd,bsd->bts", x, x)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    return jax.nn.softmax(jnp.where(mask, scores, -1e9), -1) @ x


PARALLEL: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...], tuple[int | None, ...]]] = {
    "elementwise": (lambda x: jnp.maximum(x * 2 - 1, 0), (floats(N, 3),), (0,)),
    "two inputs": (lambda x, y: x + y[:, None], (floats(N, 3), floats(N)), (0,)),
    "a scalar input is shared": (lambda x, t: x / t, (floats(N, 3), jnp.float32(2)), (0,)),
    "dense": (lambda x: x @ WEIGHTS, (floats(N, 6),), (0,)),
    "dense from the left": (lambda x: WEIGHTS.T @ x.T, (floats(N, 6),), (1,)),
    "as large as the batch": (lambda x: x @ np.ones((N, N)), (floats(N, N),), (0,)),
    "products of examples": (lambda x: jnp.einsum("bij,bjk->kbi", x, x), (floats(N, 3, 3),), (1,)),
    "reduced": (lambda x: (x.sum(1), jnp.argmax(x, -1).T), (floats(N, 3, 2),), (0, 1)),
    "convolution": (
        lambda x: nn.Conv(4, (3, 3)).apply({"params": {"kernel": np.ones((3, 3, 2, 4)), "bias": np.ones(4)}}, x),
        (floats(N, 5, 5, 2),),
        (0,),
    ),
    "pooling": (lambda x: nn.max_pool(x, (2, 2)) + nn.avg_pool(x, (2, 2)), (floats(N, 4, 4, 2),), (0,)),
    "rows of all examples as one axis": (lambda x: x.reshape(-1, 6) @ WEIGHTS, (floats(N, 3, 6),), (0,)),
    "and back": (lambda x: jnp.tanh(x.reshape(-1, 6) @ WEIGHTS).reshape(N, 3, 5).sum(1), (floats(N, 3, 6),), (0,)),
    "lookup": (lambda i: jnp.asarray(TABLE)[i], (numbers(N, 2),), (0,)),
    "lookup of each in its own": (lambda x, i: jnp.take_along_axis(x, i, 1), (floats(N, 6), numbers(N, 2)), (0,)),
    "softmax": (lambda x: jax.nn.softmax(x, -1), (floats(N, 3),), (0,)),
    "sorted": (lambda x: (jnp.sort(x, 1), jnp.cumsum(x, -1), x[:, ::-1]), (floats(N, 3),), (0, 0, 0)),
    "padded": (lambda x: jnp.pad(x[:, 1:], ((0, 0), (2, 1))), (floats(N, 3),), (0,)),
    "joined": (lambda x: jnp.concatenate([x, jnp.zeros((N, 2))], 1), (floats(N, 3),), (0,)),
    "stacked": (lambda x: jnp.stack([x, x]), (floats(N, 3),), (1,)),
    "written into": (lambda x: jnp.zeros((N, 5)).at[:, 1:4].set(x), (floats(N, 3),), (0,)),
    "spectrum": (lambda x: jnp.abs(jnp.fft.rfft(x)), (floats(N, 8),), (0,)),
    "solved": (lambda x: jnp.linalg.cholesky(jnp.eye(3) + x @ x.mT), (floats(N, 3, 3),), (0,)),
    "recurrence": (recurrent, (floats(N, 3, 6),), (1,)),
    "branches": (branches, (floats(N, 3),), (0,)),
    "counted loop": (counted, (floats(N, 3),), (0,)),
    "attention": (attention, (floats(N, 3, 2),), (0,)),
    "a result no example enters": (lambda x: (x * 2, jnp.arange(5)), (floats(N, 3),), (0, None)),
    "a known start for every example": (lambda x: x + np.zeros((N, 3)), (floats(N, 3),), (0,)),
}
MIXING: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "batch norm in training": (
        lambda x: nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False).apply(
            {"batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}, x, mutable=["batch_stats"]
        )[0],
        (floats(N, 3),),
    ),
    "softmax over examples": (lambda x: jax.nn.softmax(x, 0), (floats(N, 3),)),
    "mean": (lambda x: x - x.mean(0), (floats(N, 3),)),
    "products of pairs": (lambda x: x @ x.T, (floats(N, 3),)),
    "product over examples": (lambda x: np.ones((2, N)) @ x, (floats(N, 3),)),
    "reversed": (lambda x: x[::-1], (floats(N, 3),)),
    "rolled": (lambda x: jnp.roll(x, 1, 0), (floats(N, 3),)),
    "sorted examples": (lambda x: jnp.sort(x, 0), (floats(N, 3),)),
    "running sum": (lambda x: jnp.cumsum(x, 0), (floats(N, 3),)),
    "one example": (lambda x: x[0], (floats(N, 3),)),
    "some examples": (lambda x: x[:2], (floats(N, 3),)),
    "joined examples": (lambda x: jnp.concatenate([x, x]), (floats(N, 3),)),
    "examples added to features": (lambda x: x + x.T, (floats(N, N),)),
    "number of the example": (lambda x: x + jnp.arange(N)[:, None], (floats(N, 3),)),
    "another constant for each example": (lambda x: x + np.arange(3 * N).reshape(N, 3), (floats(N, 3),)),
    "examples innermost": (lambda x: x.T.reshape(-1), (floats(N, 3),)),
    "examples split": (lambda x: x.reshape(2, 2, 3), (floats(N, 3),)),
    "loop over examples": (lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(3), x)[1], (floats(N, 3),)),
    "carried from one example to another": (
        lambda x: lax.scan(lambda c, _: (jnp.roll(c, 1, 0), None), x, None, length=3)[0],
        (floats(N, 3),),
    ),
    "until all are done": (lambda x: lax.while_loop(lambda v: v.max() < 9, lambda v: v + 1, x), (floats(N, 3),)),
    "a branch for all": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), (floats(N, 3),)),
    "lookup among examples": (lambda x, i: x[i], (floats(N, 3), numbers(N))),
    "depthwise over examples": (lambda x: lax.conv(x[None], np.ones((2, N, 1)), (1,), "SAME"), (floats(N, 8),)),
    "one example alone": (lambda x: x * 2, (floats(1, 3),)),
    "inputs of two sizes": (lambda x, y: (x, y), (floats(N, 3), floats(5, 3))),
    "no input": (lambda: jnp.ones(3), ()),
    "prints": (lambda x: (jax.debug.print("{}", x), x)[1], (floats(N, 3),)),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_finds_the_batch_axis_of_every_output(name: str) -> None:
    fun, args, axes = PARALLEL[name]
    inputs = tuple(0 if a.ndim else None for a in args)
    assert batch_axes(graph_of(fun, *args)) == BatchAxes(N, inputs, axes)


@pytest.mark.parametrize("name", PARALLEL)
def test_examples_computed_alone_give_the_same(name: str) -> None:
    fun, args, axes = PARALLEL[name]
    graph = graph_of(fun, *args)
    want = jax.tree.leaves(fun(*args))
    one = rebatch(graph, 1)
    assert one is not None
    for i in range(N):
        got = run(one, {}, *(a[i : i + 1] if a.ndim else a for a in args))
        for y, whole, axis in zip(got, want, axes, strict=True):
            block = whole if axis is None else np.split(np.asarray(whole), N, axis)[i]
            assert y.dtype == block.dtype
            np.testing.assert_allclose(y, block, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXING)
def test_refuses_programs_in_which_examples_may_meet(name: str) -> None:
    fun, args = MIXING[name]
    graph = graph_of(fun, *args)
    assert batch_axes(graph) is None
    assert rebatch(graph, 1) is None
    assert map_batch(graph, 1) is None


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo(name: str) -> None:
    model = load(name, tiny=True)
    live = model.make_inputs(N)[model.frozen_inputs :]
    found = batch_axes(graph_of(lambda *a: model.apply(*model.known, *a), *live))
    if name == "g2p":
        # It picks the last state of each word by the number of the example.
        assert found is None
    else:
        assert found == BatchAxes(N, (0,) * len(live), (0,))


# -- random programs: every axis is as long as the batch, so that no length gives a wrong one away ---------------------

CONSTANTS = [np.full((N, N), 0.5), rng.normal(size=(N, N)), np.tile(rng.normal(size=N), (N, 1))]
Step = Callable[[list[Any]], Any]


def _axis(x: Any, i: int) -> int:
    return i % x.ndim


def _product(x: Any, y: Any, i: int, j: int) -> Any:
    if not (x.ndim and y.ndim) or x.shape[_axis(x, i)] != y.shape[_axis(y, j)]:
        return x
    return jnp.tanh(jnp.tensordot(x, y, (_axis(x, i), _axis(y, j)))) if x.ndim + y.ndim <= 5 else x


def _sum(x: Any, y: Any) -> Any:
    return x + y if x.shape == y.shape else x


STEPS: list[Callable[[Any, Any, int, int], Any]] = [
    lambda x, y, i, j: jnp.sin(x) * 2,
    lambda x, y, i, j: _sum(x, y),
    lambda x, y, i, j: _sum(x, jnp.asarray(CONSTANTS[i % 3])),
    lambda x, y, i, j: _product(x, y, i, j),
    lambda x, y, i, j: _product(x, jnp.asarray(CONSTANTS[1]), i, j),
    lambda x, y, i, j: jnp.einsum("abc,abd->bcd", x, y) if x.shape == y.shape == (N, N, N) else x,
    lambda x, y, i, j: jnp.swapaxes(x, _axis(x, i), _axis(x, j)) if x.ndim else x,
    lambda x, y, i, j: x.sum(_axis(x, i)) if x.ndim > 1 else x,
    lambda x, y, i, j: x - x.max(_axis(x, i), keepdims=True) if x.ndim else x,
    lambda x, y, i, j: jnp.cumsum(x, _axis(x, i)) if x.ndim else x,
    lambda x, y, i, j: jnp.flip(x, _axis(x, i)) if x.ndim else x,
    lambda x, y, i, j: jnp.stack([x] * N, i % (x.ndim + 1)) if x.ndim < 3 else x,
    lambda x, y, i, j: (
        jnp.broadcast_to(jnp.expand_dims(x, i % (x.ndim + 1)), (N,) * (x.ndim + 1))
        if x.ndim < 3 and x.shape == (N,) * x.ndim
        else x
    ),
    lambda x, y, i, j: x.reshape([(-1,), (N, -1), (-1, N), (2, -1)][i % 4]) if x.size > 1 else x,
    lambda x, y, i, j: x.reshape((N,) * 3) if x.size == N**3 else x,
    lambda x, y, i, j: lax.slice_in_dim(x, 0, 2 + i % 3, axis=_axis(x, j)) if x.ndim and min(x.shape) >= N else x,
    lambda x, y, i, j: jnp.take(x, np.array([0, 2, 1, 3]), _axis(x, i)) if x.ndim and min(x.shape) >= N else x,
    lambda x, y, i, j: lax.scan(lambda c, v: (jnp.tanh(c + v), c), jnp.zeros(x.shape[1:]), x)[1] if x.ndim else x,
    lambda x, y, i, j: lax.fori_loop(0, 3, lambda k, c: jnp.roll(c, i, _axis(x, j)) + x, x) if x.ndim else x,
]


@st.composite
def programs(draw: st.DrawFn) -> Callable[[jax.Array], list[Any]]:
    small = st.integers(0, 5)
    steps = draw(
        st.lists(st.tuples(st.integers(0, len(STEPS) - 1), small, small, small, small), min_size=1, max_size=6)
    )

    def program(x: jax.Array) -> list[Any]:
        values = [x, jnp.tanh(x)]
        for step, a, b, i, j in steps:
            # Values near the end are taken more often.
            values.append(STEPS[step](values[-1 - a % min(2, len(values))], values[-1 - b % len(values)], i, j))
        return values[1:]

    return program


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=programs(), rank=st.integers(1, 3), example=st.integers(0, N - 1))
def test_never_claims_independence_of_examples_that_meet(program: Any, rank: int, example: int) -> None:
    x = jnp.asarray(np.random.default_rng(rank).normal(size=(N,) * rank), jnp.float32)
    graph = graph_of(program, x)
    spreads = interpret(graph, Spreads(N), Spread(0))
    before = run(graph, {}, x)
    after = run(graph, {}, x.at[example].add(0.25))
    for spread, a, b in zip(spreads, before, after, strict=True):
        if spread == MIXED:
            continue
        if spread.axis is None:
            np.testing.assert_array_equal(a, b)
            continue
        for i, (p, q) in enumerate(
            zip(np.split(np.asarray(a), N, spread.axis), np.split(np.asarray(b), N, spread.axis))
        ):
            if i != example:
                np.testing.assert_array_equal(p, q)

    apart = [i for i, s in enumerate(spreads) if s != MIXED]
    part = graph_of(lambda x: [program(x)[i] for i in apart], x)
    mapped = map_batch(part, 1)
    assert (mapped is None) == (batch_axes(part) is None)
    if mapped is not None:
        for i, y in zip(apart, run(mapped, {}, x), strict=True):
            np.testing.assert_allclose(y, before[i], rtol=1e-4, atol=1e-4)
