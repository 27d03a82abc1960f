"""Reductions of what is computed from slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer import autoinfer
from jaxinfer.rewrites import fusion_bounds


def _barriers(function, *arguments):
    _, graph = rewrite(function, arguments, fusion_bounds.RULES)
    return graph.count("optimization_barrier")


def _stencil(x):
    return x[2:] - 2 * x[1:-1] + x[:-2]


def _pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID")


@pytest.mark.parametrize("reduce", [jnp.sum, jnp.max, lambda x: jnp.min(x, 1), jnp.mean, _pool, jax.nn.softmax])
def test_a_reduction_of_several_slices_stands_apart(reduce):
    graph = compare(lambda x: reduce(_stencil(x) ** 2), (random(9, 4),), fusion_bounds.RULES)
    assert graph.count("optimization_barrier") >= 1


def test_parts_that_are_spread_or_reshaped_count():
    x, k = random(8, 8, 1), random(3, 16)
    taps = lambda x, k: jnp.sum(x[1:] * k[0] + x[:-1] * k[1])  # noqa: E731
    assert _barriers(taps, x, k) == 1
    assert _barriers(lambda x: jnp.max(x[:4].reshape(-1) + x[4:].reshape(-1)), x) == 1


def test_other_reductions_are_left_alone():
    x, y = random(9, 4), random(9, 4)
    for function in (
        lambda x, y: jnp.sum(x * y),
        lambda x, y: jnp.sum((x[1:] - x[1:].mean()) ** 2),
        lambda x, y: jnp.sum(x[1:] @ y[1:].T),
        lambda x, y: jnp.sum(x[1:].astype(jnp.int32) - y[1:].astype(jnp.int32)),
        lambda x, y: jnp.prod(x[1:] - x[:-1]),
        lambda x, y: jnp.cumsum(x[1:] - x[:-1]),
    ):
        assert _barriers(function, x, y) == 0
    w = np.arange(2.0, dtype=np.float32)
    assert _barriers(lambda x, w: jnp.sum(jnp.tanh(x * w[0] + w[1])), random(64, 64), w) == 0


def test_a_barrier_is_set_once_and_inside_loops():
    def program(x):
        return lax.scan(lambda c, _: (c - 0.1 * jnp.sum(_stencil(c) ** 2), None), x, length=3)[0]

    graph = compare(program, (random(9, 4),), fusion_bounds.RULES)
    assert sum(node.op == "optimization_barrier" for node in graph.walk()) == 1


def test_derivatives_of_programs_with_barriers():
    energy = lambda x: jnp.sum(jnp.sin(_stencil(x)) ** 2)  # noqa: E731
    x = random(9, 4)
    fast = autoinfer.optimize(energy, tune="off")
    np.testing.assert_allclose(fast(x), energy(x), rtol=1e-6)
    for derivative in (autoinfer.grad, jax.grad):
        np.testing.assert_allclose(derivative(fast)(x), jax.grad(energy)(x), rtol=1e-4, atol=1e-5)
    found = jax.jit(autoinfer.hessian(energy))(x)
    np.testing.assert_allclose(found, jax.hessian(energy)(x), rtol=1e-3, atol=1e-4)
    assert "optimization_barrier" in str(jax.make_jaxpr(autoinfer.value_and_grad(energy))(x))


@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12) or jax.default_backend() != "cpu",
    reason="an older XLA drops barriers before it fuses",
)
def test_the_sum_of_a_stencil_takes_less_memory():
    def energy(x):
        return jnp.sum(sum(x[i : i + 500, j : j + 500] for i in range(3) for j in range(3)) ** 2)

    x = jnp.ones((502, 502))
    before = jax.jit(energy).lower(x).compile().memory_analysis().temp_size_in_bytes
    after = autoinfer.optimize(energy, tune="off").lower(x).compile().memory_analysis().temp_size_in_bytes
    assert after < before / 4
