"""Products that sum over rows: which are computed the other way round, and which as one."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer import autoinfer
from jaxinfer.rewrites import product_layouts

RULES = product_layouts.RULES


def product(axis):
    return lambda a, b: lax.dot_general(a, b, (((0,), (axis,)), ((), ())))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_narrow_operand_is_turned_in_the_place_of_a_large_one(axis):
    a, b = random(300, 270), random(300, 5) if axis == 0 else random(5, 300)
    after = compare(product(axis), (a, b), RULES)
    (dot,) = (n for n in after.walk() if n.op == "dot_general")
    assert dot.inputs[1].shape == (300, 270) and dot.aval.shape == (5, 270)


@pytest.mark.parametrize(
    "a, b",
    [((300, 270), (300, 200)), ((300, 20), (300, 270)), ((6, 300), (6, 300)), ((30, 30), (30, 2))],
    ids=["alike", "a narrow one first", "few rows", "small"],
)
def test_other_products_stay(a, b):
    before, after = rewrite(product(0), (random(*a), random(*b)), RULES)
    assert str(before) == str(after)


def adjoints(a, b, g):
    numbers = (((0,), (0,)), ((), ()))
    return lax.dot_general(a, g, numbers), lax.dot_general(b, g, numbers)


def test_small_products_with_one_right_operand_are_one():
    a, b, g = random(128, 256), random(128, 128), random(128, 256)
    after = compare(adjoints, (a, b, g), RULES)
    (dot,) = (n for n in after.walk() if n.op == "dot_general")
    assert dot.aval.shape == (384, 256)


@pytest.mark.parametrize(
    "rows, columns, width",
    [(128, (64, 64), 64), (256, (256, 256), 256), (32, (512, 512), 256), (64, (256, 256), 1024)],
    ids=["too little", "enough for several cores each", "few rows", "large results"],
)
def test_products_with_one_right_operand_stay(rows, columns, width):
    before, after = rewrite(adjoints, (*(random(rows, n) for n in columns), random(rows, width)), RULES)
    assert str(before) == str(after)


def test_the_gradient_of_a_recurrent_cell_joins_what_one_cotangent_meets():
    def loss(w, u, x):
        def step(h, row):
            h = jnp.tanh(row @ w + h @ u)
            return h, h

        return jnp.sum(lax.scan(step, jnp.zeros(256), x)[1] ** 2)

    args = (random(128, 256), random(256, 256), random(128, 128))
    report = autoinfer.grad(loss, argnums=(0, 1)).explain(*args)
    joined = {"joint-adjoints"} & set(report.fired)
    assert joined if jax.default_backend() == "cpu" else not joined
