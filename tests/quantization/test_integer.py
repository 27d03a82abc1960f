"""Integer products against int64 NumPy: random codes and the extremes, every form and layout."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.quantization import integer
from jaxinfer.quantization.activations import DIGITS, digits, from_digits

_SHAPES = [(1, 1, 1), (1, 64, 96), (2, 7, 1), (1, 300, 1), (5, 33, 17), (16, 128, 64), (3, 1, 9), (128, 384, 32)]


def _codes(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if kind == "random":
        return rng.integers(-128, 128, shape).astype(np.int8)
    if kind == "lowest":
        return np.full(shape, -128, np.int8)
    return rng.choice(np.array([-128, 127], np.int8), shape)


_KINDS = ("random", "lowest", "ends")


@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_products_equal_int64(form, shape) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    run = jax.jit(lambda x, w: integer.dot(x, w, form))
    for a, b in itertools.product(_KINDS, _KINDS):
        x, w = _codes(a, rng, (m, k)), _codes(b, rng, (k, n))
        got = np.asarray(run(x, w))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_known_weights_and_transposed_ones_give_the_same(form) -> None:
    rng = np.random.default_rng(1)
    x, w = _codes("random", rng, (1, 96)), _codes("ends", rng, (96, 64))
    want = x.astype(np.int64) @ w.astype(np.int64)
    np.testing.assert_array_equal(jax.jit(lambda x: integer.dot(x, jnp.asarray(w), form))(x), want)
    turned = np.ascontiguousarray(w.T)
    np.testing.assert_array_equal(jax.jit(lambda x, t: integer.dot(x, t.T, form))(x, turned), want)


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_the_longest_sum_of_extremes_fits(form) -> None:
    k = integer.LONGEST_SUM
    x, w = np.full((1, k), -128, np.int8), np.full((k, 2), -128, np.int8)
    np.testing.assert_array_equal(jax.jit(lambda x, w: integer.dot(x, w, form))(x, w), np.full((1, 2), k << 14))
    with pytest.raises(ValueError, match="may not fit"):
        integer.dot(jnp.zeros((1, k + 1), jnp.int8), jnp.zeros((k + 1, 2), jnp.int8), form)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="int8"):
        integer.dot(jnp.zeros((2, 2)), jnp.zeros((2, 2), jnp.int8))


# -- convolutions -----------------------------------------------------------------------------------------------------

_CONVOLUTIONS = [
    # image, kernel, strides, padding, lhs dilation, rhs dilation, groups; NHWC, HWIO
    ((2, 9, 8, 3), (3, 3, 3, 5), (2, 1), ((1, 1), (0, 2)), (1, 1), (1, 1), 1),
    ((1, 8, 8, 64), (3, 3, 64, 32), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1),
    ((1, 6, 7, 4), (1, 1, 4, 6), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
    ((2, 7, 6, 4), (2, 3, 4, 3), (1, 2), ((2, 0), (1, 3)), (2, 1), (1, 2), 1),
    ((2, 7, 6, 6), (3, 3, 2, 9), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 3),
    ((1, 9, 9, 8), (3, 3, 1, 8), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 8),
    ((2, 9, 8, 8), (5, 3, 1, 8), (2, 2), ((2, 1), (0, 1)), (1, 1), (1, 2), 8),
    ((2, 9, 8, 8), (3, 3, 1, 8), (2, 1), ((3, 0), (-1, 2)), (1, 2), (2, 1), 8),
]


def _int64_convolution(x, w, strides, padding, lhs, rhs, groups, zero) -> np.ndarray:
    """A convolution by the definition, NHWC and HWIO."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    batch, height, width, features = x.shape
    wide = np.full((batch, (height - 1) * lhs[0] + 1, (width - 1) * lhs[1] + 1, features), zero, np.int64)
    wide[:, :: lhs[0], :: lhs[1]] = x
    for axis, (low, high) in enumerate(padding, start=1):
        edges = [(0, 0)] * 4
        edges[axis] = (max(low, 0), max(high, 0))
        wide = np.pad(wide, edges, constant_values=zero)
        wide = wide.take(range(max(-low, 0), wide.shape[axis] - max(-high, 0)), axis)
    spans = [r * (k - 1) + 1 for r, k in zip(rhs, w.shape)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(wide.shape[1:3], spans, strides)]
    out = np.zeros((batch, *sizes, w.shape[3]), np.int64)
    per, made = features // groups, w.shape[3] // groups
    for i, j, o in itertools.product(range(sizes[0]), range(sizes[1]), range(w.shape[3])):
        first = o // made * per
        y, z = i * strides[0], j * strides[1]
        part = wide[:, y : y + spans[0] : rhs[0], z : z + spans[1] : rhs[1], first : first + per]
        out[:, i, j, o] = (part * w[..., o]).sum((1, 2, 3))
    return out


@pytest.mark.parametrize("case", _CONVOLUTIONS, ids=lambda c: f"{c[0]}*{c[1]}")
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW")])
def test_convolutions_equal_int64(case, layout) -> None:
    image, kernel, strides, padding, lhs, rhs, groups = case
    orders = [tuple(std.index(c) for c in name) for std, name in zip(("NHWC", "HWIO", "NHWC"), layout)]
    rng = np.random.default_rng(2)
    for a, b, zero in [
        ("random", "random", 0),
        ("random", "ends", -128),
        ("lowest", "lowest", 17),
        ("ends", "ends", 127),
    ]:
        x, w = _codes(a, rng, image), _codes(b, rng, kernel)
        want = _int64_convolution(x, w, strides, padding, lhs, rhs, groups, zero)
        turned_x, turned_w = x.transpose(orders[0]), w.transpose(orders[1])
        numbers = lax.conv_dimension_numbers(turned_x.shape, turned_w.shape, layout)
        params = {
            "dimension_numbers": numbers,
            "window_strides": strides,
            "padding": padding,
            "lhs_dilation": lhs,
            "rhs_dilation": rhs,
            "feature_group_count": groups,
            "batch_group_count": 1,
        }
        forms = [integer.convolution] + ([integer.depthwise] if groups == image[3] else [])
        for form in forms:
            got = jax.jit(functools.partial(form, params=params, zero=zero))(turned_x, turned_w)
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(np.asarray(got), want.transpose(orders[2]), err_msg=form.__name__)


# -- digits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_digits_give_products_in_float32_precision(form) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(3, 512)) * np.array([[1e-20], [1.0], [1e20]])).astype(np.float32)
    w = _codes("random", rng, (512, 40))

    @jax.jit
    def run(x, w):
        parts, scale = digits(x)
        return from_digits(integer.dot(parts, w, form), scale)

    want = x.astype(np.float64) @ w.astype(np.float64)
    bound = 2.0**-20 * np.abs(x).max(1, keepdims=True) * np.abs(w.astype(np.float64)).sum(0)
    assert (np.abs(np.asarray(run(x, w), np.float64) - want) <= bound).all()


def test_digits_hold_the_largest_entries() -> None:
    x = np.array([[1.0, -1.0, 0.999, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    parts, scale = jax.jit(digits)(x)
    stacked = np.asarray(parts, np.float64).reshape(DIGITS, 2, 4)
    back = sum(stacked[i] * 128.0**i for i in range(DIGITS)) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(back, x, atol=2.0**-20)
