"""Optimized programs lower for every platform, each in the form that suits it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.rewriting import Rule, op, var

PLATFORMS = ("cpu", "cuda", "tpu")
QUICK = ("mlp", "cnn", "mobilenetv2", "lstm", "encoder", "two_tower")
SIZES = [
    pytest.param(name, tiny, marks=() if tiny and name in QUICK else pytest.mark.slow)
    for tiny in (True, False)
    for name in ZOO
]


def optimize(fun, **options):
    return autoinfer.optimize(fun, tune="off", verify=False, **options)


def exported(fun, *args):
    return export.export(jax.jit(fun), platforms=PLATFORMS)(*args)


@pytest.mark.parametrize(("name", "tiny"), SIZES)
def test_every_model_lowers_for_every_platform(name, tiny):
    model = load(name, tiny=tiny, pretrained=False)
    optimized = optimize(model.apply)
    whole = exported(lambda *args: optimized(*args), model.variables, *model.inputs)
    assert whole.platforms == PLATFORMS
    if tiny:
        have, want = (
            jax.tree.leaves(f(model.variables, *model.inputs)) for f in (jax.jit(whole.call), jax.jit(model.apply))
        )
        for a, b in zip(have, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("name", "tiny"), SIZES)
def test_every_frozen_model_lowers_for_every_platform(name, tiny):
    model = load(name, tiny=tiny, pretrained=False)
    frozen = optimize(model.apply).freeze(*model.known)
    before = exported(lambda f, *live: f(*live), frozen, *model.live) if tiny else None
    frozen.program(*model.live)
    after = exported(lambda *live: frozen(*live), *model.live)
    for whole in (before, after):
        assert whole is None or whole.platforms == PLATFORMS
    if tiny:
        want = jax.tree.leaves(jax.jit(model.apply)(model.variables, *model.inputs))
        for a, b in zip(jax.tree.leaves(jax.jit(after.call)(*model.live)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))


def test_each_platform_gets_its_own_form():
    def form(name, after, *platforms):
        return Rule(
            name, f"sin x → {name} on {platforms}", op("sin", var("x")), after, "lossy", platforms=frozenset(platforms)
        )

    rules = [
        form("tangent", lambda m, x: jnp.tan(x), "cpu"),
        form("cosine", lambda m, x: jnp.cos(x), "cuda"),
        form("logarithm", lambda m, x: jnp.log(x), "tpu"),
    ]
    fast = optimize(lambda x: jnp.sin(x) + 1, rules=rules, numerics="lossy")
    for platform, word in zip(PLATFORMS, ("tan", "cosine", "log")):
        one = export.export(jax.jit(lambda x: fast(x)), platforms=[platform])(jnp.ones(3))
        assert f"stablehlo.{word}" in one.mlir_module() and "stablehlo.sine" not in one.mlir_module()
    text = exported(lambda x: fast(x), jnp.ones(3)).mlir_module()
    assert all(f"stablehlo.{word}" in text for word in ("tan", "cosine", "log")) and "stablehlo.case" in text


def test_derivatives_and_batches_are_exported():
    fast = optimize(lambda w, x: jnp.sum(jax.nn.relu(x @ w) ** 2))
    w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    whole = exported(jax.vmap(jax.grad(fast), (None, 0)), w, x[None])
    want = jax.vmap(jax.grad(fast.__wrapped__), (None, 0))(w, x[None])
    np.testing.assert_allclose(jax.jit(whole.call)(w, x[None]), want, rtol=1e-6)


def test_serialized_and_read_back():
    pytest.importorskip("flatbuffers", reason="JAX writes exported programs with flatbuffers")
    fast = optimize(lambda a, b, x: a @ b @ x)
    args = (jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones(8))
    data = exported(lambda *a: fast(*a), *args).serialize(vjp_order=1)
    back = export.deserialize(data)
    np.testing.assert_allclose(jax.jit(back.call)(*args), np.full(8, 64.0))
    np.testing.assert_allclose(jax.grad(lambda x: back.call(*args[:2], x).sum())(args[2]), np.full(8, 64.0))
