"""Shrunk programs keep the derivatives their authors wrote, and can be trained on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrinking import MLP, check, columns, masked, mlp, mlp_masks, normal, random_tree, without

pytestmark = pytest.mark.usefixtures("double")


@jax.custom_jvp
def steep(x: Any) -> Any:
    return jnp.tanh(x)


steep.defjvp(lambda primals, tangents: (steep(*primals), 3 * tangents[0] * jnp.cos(primals[0])))


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return jnp.sin(x)


clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (jnp.clip(ct, -0.1, 0.1) * x,))


@jax.custom_vjp
def mixing(x: Any) -> Any:
    return x - x.mean(-1, keepdims=True)


mixing.defvjp(lambda x: (mixing(x), None), lambda _, ct: (ct * 2 - ct.mean(-1, keepdims=True),))


@pytest.mark.parametrize("activation", [steep, clipped, mixing, jax.nn.relu, jax.nn.softplus])
def test_custom_derivatives_are_kept(activation: Any) -> None:
    def fun(p: Any, x: Any) -> Any:
        return (activation(x @ p["a"]) * p["scale"]) @ p["out"]

    shapes = {"a": (3, 5), "scale": (5,), "out": (5, 2)}
    masks = {"a": columns((3, 5), 2, 3), "scale": without(5, 2, 3), "out": None}
    params, x = random_tree(**shapes), normal(4, 3)
    small, small_params = check(fun, params, masks, x, shapes={"a": (3, 3), "scale": (3,), "out": (3, 2)})
    gradients_agree(fun, params, masks, small, small_params, x)


def gradients_agree(fun: Any, params: Any, masks: Any, small: Any, small_params: Any, *args: Any) -> None:
    """The gradient of the small program is the kept part of the masked program's."""

    def loss(f: Any) -> Any:
        return lambda p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(p, *args)))

    whole = jax.grad(loss(lambda p, *xs: fun(masked(p, masks), *xs)))(params)
    have = jax.grad(loss(small))(small_params)
    for name, leaf in have.items():
        mask = np.ones(params[name].shape, bool) if masks[name] is None else masks[name]
        taken = {leaf.name: leaf for leaf in small.report.leaves}[name]
        assert leaf.shape == taken.small
        kept = np.asarray(whole[name])[np.ix_(*(kept_of(small, name)))]
        there = mask[np.ix_(*(kept_of(small, name)))]
        np.testing.assert_allclose(np.where(there, leaf, 0), kept, rtol=1e-9, atol=1e-12)


def kept_of(small: Any, name: str) -> list[np.ndarray]:
    return [np.asarray(k) for k in small.kept[name]]


def test_training_goes_on() -> None:
    masks = mlp_masks(a=columns((4, 8), 0, 3), c=columns((8, 6), 5), d=None)
    params, x = random_tree(**MLP), normal(5, 4)
    small, small_params = check(mlp, params, masks, x)
    gradients_agree(mlp, params, masks, small, small_params, x)
