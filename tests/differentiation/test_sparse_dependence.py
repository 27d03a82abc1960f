"""Patterns: nothing that differs from zero is left out, and what is provably zero is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sparse_programs import RandomProgram

from jaxinfer.differentiation.sparse.pattern import Pattern
from jaxinfer.differentiation.sparse.transform import sparse_hessian, sparse_jacobian

# Correctness only: compiling is most of the time.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
X = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, 6))


def evaluated(fun, x):
    return np.asarray(jax.jit(fun).lower(x).compile(_FAST)(x))


def pattern(fun, x=X):
    return sparse_jacobian(fun).pattern(x)


def assert_covers(program, hessian):
    x = program.argument()
    fun = (lambda x: jnp.sum(program(x) ** 2)) if hessian else program
    dense = evaluated((jax.hessian if hessian else jax.jacfwd)(fun), x)
    found = (sparse_hessian if hessian else sparse_jacobian)(fun, method="passes").pattern(x)
    missed = np.argwhere((dense.reshape(found.shape) != 0) & ~found.todense())
    assert not len(missed), f"{'Hessian' if hessian else 'Jacobian'} of {program}: missing entries {missed.tolist()}"


@pytest.mark.parametrize("seed", range(40))
def test_no_entry_of_a_random_program_is_missing(seed):
    assert_covers(RandomProgram.draw(seed), hessian=seed % 4 == 3)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, 50))
def test_no_entry_of_five_hundred_random_programs_is_missing(first):
    for seed in range(first, first + 50):
        assert_covers(RandomProgram.draw(seed), hessian=seed % 4 == 3)


TIGHT = {
    "cancelled": (lambda x: (x + 1) - x, 0),
    "cancelled along the way": (lambda x: (2 * x + x[0]) - (x + x), 6),
    "zero derivative": (lambda x: jnp.sign(x) * x[::-1] + jnp.floor(x), 6),
    "stopped": (lambda x: lax.stop_gradient(x) * x[0], 6),
    "known zeros": (lambda x: x * np.array([1, 0, 1, 0, 1, 0]), 3),
    "known sparse matrix": (lambda x: np.diag(np.arange(6.0)) @ x, 5),
    "zeros of an unknown matrix": (lambda x: jnp.tril(jnp.outer(x[::-1], x)) @ lax.stop_gradient(x), 24),
    "known choice": (lambda x: jnp.where(np.arange(6) < 2, x, x[::-1]), 6),
    "known index": (lambda x: x[np.array([0, 3, 3])], 3),
    "known update": (lambda x: jnp.zeros(8).at[np.array([1, 2])].set(x[:2]), 2),
    "running sum": (jnp.cumsum, 21),
    "running product": (jnp.cumprod, 21),
    "rows": (lambda x: x.reshape(2, 3).sum(1), 6),
    "stencil by convolution": (lambda x: jnp.convolve(x, np.array([1.0, 0.0, -1.0]), mode="same"), 10),
    "convolved with a small argument": (lambda x: jnp.convolve(np.ones(9), x[:3], mode="valid"), 21),
    "pooled": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (2,), "VALID"), 6),
    "loop": (lambda x: lax.fori_loop(0, 3, lambda i, c: c.at[i].set(c[i + 1] * 2), x), 6),
    "scan": (lambda x: lax.scan(lambda c, v: (v, c + v), x[0], x)[1], 11),
    "scan in reverse": (lambda x: lax.scan(lambda c, v: (v, c * v), x[-1], x, reverse=True)[1], 11),
    "while with a known end": (
        lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.roll(s[1], 1)), (0, x))[1],
        6,
    ),
    "known branch": (lambda x: lax.cond(np.bool_(True), lambda x: x * 2, lambda x: x * x.sum(), x), 6),
    "unknown branch": (lambda x: lax.cond(x[0] > 0, lambda x: x * 2, lambda x: x[::-1], x), 12),
    "unknown row of a table": (lambda x: lax.dynamic_slice(x.reshape(2, 3), (jnp.argmax(x[:2]), 0), (1, 3)), 6),
    "columns of a triangular solve": (
        lambda x: lax.linalg.triangular_solve(np.eye(2) + np.ones((2, 2)), x.reshape(2, 3), left_side=True),
        12,
    ),
    "depthwise convolution": (
        lambda x: lax.conv_general_dilated(
            x.reshape(1, 2, 3), np.ones((2, 1, 1)), (1,), "VALID", feature_group_count=2
        ),
        6,
    ),
}


@pytest.mark.parametrize("name", TIGHT)
def test_how_tight(name):
    fun, entries = TIGHT[name]
    found = pattern(fun)
    dense = np.asarray(jax.jacfwd(fun)(X)).reshape(found.shape)
    assert found.todense()[dense != 0].all()
    assert found.nnz == entries
    assert not found.coarse


HESSIANS = {
    "linear": (lambda x: jnp.sum(3 * x), 0),
    "bilinear": (lambda x: x[0] * x[1] + x[2], 2),
    "separable": (lambda x: jnp.sum(jnp.sin(x) + x), 6),
    "chained": (lambda x: jnp.sum((x[1:] - x[:-1] ** 2) ** 2), 16),
    "squared sum": (lambda x: jnp.sum(x) ** 2, 36),
    "quadratic form": (lambda x: x @ np.diag(np.arange(6.0)) @ x, 5),
    "piecewise linear": (lambda x: jnp.sum(jnp.abs(x)) + jnp.max(x), 0),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_how_tight_for_hessians(name):
    fun, entries = HESSIANS[name]
    found = sparse_hessian(fun).pattern(X)
    assert found.todense()[np.asarray(jax.hessian(fun)(X)) != 0].all()
    assert found.nnz == entries


def test_custom_rules_say_what_depends():
    @jax.custom_jvp
    def through(x):
        return jnp.round(x)

    through.defjvp(lambda primals, tangents: (through(*primals), tangents[0] + tangents[0][0]))
    assert pattern(through).nnz == 11
    assert pattern(jnp.round).nnz == 0

    @jax.custom_vjp
    def reversed_rule(x):
        return x

    reversed_rule.defvjp(lambda x: (x, None), lambda _, ct: (ct[::-1],))
    np.testing.assert_array_equal(pattern(reversed_rule).todense(), np.eye(6, dtype=bool)[::-1])


def test_what_is_not_known_is_reported():
    found = pattern(lambda x: jnp.linalg.inv(jnp.diag(x)) @ x)
    assert found.nnz == 36
    assert found.coarse


def test_arguments_are_not_known():
    """A pattern holds for all values of arrays of the same types."""
    assert sparse_jacobian(lambda x, w: w * x).pattern(X, jnp.zeros(6)).nnz == 6


def test_large_problems_stay_cheap():
    n = 200_000
    found = pattern(lambda x: x[1:] * x[:-1] + jnp.roll(x, 3)[1:], jnp.zeros(n))
    assert found.nnz == 3 * (n - 1)


def test_a_dense_program_is_given_up():
    found = pattern(lambda x: (x - x.mean()).reshape(100, 80)[:2, :3], jnp.zeros(8000))
    assert found.is_dense and found.coarse


def test_patterns():
    found = Pattern.dense((2, 3))
    assert found.is_dense and found.density == 1 and found.nnz == 6
    lower = pattern(jnp.cumsum, X[:3])
    np.testing.assert_array_equal(lower.todense(), np.tril(np.ones((3, 3), bool)))
    np.testing.assert_array_equal(lower.transposed().todense(), np.triu(np.ones((3, 3), bool)))
    np.testing.assert_array_equal(lower.symmetric().todense(), np.eye(3, dtype=bool))
