"""Products with weights most of which are zero."""

import numpy as np
import pytest
from rewritten import compare

from jaxinfer.rewrites import sparse_weights
from jaxinfer.rewrites.sparse_weights import ellpack


def _weights(rng, *shape, kept):
    return (rng.normal(size=shape) * (rng.random(shape) < kept)).astype(np.float32)


def _has_product(graph):
    return any(node.op == "dot_general" for node in graph.nodes)


def test_columns_are_kept_with_the_places_of_their_entries():
    matrix = np.array([[0, 3, 0], [1, 0, 0], [2, 4, 0], [0, 5, 0]], np.float32)
    places, entries = ellpack(matrix)
    np.testing.assert_array_equal(places, [[1, 0, 0], [2, 2, 0], [0, 3, 0]])
    np.testing.assert_array_equal(entries, [[1, 3, 0], [2, 4, 0], [0, 5, 0]])


@pytest.mark.parametrize("shape", [(1, 100), (100,), (1, 1, 100)])
def test_a_vector_reads_only_what_is_not_zero(shape):
    rng = np.random.default_rng(0)
    w, x = _weights(rng, 100, 90, kept=0.1), rng.normal(size=shape).astype(np.float32)
    assert not _has_product(compare(lambda w, x: x @ w, (w, x), sparse_weights.RULES, known=(0,)))


def test_weights_that_are_all_zero():
    w, x = np.zeros((100, 90), np.float32), np.ones((1, 100), np.float32)
    assert not _has_product(compare(lambda w, x: x @ w, (w, x), sparse_weights.RULES, known=(0,)))


@pytest.mark.parametrize("rows", [2, 0])
def test_several_rows_are_multiplied_densely(rows):
    rng = np.random.default_rng(1)
    w, x = _weights(rng, 100, 90, kept=0.1), rng.normal(size=(rows, 100)).astype(np.float32)
    assert _has_product(compare(lambda w, x: x @ w, (w, x), sparse_weights.RULES, known=(0,)))


def test_dense_and_unknown_weights_stay():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 100)).astype(np.float32)
    dense, sparse = _weights(rng, 100, 90, kept=0.6), _weights(rng, 100, 90, kept=0.1)
    assert _has_product(compare(lambda w, x: x @ w, (dense, x), sparse_weights.RULES, known=(0,)))
    assert _has_product(compare(lambda w, x: x @ w, (sparse, x), sparse_weights.RULES))
