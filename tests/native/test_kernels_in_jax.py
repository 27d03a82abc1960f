"""Kernels under JAX's transformations, in other dtypes, and in programs that run elsewhere."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_convolution import assert_close, exact, packed, random
from jax import export, lax

from jaxinfer.native import Tail, Window, depthwise_convolution, pack, packed_convolution
from jaxinfer.native import library as kernels_here

PLATFORMS = ("cpu", "cuda", "tpu")
WINDOW = Window((2, 1), ((1, 2), (0, 1)), (1, 2))
X, BIAS = random(2, 8, 9, 12), random(20)
W = {"packed": random(3, 2, 12, 20), "depthwise": random(3, 2, 12)}
KERNELS = ("packed", "depthwise")


def width(kind):
    return W[kind].shape[-1]


def kernel(kind, panel=None):
    """A kernel as a function of images, weights, bias and another array."""

    def function(x, w, bias=None, addend=None, low=-math.inf, high=math.inf):
        tail = Tail(bias, addend, low, high)
        return packed(x, w, WINDOW, tail, panel) if kind == "packed" else depthwise_convolution(x, w, WINDOW, tail)

    return function


def plain(kind):
    """The same in JAX's own operations."""

    def function(x, w, bias=0.0, addend=0.0, low=-math.inf, high=math.inf):
        groups = 1 if kind == "packed" else w.shape[-1]
        sums = lax.conv_general_dilated(
            x,
            w if kind == "packed" else w[:, :, None],
            WINDOW.strides,
            WINDOW.padding,
            rhs_dilation=WINDOW.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.minimum(jnp.maximum(sums + bias + addend, low), high)

    return function


def terms(kind):
    """Operands: images, weights, bias and an array to be added."""
    shape = exact(X, W[kind], WINDOW)[0].shape
    return X, W[kind], BIAS[: width(kind)], random(*shape, seed=1)


def in_float64(function, *args):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), args)
        return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def assert_near(have, want, tolerance=1e-5):
    """Within a share of the largest value: sums of hundreds of float32 products."""
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def lowered(function, *args):
    return jax.jit(function).lower(*args).as_text()


# -- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KERNELS)
def test_jit_uses_the_kernel(kind, kernels):
    target = {"packed": "jaxinfer_convolution", "depthwise": "jaxinfer_depthwise"}[kind]
    text = lowered(kernel(kind), *terms(kind))
    assert text.count("custom_call") == text.count(target) == 1 and "stablehlo.convolution" not in text
    args = terms(kind)
    nested = jax.jit(lambda *args: jax.jit(jax.jit(kernel(kind)))(*args) * 1)
    for function in (kernel(kind), jax.jit(kernel(kind)), nested):
        assert_close(function(*args), *args[:2], WINDOW, Tail(*args[2:]))


@pytest.mark.parametrize("kind", KERNELS)
def test_op_by_op(kind):
    args = terms(kind)
    with jax.disable_jit():
        assert_close(kernel(kind, panel=16)(*args), *args[:2], WINDOW, Tail(*args[2:]))


@pytest.mark.parametrize("kind", KERNELS)
def test_gradients(kind, kernels):
    def gradients(function):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args, low=-2.0, high=3.0))), (0, 1, 2, 3))

    args = terms(kind)
    assert_near(jax.jit(gradients(kernel(kind)))(*args), in_float64(gradients(plain(kind)), *args))


@pytest.mark.parametrize("kind", KERNELS)
def test_second_derivatives(kind, kernels):
    def second(function):
        def loss(x, w):
            return jnp.sum(jnp.sin(function(x, w)))

        return lambda x, w: jax.jvp(jax.grad(loss, (0, 1)), (x, w), (jnp.cos(x), jnp.cos(w)))[1]

    args = terms(kind)[:2]
    assert_near(jax.jit(second(kernel(kind)))(*args), in_float64(second(plain(kind)), *args))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1, 2, 3)])
def test_tangents(kind, moving, kernels):
    """Of some operands only: those of the others are zeros that nobody made."""

    def tangents(function):
        def of_moving(*args):
            def part(*some):
                every = list(args)
                for i, value in zip(moving, some):
                    every[i] = value
                return function(*every, low=-2.0)

            chosen = [args[i] for i in moving]
            return jax.jvp(part, chosen, [jnp.cos(a) for a in chosen])

        return of_moving

    args = terms(kind)
    assert_near(jax.jit(tangents(kernel(kind)))(*args), in_float64(tangents(plain(kind)), *args))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("axes", [(0, None, None, None), (None, 0, None, None), (None, None, 0, 2), (1, 2, 0, 3)])
def test_batches(kind, axes, kernels):
    args = terms(kind)
    batched = [a if at is None else np.stack([a, a[::-1], 2 * a], at) for a, at in zip(args, axes)]
    have = jax.jit(jax.vmap(kernel(kind), axes))(*batched)
    assert len(have) == 3
    for i in range(3):
        one = [a if at is None else np.take(a, i, at) for a, at in zip(batched, axes)]
        assert_close(have[i], *one[:2], WINDOW, Tail(*one[2:]))


@pytest.mark.parametrize("kind", KERNELS)
def test_loops(kind, kernels):
    images = np.stack([X, 2 * X, X[::-1]])

    def loop(function):
        def step(total, x):
            y = function(x, W[kind].astype(x.dtype), low=-1.0, high=5.0)
            return total + y.sum(), y

        return lambda images: lax.scan(step, jnp.zeros((), images.dtype), images)

    assert "jaxinfer_" in lowered(loop(kernel(kind)), images)
    _, results = jax.jit(loop(kernel(kind)))(images)
    for x, y in zip(images, results, strict=True):
        assert_close(y, x, W[kind], WINDOW, Tail(None, None, -1.0, 5.0))

    def slopes(function):
        return jax.grad(lambda images: loop(function)(images)[0])

    # The sum of many bounded values: what is at a bound in float32 is so in float64.
    assert_near(jax.jit(slopes(kernel(kind)))(images), in_float64(slopes(plain(kind)), images))


@pytest.mark.parametrize("kind", KERNELS)
def test_types_without_values(kind):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in terms(kind)]
    want = exact(*terms(kind)[:2], WINDOW)[0].shape
    result = jax.eval_shape(kernel(kind, panel=16), *shapes)
    assert (result.shape, result.dtype) == (want, np.float32)


# -- in plain JAX -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", [8, 16, 32])
@pytest.mark.parametrize("features", [1, 20, 32])
def test_weights_are_packed_in_panels(panel, features):
    w = random(3, 2, 5, features)
    have = np.asarray(pack(w, panel))
    assert have.shape == (-(-features // panel), 3, 2, 5, panel)
    for c in range(have.shape[0] * panel):
        want = w[..., c] if c < features else np.zeros((3, 2, 5))
        np.testing.assert_array_equal(have[c // panel, ..., c % panel], want)


@pytest.mark.parametrize("kind", KERNELS)
def test_double_precision_goes_the_plain_way(kind):
    args = terms(kind)
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in args]
        assert "jaxinfer_" not in lowered(kernel(kind, panel=16), *wide)
        have = kernel(kind, panel=16)(*wide, low=-1.0, high=2.0)
        assert have.dtype == jnp.float64
    want, _ = exact(*args[:2], WINDOW, Tail(*args[2:], -1.0, 2.0))
    np.testing.assert_allclose(have, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_goes_the_plain_way(kind, dtype):
    args = [jnp.asarray(a, dtype) for a in terms(kind)[:3]]
    assert "jaxinfer_" not in lowered(kernel(kind, panel=16), *args)
    have = kernel(kind, panel=16)(*args, low=0.0, high=6.0)
    assert have.dtype == dtype
    want, _ = exact(*(np.asarray(a, np.float64) for a in args[:2]), WINDOW, Tail(np.asarray(args[2], np.float64), None))
    # Sums of 72 terms, and one rounding or two of them.
    spacing = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(have, np.float64), np.clip(want, 0, 6), rtol=0, atol=2 * spacing * np.abs(want).max()
    )


@pytest.mark.parametrize("kind", KERNELS)
def test_programs_that_are_exported_hold_no_kernel(kind):
    args, function = terms(kind), kernel(kind, panel=16)
    for platforms in (PLATFORMS, *((p,) for p in PLATFORMS)):
        whole = export.export(jax.jit(function), platforms=platforms)(*args)
        text = whole.mlir_module()
        assert "jaxinfer_" not in text and "custom_call" not in text and "stablehlo.convolution" in text
        if "cpu" in platforms:
            back = export.deserialize(whole.serialize(vjp_order=1))
            assert_close(jax.jit(back.call)(*args), *args[:2], WINDOW, Tail(*args[2:]))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_lowered_for_without_the_kernel(kind, platform):
    traced = jax.jit(kernel(kind, panel=16)).trace(*terms(kind))
    assert "jaxinfer_" not in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", KERNELS)
def test_without_a_library_it_is_plain(kind, monkeypatch):
    module = importlib.import_module("jaxinfer.native.library")
    monkeypatch.setattr(module, "_loaded", lambda: (None, "none is wanted"))
    args, function = terms(kind), kernel(kind, panel=16)
    assert "jaxinfer_" not in lowered(lambda *args: function(*args), *args)
    assert_close(jax.jit(lambda *args: function(*args))(*args), *args[:2], WINDOW, Tail(*args[2:]))


def test_panels_may_have_any_width_without_the_kernel():
    w, tail = random(3, 3, 12, 20), Tail(jnp.pad(BIAS, (0, 1)), None, 0.0, 6.0)
    with jax.enable_x64(True):
        wide = tail._replace(bias=jnp.asarray(tail.bias, jnp.float64))
        have = packed_convolution(jnp.asarray(X, jnp.float64), pack(jnp.asarray(w, jnp.float64), 7), 20, tail=wide)
    np.testing.assert_allclose(have, exact(X, w, tail=Tail(BIAS, None, 0.0, 6.0))[0], rtol=1e-12, atol=1e-12)


def test_the_library_is_there_or_says_why_not():
    from jaxinfer import native

    assert (kernels_here() is None) == bool(native.why_missing())
