"""Products of int8 by the kernel, against int64: exact on any numbers and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from jaxinfer.graph import run, trace
from jaxinfer.native import integer_offsets, integer_product, library, pack_integers
from jaxinfer.rewrites.native_integers import RULES
from jaxinfer.rewriting import Rewriter, fold


@pytest.fixture(autouse=True)
def integers(kernels):
    if not kernels.has_integers:
        pytest.skip("this processor has no instruction for it")


def numbers(*shape, seed=0, extreme=False):
    rng = np.random.default_rng([seed, *shape])
    drawn = rng.choice([-128, 127], shape) if extreme else rng.integers(-128, 128, shape)
    return drawn.astype(np.int8)


def product(x, w):
    panel = library().panel
    return integer_product(x, pack_integers(w, panel), integer_offsets(w, panel), w.shape[1])


def exact(x, w):
    return x.astype(np.int64) @ w.astype(np.int64)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 130), st.booleans())
def test_any_shape(rows, depth, features, extreme):
    x, w = numbers(rows, depth, extreme=extreme), numbers(depth, features, seed=1, extreme=extreme)
    np.testing.assert_array_equal(jax.jit(product)(x, w), exact(x, w))


def test_the_largest_sums():
    depth = (1 << 17) - 1
    for a, b in ((-128, -128), (-128, 127), (127, 127)):
        x, w = np.full((2, depth), a, np.int8), np.full((depth, 3), b, np.int8)
        np.testing.assert_array_equal(jax.jit(product)(x, w), exact(x, w))


def test_work_for_several_threads_again_and_again():
    x, w = numbers(500, 257), numbers(257, 300)
    run_ = jax.jit(product)
    for _ in range(20):
        np.testing.assert_array_equal(run_(x, w), exact(x, w))


def test_nothing_to_sum_over():
    assert not np.any(product(numbers(3, 0), numbers(0, 5)))


def test_exports_are_in_jaxs_own_operations():
    x, w = numbers(20, 64), numbers(64, 40)
    exported = export.export(jax.jit(product), platforms=["cpu"])(x, w)
    assert "jaxinfer_" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x, w), exact(x, w))


# -- the rule ---------------------------------------------------------------------------------------------------------


def rewritten(function, *arrays, known):
    jaxpr = jax.make_jaxpr(function)(*arrays)
    graph = trace(jaxpr, {i: a for i, a in enumerate(arrays) if i in known})
    rewriter = Rewriter([r for r in RULES if r.name == "packed-integers"])
    return fold(rewriter.apply(graph, {node: found[0] for node, found in rewriter.offers(graph).items()}))


def contracted(numbers_, dtype=jnp.int32):
    return lambda x, w: lax.dot_general(x, w, numbers_, preferred_element_type=dtype)


@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("axes", [((1,), (0,)), ((0,), (0,)), ((1,), (1,)), ((0,), (1,))])
def test_products_with_known_weights(axes, known):
    shapes = [(80, 90) if axis == (0,) else (90, 80) for axis in axes]
    x, w = numbers(*shapes[0]), numbers(*shapes[1], seed=1)
    after = rewritten(contracted((axes, ((), ()))), x, w, known=(known,))
    assert sum(n.op == "integer_product" for n in after.walk()) == 1
    assert not any(n.op == "dot_general" for n in after.walk())
    (have,) = run(after, {}, w if known == 0 else x)
    want = np.tensordot(x.astype(np.int64), w.astype(np.int64), axes)
    np.testing.assert_array_equal(have, want)


def test_what_is_left_alone():
    plain = (((1,), (0,)), ((), ()))
    for function, x, w, known in (
        (contracted(plain), numbers(40, 80), numbers(80, 40), ()),  # nothing is known
        (contracted(plain, jnp.int8), numbers(40, 80), numbers(80, 40), (1,)),  # sums of eight bits
        (contracted(plain), numbers(2, 8), numbers(8, 4), (1,)),  # small
        (contracted((((2,), (1,)), ((0,), (0,)))), numbers(4, 40, 80), numbers(4, 80, 40), (1,)),  # batches
        (contracted(plain), numbers(40, 80).astype(np.int16), numbers(80, 40).astype(np.int16), (1,)),
    ):
        after = rewritten(function, x, w, known=known)
        assert not any(n.op == "integer_product" for n in after.walk())


# -- as real numbers --------------------------------------------------------------------------------------------------


def layer(x, w, zero, scale, shift, bias):
    sums = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32) - zero
    return jnp.minimum(jnp.maximum((sums.astype(jnp.float32) * scale - shift) * 0.5 + bias, 0.0), 6.0)


def real_rows(width):
    rng = np.random.default_rng(7)
    rows = [rng.normal(size=width).astype(np.float32) for _ in range(3)]
    return rng.integers(-9, 9, (1, width)).astype(np.int32), rows[0] / 10_000, rows[1], rows[2]


def with_real(function, *arrays):
    jaxpr = jax.make_jaxpr(function)(*arrays)
    graph = trace(jaxpr, {i: a for i, a in enumerate(arrays) if i})
    rewriter = Rewriter([r for r in RULES if r.name == "packed-integers-real"])
    return fold(rewriter.apply(graph, {node: found[0] for node, found in rewriter.offers(graph).items()}))


@pytest.mark.parametrize("rows", [2, 14, 45])
def test_scales_shifts_and_bounds_go_along(rows):
    x, w, terms = numbers(rows, 90), numbers(90, 150, seed=1), real_rows(150)
    after = with_real(layer, x, w, *terms)
    work = [n.op for n in after.walk() if n not in after.known and n.op not in ("input", "const", "reshape")]
    assert work == ["integer_product"]
    (have,) = run(after, {}, x)
    zero, scale, shift, bias = (np.asarray(t, np.float64) for t in terms)
    want = np.clip(((exact(x, w) - zero) * scale - shift) * 0.5 + bias, 0.0, 6.0)
    np.testing.assert_allclose(have, want, atol=2e-5)


def test_what_is_needed_by_itself_ends_the_chain():
    x, w, (zero, scale, *_) = numbers(20, 90), numbers(90, 150, seed=1), real_rows(150)

    def both(x, w, zero, scale):
        real = contracted((((1,), (0,)), ((), ())))(x, w).astype(jnp.float32)
        return real * scale, real.sum(), jnp.maximum(real, x[:1, :1].astype(jnp.float32))

    after = with_real(both, x, w, zero, scale)
    assert sum(n.op == "integer_product" for n in after.walk()) == 1
    for have, want in zip(run(after, {}, x), both(x, w, zero, scale), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-6)


def test_a_nan_among_scales_stays_one():
    x, w, (zero, scale, shift, bias) = numbers(20, 90), numbers(90, 150, seed=1), real_rows(150)
    scale[3] = np.nan
    (have,) = run(with_real(layer, x, w, zero, scale, shift, bias), {}, x)
    assert np.isnan(have[:, 3]).all() and np.isfinite(np.delete(have, 3, 1)).all()
