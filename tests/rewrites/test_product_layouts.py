"""Products that sum over rows: which are computed the other way round."""

import pytest
from jax import lax
from rewritten import compare, random, rewrite

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
