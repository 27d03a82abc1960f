"""Products in 16 bits, and losses that are scaled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.quantization.loss_scaling import loss_scaling
from jaxinfer.quantization.mixed_precision import mixed_precision


def _network(params, x):
    y = jnp.maximum(x @ params["a"] + params["b"], 0)
    return jax.nn.softmax(jax.nn.relu(y @ params["c"]) @ params["d"])


def _loss(params, batch):
    x, labels = batch
    return -jnp.mean(jnp.log(jnp.sum(_network(params, x) * jax.nn.one_hot(labels, 3), -1)))


def _params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 16), "b": (16,), "c": (16, 16), "d": (16, 3)}
    return {k: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for k, s in shapes.items()}


def _batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    return x, np.argmax(x @ rng.normal(size=(6, 3)), 1)


def _dtypes(jaxpr, found) -> list[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(str(eqn.outvars[0].aval.dtype))
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    _dtypes(getattr(inner, "jaxpr", inner), found)
    return found


@pytest.mark.parametrize(("number", "name"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_products_and_their_derivatives_are_in_sixteen_bits(number, name) -> None:
    mixed = mixed_precision(_loss, number)
    jaxpr = jax.make_jaxpr(jax.grad(mixed))(_params(), _batch())
    products = _dtypes(jaxpr.jaxpr, [])
    assert len(products) >= 7 and products.count(name) == len(products)
    assert all(a.dtype == jnp.float32 for a in jaxpr.out_avals)


def test_gradients_are_those_of_the_function() -> None:
    params, batch = _params(), _batch()
    exact = jax.grad(_loss)(params, batch)
    found = jax.jit(jax.grad(mixed_precision(_loss)))(params, batch)
    for name, gradient in exact.items():
        assert np.linalg.norm(found[name] - gradient) < 0.03 * np.linalg.norm(gradient)


def test_training_comes_to_the_same_loss() -> None:
    batch = _batch()

    def train(loss, optimizer, scaled):
        def step(carry, _):
            params, state = carry
            scale = state.scale if scaled else 1.0
            value, gradients = jax.value_and_grad(lambda p: loss(p, batch) * scale)(params)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value / scale

        params = _params()
        return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, 150))(params)

    (_, _), exact = train(_loss, optax.adam(1e-2), False)
    for number in ("bf16", "f16"):
        (_, state), losses = train(mixed_precision(_loss, number), loss_scaling(optax.adam(1e-2), period=50), True)
        assert losses[-1] < 0.3 * exact[0] and abs(losses[-1] - exact[-1]) < 0.02
        assert state.scale > 2.0**15


def test_loops_branches_and_checkpoints() -> None:
    w = jnp.asarray(np.random.default_rng(2).normal(size=(8, 8)) / 4, jnp.float32)

    def fun(w, x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 3)
        y = jax.checkpoint(lambda y: jnp.sin(y @ w))(y)
        y = jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2.0), (0, y))[1]
        return jax.lax.cond(y.sum() < 1e6, lambda y: y @ w, lambda y: y, y)

    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    exact, found = fun(w, x), mixed_precision(fun)(w, x)
    assert found.dtype == exact.dtype
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.03
    np.testing.assert_allclose(jax.vmap(mixed_precision(fun), (None, 0))(w, x[None])[0], found, rtol=0.02, atol=0.02)


def test_large_constants_keep_their_values() -> None:
    def fun(w, x):
        return jnp.where(x > 0, x @ w, -1e30).max()

    x = -jnp.ones((4, 4))
    assert mixed_precision(fun, "f16")(jnp.eye(4), x) == np.float32(-1e30)


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    optimizer = loss_scaling(optax.sgd(1.0, momentum=0.9), 8.0, period=3)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    good, bad = {"w": jnp.array([8.0, 16.0])}, {"w": jnp.array([jnp.inf, 1.0])}
    updates, state = optimizer.update(good, state, params)
    np.testing.assert_array_equal(updates["w"], [-1.0, -2.0])
    before = jax.tree.leaves(state.inner)
    updates, state = optimizer.update(bad, state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert (float(state.scale), int(state.good), int(state.skipped)) == (4.0, 0, 1)
    for a, b in zip(before, jax.tree.leaves(state.inner)):
        np.testing.assert_array_equal(a, b)


def test_the_scale_doubles_after_so_many_good_steps() -> None:
    optimizer = loss_scaling(optax.sgd(1.0), 8.0, period=3, least=8.0)
    params = jnp.ones(2)
    state = optimizer.init(params)
    scales = []
    for gradient in (1.0, 1.0, 1.0, 1.0, 1.0, jnp.nan, 1.0, 1.0, 1.0, jnp.nan, jnp.nan):
        _, state = optimizer.update(jnp.full(2, gradient), state, params)
        scales.append(float(state.scale))
    assert scales == [8, 8, 16, 16, 16, 8, 8, 8, 16, 8, 8]


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"period": 0}, {"least": 0.0}, {"initial": 0.5}])
def test_settings_that_make_no_sense(options) -> None:
    with pytest.raises(ValueError, match="factor"):
        loss_scaling(optax.sgd(1.0), **options)
