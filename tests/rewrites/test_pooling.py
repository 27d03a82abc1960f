"""Pooling over slices."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, rewrite

from jaxinfer.graph import run
from jaxinfer.rewrites import pooling


def _pool(size, stride, padding, join=lax.max, start=-np.inf):
    def pool(x):
        window, strides = (1, size, size, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, np.asarray(start, x.dtype), join, window, strides, padding)

    return pool


def _windows(graph):
    return [node.op for node in graph.nodes if node.op.startswith("reduce_window")]


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, "VALID"), (3, 2, "SAME"), (3, 1, "VALID")])
@pytest.mark.parametrize(("join", "start"), [(lax.max, -np.inf), (lax.min, np.inf), (lax.add, 0)])
def test_windows_become_slices(size, stride, padding, join, start):
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3)).astype(np.float32)
    assert not _windows(compare(_pool(size, stride, padding, join, start), (x,), pooling.RULES))


def test_every_maximum_is_that_of_its_window():
    x = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1)
    x[0, 0, 1, 0], x[0, 2, 2, 0] = np.nan, np.inf
    _, graph = rewrite(_pool(2, 2, "VALID"), (x,), pooling.RULES)
    (found,) = run(graph, {}, x)
    np.testing.assert_array_equal(found[0, :, :, 0], [[np.nan, 7], [13, np.inf]])


@pytest.mark.parametrize(
    "function",
    [
        _pool(5, 1, "VALID"),  # 25 positions
        lambda x: lax.reduce_window(x > 0, False, lax.bitwise_or, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        lambda x: lax.reduce_window(
            x, -np.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", base_dilation=(1, 2, 2, 1)
        ),
    ],
)
def test_other_windows_stay(function):
    before, after = rewrite(function, (jnp.ones((1, 6, 6, 2)),), pooling.RULES)
    assert str(before) == str(after)
