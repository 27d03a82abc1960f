"""Cumulative products, extrema and logarithms of sums, against JAX's derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_vjp
from jax import lax

from jaxinfer.differentiation.tables import cumulative

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset(cumulative.TANGENTS)
check = functools.partial(check, ours=OURS, mixed=False)
X = np.random.default_rng(0).normal(size=(2, 5, 3))


@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("scan", [lax.cumprod, lax.cumlogsumexp, lax.cummax, lax.cummin], ids=lambda f: f.__name__)
def test_along_any_axis(scan, reverse):
    check(lambda x: scan(x, axis=1, reverse=reverse), X, order=1 if reverse else 2, mixed=True)
    check(lambda x: (scan(x, axis=0, reverse=reverse), scan(x[:, :1], axis=1)), X, order=1)


@pytest.mark.parametrize("scan", [lax.cummax, lax.cummin], ids=lambda f: f.__name__)
def test_equal_elements_share_as_in_jax(scan):
    check(lambda x: scan(x, axis=0), np.array([1.0, 1, 0, 2, 2, 2, -1, 2, 2, 3]), order=1)
    check(lambda x: scan(x, axis=0, reverse=True), np.zeros(7))


@pytest.mark.parametrize("zeros", [(0,), (1, 3), (0, 1, 2, 3, 4)])
def test_products_with_zeros(zeros):
    x = X[0, :, 0].copy()
    x[list(zeros)] = 0
    check(lambda x: lax.cumprod(x, axis=0), x)


def test_complex():
    check(lambda x: lax.cumprod(x, axis=1), X + 1j * X[::-1])


def test_empty():
    check(lambda x: (lax.cumprod(x, axis=0), lax.cummax(x, axis=1)), np.zeros((3, 0)))


def test_logsumexp_far_apart_and_infinite():
    """Weights are shares of the sum: none overflows, and nothing is not a number."""
    x = jnp.array([-jnp.inf, -800.0, 700.0, 1e5, -1e5, 1e5])
    _, (got,) = our_vjp(lambda x: (lax.cumlogsumexp(x, axis=0),), [x], [np.ones(6)], {})
    shares = np.array([[0.0] * 6] * 6)
    for i in range(6):
        e = np.exp(np.asarray(x[: i + 1]) - max(np.asarray(x[: i + 1]))) if i else np.ones(1)
        shares[i, : i + 1] = e / e.sum()
    # Sums near 1e5 are rounded at 1e-11.
    np.testing.assert_allclose(got, shares.sum(0), rtol=1e-10)


def test_products_keep_their_precision_under_jit():
    fun = jax.jit(lambda x: lax.cumprod(x, axis=0))
    check(fun, np.array([1e-200, 1e-150, 1e200, 1e100]), order=1)
