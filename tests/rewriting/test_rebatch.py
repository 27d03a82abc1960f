"""Programs for another batch size, against the function traced at that size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.analysis.batch import BatchAxes
from jaxinfer.graph import Graph, check, run, trace_function
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.rewriting.rebatch import rebatch

N = 4


def graph_of(fun: Callable[..., Any], *args: jax.Array) -> Graph:
    return trace_function(lambda *a: jax.tree.leaves(fun(*a)), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))


def operations(graph: Graph) -> Counter[str]:
    """What a program consists of, but for the order of independent operations."""
    return Counter(f"{node.op} {node.avals}" for node in graph.walk())


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("name", [name for name in ZOO if name != "g2p"])
def test_models_are_what_they_are_traced_to_at_the_other_size(name: str, size: int) -> None:
    model = load(name, tiny=True)

    def fun(*live: Any) -> Any:
        return model.apply(*model.known, *live)

    graph = rebatch(graph_of(fun, *model.make_inputs(N)[model.frozen_inputs :]), size)
    assert graph is not None
    check(graph)
    traced = graph_of(fun, *model.make_inputs(size)[model.frozen_inputs :])
    assert graph.out_avals == traced.out_avals
    assert operations(graph) == operations(traced)


def recurrent(x: jax.Array) -> Any:
    def step(carry: Any, v: jax.Array) -> tuple[Any, Any]:
        state, count = carry
        return (jnp.tanh(state + v), count + 1), state * count

    return lax.scan(step, (jnp.zeros((x.shape[0], 3)), 0), x.swapaxes(0, 1))


def masked(x: jax.Array) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return jnp.where((places[:, :, None] >= places[:, None, :])[..., :3], x, -1.0)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "a loop with a start for every example": (recurrent, (N, 5, 3)),
    "a mask made for every example": (masked, (N, 5, 3)),
    "a counted loop": (lambda x: lax.fori_loop(0, 3, lambda i, v: jnp.sin(v) * i, x), (N, 3)),
    "branches": (lambda x: lax.switch(jnp.argmax(jnp.arange(3)), [jnp.zeros_like, jnp.sin, jnp.cos], x), (N, 3)),
    "rows of all examples": (lambda x: (x.reshape(-1, 3) @ np.ones((3, 2))).reshape(x.shape[0], -1), (N, 5, 3)),
}


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("name", PROGRAMS)
def test_computes_what_the_function_computes(name: str, size: int) -> None:
    fun, shape = PROGRAMS[name]
    x = jnp.asarray(np.random.default_rng(size).normal(size=(size, *shape[1:])), jnp.float32)
    graph = rebatch(graph_of(fun, jnp.ones(shape, jnp.float32)), size)
    assert graph is not None
    check(graph)
    for y, want in zip(run(graph, {}, x), jax.tree.leaves(fun(x)), strict=True):
        assert y.dtype == want.dtype
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


def test_numbers_that_came_from_the_batch_size_stay() -> None:
    graph = rebatch(graph_of(lambda x: x / x.shape[0], jnp.ones((N, 3))), 1)
    assert graph is not None
    np.testing.assert_array_equal(run(graph, {}, jnp.ones((1, 3)))[0], np.full((1, 3), 1 / N))


def test_a_known_start_is_cut_and_repeated() -> None:
    start = np.tile(np.arange(3.0, dtype=np.float32), (N, 1))
    graph = graph_of(lambda x: x + start, jnp.ones((N, 3)))
    for size in (1, 9):
        other = rebatch(graph, size)
        assert other is not None
        y = run(other, {}, jnp.zeros((size, 3)))[0]
        np.testing.assert_array_equal(y, np.tile(start[:1], (size, 1)))


def test_batch_axes_may_be_given() -> None:
    graph = graph_of(lambda x, w: w @ x, jnp.ones((3, N)), jnp.ones((5, 3)))
    assert rebatch(graph, 1) is None
    other = rebatch(graph, 2, BatchAxes(N, (1, None), (1,)))
    assert other is not None
    assert [node.aval.shape for node in other.inputs] == [(3, 2), (5, 3)]
    assert other.out_avals[0].shape == (5, 2)
