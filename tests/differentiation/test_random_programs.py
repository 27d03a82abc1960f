"""Derivatives of random programs, to third order, in both modes and mixed with JAX's, equal JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import random_program

from jaxinfer import autoinfer

N = 5


def check(seed):
    source = random_program(seed)
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        scope = {"jax": jax, "jnp": jnp, "N": N, "A": jnp.asarray(rng.normal(size=(N, N)))}
        exec(source, scope)
        f, x, v = scope["f"], jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=N))

        def along(gradient):
            """Third derivatives along v, so that they are as cheap as first ones."""

            def slope(g):
                return lambda x: jnp.vdot(gradient(g)(x), v)

            return gradient(slope(slope(f)))(x)

        def mixed(a, b):
            return a.jvp(b.grad(f), (x,), (v,))[1], b.vjp(a.grad(f), x)[1](v)[0]

        pairs = {
            "third order": (jax.jit(lambda: along(autoinfer.grad)), jax.jit(lambda: along(jax.grad))),
            "forward and reverse": (jax.jit(lambda: mixed(autoinfer, autoinfer)), jax.jit(lambda: mixed(jax, jax))),
            "ours of JAX's": (jax.jit(lambda: mixed(autoinfer, jax)), jax.jit(lambda: mixed(jax, jax))),
            "JAX's of ours": (jax.jit(lambda: mixed(jax, autoinfer)), jax.jit(lambda: mixed(jax, jax))),
        }
        for name, (have, want) in pairs.items():
            for a, b in zip(jax.tree.leaves(have()), jax.tree.leaves(want()), strict=True):
                scale = max(1.0, float(np.max(np.abs(b))))
                what = f"{name}, seed {seed}:\n{source}"
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * scale, err_msg=what)


@pytest.mark.parametrize("seed", [*range(8), 52, 86])
def test_random_program(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [s for s in range(8, 200) if s not in (52, 86)])
def test_more_random_programs(seed):
    check(seed)
