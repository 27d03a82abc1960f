"""Choices by the same index: which are joined, and what is left of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer.graph import run
from jaxinfer.rewrites import branch_sharing, control_flow, simplify

RULES = (*simplify.RULES, *control_flow.RULES, *branch_sharing.RULES)
W, X = random(5, 4, seed=1), random(4, seed=2)


def clip(i, low, high):
    return lax.clamp(np.int32(low), i, np.int32(high))


def value(p, w, x):
    return lax.cond(p > 0, lambda x: jnp.sum(jnp.tanh(w @ x)), lambda x: jnp.sum(jnp.exp(w @ x)), x)


def slope(p, w, x):
    return lax.cond(p > 0, lambda x: 1 - jnp.tanh(w @ x) ** 2, lambda x: jnp.exp(w @ x), x)


def choices(graph):
    return [node for node in graph.walk() if node.op == "cond"]


@pytest.mark.parametrize("p", [1.0, -1.0])
def test_branches_compute_what_they_share_once(p):
    (choice,) = choices(compare(lambda p, w, x: (value(p, w, x), slope(p, w, x)), (jnp.float32(p), W, X), RULES))
    assert [branch.count("dot_general", "tanh", "exp") for branch in choice.params["branches"]] == [2, 2]


@pytest.mark.parametrize("i", [-3, 0, 1, 2, 9])
def test_indices_that_are_clamped_once_more_are_the_same(i):
    branches = [jnp.sin, lambda x: jnp.tanh(x @ W.T @ W), lambda x: jnp.tanh(x @ W.T @ W) + x]

    def function(i, x):
        # `lax.switch` clamps its index; the second one does it again.
        return lax.switch(i, branches, x), lax.switch(clip(i, 0, 2), branches, x)[::-1]

    assert len(choices(compare(function, (jnp.int32(i), X), RULES))) == 1


def test_equal_results_become_one():
    def function(p, x):
        first = lax.cond(p > 0, lambda x: (jnp.tanh(x) * x * x, x), lambda x: (jnp.exp(x), 2 * x), x)
        second = lax.cond(p > 0, lambda x: (x, jnp.tanh(x) * x * x), lambda x: (x, jnp.exp(x)), x)
        return first, second

    (choice,) = choices(compare(function, (jnp.float32(1.0), X), RULES))
    # tanh(x) x x or exp(x), and x or 2 x; an operand that every branch returns is passed around the choice.
    assert len(choice.avals) == 2


def test_what_the_second_choice_reads_may_be_made_later():
    def function(p, w, x):
        first = value(p, w, x)
        late = jnp.cos(x)
        second = lax.cond(p > 0, lambda x, y: jnp.tanh(w @ x).sum() * y, lambda x, y: y, x, late)
        return jnp.sin(first), second

    assert len(choices(compare(function, (jnp.float32(1.0), W, X), RULES))) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda p, w, x: (value(p, w, x), slope(p + 1, w, x)),
        lambda p, w, x: (value(p, w, x), slope(p, w, x + 1)),
        lambda p, w, x: (value(p, w, x), lax.cond(p > 0, lambda x: x, lambda x: -x, x)),
        lambda p, w, x: slope(p, w[:, :5], jnp.append(value(p, w, x), x[1:])),
    ],
    ids=["index", "operands", "nothing in common", "one reads the other"],
)
def test_choices_that_stay_apart(function):
    _, after = rewrite(function, (jnp.float32(1.0), W, X), RULES)
    assert len(choices(after)) == 2


def test_effects_keep_their_choices():
    def function(p, w, x):
        def loud(x):
            jax.debug.print("{}", x.sum())
            return jnp.tanh(w @ x)

        return lax.cond(p > 0, loud, lambda x: w @ x, x), slope(p, w, x)

    _, after = rewrite(function, (jnp.float32(-1.0), W, X), RULES)
    assert len(choices(after)) == 2


def test_bounds_of_indices():
    def clamps(function, *arguments):
        _, after = rewrite(function, arguments, RULES)
        for value in range(-3, 9):
            given = jnp.asarray(value, arguments[0].dtype)
            assert run(after, {}, given)[0] == function(given)
        return after.count("max", "min", "clamp")

    truth, number = np.array(True), np.int32(3)
    assert clamps(lambda p: clip(p.astype(jnp.int32), 0, 1), truth) == 0
    assert clamps(lambda p: clip(p.astype(jnp.int32), 1, 2), truth) == 0
    assert clamps(lambda i: clip(clip(i, 0, 5), 0, 5), number) == 2
    assert clamps(lambda i: clip(clip(i, 0, 5), -1, 6), number) == 2
    # Numbers that may be none are left alone.
    _, floats = rewrite(lambda x: lax.min(lax.min(x, 5.0), 5.0), (np.float32(3),), control_flow.RULES)
    assert floats.count("min") == 2
