"""Derivatives of optimized functions are those of the functions as written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def optimize(fun):
    return autoinfer.optimize(fun, tune="off", verify=False)


def assert_equal_to_rounding(have, want):
    """1e-10 of each element or of the largest: what is zero over the reals may come out as any rounding error."""
    assert jax.tree.structure(have) == jax.tree.structure(want)
    pairs = list(zip(jax.tree.leaves(have), jax.tree.leaves(want)))
    largest = max(
        (float(jnp.abs(b).max(initial=0)) for _, b in pairs if jnp.issubdtype(b.dtype, jnp.inexact)), default=0
    )
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * largest)
        else:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def floating(tree):
    """The leaves of a pytree to differentiate in, and how to put them back."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def put(values):
        now = list(leaves)
        for i, value in zip(places, values):
            now[i] = value
        return jax.tree.unflatten(structure, now)

    return [leaves[i] for i in places], put


# -- every model ------------------------------------------------------------------------------------------------------

QUICK = ("mlp", "cnn", "lstm", "encoder", "two_tower")
MODELS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_every_model(name):
    model = load(name, tiny=True, dtype=jnp.float64)
    want = jax.jit(jax.grad(model.loss))(model.variables, *model.inputs)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(want))
    assert_equal_to_rounding(jax.grad(optimize(model.loss))(model.variables, *model.inputs), want)
    assert_equal_to_rounding(optimize(jax.grad(model.loss))(model.variables, *model.inputs), want)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_every_frozen_model_with_respect_to_its_inputs(name):
    model = load(name, tiny=True, dtype=jnp.float64)
    moving, put = floating(model.live)
    if not moving:
        pytest.skip("its inputs are whole numbers")

    def energy(apply, values):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(apply(*put(values))))

    frozen = optimize(model.apply).freeze(*model.known)
    want = jax.jit(jax.grad(lambda v: energy(functools.partial(model.apply, *model.known), v)))(moving)
    before = jax.grad(lambda v: energy(frozen, v))(moving)
    frozen(*model.live)
    after = jax.grad(lambda v: energy(frozen, v))(moving)
    assert_equal_to_rounding(before, want)
    assert_equal_to_rounding(after, want)


# -- one function in every setting ------------------------------------------------------------------------------------


def network(w, x):
    hidden = jax.nn.relu(x @ w["a"])
    return jnp.tanh(hidden @ w["b"]) * jax.nn.softmax(hidden @ w["b"])


def weights():
    rng = np.random.default_rng(0)
    return {"a": jnp.asarray(rng.normal(size=(4, 5))), "b": jnp.asarray(rng.normal(size=(5, 4)))}


def points(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def total(fun):
    return lambda *args: jnp.sum(jnp.sin(fun(*args)))


SETTINGS = {
    "grad": lambda f: jax.grad(total(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(total(f))),
    "jit of grad": lambda f: jax.jit(jax.grad(total(f))),
    "both arguments": lambda f: jax.grad(total(f), argnums=(0, 1)),
    "value and gradient": lambda f: jax.value_and_grad(total(f), argnums=1),
    "grad of grad": lambda f: jax.grad(total(jax.grad(total(f), argnums=1)), argnums=(0, 1)),
    "third derivative": lambda f: jax.grad(lambda w, x: total(jax.grad(total(jax.grad(total(f), 1)), 1))(w, x)),
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x * 2)),
    "jvp in one argument": lambda f: lambda w, x: jax.jvp(functools.partial(f, w), (x,), (x * 2,)),
    "vjp": lambda f: lambda w, x: jax.vjp(f, w, x)[1](jnp.ones((3, 4))),
    "linearize": lambda f: lambda w, x: jax.linearize(f, w, x)[1](w, x),
    "linear transpose": lambda f: lambda w, x: jax.linear_transpose(jax.linearize(f, w, x)[1], w, x)(jnp.ones((3, 4))),
    "jacrev": lambda f: jax.jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jax.jacfwd(f, argnums=1),
    "hessian": lambda f: jax.hessian(total(f), argnums=1),
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(total(f), argnums=1), argnums=1),
    "vmap": lambda f: jax.vmap(f, (None, 0)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(total(f)), (None, 0)),
    "grad of vmap": lambda f: jax.grad(total(jax.vmap(f, (None, 0)))),
    "vmap of vmap": lambda f: lambda w, x: jax.vmap(jax.vmap(f, (None, 0)), (None, 1))(w, x[:, None]),
    "vmap over weights": lambda f: lambda w, x: jax.vmap(f)(jax.tree.map(lambda v: jnp.stack([v] * 3), w), x),
    "checkpoint": lambda f: jax.grad(total(jax.checkpoint(f))),
    "checkpoint with a policy": lambda f: jax.grad(
        total(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable))
    ),
    "scan": lambda f: jax.grad(lambda w, x: jnp.sum(lax.scan(lambda c, _: (f(w, c) + c, c.sum()), x, length=3)[0])),
    "scan over points": lambda f: jax.grad(lambda w, x: jnp.sum(lax.map(functools.partial(f, w), x))),
    "cond": lambda f: jax.grad(lambda w, x: jnp.sum(lax.cond(x[0, 0] > 0, f, lambda w, x: x * 2, w, x))),
    "while": lambda f: (
        lambda w, x: jax.jvp(
            lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(w, c[1])), (0, x)), (x,), (x,)
        )
    ),
    "nested jit": lambda f: jax.jit(jax.grad(jax.jit(lambda w, x: jnp.sum(jax.jit(f)(w, jax.jit(f)(w, x)))))),
    "optimized twice": lambda f: jax.grad(total(lambda w, x: f(w, f(w, x)))),
    "symbolic zero cotangent": lambda f: jax.grad(lambda w, x: jnp.sum(x) + 0 * lax.stop_gradient(jnp.sum(f(w, x)))),
    "stop gradient": lambda f: jax.grad(lambda w, x: jnp.sum(f(w, lax.stop_gradient(f(w, x))))),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_every_setting(setting):
    w, x = weights(), points(3, 4)
    want = jax.jit(SETTINGS[setting](network))(w, x)
    assert_equal_to_rounding(SETTINGS[setting](optimize(network))(w, x), want)


@pytest.mark.parametrize("setting", SETTINGS)
def test_frozen_weights_in_every_setting(setting):
    """The weights are known; the function of the weights that the settings want ignores what it is given."""
    w, x = weights(), points(3, 4)
    frozen = optimize(network).freeze(w)
    frozen(x)

    def of_points(f):
        return lambda _, x: f(x)

    want = jax.jit(SETTINGS[setting](of_points(functools.partial(network, w))))(w, x)
    assert_equal_to_rounding(SETTINGS[setting](of_points(frozen))(w, x), want)


def test_optimized_inside_optimized():
    w, x = weights(), points(3, 4)
    inner = optimize(network)
    outer = optimize(lambda w, x: jnp.sum(inner(w, x) ** 2))
    want = jax.jit(jax.grad(lambda w, x: jnp.sum(network(w, x) ** 2)))(w, x)
    assert_equal_to_rounding(jax.grad(outer)(w, x), want)
    assert_equal_to_rounding(optimize(jax.grad(outer))(w, x), want)


# -- derivatives that the user chose ----------------------------------------------------------------------------------


KINKED = jnp.array([-1.0, -0.0, 0.0, 1.0])


@pytest.mark.parametrize("kink", [jax.nn.relu, jax.nn.relu6, jnp.abs, lambda x: jnp.maximum(x, 0), jax.nn.leaky_relu])
def test_at_kinks(kink):
    def fun(x):
        return jnp.sum(kink(x) * jnp.arange(1.0, 5.0))

    for outer in (jax.grad, jax.jacfwd):
        want = outer(fun)(KINKED)
        assert np.array_equal(outer(optimize(fun))(KINKED), want)
        assert np.array_equal(optimize(outer(fun))(KINKED), want)


def test_relu_at_zero_has_its_own_derivative():
    assert float(jax.grad(optimize(jax.nn.relu))(0.0)) == 0.0
    assert float(jax.grad(optimize(lambda x: jnp.maximum(x, 0.0)))(0.0)) == 0.5


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0] * 7.0))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), x), lambda x, ct: (ct * 100 + x,))


@pytest.mark.parametrize("custom", [clipped, doubled])
def test_custom_derivatives_are_kept(custom):
    def fun(x):
        return jnp.sum(custom(x * 3) * x)

    x = points(5)
    for f in (fun, lambda x: jnp.sum(jax.vmap(lambda v: custom(v) * v)(x)), lambda x: lax.map(custom, x).sum()):
        want = jax.jit(jax.grad(f))(x)
        assert_equal_to_rounding(jax.grad(optimize(f))(x), want)
        assert_equal_to_rounding(optimize(jax.grad(f))(x), want)
        assert_equal_to_rounding(jax.jit(jax.grad(optimize(f)))(x), want)
        assert_equal_to_rounding(jax.vmap(jax.grad(optimize(f)))(x[None]), want[None])


def test_optimized_inside_custom_rules():
    w, x = weights(), points(3, 4)

    def with_rules(f):
        @jax.custom_vjp
        def g(w, x):
            return f(w, x)

        g.defvjp(lambda w, x: (f(w, x), (w, x)), lambda held, ct: jax.vjp(f, *held)[1](ct * 3))

        @jax.custom_jvp
        def h(w, x):
            return f(w, x)

        h.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
        return lambda w, x: jnp.sum(g(w, x)) + jnp.sum(h(w, x) ** 2)

    want = jax.jit(jax.grad(with_rules(network), argnums=(0, 1)))(w, x)
    assert_equal_to_rounding(jax.grad(with_rules(optimize(network)), argnums=(0, 1))(w, x), want)
    assert_equal_to_rounding(jax.jit(jax.grad(with_rules(optimize(network)), argnums=(0, 1)))(w, x), want)


def test_whole_numbers_and_keys_beside_floats():
    def fun(x, index, key):
        noise = jax.random.normal(key, x.shape, x.dtype)
        return jnp.take(x * noise, index) * jnp.argmax(x), index + 1, key

    args = points(4), jnp.array([1, 2, 1]), jax.random.key(0)

    def loss(f):
        return lambda x, index, key: (jnp.sum(f(x, index, key)[0]), f(x, index, key)[1])

    have, want = (jax.grad(loss(f), has_aux=True)(*args) for f in (optimize(fun), fun))
    assert_equal_to_rounding(have, want)
    jax.tree.map(np.testing.assert_array_equal, optimize(fun)(*args)[1], fun(*args)[1])
    have, want = (
        jax.vjp(f, args[0], args[1])[1]
        for f in (lambda x, i: optimize(fun)(x, i, args[2])[0], lambda x, i: fun(x, i, args[2])[0])
    )
    assert_equal_to_rounding(have(jnp.ones(3))[0], want(jnp.ones(3))[0])


def test_complex_numbers():
    def fun(z):
        return jnp.sum(jnp.abs(z @ z.T) ** 2) + jnp.real(jnp.sum(z * 1j))

    z = points(3, 3) + 1j * points(3, 3).T
    assert_equal_to_rounding(jax.grad(optimize(fun))(z), jax.grad(fun)(z))
    assert_equal_to_rounding(optimize(jax.grad(fun))(z), jax.grad(fun)(z))


# -- memory -----------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 12, 64, 256


def checkpointed(stack):
    @jax.checkpoint
    def layer(x, w):
        hidden = jax.nn.gelu(x @ w["up"])
        return x + jnp.tanh(hidden @ w["down"])

    if stack:
        return lambda w, x: jnp.mean(lax.scan(lambda x, w: (layer(x, w), None), x, w)[0] ** 2)

    def loss(w, x):
        for i in range(LAYERS):
            x = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], w))
        return jnp.mean(x**2)

    return loss


def temporary_bytes(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("stack", [False, True], ids=["unrolled", "scanned"])
def test_checkpointing_still_saves_memory(stack):
    rng = np.random.default_rng(0)
    w = {
        "up": jnp.asarray(rng.normal(size=(LAYERS, WIDTH, 4 * WIDTH)) / 8, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(LAYERS, 4 * WIDTH, WIDTH)) / 16, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    loss = checkpointed(stack)
    plain = temporary_bytes(jax.value_and_grad(loss), w, x)
    outer = optimize(jax.value_and_grad(loss)).lower(w, x).compile().memory_analysis().temp_size_in_bytes
    inner = temporary_bytes(jax.value_and_grad(optimize(loss)), w, x)
    print(f"temporary memory relative to the original's: {outer / plain:.4f} outside, {inner / plain:.4f} inside")
    assert outer <= 1.02 * plain
    assert inner <= 1.02 * plain
