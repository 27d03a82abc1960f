"""Programs mapped over parts of their batch, whole or in stages, against the function itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.analysis.batch import batch_axes, value_axes
from jaxinfer.graph import Graph, check, emit, run, trace_function
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.rewriting.mapping import Stage, crossing_values, map_batch, map_stages

N = 4
# The last state of a word is picked by the number of the example, which is not looked through.
QUICK = {"mobilenetv2", "lstm", "decoder", "gcn", "two_tower", "ctc"}
PARALLEL = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ZOO if n != "g2p"]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def graph_of(fun: Callable[..., Any], *args: jax.Array) -> Graph:
    return trace_function(lambda *a: jax.tree.leaves(fun(*a)), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))


def call(graph: Graph, *inputs: Any) -> list[Any]:
    return jax.jit(lambda *x: run(graph, {}, *x))(*inputs)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.mark.parametrize("name", PARALLEL)
def test_models_in_stages_of_one_two_and_all(name: str) -> None:
    model = load(name, tiny=True, dtype=jnp.float64)
    live = model.make_inputs(N)[model.frozen_inputs :]
    fun = jax.jit(lambda *x: model.apply(*model.known, *x))
    graph = graph_of(fun, *live)
    third = len(graph.nodes) // 3
    mapped = map_stages(graph, [Stage(0, 1), Stage(third, 2), Stage(2 * third, N)])
    assert mapped is not None
    check(mapped)
    assert mapped.out_avals == graph.out_avals
    for y, want in zip(call(mapped, *live), jax.tree.leaves(fun(*live)), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)


def test_cuts_at_every_place_give_the_same() -> None:
    def fun(x: jax.Array, scale: jax.Array) -> Any:
        kept = jnp.sin(x) * scale
        rows = jnp.tanh(kept.reshape(-1, 5) * jnp.arange(5.0))
        turned = (rows.reshape(x.shape) + x).transpose(2, 1, 0) + scale
        return turned, x, turned.sum((0, 1)) + kept.sum((1, 2)), scale * 2

    x = normal(N, 3, 5)
    graph = graph_of(fun, x, jnp.float64(2))
    want = fun(x, 3.0)
    for start in range(len(graph.nodes) + 1):
        mapped = map_stages(graph, [Stage(0, 2), Stage(start, 1)])
        assert mapped is not None
        check(mapped)
        for y, expected in zip(run(mapped, {}, x, 3.0), want, strict=True):
            np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_what_crosses_a_cut() -> None:
    graph = graph_of(lambda x: jnp.sin(x).sum(1) + jnp.cos(x[:, 0]), normal(N, 3))
    found = batch_axes(graph)
    assert found is not None
    axes = value_axes(graph, found)
    first = [n.op for n in graph.nodes].index("reduce_sum")
    assert {v.op for v in crossing_values(graph, axes, first)} == {"input", "sin"}
    assert {v.op for v in crossing_values(graph, axes, len(graph.nodes))} == {"add"}


def test_results_come_back_along_their_own_axes() -> None:
    def fun(x: jax.Array, scale: jax.Array) -> Any:
        rows = jnp.tanh(x.reshape(-1, 5) * scale)
        return x.transpose(2, 0, 1), jnp.arange(3.0) * scale, rows, x.sum((1, 2))

    x = normal(N, 3, 5)
    mapped = map_batch(graph_of(fun, x, jnp.float64(2)), 2)
    assert mapped is not None
    for y, want in zip(run(mapped, {}, x, 3.0), fun(x, 3.0), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-12)


def test_weak_types_and_small_dtypes_stay() -> None:
    def fun(x: jax.Array) -> Any:
        y = x.astype(jnp.bfloat16)
        start = (jnp.zeros((x.shape[0],)), 1.0)
        total, weak = lax.fori_loop(0, 3, lambda i, c: (c[0] + x.sum(1), c[1] * 2), start)
        return y * 2, x > 0, total, weak, lax.cond(weak > 2, lambda: jnp.ones_like(x), lambda: x)

    x = normal(N, 3)
    graph = graph_of(fun, x)
    mapped = map_batch(graph, 1)
    assert mapped is not None
    assert [(a.dtype, a.weak_type) for a in mapped.out_avals] == [(a.dtype, a.weak_type) for a in graph.out_avals]
    for y, want in zip(run(mapped, {}, x), fun(x), strict=True):
        np.testing.assert_array_equal(y, want)


def test_loops_whose_start_every_example_shares() -> None:
    def fun(x: jax.Array) -> Any:
        def step(carry: Any, v: jax.Array) -> tuple[Any, Any]:
            total, count = carry
            return (total + v, count + 1), (total * count, count)

        return lax.scan(step, (jnp.zeros((x.shape[0], 3)), 0.0), x.swapaxes(0, 1), reverse=True, unroll=2)

    x = normal(N, 6, 3)
    mapped = map_batch(graph_of(fun, x), 1)
    assert mapped is not None
    for y, want in zip(run(mapped, {}, x), jax.tree.leaves(fun(x)), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-12)


def test_weights_are_shared_and_not_copied() -> None:
    weights = normal(30, 40)
    graph = graph_of(lambda x: jnp.tanh(x @ weights), jnp.ones((N, 30)))
    mapped = map_batch(graph, 1)
    assert mapped is not None
    (found,) = mapped.weights
    assert found.value is graph.weights[0].value


def test_the_program_of_a_part_is_improved() -> None:
    seen = []

    def improve(graph: Graph) -> Graph:
        seen.append(graph)
        return graph_of(lambda x: jnp.full_like(x, 7.0), jnp.ones(graph.inputs[0].aval.shape))

    mapped = map_batch(graph_of(jnp.sin, jnp.ones((N, 3))), 2, improve)
    assert mapped is not None
    assert [g.inputs[0].aval.shape for g in seen] == [(2, 3)]
    np.testing.assert_array_equal(run(mapped, {}, jnp.ones((N, 3)))[0], np.full((N, 3), 7.0))


@pytest.mark.parametrize("step", [3, 4, 8])
def test_parts_must_be_equal_and_smaller(step: int) -> None:
    assert map_batch(graph_of(jnp.sin, jnp.ones((N, 3))), step) is None


def test_a_loop_needs_less_memory() -> None:
    kernel = normal(3, 3, 32, 32)
    x = normal(16, 32, 32, 1)

    def fun(x: jax.Array) -> jax.Array:
        x = x * jnp.arange(32.0)
        for _ in range(3):
            x = jnp.tanh(
                lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            )
        return x.sum((1, 2, 3))

    graph = graph_of(fun, x)
    mapped = map_batch(graph, 1)
    assert mapped is not None

    def temporary(graph: Graph) -> int:
        compiled = jax.jit(emit(graph)).lower([w.value for w in graph.weights], x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(mapped) < temporary(graph) / 4
