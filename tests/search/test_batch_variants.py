"""Which programs are offered as loops over their batch, and in which stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.analysis.batch import batch_axes, value_axes
from jaxinfer.graph import Graph, run, trace_function
from jaxinfer.rewriting.mapping import Stage
from jaxinfer.search.batch import batch_variants, choose_stages, live_bytes

N = 8


def graph_of(fun: Callable[..., Any], *args: Any) -> Graph:
    return trace_function(lambda *a: jax.tree.leaves(fun(*a)), *args)


def images(batch: int, side: int, channels: int) -> Any:
    return jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)


def conv(x: jax.Array, features: int, stride: int = 1) -> jax.Array:
    kernel = np.random.default_rng(features).normal(size=(3, 3, x.shape[-1], features)).astype(np.float32) / 9
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def shrinking(x: jax.Array) -> jax.Array:
    for features in (16, 32, 64):
        x = jnp.maximum(conv(x, features, 2), 0) + 1
        x = jnp.maximum(conv(x, features), 0) + 1
    return x.mean((1, 2))


def unchanged(graph: Graph) -> Graph:
    return graph


def widened(x: jax.Array) -> jax.Array:
    return shrinking(conv(x, 32))


def level(x: jax.Array) -> jax.Array:
    return conv(conv(x, 32), 32)


# Small images go several at a time. One of 64 × 64 × 32 takes 512 KiB, of 96 × 96 × 32 more than 1 MiB, of
# 128 × 128 × 32 as much as two MiB.
@pytest.mark.parametrize(
    ("fun", "side", "names"),
    [
        (widened, 32, ["mapped by 4"]),
        (widened, 40, ["mapped by 2", "mapped by 4"]),
        (widened, 64, ["mapped in stages of 4, 8", "mapped by 1"]),
        (widened, 96, ["mapped in stages of 1, 8", "mapped by 1"]),
        (level, 128, ["mapped by 1", "mapped by 2"]),
    ],
)
def test_large_networks_for_images_are_offered_with_the_same_results(
    fun: Callable[..., Any], side: int, names: list[str]
) -> None:
    graph = graph_of(fun, images(N, side, 16))
    variants = dict(batch_variants(graph, unchanged))
    assert list(variants) == names
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, side, side, 16)), jnp.float32)
    want = fun(x)
    assert jnp.std(want) > 0.1
    for variant in variants.values():
        got = jax.jit(lambda x, variant=variant: run(variant, {}, x))(x)
        np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "graph",
    [
        graph_of(shrinking, images(N, 8, 3)),
        graph_of(widened, images(2, 64, 16)),
        graph_of(lambda x: conv(x - x.mean(0), 64), images(N, 64, 64)),
        graph_of(lambda x: x @ np.ones((4096, 8192), np.float32), jax.ShapeDtypeStruct((N, 4096), jnp.float32)),
    ],
    ids=["little work", "few examples", "examples meet", "products that stay in the cache"],
)
def test_others_are_not_offered(graph: Graph) -> None:
    assert batch_variants(graph, unchanged) == []


def test_stages_hold_what_stays_in_the_cache() -> None:
    graph = graph_of(shrinking, images(N, 64, 3))
    found = batch_axes(graph)
    assert found is not None
    axes = value_axes(graph, found)
    budget = 1 << 16
    stages = choose_stages(graph, N, budget)
    assert stages[0].start == 0
    assert [s.step for s in stages] == sorted({s.step for s in stages})
    assert len(stages) > 2
    for stage, after in zip(stages, [*stages[1:], Stage(len(graph.nodes), N)]):
        sizes = [
            v.aval.size * 4 // N
            for node in graph.nodes[stage.start : after.start]
            if node.op == "conv_general_dilated"
            for v in node.inputs
            if v in axes
        ]
        assert all(stage.step == 1 or stage.step * size <= budget for size in sizes)
    # Each stage begins where an activation is finished, so that it can be computed with its convolution.
    for stage in stages[1:]:
        assert graph.nodes[stage.start].op == "conv_general_dilated"


def test_one_stage_where_everything_stays_in_the_cache() -> None:
    assert choose_stages(graph_of(shrinking, images(N, 8, 3)), N) == [Stage(0, N)]


def test_live_bytes_are_of_the_products_alive_at_once() -> None:
    a = np.ones((64, 64), np.float32)
    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert live_bytes(graph_of(lambda x: x @ a @ a @ a, square)) == 2 * 64 * 64 * 4
    assert live_bytes(graph_of(lambda x: jnp.sin(x), square)) == 0

    def branches(x: jax.Array) -> jax.Array:
        p, q, r = x @ a, jnp.sin(x) @ a, jnp.cos(x) @ a
        return p @ q + r

    assert live_bytes(graph_of(branches, square)) == 4 * 64 * 64 * 4
