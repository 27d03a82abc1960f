"""Wanda against its formula, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.autoinfer import NM, Wanda
from jaxinfer.sparsity.learning.activations import inputs_of_products

SGD = optax.sgd(0.0)


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fed(fun, params, *args):
    return jax.jit(inputs_of_products(fun, params, *args))(params, *args)


def prune(fun, params, batches, target, granularity="element", **options):
    return autoinfer.learn_masks(
        fun,
        params,
        batches,
        target,
        SGD,
        method=Wanda(len(batches)),
        granularity=granularity,
        progress=False,
        **options,
    )


def network(params, x):
    return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"].T


PARAMS = {"a": array(8, 6, seed=1), "bias": array(6), "b": array(5, 6, seed=2)}
BATCHES = [array(7, 8, seed=s) * np.arange(1, 9, dtype=np.float32) for s in (3, 4)]


def _scores():
    """|w|·‖x‖ of both kernels, entries of an output in a column, from NumPy alone."""
    x = np.concatenate(BATCHES)
    hidden = np.tanh(x @ PARAMS["a"] + PARAMS["bias"])
    return {
        "a": np.abs(PARAMS["a"]) * np.linalg.norm(x, axis=0)[:, None],
        "b": np.abs(PARAMS["b"].T) * np.linalg.norm(hidden, axis=0)[:, None],
    }


def test_half_of_each_output():
    result = prune(network, PARAMS, BATCHES, 0.5)
    assert result.masks["bias"] is None and result.step == 0
    for name, scores in _scores().items():
        mask = np.asarray(result.masks[name] if name == "a" else result.masks[name].T)
        count = len(scores) // 2
        np.testing.assert_array_equal(mask.sum(0), count)
        np.testing.assert_array_equal(mask, scores >= np.sort(scores, axis=0)[-count])
        # The kernel "b" is used transposed: its entries are told apart all the same.
        np.testing.assert_array_equal(np.asarray(result.params[name]), np.where(result.masks[name], PARAMS[name], 0))


def test_two_of_four_along_the_sum():
    result = prune(network, PARAMS, BATCHES, None, NM(2, 4))
    for name, scores in _scores().items():
        mask = np.asarray(result.masks[name] if name == "a" else result.masks[name].T)
        for start in range(0, len(scores), 4):
            run = scores[start : start + 4]
            np.testing.assert_array_equal(mask[start : start + 4], run >= np.sort(run, axis=0)[-2])


def test_odd_fractions_come_out_right_on_the_whole():
    result = prune(network, PARAMS, BATCHES, 0.3)
    for name in "ab":
        assert int(result.masks[name].sum()) == int(0.3 * PARAMS[name].size)


def test_norms_before_a_convolution():
    """Strides, padding and groups, against windows cut out one by one."""
    kernel, image = array(3, 3, 2, 4, seed=1), array(2, 7, 7, 4)

    def fun(p, x):
        return lax.conv_general_dilated(
            x, p, (2, 2), ((1, 1), (0, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    found = fed(fun, jnp.asarray(kernel), image)[0]
    padded = np.pad(image, ((0, 0), (1, 1), (0, 2), (0, 0)))
    height, width = fun(kernel, image).shape[1:3]
    for i, j, c, o in np.ndindex(kernel.shape):
        channel = 2 * (o // 2) + c
        window = padded[:, i : i + 2 * height : 2, j : j + 2 * width : 2, channel][:, :height, :width]
        assert float(found.squares[i, j, c, o]) == pytest.approx(np.square(window).sum(), rel=1e-5)
        assert int(found.outputs[i, j, c, o]) == o + 1
        assert int(found.places[i, j, c, o]) == (3 * i + j) * 2 + c


def test_norms_in_loops_branches_and_moves():
    """A recurrent kernel, a stack of layers, a kernel in a branch, one cut in two, one used twice."""
    x = array(4, 6)
    params = {
        "recurrent": array(6, 6, seed=1),
        "stack": array(3, 6, 6, seed=2) / 3,
        "branch": array(6, 6, seed=3),
        "both": array(6, 12, seed=4),
        "unused": array(6, 6, seed=5),
    }

    def fun(p, x):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ p["recurrent"]), None), x, length=3)
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
        h = lax.cond(h.sum() > -1e9, lambda h: h @ p["branch"], lambda h: h, h)
        k, q = jnp.split(p["both"], 2, axis=1)
        return (h @ k) @ q, p["unused"] * 2

    def by_hand(p, x):
        h, squares = x, {"recurrent": 0}
        for _ in range(3):
            squares["recurrent"] += np.square(h).sum(0)[:, None]
            h = np.tanh(h @ p["recurrent"])
        squares["stack"] = []
        for w in p["stack"]:
            squares["stack"].append(np.square(h).sum(0)[:, None] + 0 * w)
            h = np.tanh(h @ w)
        squares["branch"] = np.square(h).sum(0)[:, None]
        h = h @ p["branch"]
        k, q = np.split(p["both"], 2, axis=1)
        squares["both"] = np.concatenate(
            [np.square(h).sum(0)[:, None] + 0 * k, np.square(h @ k).sum(0)[:, None] + 0 * q], 1
        )
        return squares

    found = fed(fun, params, x)
    names = sorted(params)
    assert {names[i] for i in found} == {"recurrent", "stack", "branch", "both"}
    for name, expected in by_hand(params, x).items():
        got = found[names.index(name)]
        np.testing.assert_allclose(got.squares, np.asarray(expected) + 0 * params[name], rtol=2e-4)
    # Layers of the stack have outputs of their own.
    stack = np.asarray(found[names.index("stack")].outputs)
    assert len(np.unique(stack)) == 18 and np.all(stack == stack[:, :1])


def test_what_wanda_cannot_do():
    with pytest.raises(ValueError, match="no product reads bias"):
        prune(network, PARAMS, BATCHES, 0.5, prune=lambda name, _: True)
    with pytest.raises(ValueError, match="'element' or NM"):
        prune(network, PARAMS, BATCHES, 0.5, "row")
    with pytest.raises(ValueError, match="one batch at least"):
        Wanda(0)
