"""Reductions over axes and windows, against JAX's derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_vjp, random_like
from jax import lax
from jax.extend.core import primitives

from jaxinfer.differentiation.tables import reductions

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset(reductions.TANGENTS)
check = functools.partial(check, ours=OURS, mixed=False)
X = np.random.default_rng(0).normal(size=(3, 4, 5))
TIES = np.round(X)


@pytest.mark.parametrize("reduce", [jnp.max, jnp.min])
@pytest.mark.parametrize("x", [X, TIES, X + 1j * X[::-1], X[:, :1]], ids=["plain", "ties", "complex", "size 1"])
def test_extrema_along_axes(reduce, x):
    check(lambda x: (reduce(x, (0, 2)), reduce(x, 1)), x, order=2 if x is TIES else 1)


def test_extremum_of_nothing():
    check(lambda x: lax.reduce_max(x, (0,)), np.zeros((0, 3)))
    check(lambda x: jnp.max(x, 0), np.zeros((3, 0)))


def test_flat_reductions():
    check(lambda x: (jnp.argmax(x, 0), jnp.argmin(x), jnp.any(x > 0), x.sum()), X, ours={"argmax", "argmin"})


@pytest.mark.parametrize(
    "zeros", [0, 2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_products_with_zeros_to_third_order(zeros):
    x = X[0, :, 0].copy()
    x[:zeros] = 0
    check(jax.grad(jnp.prod), x, mixed=True)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_products_of_any_size(size):
    check(lambda x: jnp.prod(x, 1), np.resize(X, (2, size, 3)), order=1)


def test_products_over_axes_and_complex():
    check(lambda x: (jnp.prod(x, (0, 2)), jnp.prod(x[0, 0] + 1j * x[0, 1])), X)


def test_softmax_and_logsumexp():
    check(lambda x: (jax.nn.softmax(x, 1), jax.nn.logsumexp(x, (0, 2)), jnp.std(x, 0)), X)


def window(combine, init, **options):
    """A reduction over overlapping windows with padding and strides."""
    padding = [(0, 0), (1, 0), (2, 1)]
    return lambda x: lax.reduce_window(x, init, combine, (1, 2, 3), (1, 2, 1), padding, **options)


WINDOWS = [(lax.add, 0.0), (lax.max, -np.inf), (lax.min, np.inf)]


@pytest.mark.parametrize(("combine", "init"), WINDOWS, ids=["add", "max", "min"])
@pytest.mark.parametrize("base", [(1, 1, 1), (2, 1, 3)], ids=["dense", "dilated"])
def test_windows(combine, init, base):
    check(window(combine, init, base_dilation=base), X, order=base[0])
    check(window(combine, init, base_dilation=base), TIES, order=1)


def test_sums_over_windows_with_gaps():
    check(window(lax.add, 0.0, base_dilation=(2, 1, 3), window_dilation=(1, 2, 1)), X)
    check(window(lax.add, 0.0), np.zeros((0, 4, 5)), order=1)
    check(lambda x: lax.reduce_window(x, 0.0, lax.add, (9,), (2,), "VALID"), X[0, 0], order=1)


@pytest.mark.parametrize(("combine", "init"), WINDOWS[1:], ids=["max", "min"])
def test_extrema_of_windows_with_gaps_in_reverse(combine, init):
    """JAX has forward mode only there, so it is the transpose of that."""
    fun = window(combine, init, window_dilation=(1, 2, 1))
    check(fun, X, reverse=False)
    ct, tangent = random_like(1, fun(X)), random_like(2, X)
    _, (got,) = our_vjp(lambda x: (fun(x),), [jnp.asarray(X)], [ct], {})
    _, moved = jax.jvp(fun, (X,), (tangent,))
    np.testing.assert_allclose(jnp.vdot(got, tangent), jnp.vdot(ct, moved), rtol=1e-12)


@pytest.mark.parametrize("select", [primitives.ge_p, primitives.le_p])
def test_values_moved_by_chosen_places(select):
    ones = (1, 1, 1)
    params = {"select_prim": select, "window_dimensions": (1, 2, 3), "window_strides": (1, 2, 1)}
    params["padding"] = ((0, 0), (1, 1), (2, 1))
    gathered = lambda x, k: primitives.select_and_gather_add_p.bind(  # noqa: E731
        x, k, base_dilation=ones, window_dilation=ones, **params
    )
    check(gathered, X, X[::-1])
    scattered = lambda x, k: primitives.select_and_scatter_add_p.bind(x, k, **params)  # noqa: E731
    check(scattered, gathered(X, X), X)
    check(lambda k: (gathered(np.ones_like(X), k), k * k), X)


def test_rounding_to_fewer_bits():
    check(lambda x: lax.reduce_precision(jnp.sin(x), 5, 10), X)
