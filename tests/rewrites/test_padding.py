"""Adjoints of slices that do not overlap become one concatenation."""

import jax
import jax.numpy as jnp
import pytest
from rewritten import compare, random

from jaxinfer.rewrites import padding, simplify

RULES = (*simplify.RULES, *padding.RULES)
X = random(4, 7)


def _gradient_of(fun):
    return lambda x: jax.grad(lambda x: sum(jnp.sum(y) for y in fun(x)))(x)


# How many concatenations, pads and sums are left.
LEFT = {
    "all of it": (lambda x: (jnp.sin(x[:, :2]), x[:, 5:] ** 3, jnp.cos(x[:, 2:5])), (1, 0, 0)),
    "a gap and an end": (lambda x: (jnp.sin(x[:, 1:2]), x[:, 4:6] ** 3), (1, 1, 0)),
    "rows": (lambda x: (jnp.sin(x[0]), x[1] ** 3, jnp.cos(x[3]), jnp.tan(x[2])), (1, 0, 0)),
    "overlapping": (lambda x: (jnp.sin(x[:3]), x[2:] ** 3), (0, 2, 1)),
    "another term": (lambda x: (jnp.sin(x[:3]), x[3:] ** 3, jnp.exp(x)), (1, 0, 1)),
    "two axes": (lambda x: (jnp.sin(x[:3]), x[:, 3:] ** 3), (0, 2, 1)),
    "every second": (lambda x: (jnp.sin(x[::2]), x[1::2] ** 3), (0, 2, 1)),
}


@pytest.mark.parametrize("name", LEFT)
def test_adjoints_of_slices(name):
    fun, left = LEFT[name]
    graph = compare(_gradient_of(fun), (X,), RULES)
    sums = [n for n in graph.nodes if n.op in ("add", "add_any") and n.aval.shape == X.shape]
    # The derivatives of sin, cos, tan, exp and powers have no sums of the whole array's shape.
    assert (graph.count("concatenate"), graph.count("pad"), len(sums)) == left


def test_a_pad_used_elsewhere_stays():
    def fun(x):
        left = jnp.pad(x, ((0, 0), (0, 7)))
        return left + jnp.pad(x, ((0, 0), (7, 0))), jnp.tanh(left)

    assert compare(fun, (X,), RULES).count("concatenate") == 0
