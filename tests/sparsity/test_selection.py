"""Choosing the best units under a cost, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sparsity.learning.selection import ranks, select

_SCORES = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(width=32, allow_subnormal=False)),
    min_size=16,
    max_size=16,  # one size, compiled once
)


@jax.jit
def _select(scores, protected, weights, left):
    return select(scores, protected, lambda z: (z * weights).sum(), left)


def _greedy(scores, weights, protected, left):
    """Units from the best on, equal ones in order, until the next would be too much."""
    clean = np.where(np.isnan(scores), -np.inf, scores) + 0.0
    keep = protected.copy()
    for i in np.argsort(-clean, kind="stable"):
        if not keep[i]:
            keep[i] = True
            if weights[keep].sum() > left:
                keep[i] = False
                break
    return keep


@settings(max_examples=60, deadline=None)
@given(_SCORES, st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_the_best_that_fit_are_kept(scores, seed, percent):
    rng = np.random.default_rng(seed)
    scores = np.asarray(scores, np.float32)
    weights = rng.integers(1, 5, scores.size)
    protected = np.arange(scores.size) == np.argmax(np.nan_to_num(scores, nan=-np.inf))
    left = percent * int(weights.sum()) // 100
    found = _select(scores, protected, weights, left)
    np.testing.assert_array_equal(np.asarray(found), _greedy(scores, weights, protected, left))


@settings(max_examples=30, deadline=None)
@given(_SCORES)
def test_ranks_order_as_scores_do(scores):
    scores = np.nan_to_num(np.asarray(scores, np.float32))
    found = np.asarray(ranks(jnp.asarray(scores)))
    np.testing.assert_array_equal(np.argsort(found), np.argsort(scores, kind="stable"))
    np.testing.assert_allclose(np.sort(found), np.arange(1, scores.size + 1) / scores.size, rtol=1e-6)
