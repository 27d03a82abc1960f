"""Sums of a product times something that are taken from another product: where, and what is left of them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer import autoinfer
from jaxinfer.rewrites import RULES, product_sums

HEADS, ROWS, KEYS, WIDTH = 2, 6, 9, 3
G, P, V = random(HEADS, ROWS, WIDTH), random(HEADS, ROWS, KEYS, seed=1), random(HEADS, KEYS, WIDTH, seed=2)


def long_sums(graph):
    """Sums that run over the keys."""
    return [n for n in graph.walk() if n.op == "reduce_sum" and n.inputs[0].shape[-1] == KEYS]


def both(g, p, v):
    return p @ v, jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)


@pytest.mark.parametrize(
    "function",
    [
        both,
        lambda g, p, v: both(g, p, v)[::-1],
        lambda g, p, v: (p @ v, jnp.sum(p * (g @ v.swapaxes(1, 2)), -1)),
        lambda g, p, v: (v.swapaxes(1, 2) @ p.swapaxes(1, 2), jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)),
        lambda g, p, v: (p @ v, jnp.sum((v @ g.swapaxes(1, 2)).swapaxes(1, 2) * p, -1)),
        lambda g, p, v: (jnp.einsum("hqk,hkd->qhd", p, v), jnp.sum(jnp.einsum("hqd,hkd->hqk", g, v) * p, -1)),
    ],
    ids=["plain", "sum first", "factors swapped", "product turned", "operand turned", "einsum"],
)
def test_a_sum_is_taken_from_the_product_that_is_there(function):
    after = compare(function, (G, P, V), RULES)
    assert not long_sums(after) and after.count("dot_general") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda g, p, v: jnp.sum((g @ v.swapaxes(1, 2)) * p, -1),
        lambda g, p, v: (p @ jnp.tanh(v), jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)),
        lambda g, p, v: (jnp.tanh(p) @ v, jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)),
        lambda g, p, v: (p @ v[::-1], jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)),
        lambda g, p, v: (p @ v, jnp.sum((g @ v.swapaxes(1, 2)) * p, 1)),
        lambda g, p, v: (p @ v, jnp.sum((g @ v.swapaxes(1, 2)) * p, (1, 2))),
    ],
    ids=["no product", "of something else", "with something else", "heads swapped", "another axis", "two axes"],
)
def test_other_sums_stay(function):
    before, after = rewrite(function, (G, P, V), product_sums.RULES)
    assert str(before) == str(after)


def test_a_longer_sum_is_not_taken():
    g, v = random(HEADS, ROWS, 12), random(HEADS, KEYS, 12)
    before, after = rewrite(both, (g, P, v), product_sums.RULES)
    assert str(before) == str(after)


def test_numbers_in_fewer_bits_stay():
    before, after = rewrite(both, tuple(jnp.asarray(x, jnp.bfloat16) for x in (G, P, V)), product_sums.RULES)
    assert str(before) == str(after)


def test_products_of_fewer_bits_summed_in_more_stay():
    g, v = (jnp.asarray(x, jnp.bfloat16) for x in (G, V))

    def wide(a, b, axis):
        return lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def function(g, p, v):
        return wide(p, v, 1), jnp.sum(wide(g, v, 2) * p, -1)

    before, after = rewrite(function, (g, P, v), product_sums.RULES)
    assert str(before) == str(after)


def attention(q, k, v):
    scores = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k), -1)
    return jnp.sum(jnp.tanh(jnp.einsum("hqk,hkd->hqd", scores, v)))


def test_the_gradient_of_attention_sums_over_one_head():
    """Forward, one sum over keys normalizes the scores; backward there is none."""
    q, k = random(HEADS, ROWS, WIDTH), random(HEADS, KEYS, WIDTH, seed=3)
    gradient = autoinfer.grad(attention, (0, 1, 2))
    assert len(long_sums(autoinfer.optimize(gradient, tune="off").graph(q, k, V))) == 1
    compare(gradient, (q, k, V), ())
