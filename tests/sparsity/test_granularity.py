"""Units within one parameter, against loops over their entries."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sparsity.learning.granularity import NM, Block, Column, Element, Row, as_grain, check_rank

_SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
_GRAINS = st.one_of(
    st.just(Element()),
    st.just(Row()),
    st.just(Column()),
    st.builds(Block, st.integers(1, 4), st.integers(1, 4)),
)


def _unit(grain, index):
    """The unit that an entry belongs to, by the words of the documentation."""
    if isinstance(grain, Block):
        return (*index[:-2], index[-2] // grain.rows, index[-1] // grain.columns)
    return {Element: index, Row: index[-2:-1], Column: index[-1:]}[type(grain)]


@settings(max_examples=12, deadline=None)
@given(_GRAINS, _SHAPES, st.integers(0, 2**32 - 1))
def test_pool_and_spread_follow_the_entries(grain, shape, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 8, shape).astype(np.float32)
    sums = np.zeros(grain.units(shape), np.float32)
    sizes = np.zeros(grain.units(shape), np.float32)
    for index in itertools.product(*map(range, shape)):
        sums[_unit(grain, index)] += x[index]
        sizes[_unit(grain, index)] += 1
    np.testing.assert_array_equal(grain.pool(jnp.asarray(x)), sums)
    np.testing.assert_array_equal(np.broadcast_to(grain.sizes(shape), sums.shape), sizes)

    z = rng.random(grain.units(shape)).astype(np.float32)
    spread = np.broadcast_to(grain.spread(jnp.asarray(z), shape), shape)
    for index in itertools.product(*map(range, shape)):
        assert spread[index] == z[_unit(grain, index)]


@settings(max_examples=6, deadline=None)
@given(_SHAPES, st.integers(1, 3), st.integers(1, 3), st.integers(-2, -1), st.integers(0, 2**32 - 1))
def test_n_of_m_keeps_the_best_of_each_run(shape, n, more, axis, seed):
    grain = NM(n, n + more, axis)
    scores = np.random.default_rng(seed).integers(0, 4, shape).astype(np.float32)  # with ties
    kept = np.moveaxis(np.asarray(grain.winners(jnp.asarray(scores), shape)), axis, -1)
    scores = np.moveaxis(scores, axis, -1)
    for index in np.ndindex(kept.shape[:-1]):
        for start in range(0, kept.shape[-1], grain.m):
            run, flags = scores[index][start : start + grain.m], kept[index][start : start + grain.m]
            assert flags.sum() == min(n, run.size)
            np.testing.assert_array_equal(np.sort(run[flags]), np.sort(run)[-int(flags.sum()) :])
    assert kept.mean() == pytest.approx(grain.share(shape))


@pytest.mark.parametrize("grain", [Element(), Row(), Column(), Block(2, 3)])
def test_the_best_unit_is_kept_in_any_case(grain):
    scores = np.random.default_rng(0).normal(size=grain.units((4, 6))).astype(np.float32)
    winners = np.asarray(grain.winners(jnp.asarray(scores), (4, 6)))
    np.testing.assert_array_equal(winners, scores == scores.max())


def test_names_and_nonsense():
    assert as_grain("element") == Element()
    assert as_grain("channel") is None
    with pytest.raises(ValueError, match="no granularity 'elements'; there are 'element', 'row'"):
        as_grain("elements")
    with pytest.raises(ValueError, match="0 < N < M"):
        NM(4, 4)
    with pytest.raises(ValueError, match="no entries"):
        Block(0, 4)
    with pytest.raises(ValueError, match="needs 2 axes, but bias"):
        check_rank(Row(), "bias", jnp.zeros(3))
