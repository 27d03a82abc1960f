"""Kernels against sums in float64, of shapes that fill their tiles, panels and vectors and of such that do not."""

import ctypes
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_convolution import assert_close, exact, packed, random
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinfer.native import Tail, Window, depthwise_convolution
from jaxinfer.native.library import _threads

pytestmark = pytest.mark.usefixtures("kernels")
CLAMPS = ((-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 0.5), (-math.inf, 0.25))
fuzzed = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """Shapes of a convolution, and what follows it."""

    images: tuple[int, int, int]
    depth: int
    features: int
    size: tuple[int, int]
    window: Window
    bias: bool
    addend: bool
    clamp: tuple[float, float]

    def weights(self, depthwise):
        return random(*self.size, self.depth) if depthwise else random(*self.size, self.depth, self.features)

    def check(self, kernel, depthwise=False):
        x, w = random(*self.images, self.depth), self.weights(depthwise)
        bias = random(w.shape[-1]) if self.bias else None
        addend = random(*exact(x, w, self.window)[0].shape, seed=1) if self.addend else None
        run = jax.jit(lambda x, w, bias, addend: kernel(x, w, self.window, Tail(bias, addend, *self.clamp)))
        have = run(x, w, bias, addend)
        assert_close(have, x, w, self.window, Tail(bias, addend, *self.clamp))


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def windows(most_stride=3):
    return st.builds(Window, pairs(1, most_stride), st.tuples(pairs(0, 4), pairs(0, 4)), pairs(1, 3))


def cases(depth, features=1):
    images = st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11))
    sizes = st.integers(1, depth), st.integers(1, features), pairs(1, 5)
    return st.builds(Case, images, *sizes, windows(), st.booleans(), st.booleans(), st.sampled_from(CLAMPS))


# -- any shapes -------------------------------------------------------------------------------------------------------


@fuzzed
@given(cases(depth=40, features=100))
def test_convolutions(case):
    case.check(packed)


@fuzzed
@given(cases(depth=70))
def test_depthwise_convolutions(case):
    case.check(depthwise_convolution, depthwise=True)


@fuzzed
@given(
    st.one_of(st.just(1), st.integers(2, 60)),
    st.permutations((0, 1, 2)),
    st.integers(1, 300),
    st.integers(1, 200),
    st.booleans(),
    st.booleans(),
    st.sampled_from(CLAMPS),
)
def test_products(rows, order, depth, features, bias, addend, clamp):
    """A matrix is an image of one row, or of one column, or as many images as it has rows."""
    images = tuple((1, 1, rows)[i] for i in order)
    Case(images, depth, features, (1, 1), Window(), bias, addend, clamp).check(packed)


@pytest.mark.parametrize("depth", [*range(1, 14), 127, 1001])
@pytest.mark.parametrize("features", [1, 17, 70])
def test_products_with_one_row(depth, features):
    Case((1, 1, 1), depth, features, (1, 1), Window(), True, True, (-1.0, 4.0)).check(packed)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("columns", [3, 5])
@pytest.mark.parametrize("depth", [1, 15, 16, 17, 31, 33, 64])
@pytest.mark.parametrize("width", [4, 23, 30])
def test_windows_whose_pixels_are_computed_together(columns, stride, depth, width):
    padding = ((1, 1), (columns // 2, 1))
    case = Case((2, 5, width), depth, 1, (3, columns), Window((1, stride), padding), True, False, (0.0, 6.0))
    case.check(depthwise_convolution, depthwise=True)


def test_the_oracle_agrees_with_jax():
    """Sums by hand are those of JAX's own operation in float64."""
    window = Window((2, 1), ((1, 2), (0, 3)), (1, 2))
    x, w = random(2, 9, 8, 6), random(3, 2, 6, 5)
    for weights, kernel, groups in ((w, w, 1), (w[..., 0], w[..., 0][:, :, None], 6)):
        with jax.enable_x64(True):
            want = lax.conv_general_dilated(
                jnp.asarray(x, jnp.float64),
                jnp.asarray(kernel, jnp.float64),
                window.strides,
                window.padding,
                rhs_dilation=window.dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
        np.testing.assert_allclose(exact(x, weights, window)[0], want, rtol=1e-12, atol=1e-12)


# -- shapes at the edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 6, 6), (2, 0, 6), (2, 6, 0), (2, 2, 6), (2, 6, 2)])
@pytest.mark.parametrize("padding", [0, 2])
def test_empty_images_and_results(shape, padding):
    window = Window((1, 1), ((padding, padding),) * 2)
    case = Case(shape, 5, 20, (3, 3), window, True, False, (-1.0, 1.0))
    case.check(packed)
    case.check(depthwise_convolution, depthwise=True)


def test_no_features():
    assert packed(random(1, 4, 4, 3), random(3, 3, 3, 0)).shape == (1, 2, 2, 0)


@pytest.mark.parametrize("dilation", [1, 2])
def test_windows_that_lie_in_the_padding(dilation):
    """There the result is the bias, within its bounds, to the last bit."""
    window, bias = Window((2, 2), ((9, 9), (8, 10)), (dilation, dilation)), random(20)
    x, w = random(2, 3, 4, 20), random(3, 3, 20, 20)
    tail = Tail(bias, None, -0.5, 0.5)
    for have, weights in (
        (packed(x, w, window, tail), w),
        (depthwise_convolution(x, w[..., 0], window, tail), w[..., 0]),
    ):
        assert_close(have, x, weights, window, tail)
        for corner in (have[:, 0, 0], have[:, -1, -1], have[:, 0, -1], have[:, -1, 0]):
            np.testing.assert_array_equal(corner, np.broadcast_to(np.clip(bias, -0.5, 0.5), (2, 20)))


@pytest.mark.parametrize("size", [1, 3])
def test_more_tiles_than_are_handed_out_one_by_one(size):
    window = Window((1, 1), ((size // 2, size // 2),) * 2)
    Case((2, 260, 130), 2, 3, (size, size), window, True, False, (-1.0, 1.0)).check(packed)


def test_more_lines_than_are_handed_out_one_by_one():
    case = Case((3, 3001, 4), 2, 1, (3, 3), Window((1, 1), ((1, 1), (1, 1))), True, False, (-1.0, 1.0))
    case.check(depthwise_convolution, depthwise=True)


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 3])
def test_numbers_that_are_not_finite(number, clamp, size):
    """They reach the results whose windows hold them, and no others; bounds make an infinity finite, and no NaN."""
    window = Window((1, 1), ((1, 1), (1, 1)))
    x, w = random(2, 7, 8, 20), random(size, size, 20, 40)
    x[0, 3, 4, 7] = x[1, 0, 0, 19] = number
    for kernel, weights in ((packed, w), (depthwise_convolution, w[..., 0])):
        have = kernel(x, weights, window, Tail(None, None, *clamp))
        assert_close(have, x, weights, window, Tail(None, None, *clamp))
        if math.isnan(number):
            assert 0 < np.isnan(have).sum() < have.size / 2


@pytest.mark.parametrize("rows", [1, 9])
def test_one_row_that_is_not_finite(rows):
    x, w = random(1, 1, rows, 30), random(1, 1, 30, 40)
    x[..., -1, 29] = math.inf
    assert_close(packed(x, w, tail=Tail(low=0.0, high=6.0)), x, w, tail=Tail(low=0.0, high=6.0))
    x[..., -1, 3] = math.nan
    assert_close(packed(x, w, tail=Tail(low=0.0, high=6.0)), x, w, tail=Tail(low=0.0, high=6.0))


def test_a_term_that_is_nan_stays_one():
    x, w, bias, addend = random(1, 4, 4, 20), random(1, 1, 20, 20), random(20), random(1, 4, 4, 20, seed=1)
    bias[3], addend[0, 1, 2, 5] = math.nan, math.nan
    tail = Tail(bias, addend, 0.0, 1.0)
    for have, weights in ((packed(x, w, tail=tail), w), (depthwise_convolution(x, w[..., 0], tail=tail), w[..., 0])):
        assert_close(have, x, weights, tail=tail)
        assert np.isnan(have).sum() == 17


# -- threads ----------------------------------------------------------------------------------------------------------


def convolution(seed=0):
    x, w = random(2, 30, 30, 24, seed=seed), random(3, 3, 24, 70)
    window, tail = Window((1, 1), ((1, 1), (1, 1))), Tail(random(70), None, -2.0, 3.0)
    return packed, x, w, window, tail


def depthwise(seed=0):
    x, w = random(2, 50, 50, 70, seed=seed), random(3, 3, 70)
    return depthwise_convolution, x, w, Window((1, 1), ((1, 1), (1, 1))), Tail(random(70), None, -2.0, 3.0)


def matrix(seed=0, rows=100):
    x, w = random(1, 1, rows, 300, seed=seed), random(1, 1, 300, 500)
    return packed, x, w, Window(), Tail(random(500), random(1, 1, rows, 500, seed=2), -9.0, 9.0)


def vector(seed=0):
    return matrix(seed, rows=1)


LARGE = (convolution, depthwise, matrix, vector)


def compiled(kernel, x, w, window, tail):
    """The kernel as a function of x alone."""
    return jax.jit(lambda x: kernel(x, w, window, tail))


@pytest.fixture
def resize(kernels):
    """Changes how many threads share work; afterwards there are as many as before."""
    mapped = Path("/proc/self/maps").read_text()
    path = re.search(rf"/\S*kernels-{kernels.digest}\.so", mapped)
    yield ctypes.CDLL(path[0]).team_resize
    ctypes.CDLL(path[0]).team_resize(_threads())


@pytest.mark.parametrize("work", LARGE)
def test_the_same_bits_again_and_again(work, resize):
    """Whatever number of threads share the work, and whoever of them does what."""
    _, x, w, window, tail = work()
    run = compiled(*work())
    assert resize(1) == 1
    first = np.asarray(run(x))
    assert_close(first, x, w, window, tail)
    for threads in (2, 4, 7):
        assert resize(threads) == threads
        for _ in range(50):
            np.testing.assert_array_equal(run(x), first)


def test_calls_of_several_threads_at_once(resize):
    """Some of them find the team at work for another, and do theirs alone."""
    resize(4)
    runs = [(compiled(*work()), [work(seed)[1] for seed in range(3)]) for work in LARGE]
    want = [[np.asarray(run(x)) for x in inputs] for run, inputs in runs]

    def calls(number):
        for i in range(number, number + 12):
            (run, inputs), results = runs[i % 4], want[i % 4]
            for x, y in zip(inputs, results, strict=True):
                np.testing.assert_array_equal(run(x), y)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(calls, range(12)))


def test_as_many_threads_as_jax_has(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for variable, value, want in (
        ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false", 1),
        ("NPROC", "1", 1),
        ("NPROC", str(cores + 5), cores),
        ("NPROC", "many", cores),
        ("NPROC", "", cores),
    ):
        with monkeypatch.context() as patch:
            patch.delenv("XLA_FLAGS", raising=False)
            patch.delenv("NPROC", raising=False)
            patch.setenv(variable, value)
            assert _threads() == want, (variable, value)


# -- what kernels do not take -----------------------------------------------------------------------------------------


def test_nothing_to_sum_over():
    x, w = random(1, 5, 5, 0), random(3, 3, 0, 20)
    np.testing.assert_array_equal(packed(x, w), np.zeros((1, 3, 3, 20)))


def test_negative_padding_is_refused():
    window = Window((1, 1), ((1, -1), (-1, 1)))
    for call in (
        lambda: packed(random(1, 5, 5, 3), random(1, 1, 3, 20), window),
        lambda: depthwise_convolution(random(1, 5, 5, 3), random(1, 1, 3), window),
    ):
        with pytest.raises(ValueError, match="negative padding"):
            call()


# -- pools ------------------------------------------------------------------------------------------------------------


@fuzzed
@given(cases(depth=20, features=70), st.sampled_from([(2, 2), (1, 3), (3, 2), (2, 1)]))
def test_pools(case, pool):
    x, w = random(*case.images, case.depth), case.weights(depthwise=False)
    tail = Tail(random(case.features) if case.bias else None, None, *case.clamp)
    plain, error = exact(x, w, case.window, tail)
    images, height, width, features = plain.shape
    rows, columns = height // pool[0], width // pool[1]
    if rows and columns:
        cut = plain[:, : rows * pool[0], : columns * pool[1]]
        want = cut.reshape(images, rows, pool[0], columns, pool[1], features).max((2, 4))
        have = packed(x, w, case.window, tail._replace(pool=pool))
        np.testing.assert_allclose(have, want, rtol=0, atol=np.max(error))


def test_a_nan_is_the_largest_of_its_pool():
    x = np.ones((1, 4, 4, 1), np.float32)
    x[0, 1, 2] = np.nan
    have = packed(x, np.ones((1, 1, 1, 20), np.float32), tail=Tail(low=0.0, pool=(2, 2)))[0, :, :, 0]
    np.testing.assert_array_equal(have, [[1, np.nan], [1, 1]])


def test_pools_that_are_refused():
    x, w = random(1, 4, 4, 3), random(1, 1, 3, 20)
    with pytest.raises(ValueError, match="added"):
        packed(x, w, tail=Tail(addend=random(1, 4, 4, 20), pool=(2, 2)))
    with pytest.raises(ValueError, match="depthwise"):
        depthwise_convolution(x, w[..., 0], tail=Tail(pool=(2, 2)))
