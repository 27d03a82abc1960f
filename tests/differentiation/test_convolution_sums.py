"""Cotangents of convolutions as sums: the shapes that take these forms on the CPU, against JAX's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.differentiation.tables import bilinear, convolution, convolution_sums

OURS = frozenset(bilinear.TANGENTS) | frozenset(convolution.TANGENTS)
ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the forms are for XLA's CPU backend")
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

# image, window, features, strides, padding, dilation of the window, groups
CASES = {
    "depthwise": ((2, 5, 6, 3), (3, 3), 3, (1, 1), ((1, 1), (1, 1)), (1, 1), 3),
    "depthwise, strided": ((1, 9, 7, 2), (3, 2), 2, (2, 3), ((0, 1), (1, 0)), (1, 1), 2),
    "depthwise, dilated, multiplied": ((2, 9, 8, 2), (2, 3), 4, (2, 1), ((1, 2), (0, 3)), (2, 2), 2),
    "depthwise, cropped": ((1, 9, 9, 2), (3, 3), 2, (1, 2), ((-1, 2), (0, -1)), (1, 1), 2),
    "depthwise, steps over places": ((1, 11, 2), (2,), 2, (4,), ((0, 0),), (1,), 2),
    "depthwise, sequence": ((2, 13, 3), (3,), 6, (1,), ((2, 0),), (1,), 3),
    "depthwise, volume": ((1, 4, 5, 4, 2), (2, 2, 3), 2, (1, 2, 1), ((0, 1), (0, 0), (1, 1)), (1, 1, 1), 2),
    "pointwise": ((2, 5, 4, 3), (1, 1), 4, (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "pointwise, strided and padded": ((1, 6, 7, 3), (1, 1), 4, (2, 3), ((1, 0), (0, 2)), (1, 1), 1),
    "few places": ((2, 5, 4, 3), (3, 3), 4, (1, 1), ((1, 1), (0, 1)), (1, 1), 1),
    "few places, strided, dilated": ((1, 9, 9, 2), (3, 2), 3, (2, 2), ((1, 2), (0, 1)), (2, 1), 1),
}


def operands(name, dtype=np.float64):
    """A convolution, an image and a kernel."""
    shape, window, features, strides, padding, dilation, groups = CASES[name]
    draw = np.random.default_rng(0).standard_normal

    def convolve(x, kernel):
        numbers = LAYOUTS[len(window)]
        return lax.conv_general_dilated(x, kernel, strides, padding, None, dilation, numbers, groups)

    kernel = (*window, shape[-1] // groups, features)
    return convolve, jnp.asarray(draw(shape), dtype), jnp.asarray(draw(kernel), dtype)


def convolutions(function, *args):
    """How many convolutions a program has."""
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


def test_like_jax(float64):
    made = [operands(name) for name in CASES]

    def fun(*args):
        return [convolve(x, k) for (convolve, _, _), x, k in zip(made, args[::2], args[1::2])]

    check(fun, *(array for _, x, k in made for array in (x, k)), ours=OURS, order=1)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("depthwise")])
def test_like_jax_row_by_row(name, float64, monkeypatch):
    monkeypatch.setattr(convolution_sums, "_MOST_BYTES", 0)
    convolve, x, kernel = operands(name)
    check(lambda x, k: [convolve(x, k)], x, kernel, ours=OURS | {"scan"}, order=1)


@pytest.mark.parametrize("name", ["depthwise, strided", "depthwise, dilated, multiplied", "few places"])
def test_second_order(name, float64):
    convolve, x, kernel = operands(name)
    check(lambda x, k: [jnp.sin(convolve(x, k))], x, kernel, ours=OURS, order=2)


def test_channels_first(float64):
    def fun(x, k):
        return [lax.conv_general_dilated(x, k, (2, 1), "SAME", feature_group_count=3)]

    draw = np.random.default_rng(1).standard_normal
    check(fun, draw((2, 3, 6, 5)), draw((6, 1, 3, 3)), ours=OURS, order=1)


def loss(name, dtype):
    """A scalar of image and kernel, and both."""
    convolve, x, kernel = operands(name, dtype)
    return lambda x, k: jnp.sum(jnp.sin(convolve(x, k).astype(np.float32))), x, kernel


def test_batched(float64):
    fun, x, kernel = loss("depthwise, strided", np.float64)
    xs = jnp.stack([x, 2 * x, x + 1])
    have = jax.vmap(autoinfer.grad(fun, (0, 1)), (0, None))(xs, kernel)
    want = jax.vmap(jax.grad(fun, (0, 1)), (0, None))(xs, kernel)
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["depthwise", "few places"])
def test_narrow_floats(name):
    fun, x, kernel = loss(name, jnp.bfloat16)
    have = autoinfer.grad(fun, (0, 1))(x, kernel)
    want = jax.grad(fun, (0, 1))(x.astype(np.float32), kernel.astype(np.float32))
    for a, b in zip(have, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.05, atol=0.05 * np.abs(b).max())


@ON_CPU
@pytest.mark.parametrize("name", CASES)
def test_no_convolution_is_left(name):
    fun, x, kernel = loss(name, np.float32)
    assert convolutions(jax.grad(fun, (0, 1)), x, kernel) == 3
    assert convolutions(autoinfer.grad(fun, (0, 1)), x, kernel) == 1


@pytest.mark.parametrize("name", ["depthwise", "pointwise", "few places"])
def test_other_backends_keep_convolutions(name, monkeypatch):
    fun, x, kernel = loss(name, np.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions(autoinfer.grad(fun, (0, 1)), x, kernel) == 3


@ON_CPU
def test_a_window_of_many_places_or_many_phases_stays_a_convolution():
    def fun(strides):
        return lambda x, k: jnp.sum(
            lax.conv_general_dilated(x, k, strides, "VALID", dimension_numbers=LAYOUTS[2], feature_group_count=2) ** 2
        )

    large = jnp.zeros((1, 20, 20, 2)), jnp.zeros((12, 12, 1, 2))
    assert convolutions(autoinfer.grad(fun((1, 1)), (0, 1)), *large) == 3
    patches = jnp.zeros((1, 18, 18, 2)), jnp.zeros((9, 9, 1, 2))
    assert convolutions(autoinfer.grad(fun((9, 9)), (0, 1)), *patches) == 2
