"""Loops over vectors: every instruction against float64, steps in both directions, and what JAX makes of a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_convolution import random
from jax import export

from jaxinfer.native import Instruction, Place, VectorLoop, library, pack, vector_loop

pytestmark = pytest.mark.usefixtures("kernels")

_EPSILON = 2.0**-23
ELEMENTWISE = {
    "neg": lambda a, b: -a,
    "abs": lambda a, b: np.abs(a),
    "exp": lambda a, b: np.exp(a),
    "tanh": lambda a, b: np.tanh(a),
    "logistic": lambda a, b: 1 / (1 + np.exp(-a)),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": np.maximum,
    "min": np.minimum,
    "copy": lambda a, b: a,
}


def elementwise(operation, size):
    """A loop of one step: result = operation(first operand, second operand)."""
    instruction = Instruction(operation, size, 0, Place(3, 0), Place(1, 0), Place(2, 0))
    return VectorLoop((), (instruction,), (), 1, False, 0, ((size,),), (False, False, False))


def apply(operation, a, b):
    (result,) = jax.jit(lambda a, b: vector_loop(elementwise(operation, a.size), [a, b]))(a, b)
    return np.asarray(result, np.float64)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 70, 256])
@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_elementwise_operations(operation, size):
    a, b = random(size), random(size, seed=1)
    want = ELEMENTWISE[operation](a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(apply(operation, a, b), want, rtol=3 * _EPSILON, atol=0)


@pytest.mark.parametrize("operation", ["exp", "tanh", "logistic"])
def test_functions_over_all_their_range(operation):
    a = np.concatenate([np.linspace(-110, 110, 40001), np.linspace(-1, 1, 20001), 10.0 ** -np.arange(1.0, 38)])
    a = a.astype(np.float32)
    with np.errstate(over="ignore"):
        want = ELEMENTWISE[operation](a.astype(np.float64), None).astype(np.float32)
    have = apply(operation, a, a)
    # XLA's threads take numbers below the smallest normal one for zeros.
    np.testing.assert_allclose(have, want, rtol=4 * _EPSILON, atol=2.0**-126)


@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_values_that_are_no_numbers(operation):
    a = np.float32([np.nan, np.inf, -np.inf, 0.0, np.nan, 1.0, np.inf, -np.inf])
    b = np.float32([1.0, 2.0, 3.0, np.nan, np.nan, np.inf, np.inf, np.inf])
    with np.errstate(all="ignore"):
        want = ELEMENTWISE[operation](a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(apply(operation, a, b), want, rtol=2 * _EPSILON, atol=0)


# -- steps ------------------------------------------------------------------------------------------------------------


def recurrence(steps, width, backwards=False):
    """h ← tanh(h W + x[t]), from an operand; the results are the last h and every h."""
    h, z = Place(0, 0), Place(0, width)

    def copy(to, place):
        return Instruction("copy", width, 0, to, place, place)

    step = (
        Instruction("product", width, width, z, h, Place(3, 0)),
        Instruction("add", width, 0, z, z, Place(1, 0)),
        Instruction("tanh", width, 0, h, z, z),
        copy(Place(5, 0), h),
    )
    return VectorLoop(
        first=(copy(h, Place(2, 0)),),
        step=step,
        last=(copy(Place(4, 0), h),),
        steps=steps,
        backwards=backwards,
        memory=2 * width,
        results=((width,), (steps, width)),
        moves=(True, False, False, False, True),
    )


def operands(steps, width):
    w = random(width, width, seed=2) / np.float32(2 * np.sqrt(width))
    return [random(steps, width), random(width, seed=1), pack(w[None, None], library().panel)], w


def exact(xs, h, w, backwards):
    every = np.zeros(xs.shape)
    for t in reversed(range(len(xs))) if backwards else range(len(xs)):
        h = every[t] = np.tanh(h @ w + xs[t])
    return h, every


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("width", [1, 20, 33, 300])
def test_a_recurrence(width, backwards):
    arrays, w = operands(9, width)
    loop = recurrence(9, width, backwards)
    have = jax.jit(lambda *xs: vector_loop(loop, xs))(*arrays)
    want = exact(*(x.astype(np.float64) for x in (*arrays[:2], w)), backwards)
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_loop_gives_the_same_bits_each_time():
    arrays, _ = operands(20, 256)
    run = jax.jit(lambda *xs: vector_loop(recurrence(20, 256), xs))
    first = [np.asarray(x) for x in run(*arrays)]
    for _ in range(30):
        for a, b in zip(run(*arrays), first, strict=True):
            np.testing.assert_array_equal(a, b)


# -- JAX --------------------------------------------------------------------------------------------------------------


def by_scan(xs, h, w):
    def step(h, x):
        h = jnp.tanh(h @ w + x)
        return h, h

    return jax.lax.scan(step, h, xs)


def test_derivatives_and_batches():
    arrays, w = operands(6, 20)
    loop = recurrence(6, 20)
    direction = [random(*x.shape, seed=5) for x in arrays[:2]]

    def mine(xs, h):
        return vector_loop(loop, [xs, h, arrays[2]])

    def plain(xs, h):
        return list(by_scan(xs, h, w))

    for have, want in zip(*(jax.tree.leaves(jax.jvp(f, arrays[:2], direction)) for f in (mine, plain)), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)
    for have, want in zip(
        *(jax.grad(lambda *a, f=f: f(*a)[1].sum(), (0, 1))(*arrays[:2]) for f in (mine, plain)), strict=True
    ):
        np.testing.assert_allclose(have, want, atol=1e-5)
    several = random(3, 6, 20)
    for have, want in zip(*(jax.vmap(f, (0, None))(several, arrays[1]) for f in (mine, plain)), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_other_dtypes_and_exports_are_in_jaxs_own_operations():
    arrays, w = operands(6, 20)
    loop = recurrence(6, 20)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        have = jax.jit(lambda *xs: vector_loop(loop, xs))(*wide)
        for a, b in zip(have, exact(wide[0], wide[1], np.asarray(w, np.float64), False), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)
    for platform in ("cpu", "cuda", "tpu"):
        exported = export.export(jax.jit(lambda *xs: vector_loop(loop, xs)), platforms=[platform])(*arrays)
        assert "jaxinfer_" not in exported.mlir_module()
    for a, b in zip(exported_here(loop, arrays), jax.jit(lambda *xs: vector_loop(loop, xs))(*arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def exported_here(loop, arrays):
    return export.export(jax.jit(lambda *xs: vector_loop(loop, xs)), platforms=["cpu"])(*arrays).call(*arrays)
