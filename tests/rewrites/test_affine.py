"""Normalisations and other known scales and shifts disappear into the weights beside them."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer.graph import run
from jaxinfer.rewrites import affine, conversions, movement, reductions, simplify, slicing

RULES = (
    *simplify.RULES,
    *conversions.RULES,
    *movement.RULES,
    *reductions.RULES,
    *slicing.RULES,
    *affine.RULES,
)
ARITHMETIC = ("add", "sub", "mul", "div", "rsqrt", "sqrt", "neg")


def _perturbed(tree):
    """The tree with every float array made positive and irregular, as trained statistics are."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + rng.uniform(0.1, 1.0, x.shape).astype(x.dtype), tree)


def _statistics():
    """Scale, bias, mean and variance of five channels."""
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 1.5, 5).astype(np.float32) for _ in range(4)]


def _normalise(y, scale, bias, mean, var, shape=(1, 1, 1, -1)):
    scale, bias, mean, var = (a.reshape(shape) for a in (scale, bias, mean, var))
    return (y - mean) * (lax.rsqrt(var + 1e-3) * scale) + bias


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_flax_linen_batch_norm(dtype):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, groups in ((6, 1), (6, 6), (4, 2)):
                x = nn.Conv(features, (3, 3), feature_group_count=groups, dtype=dtype)(x)
                x = nn.relu6(nn.BatchNorm(use_running_average=True, dtype=dtype)(x))
            return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    model, x = Block(), random(2, 6, 6, 3)
    variables = _perturbed(model.init(jax.random.key(0), x))
    after = compare(model.apply, (variables, x), RULES, known=(0,))
    # Four products, each with one bias.
    assert after.count(*ARITHMETIC) == 4


def test_flax_nnx_batch_norm():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    definition, state = nnx.split(Block(nnx.Rngs(0)))
    after = compare(
        lambda state, x: nnx.merge(definition, state)(x), (_perturbed(state), random(5, 3)), RULES, known=(0,)
    )
    assert after.count(*ARITHMETIC) == 1


def test_equinox_batch_norm():
    conv = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0))
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, "batch", mode="batch")
    norm = eqx.nn.inference_mode(norm)
    block, static = eqx.partition((conv, norm, state), eqx.is_inexact_array)
    block = _perturbed(block)

    def apply(block, x):
        conv, norm, state = eqx.combine(block, static)
        return jax.vmap(lambda x: norm(conv(x), state)[0], axis_name="batch")(x)

    after = compare(apply, (block, random(2, 3, 5, 5)), RULES, known=(0,), tolerance=1e-4)
    assert after.count(*ARITHMETIC) == 1
    assert after.count("conv_general_dilated") == 1


LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC", (2, 6, 6, 4), (3, 3, 4, 5), (1, 1, 1, -1)),
    "NCHW": ("NCHW", "OIHW", "NCHW", (2, 4, 6, 6), (5, 4, 3, 3), (1, -1, 1, 1)),
    "mixed": ("HWNC", "IOHW", "CNHW", (6, 6, 2, 4), (4, 5, 3, 3), (-1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_convolution(name):
    lhs, rhs, out, x_shape, w_shape, along = LAYOUTS[name]

    def apply(x, w, *statistics):
        y = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=(lhs, rhs, out))
        return jax.nn.relu(_normalise(y, *statistics, shape=along))

    after = compare(apply, (random(*x_shape), random(*w_shape), *_statistics()), RULES, known=range(1, 6))
    assert after.count(*ARITHMETIC) == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scale_before_a_convolution(groups):
    def apply(x, w, k):
        return lax.conv_general_dilated(
            x / k, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    k = np.random.default_rng(0).uniform(0.5, 2, 4).astype(np.float32)
    after = compare(apply, (random(2, 5, 5, 4), random(3, 3, 4 // groups, 8), k), RULES, known=(1, 2))
    assert after.count(*ARITHMETIC) == 0


def _rounded(x):
    return jnp.tanh(x)


def test_normalisation_before_a_convolution_without_padding():
    def apply(x, w, c, *statistics):
        y = _normalise(_rounded(x), *statistics)
        return lax.conv_general_dilated(y, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + c

    arguments = (random(2, 5, 5, 5), random(3, 3, 5, 8), random(8), *_statistics())
    after = compare(apply, arguments, RULES, known=range(1, 7), tolerance=1e-4)
    assert after.count(*ARITHMETIC) == 1


def test_padding_keeps_the_shift():
    def apply(x, w, c):
        return lax.conv(_rounded(x) + c[:, None, None], w, (1, 1), "SAME")

    after = compare(apply, (random(1, 3, 5, 5), random(2, 3, 3, 3), random(3)), RULES, known=(1, 2))
    assert after.count("add") == 1


def test_shift_of_exact_data_stays():
    """Temperatures in kelvin: multiplying them before the mean is taken off would lose digits."""
    x = 290 + random(4, 6) / 64
    after = compare(lambda x, w: (x - 290.0) @ w, (x, random(6, 3)), RULES, known=(1,), tolerance=1e-6)
    assert after.count("sub", "add") == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batched", [False, True])
def test_dense_layers(side, batched):
    b = (2,) if batched else ()

    def apply(x, w, k, c):
        y = jnp.matmul(x, w) if side == "right" else jnp.matmul(w, x)
        return (y * k - c) / k + 1.0

    shapes = ((*b, 4, 5), (*b, 5, 6)) if side == "right" else ((*b, 5, 6), (*b, 4, 5))
    x, w = random(*shapes[0]), random(*shapes[1])
    along = (1, 6) if side == "right" else (4, 1)
    k = np.random.default_rng(0).uniform(0.5, 2, along).astype(np.float32)
    after = compare(apply, (x, w, k, random(*along)), RULES, known=(1, 2, 3))
    assert after.count(*ARITHMETIC) == 1


def test_heads_of_a_projection():
    """A scale behind reshapes and transposes, as attention has it."""

    def apply(x, w):
        q = (x @ w).reshape(2, 7, 3, 4).transpose(0, 2, 1, 3)
        return q / np.sqrt(4).astype(np.float32)

    after = compare(apply, (random(2, 7, 6), random(6, 12)), RULES, known=(1,))
    assert after.count(*ARITHMETIC) == 0


def test_scale_along_the_wrong_axis_stays():
    after = compare(lambda x, w, k: (x @ w) * k, (random(4, 5), random(5, 6), random(4, 1)), RULES, known=(1, 2))
    assert after.count("mul") == 1


def test_product_used_twice_is_left_alone():
    def apply(x, w, k):
        y = x @ w
        return y, y * k

    after = compare(apply, (random(4, 5), random(5, 6), random(6)), RULES, known=(1, 2))
    assert after.count("dot_general") == 1
    assert after.count("mul") == 1


def test_lone_difference_ends():
    after = compare(lambda x, w, c: x @ w - c, (random(4, 5), random(5, 6), random(6)), RULES, known=(1, 2))
    assert after.count(*ARITHMETIC) == 1


def test_narrow_weights_keep_their_type():
    """A float32 factor of a bfloat16 product with float32 result does not round into bfloat16 weights."""

    def apply(x, w, k):
        return jnp.matmul(x, w, preferred_element_type=jnp.float32) * k

    x, w, k = jnp.asarray(random(4, 5), "bfloat16"), jnp.asarray(random(5, 6), "bfloat16"), random(6)
    _, after = rewrite(apply, (x, w, k), RULES, known=(1, 2))
    assert after.count("mul") == 1


def test_integers_wrap_alike():
    rng = np.random.default_rng(0)
    x, w, k = (rng.integers(-(2**31), 2**31, s).astype(np.int32) for s in ((3, 4), (4, 5), (5,)))
    before, after = rewrite(lambda x, w, k: (x @ w - k) * k, (x, w, k), RULES, known=(1, 2))
    assert after.count("mul", "sub") == 0
    np.testing.assert_array_equal(run(before, {}, x)[0], run(after, {}, x)[0])


def test_complex_factors_are_not_conjugated():
    x, w, k = (random(*s) + 1j * random(*s, seed=1) for s in ((3, 4), (4, 5), (5,)))
    before, after = rewrite(lambda x, w, k: (x @ w) * k, (x, w, k), RULES, known=(1, 2))
    assert after.count("mul") == 0
    np.testing.assert_allclose(run(before, {}, x)[0], run(after, {}, x)[0], rtol=1e-5, atol=1e-5)
