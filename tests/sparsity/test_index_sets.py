"""IndexSets through chains of reshapes and transpositions: whatever goes, what is left of every array is a block."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coupling import shaped

from jaxinfer import autoinfer
from jaxinfer.sparsity.coupling.index_sets import FREE, GIVEN, IndexSets


@st.composite
def factors(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Sizes above one, in some order, whose product is ``size``."""
    found = []
    while size > 1:
        factor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        found.append(factor)
        size //= factor
    return tuple(found)


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """A number of elements, and steps: a shape to bring them into, and an order of its axes."""
    size = draw(st.sampled_from([8, 12, 24, 30]))
    shapes = draw(st.lists(factors(size), min_size=1, max_size=4))
    return size, [(shape, tuple(draw(st.permutations(range(len(shape)))))) for shape in shapes]


def _moved(x: Any, steps: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Any]:
    """What a vector is after each step, before and after its axes are moved, and at last as a vector again."""
    found = [x]
    for shape, order in steps:
        found.append(found[-1].reshape(shape))
        found.append(found[-1].transpose(order))
    return [*found, found[-1].reshape(-1)]


@settings(max_examples=80, deadline=None)
@given(chains(), st.integers(0, 2**31))
def test_what_is_left_is_always_a_block(chain: tuple[int, Any], seed: int) -> None:
    size, steps = chain
    params = shaped(a=(size,), b=(size,))
    groups = autoinfer.channel_groups(lambda p: _moved(p["a"], steps)[-1] @ p["b"], params)
    rng = np.random.default_rng(seed)
    masks = groups.masks({g.name: rng.random(g.size) < 0.6 for g in groups})
    for mask in _moved(np.asarray(masks["a"]), steps):
        sides = [mask.any(tuple(i for i in range(mask.ndim) if i != axis)) for axis in range(mask.ndim)]
        assert np.array_equal(mask, functools.reduce(np.multiply.outer, sides))
    # What it is multiplied by goes with it; the other way round it may stay, as data that nothing reads.
    last = _moved(np.asarray(masks["a"]), steps)[-1]
    assert not (np.asarray(masks["b"]) & ~last).any()
    if all(place not in groups.locked for place in (("a", 0), ("b", 0))):
        assert np.array_equal(last, masks["b"])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([12, 24, 30]).flatmap(factors), st.data())
def test_factors_of_one_reshape_can_all_go(shape: tuple[int, ...], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    params = shaped(a=(math.prod(shape),), b=(math.prod(shape),))

    def fun(p: Any) -> Any:
        return jnp.tanh(p["a"]).reshape(shape).transpose(order).reshape(-1) @ p["b"]

    groups = autoinfer.channel_groups(fun, params)
    # A vector that is a single axis goes by the element; factors of two or more axes go one by one.
    assert sorted(g.size for g in groups) == sorted(shape)


def test_codes_without_ids_pass() -> None:
    units = IndexSets()
    mixed = np.array([FREE, GIVEN, FREE, GIVEN])
    rows, columns = units.split(mixed, 2, 2)
    assert rows.tolist() == [GIVEN, GIVEN]
    assert columns.tolist() == [FREE, GIVEN]
    assert units.compose(np.array([FREE, GIVEN]), np.array([FREE, FREE])).tolist() == [FREE, FREE, GIVEN, GIVEN]


def test_what_is_composed_of_itself_is_one() -> None:
    units = IndexSets()
    a, b = units.fresh(2), units.fresh(3)
    both = units.compose(a, b)
    units.unify(both, np.repeat(a, 3))
    assert units.settle() == {}
    assert {units.atoms(i) for i in (*both.tolist(), *b.tolist())} <= {units.atoms(i) for i in a.tolist()}
