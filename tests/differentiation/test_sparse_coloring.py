"""Colourings: every entry can be read off the passes, and there are few of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from jaxinfer.differentiation.sparse.coloring import color, color_columns, color_symmetric, star_coloring
from jaxinfer.differentiation.sparse.pattern import Pattern


def pattern_of(dense):
    return Pattern.of(sparse.csr_array(np.asarray(dense, int)))


def band(n, width):
    i = np.arange(n)
    return abs(i[:, None] - i) <= width


def arrow(n):
    found = np.eye(n, dtype=bool)
    found[0] = found[:, 0] = True
    return found


def read(coloring, matrix):
    """The entries as they come out of passes over a matrix."""
    forward = matrix @ (coloring.columns[:, None] == np.arange(coloring.forward))
    reverse = matrix.T @ (coloring.rows[:, None] == np.arange(coloring.reverse))
    return np.concatenate([forward.T.ravel(), reverse.T.ravel()])[coloring.source]


def assert_readable(coloring, symmetric=False):
    pattern = coloring.pattern
    values = np.zeros(pattern.shape)
    values[pattern.rows, pattern.cols] = np.random.default_rng(0).standard_normal(pattern.nnz)
    if symmetric:
        values = values + values.T
    np.testing.assert_allclose(read(coloring, values), values[pattern.rows, pattern.cols], rtol=1e-12)


matrices = st.tuples(st.integers(1, 12), st.integers(1, 12), st.floats(0, 0.6), st.integers(0, 10**6)).map(
    lambda a: np.random.default_rng(a[3]).random(a[:2]) < a[2]
)


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_every_entry_can_be_read(dense):
    pattern = pattern_of(dense)
    for modes in ((True, True), (True, False), (False, True)):
        coloring = color(pattern, *modes)
        assert_readable(coloring)
        assert (coloring.forward == 0 or modes[0]) and (coloring.reverse == 0 or modes[1])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.floats(0, 0.5), st.integers(0, 10**6))
def test_every_entry_of_a_symmetric_matrix_can_be_read(n, density, seed):
    dense = np.random.default_rng(seed).random((n, n)) < density
    coloring = color_symmetric(pattern_of(dense | dense.T))
    assert_readable(coloring, symmetric=True)
    assert coloring.reverse == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.floats(0.1, 0.6), st.integers(0, 10**6))
def test_star_colouring_by_its_definition(n, density, seed):
    dense = np.random.default_rng(seed).random((n, n)) < density
    dense = (dense | dense.T) & ~np.eye(n, dtype=bool)
    colors = star_coloring(pattern_of(dense | np.eye(n, dtype=bool)))
    assert all(colors[i] != colors[j] for i, j in zip(*np.nonzero(dense)))
    for path in itertools.permutations(range(n), 4):
        if all(dense[a, b] for a, b in itertools.pairwise(path)):
            assert len({colors[v] for v in path}) > 2


@pytest.mark.parametrize(
    ("dense", "passes"),
    [(np.eye(9), 1), (band(30, 1), 3), (band(30, 2), 5), (np.ones((4, 7)), 4), (np.zeros((3, 3)), 0)],
)
def test_known_numbers_of_passes(dense, passes):
    """A band needs its width, a full matrix its shorter side."""
    assert color(pattern_of(dense)).passes == passes


def test_symmetric_matrices_take_fewer_passes():
    assert color_symmetric(pattern_of(arrow(20))).passes == 2
    assert color(pattern_of(arrow(20)), reverse=False).passes == 20
    assert color_symmetric(pattern_of(band(30, 1))).passes == 3
    assert color_symmetric(pattern_of(np.eye(5))).passes == 1


def test_long_rows_go_in_reverse():
    """One reverse pass for the first row; two forward ones for the first column and the diagonal."""
    coloring = color(pattern_of(arrow(20)))
    assert (coloring.forward, coloring.reverse) == (2, 1)
    assert_readable(coloring)


def test_passes_that_nothing_is_read_off_are_dropped():
    dense = arrow(6)
    dense[np.arange(1, 6), np.arange(1, 6)] = False
    coloring = color_symmetric(pattern_of(dense))
    assert coloring.passes == 1
    assert_readable(coloring, symmetric=True)


def test_columns_without_entries_have_no_colour():
    dense = band(6, 1)
    dense[:, 2] = False
    assert color_columns(pattern_of(dense))[2] == -1


def test_errors():
    with pytest.raises(ValueError, match="symmetric pattern"):
        color_symmetric(pattern_of(np.triu(np.ones((3, 3)))))
    with pytest.raises(ValueError, match="neither forward nor reverse"):
        color(pattern_of(np.eye(2)), forward=False, reverse=False)
