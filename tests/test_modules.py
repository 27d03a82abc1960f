"""Flax Linen, Flax NNX and Equinox: modules go in as they are, and their state comes back."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import autoinfer


def optimize(fun, **options):
    return autoinfer.optimize(fun, tune="off", **options)


def assert_close(have, want):
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)


# -- Flax Linen -------------------------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(12)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(nn.relu(x))


@pytest.fixture
def linen(x):
    model = Linen()
    variables = model.init(jax.random.key(0), x)
    statistics = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    return model, {**variables, "batch_stats": statistics}


def test_linen_apply_and_freeze(linen, x):
    model, variables = linen
    want = model.apply(variables, x)
    assert_close(optimize(model.apply)(variables, x), want)
    frozen = optimize(model.apply).freeze(variables)
    assert_close(frozen(x), want)
    assert frozen.program(x).optimized and frozen.graph(x).count("rsqrt", "div") == 0, "the normalisation is folded"


def test_linen_in_training_gives_back_its_statistics(linen, x):
    model, variables = linen

    def train(variables, x, key):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    have, want = (f(variables, x, jax.random.key(1)) for f in (optimize(train), jax.jit(train)))
    jax.tree.map(assert_close, have, want)
    apply = optimize(model.apply, static_argnames=("train", "mutable"))
    out, changed = apply(variables, x, train=True, mutable=("batch_stats",), rngs={"dropout": jax.random.key(1)})
    assert_close(out, want[0])
    jax.tree.map(assert_close, changed, want[1])


def test_a_bound_linen_module(linen, x):
    model, variables = linen
    assert_close(optimize(model.bind(variables).__call__)(x), model.apply(variables, x))


# -- Flax NNX ---------------------------------------------------------------------------------------------------------


class Counter(nnx.Variable):
    pass


class Nnx(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(12, 3, rngs=rngs)
        self.calls = Counter(jnp.array(0))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.last(jax.nn.relu(self.drop(self.norm(self.first(x)))))


def state_of(model):
    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(plain, nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nnx_module_with_its_state_written_back(mode, x):
    model, reference = Nnx(), Nnx()
    getattr(model, mode)()
    getattr(reference, mode)()
    fast, plain = optimize(model), nnx.jit(lambda m, x: m(x))
    for _ in range(3):
        assert_close(fast(x), plain(reference, x))
        jax.tree.map(assert_close, state_of(model), state_of(reference))
    assert int(model.calls[...]) == 3
    if mode == "train":
        assert float(jnp.abs(model.norm.mean[...]).max()) > 0


def test_nnx_module_as_an_argument(x):
    model, reference = Nnx(), Nnx()
    fast = optimize(lambda m, x, scale: m(x) * scale)
    for _ in range(2):
        assert_close(fast(model, x, 2.0), nnx.jit(lambda m, x: m(x))(reference, x) * 2)
        jax.tree.map(assert_close, state_of(model), state_of(reference))


def test_nnx_sees_new_weights_and_a_new_mode(x):
    model = Nnx()
    model.eval()
    fast = optimize(model)
    before = fast(x)
    model.last.kernel[...] = model.last.kernel[...] * 2
    after = fast(x)
    assert_close(after - model.last.bias[...], 2 * (before - model.last.bias[...]))
    model.train()
    assert not np.allclose(fast(x), after)


def test_nnx_method(x):
    class Encoder(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

        @autoinfer.optimize(tune="off")
        def encode(self, x):
            return self.layer(x)

    model = Encoder()
    assert_close(model.encode(x), model.layer(x))
    model.layer.bias[...] = model.layer.bias[...] + 1
    assert_close(model.encode(x), model.layer(x))


def test_nnx_frozen(x):
    model = Nnx()
    model.eval()
    for _ in range(2):
        model.norm.mean[...] = model.norm.mean[...] + 0.2
    frozen = optimize(model).freeze()
    want = nnx.jit(lambda m, x: m(x))(model, x)
    calls = int(model.calls[...])
    assert_close(frozen(x), want)
    assert frozen.program(x).optimized and frozen.graph(x).count("rsqrt") == 0
    assert int(model.calls[...]) == calls + 1, "state the call changes is written back, frozen or not"
    model.last.kernel[...] = model.last.kernel[...] * 0
    assert_close(frozen(x), want)


def test_nnx_gradient(x):
    model = Nnx()
    model.eval()

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    want = nnx.grad(loss)(model, x)
    have = nnx.grad(lambda m, x: optimize(loss)(m, x))(model, x)
    jax.tree.map(assert_close, nnx.to_pure_dict(have), nnx.to_pure_dict(want))
    have = optimize(lambda m, x: nnx.grad(loss)(m, x))(model, x)
    jax.tree.map(assert_close, nnx.to_pure_dict(have), nnx.to_pure_dict(want))


def test_nnx_inside_jit(x):
    model = Nnx()
    model.eval()
    fast = optimize(lambda m, x: m(x))
    want = nnx.jit(lambda m, x: m(x))(model, x)
    assert_close(nnx.jit(lambda m, x: fast(m, x))(model, x), want)
    assert int(model.calls[...]) == 2


# -- Equinox ----------------------------------------------------------------------------------------------------------


def test_equinox_module(x):
    model = eqx.nn.MLP(8, 3, 16, 2, key=jax.random.key(0))
    want = jax.vmap(model)(x)
    fast = optimize(model)
    assert_close(jax.vmap(fast)(x), want)
    assert_close(fast(x[0]), want[0])
    frozen = optimize(model).freeze()
    assert_close(frozen(x[0]), want[0])
    assert_close(jax.vmap(frozen)(x), want)


def test_equinox_module_as_an_argument(x):
    model = eqx.nn.MLP(8, 3, 16, 2, key=jax.random.key(0))

    def batched(model, x):
        return jax.vmap(model)(x)

    fast = optimize(batched)
    assert_close(fast(model, x), batched(model, x))
    half = jax.tree.map(lambda leaf: leaf / 2 if eqx.is_array(leaf) else leaf, model)
    assert_close(fast(half, x), batched(half, x))
    assert_close(optimize(batched).freeze(model)(x), batched(model, x))


def test_equinox_module_comes_out_as_a_result(x):
    model = eqx.nn.Linear(8, 3, key=jax.random.key(0))

    @autoinfer.optimize(tune="off")
    def step(model, x):
        gradient = eqx.filter_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))

    have, want = step(model, x), step.__wrapped__(model, x)
    assert type(have) is eqx.nn.Linear
    jax.tree.map(assert_close, eqx.filter(have, eqx.is_array), eqx.filter(want, eqx.is_array))
    assert_close(jax.vmap(step(have, x))(x), jax.vmap(step.__wrapped__(want, x))(x))


def test_equinox_state(x):
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, "batch", mode="batch")

    def call(model, state, x):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    want, after = eqx.filter_jit(call)(model, state, x)
    have, state_now = optimize(call)(model, state, x)
    assert_close(have, want)
    jax.tree.map(assert_close, jax.tree.leaves(state_now), jax.tree.leaves(after))


def test_equinox_method(x):
    class Model(eqx.Module):
        weight: jax.Array
        power: int = eqx.field(static=True)

        @autoinfer.optimize(tune="off")
        def __call__(self, x):
            return (x @ self.weight) ** self.power

    model = Model(jnp.ones((8, 2)), 2)
    assert_close(model(x), (x @ model.weight) ** 2)
    assert_close(Model(jnp.ones((8, 2)) * 2, 1)(x), (x @ model.weight) * 2)
