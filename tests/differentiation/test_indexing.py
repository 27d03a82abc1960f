"""Gathers, scatters, sorting and the largest k, against JAX's derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check
from jax import lax

from jaxinfer.differentiation.tables import indexing

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset(indexing.TANGENTS)
check = functools.partial(check, ours=OURS, mixed=False)
X = np.random.default_rng(0).normal(size=(5, 4))
Z = X + 1j * X[::-1]
# Repeated, negative and out of bounds.
INDICES = np.array([3, 0, 3, -1, 7, 2])


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_gathers_in_every_mode(mode):
    indices = INDICES % 5 if mode == "promise_in_bounds" else INDICES
    check(lambda x: (x * x).at[indices].get(mode=mode), X, order=2 if mode == "fill" else 1)


@pytest.mark.parametrize("x", [X, Z, X[:, :1]], ids=["plain", "complex", "size 1"])
def test_indexing(x):
    check(
        lambda x: (x[INDICES % 5] ** 2, x[[1, 2], [0, 0]], jnp.take_along_axis(x, x.real.argsort(0), 0)), x, ours=OURS
    )


def test_gathers_with_batching_dimensions():
    indices = np.array([[0, 1], [2, 9], [3, 0], [1, 1], [0, 2]])
    check(jax.vmap(lambda row, i: jnp.sin(row)[i]), X, indices)
    check(jax.vmap(lambda row, i: jnp.sin(row).at[i].add(row[:2] ** 2)), X, indices)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_windows(mode):
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1))
    starts = np.array([[0, 0], [1, 2], [9, 9]])
    check(lambda x: lax.gather(x * x, starts, numbers, (3, 2), mode=mode), X, order=1)


def test_empty():
    none = np.zeros((0,), int)
    check(lambda x: (x[none], x.at[none].set(2.0), x.at[none].add(x[none])), X, order=1)
    check(lambda x: (jnp.sort(x, 0), lax.top_k(x, 0)[0]), np.zeros((3, 0)), order=1)


@pytest.mark.parametrize(("mode", "unique"), [("drop", False), ("clip", False), ("drop", True)])
@pytest.mark.parametrize("update", ["set", "add", "subtract", "multiply", "min", "max"])
def test_scatters(update, mode, unique):
    indices = np.array([4, 0, 9, 1]) if unique else INDICES
    if mode == "clip" and update in ("min", "max"):
        # JAX 0.10 gives infinities where it moves indices into bounds.
        indices = INDICES % 5
    factors = np.random.default_rng(1).normal(size=(len(indices), 4))

    def scatter(x, y):
        return getattr((x * x).at[indices], update)(jnp.sin(y), mode=mode, unique_indices=unique)

    if update == "multiply" and not unique:
        check(lambda x: scatter(x, factors), X)
        with pytest.raises(NotImplementedError, match=r"unique_indices=True \(at .*test_indexing.py"):
            check(lambda y: scatter(jnp.asarray(X), y), factors)
    else:
        check(scatter, X, factors, order=2 if mode == "drop" and not unique else 1, mixed=True)


@pytest.mark.parametrize("update", ["set", "add", "subtract"])
def test_scatters_of_one_operand_and_of_complex(update):
    check(lambda x: getattr(x.at[INDICES % 5], update)(1.0) ** 2, X, order=1)
    check(lambda y: getattr(jnp.ones((5, 4)).at[INDICES % 5, 1:3], update)(y), X[:, :2][INDICES % 5], order=1)
    check(lambda x, y: getattr(x.at[INDICES % 5], update)(y * y), Z, Z[INDICES % 5], order=1)


@pytest.mark.parametrize("update", ["min", "max"])
def test_equal_elements_share_a_scattered_extremum(update):
    ties = np.array([[1.0], [1], [1], [2], [0]])
    updates = np.array([[1.0], [1], [2], [0], [3], [1]])
    check(lambda x, y: getattr(x.at[INDICES], update)(y, mode="drop"), ties, updates, order=1)


def test_functions_applied_to_elements_are_refused():
    with pytest.raises(NotImplementedError, match=r"x.at\[i\].set"):
        check(lambda x: x.at[1].apply(jnp.sin), X)


@pytest.mark.parametrize("axis", [0, 1])
def test_sorting(axis):
    check(lambda x: jnp.sort(x * x, axis), X, order=2 - axis)
    check(lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis), axis), X, order=1)
    check(lambda x: (jnp.median(x, axis), jnp.quantile(x, 0.3, axis)), X, order=1)


@pytest.mark.parametrize("num_keys", [1, 2])
def test_sorting_several_operands(num_keys):
    keys = np.round(X)
    numbers = np.arange(X.size).reshape(X.shape)
    check(lambda x, y: lax.sort((x, jnp.sin(y), y * y, numbers), dimension=0, num_keys=num_keys), keys, X)
    check(lambda y: lax.sort((numbers[::-1], y), dimension=1, num_keys=num_keys), X, order=1)


def test_equal_elements_when_sorting():
    check(lambda x: jnp.sort(x, 0) * jnp.arange(5.0)[:, None], np.round(X), order=1)


def test_the_largest():
    check(lambda x: lax.top_k(x * x, 3), X)
    check(lambda x: (lax.approx_max_k(x, 2), lax.approx_min_k(x, 3, reduction_dimension=0)), X, order=1)


def test_unique_elements_of_a_fixed_size():
    check(lambda x: jnp.unique(x, size=6, fill_value=0.0), np.round(X[0]), order=1)
