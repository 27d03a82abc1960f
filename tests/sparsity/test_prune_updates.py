"""Pruning within a training loop of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from masking import X, accuracy, batch, loss, mlp, mlp_params

from jaxinfer import autoinfer
from jaxinfer.autoinfer import NM, Cubic, prune_updates


def train(transformation, steps, params=None, dtype=jnp.float32):
    """A loop as people write it; gives the parameters, the masks and how often the step was compiled."""
    optimizer = optax.chain(optax.adam(1e-2), transformation)
    params = mlp_params(dtype=dtype) if params is None else params
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params, gradients=gradients)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, batch(i))
    return params, optax.tree_utils.tree_get(state, "masks"), step._cache_size()


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_a_loop_of_ones_own(score):
    params, masks, compiled = train(prune_updates(0.3, steps=200, score=score), 200)
    assert compiled == 1
    kept = [np.asarray(layer["kernel"]) for layer in masks.values()]
    assert sum(m.sum() for m in kept) == int(0.3 * sum(m.size for m in kept))
    for layer, mask in zip(params.values(), kept):
        np.testing.assert_array_equal(np.asarray(layer["kernel"])[~mask], 0)
        assert np.all(np.asarray(layer["kernel"])[mask] != 0)
    assert accuracy(params) > 0.9


def test_channels_and_bfloat16():
    transformation = prune_updates(
        autoinfer.Target(flops=0.4), steps=20, schedule=Cubic(every=5), granularity="channel", fun=mlp, args=(X[:2],)
    )
    params, masks, _ = train(transformation, 20, dtype=jnp.bfloat16)
    columns = [np.asarray(layer["kernel"]).any(0) for layer in masks.values()]
    rows = [np.asarray(layer["kernel"]).any(1) for layer in masks.values()]
    for here, there, layer in zip(columns, rows[1:], masks.values()):
        np.testing.assert_array_equal(here, there)
        np.testing.assert_array_equal(here, layer["bias"])
    left = sum(r.sum() * c.sum() for r, c in zip(rows, columns)) / (12 * 16 + 16 * 8 + 8 * 3)
    assert 0.4 - 21 / 344 <= left <= 0.4
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks, is_leaf=lambda x: x is None)):
        assert p.dtype == jnp.bfloat16
        assert m is None or np.all(np.asarray(p, np.float32)[~np.asarray(m)] == 0)


def test_two_of_four():
    _, masks, _ = train(prune_updates(None, steps=8, schedule=Cubic(end=0.5, every=2), granularity=NM(2, 4)), 8)
    for layer in masks.values():
        np.testing.assert_array_equal(np.asarray(layer["kernel"]).reshape(-1, 4, layer["kernel"].shape[1]).sum(1), 2)


def test_what_it_needs():
    with pytest.raises(autoinfer.TargetError, match="cannot be met"):
        prune_updates(1e-6, steps=10).init(mlp_params())
    transformation = prune_updates(0.5, steps=10, score="taylor")
    params = mlp_params()
    state = transformation.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(params, state)
    with pytest.raises(ValueError, match="need gradients"):
        transformation.update(params, state, params)
    with pytest.raises(ValueError, match="score is 'magnitude' or 'taylor'"):
        prune_updates(0.5, steps=10, score="size")
