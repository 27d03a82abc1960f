"""What shrinking does to layers small enough to tell by hand: dense, normalized, convolutional."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import MLP, check, columns, conv, mlp, mlp_masks, normal, random_tree, without

pytestmark = pytest.mark.usefixtures("double")


# -- dense layers -----------------------------------------------------------------------------------------------------


def test_nothing_masked_nothing_gone() -> None:
    small, _ = check(mlp, random_tree(**MLP), None, normal(5, 4), shapes=MLP)
    assert small.report.small == small.report.size


def test_producers_without_biases() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), b=without(8, 0, 3))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 6), "b": (6,), "c": (6, 6)})
    assert small.report.constant_bytes == 0


def test_biases_that_are_left_become_constants() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 6), "b": (6,), "c": (6, 6)})
    assert small.report.constant_bytes > 0
    (b,) = (leaf for leaf in small.report.leaves if leaf.name == "b")
    assert b.axes[0].constant == 2


def test_consumers_alone() -> None:
    masks = mlp_masks(c=columns((8, 6), 1, 2, 7, axis=0))
    small, _ = check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (4, 5), "b": (5,), "c": (5, 6)})
    assert small.report.constant_bytes == 0


def test_input_features_are_gathered() -> None:
    masks = mlp_masks(a=columns((4, 8), 1, 2, axis=0))
    check(mlp, random_tree(**MLP), masks, normal(5, 4), shapes={**MLP, "a": (2, 8)})


def test_single_entries_stay() -> None:
    mask = np.random.default_rng(1).random((8, 6)) < 0.5
    mask[:, 0] = mask[0] = True
    small, _ = check(mlp, random_tree(**MLP), mlp_masks(c=mask), normal(5, 4), shapes=MLP)
    np.testing.assert_array_equal(small.masks["c"], mask)
    assert small.masks["a"] is None


def test_a_whole_layer_beside_a_residual() -> None:
    def fun(p: Any, x: Any) -> Any:
        return (x + jax.nn.gelu(x @ p["a"] + p["b"]) @ p["c"]) @ p["out"]

    shapes = {"a": (4, 8), "b": (8,), "c": (8, 4), "out": (4, 2)}
    masks = {"a": np.zeros((4, 8), bool), "b": np.zeros(8, bool), "c": None, "out": None}
    small_shapes = {"a": (0, 0), "b": (0,), "c": (0, 0), "out": (4, 2)}
    check(fun, random_tree(**shapes), masks, normal(5, 4), shapes=small_shapes)


def test_a_parameter_used_twice_goes_only_where_both_uses_do() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    masks = {"w": columns((4, 6), 1, 5)}
    check(fun, random_tree(w=(4, 6)), masks, normal(5, 4), shapes={"w": (4, 4)})


# -- normalization ----------------------------------------------------------------------------------------------------


def layer_norm(x: Any, scale: Any, bias: Any, two_pass: bool) -> Any:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True) if two_pass else (x**2).mean(-1, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(var + 1e-6) * scale + bias


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("scale_left", [False, True])
def test_normalization_over_a_pruned_axis_keeps_its_divisor(two_pass: bool, scale_left: bool) -> None:
    def fun(p: Any, x: Any) -> Any:
        return layer_norm(x @ p["w"], p["scale"], p["bias"], two_pass) @ p["out"]

    shapes = {"w": (4, 10), "scale": (10,), "bias": (10,), "out": (10, 3)}
    gone = (0, 4, 5, 9)
    masks = {
        "w": columns((4, 10), *gone),
        "scale": None if scale_left else without(10, *gone),
        "bias": without(10, *gone),
        "out": None,
    }
    small = {"w": (4, 6), "scale": (6,), "bias": (6,), "out": (6, 3)}
    if scale_left:
        # What is missing is -mean / deviation times a scale of its own: it changes with the inputs.
        small = {"w": (4, 6), "scale": (10,), "bias": (10,), "out": (10, 3)}
    check(fun, random_tree(**shapes), masks, normal(5, 4), shapes=small)


# -- convolutions -----------------------------------------------------------------------------------------------------


def test_constants_at_the_border_of_a_padded_convolution() -> None:
    def fun(p: Any, x: Any) -> Any:
        return conv(jax.nn.sigmoid(conv(x, p["a"]) + p["b"]), p["c"])

    shapes = {"a": (3, 3, 2, 6), "b": (6,), "c": (3, 3, 6, 4)}
    masks = {"a": columns((3, 3, 2, 6), 1, 2), "b": None, "c": None}
    small = {"a": (3, 3, 2, 4), "b": (4,), "c": (3, 3, 4, 4)}
    check(fun, random_tree(**shapes), masks, normal(2, 7, 5, 2), shapes=small)


def test_depthwise() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]) + p["b"])
        h = jnp.tanh(conv(h, p["depth"], groups=6, stride=2) + p["d"])
        return h.mean((1, 2)) @ p["out"]

    shapes = {"a": (1, 1, 2, 6), "b": (6,), "depth": (3, 3, 1, 12), "d": (12,), "out": (12, 3)}
    gone = (2, 5)
    twice = (4, 5, 10, 11)
    masks = {
        "a": columns((1, 1, 2, 6), *gone),
        "b": without(6, *gone),
        "depth": columns((3, 3, 1, 12), *twice),
        "d": None,
        "out": None,
    }
    small = {"a": (1, 1, 2, 4), "b": (4,), "depth": (3, 3, 1, 8), "d": (8,), "out": (8, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 6, 6, 2), shapes=small)
    # With the biases left, what goes through the kernels that are left is a constant image.
    masks = {**masks, "b": None, "depth": None}
    check(fun, random_tree(**shapes), masks, normal(2, 6, 6, 2), shapes=small)


def test_groups_lose_whole_groups_and_equal_numbers() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jax.nn.relu(conv(x, p["g"], groups=3)).sum((1, 2)) @ p["out"]

    shapes = {"g": (3, 3, 2, 12), "out": (12, 3)}
    # The first group goes; of the others one channel each, and of the last one more, which has to stay.
    masks = {"g": columns((3, 3, 2, 12), 0, 1, 2, 3, 5, 8, 9), "out": None}
    small = {"g": (3, 3, 2, 6), "out": (6, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 4, 4, 6), shapes=small)


def test_flatten_after_a_convolution() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = jax.nn.relu(conv(x, p["a"]) + p["b"])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return h.reshape(h.shape[0], -1) @ p["out"]

    shapes = {"a": (3, 3, 1, 4), "b": (4,), "out": (16, 3)}
    masks = {"a": columns((3, 3, 1, 4), 0, 2), "b": without(4, 0, 2), "out": None}
    small = {"a": (3, 3, 1, 2), "b": (2,), "out": (8, 3)}
    check(fun, random_tree(**shapes), masks, normal(2, 4, 4, 1), shapes=small)
