"""Gradients of every model of the zoo equal JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load

QUICK = ("mlp", "cnn", "gru", "two_tower")
MODELS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient(name, float64):
    model = load(name, tiny=True, dtype=jnp.float64)
    args = (model.variables, *model.inputs)
    want = jax.jit(jax.value_and_grad(model.loss, allow_int=True))(*args)
    have = jax.jit(autoinfer.value_and_grad(model.loss, allow_int=True))(*args)
    assert jax.tree.structure(have) == jax.tree.structure(want)
    pairs = [(a, b) for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)) if b.dtype != jax.dtypes.float0]
    largest = max(float(jnp.max(jnp.abs(b), initial=0.0)) for _, b in pairs)
    assert largest > 0
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * largest)
