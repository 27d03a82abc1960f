"""Loops that carry the same thing: which are joined, and what is left of them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from rewritten import compare, random

from jaxinfer.rewrites import loop_operands, loop_sharing

RULES = (*loop_operands.RULES, *loop_sharing.RULES)
W, C, XS = random(4, 4, seed=1) / 2, random(4, seed=2), random(6, 4, seed=3)


def cell(w, h, x):
    return jnp.tanh(h @ w + x)


def last(w, c, xs, **options):
    return lax.scan(lambda h, x: (cell(w, h, x), None), c, xs, **options)[0]


def every(w, c, xs, **options):
    """The same loop, with a second carry that reads the first one and with rows."""

    def step(carry, x):
        h, s = carry
        h = cell(w, h, x)
        return (h, s * 0.5 + h), h * x

    return lax.scan(step, (c, jnp.ones_like(c)), xs, **options)


def loops(graph):
    return [node for node in graph.walk() if node.op == "scan"]


def test_a_loop_within_another_goes_away():
    (loop,) = loops(compare(lambda w, c, xs: (last(w, c, xs), every(w, c, xs)), (W, C, XS), RULES))
    assert loop.params["num_carry"] == 2
    assert (loop.params["body"].count("tanh"), loop.params["body"].count("dot_general")) == (1, 1)


def test_rows_of_the_second_loop_may_be_made_after_the_first():
    def function(w, c, xs):
        first = last(w, c, xs)
        late = jnp.exp(xs)
        out = lax.scan(lambda k, r: ((cell(w, k[0], r[0]), k[1] + k[0] * r[1]), None), (c, c), (xs, late))[0]
        return jnp.sin(first), out

    assert len(loops(compare(function, (W, C, XS), RULES))) == 1


def test_three_loops_become_one():
    def function(w, c, xs):
        return last(w, c, xs), every(w, c, xs), lax.scan(lambda h, x: (cell(w, h, x),) * 2, c, xs)

    (loop,) = loops(compare(function, (W, C, XS), RULES))
    assert loop.params["body"].count("tanh") == 1


def test_what_a_second_loop_makes_of_shared_rows_is_shared_too():
    """Two pairs of loops, as of two gradients: rows of the first pair are read by the second, backwards."""

    def gradients(w, c, xs):
        first = jax.grad(lambda c: jnp.sum(last(w, c, xs)))
        return last(w, c, xs), first(c), jax.grad(lambda c: jnp.sum(last(w, c, xs)) * 2.0)(c)

    graph = compare(gradients, (W, C, XS), RULES)
    # The second gradient's way back starts from something else, so it is a loop of its own.
    assert len(loops(graph)) == 3
    assert sum(loop.params["body"].count("tanh") for loop in loops(graph)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda w, c, xs: (last(w, c, xs), every(w, c + 1, xs)),
        lambda w, c, xs: (last(w, c, xs), every(2 * w, c, xs)),
        lambda w, c, xs: (last(w, c, xs), every(w, c, xs, reverse=True)),
        lambda w, c, xs: (last(w, c, xs), every(w, c, xs[:5])),
        lambda w, c, xs: (last(w, c, xs), every(w, c, xs, unroll=2)),
    ],
    ids=["start", "operand", "direction", "length", "unrolling"],
)
def test_loops_that_carry_something_else_stay_apart(function):
    assert len(loops(compare(function, (W, C, XS), RULES))) == 2


def test_a_loop_that_reads_anothers_result_stays():
    def function(w, c, xs):
        first = last(w, c, xs)
        return first, lax.scan(lambda h, x: (cell(w, h, x), h * first), c, xs)

    assert len(loops(compare(function, (W, C, XS), RULES))) == 2


def test_a_common_counter_or_clock_is_no_reason():
    def function(c, d, xs):
        def clocked(f):
            return lambda k, x: ((k[0] + 1, k[1] + 0.1, f(k[2], x) * k[1] + k[0]), None)

        return [lax.scan(clocked(f), (0, 0.0, s), xs)[0][2] for f, s in ((jnp.add, c), (jnp.multiply, d))]

    assert len(loops(compare(function, (C, W[0], XS), RULES))) == 2


def test_effects_keep_their_loops():
    said = []

    def function(c, xs):
        def step(h, x):
            jax.debug.callback(lambda v: said.append(v), h.sum())
            return jnp.tanh(h * h + x), None

        return lax.scan(step, c, xs)[0], lax.scan(lambda h, x: (jnp.tanh(h * h + x), h), c, xs)

    assert len(loops(compare(function, (C, XS), RULES))) == 2
