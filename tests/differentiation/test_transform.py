"""grad, value_and_grad, jvp, vjp and hvp have JAX's signatures, results and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


W = np.random.default_rng(0).normal(size=(4, 4))
X = np.random.default_rng(1).normal(size=4)


def energy(x):
    return jnp.sum(jnp.sin(jnp.tanh(W @ x) * x) ** 2)


def tree_energy(params, x, *, scale=1.0):
    return scale * jnp.sum(jnp.tanh(params["w"] @ x + params["b"]) ** 2)


PARAMS = {"w": W, "b": X}


def assert_same(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        if jnp.result_type(b) != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# -- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0), -1, (0,)])
def test_argnums(argnums):
    args = (PARAMS, jnp.asarray(X))
    assert_same(autoinfer.grad(tree_energy, argnums)(*args), jax.grad(tree_energy, argnums)(*args))
    assert_same(autoinfer.value_and_grad(tree_energy, argnums)(*args), jax.value_and_grad(tree_energy, argnums)(*args))


def test_keyword_arguments_and_what_is_no_array():
    def f(x, mode, *, power):
        assert mode == "cube"
        return jnp.sum(x**power)

    assert_same(autoinfer.grad(f)(X, "cube", power=3), jax.grad(f)(X, "cube", power=3))


def test_auxiliary_data():
    def f(x):
        return jnp.sum(x**2), {"squares": x**2, "name": "f", "count": 3}

    (gradient, aux), (value, again) = autoinfer.grad(f, has_aux=True)(X), autoinfer.value_and_grad(f, has_aux=True)(X)
    np.testing.assert_allclose(gradient, 2 * X)
    np.testing.assert_allclose(again, 2 * X)
    for found in (aux, value[1]):
        assert found["name"] == "f" and found["count"] == 3
        np.testing.assert_allclose(found["squares"], X**2)


def test_integers_have_gradients_of_float0():
    def f(x, n):
        return jnp.sum(x**2) * n

    want = jax.grad(f, (0, 1), allow_int=True)(X, 3)
    assert_same(autoinfer.grad(f, (0, 1), allow_int=True)(X, 3), want)


def test_holomorphic():
    def f(z):
        return jnp.sum(jnp.sin(z) * z)

    z = jnp.asarray(X + 1j * X[::-1])
    assert_same(autoinfer.grad(f, holomorphic=True)(z), jax.grad(f, holomorphic=True)(z))


def test_methods_and_decorators():
    class Model:
        def __init__(self, scale):
            self.scale = scale

        @functools.partial(autoinfer.grad, argnums=1)
        def force(self, x):
            return self.scale * jnp.sum(x**2)

    np.testing.assert_allclose(Model(3.0).force(X), 6 * X)


# -- forward and reverse mode -----------------------------------------------------------------------------------------


def pair(x, y):
    return {"product": jnp.outer(x, jnp.tanh(y)), "place": jnp.argmax(x)}


def test_jvp():
    args, directions = (X, X[:2]), (np.cos(X), np.ones(2))
    assert_same(autoinfer.jvp(pair, args, directions), jax.jvp(pair, args, directions))


def test_jvp_with_auxiliary_data():
    args = (lambda x: (jnp.sin(x), x), (X,), (X,))
    assert_same(autoinfer.jvp(*args, has_aux=True), jax.jvp(*args, has_aux=True))


def test_vjp():
    value, pullback = autoinfer.vjp(pair, X, X[:2])
    want, reference = jax.vjp(pair, X, X[:2])
    assert_same(value, want)
    cotangent = {"product": jnp.cos(want["product"]), "place": np.zeros((), jax.dtypes.float0)}
    assert_same(pullback(cotangent), reference(cotangent))


def test_a_pullback_is_a_pytree_of_residuals():
    value, pullback = jax.jit(lambda x: autoinfer.vjp(energy, x))(X)
    assert jax.tree.leaves(pullback), "residuals travel as leaves"
    assert_same(jax.jit(lambda p, ct: p(ct))(pullback, value), jax.vjp(energy, X)[1](value))


def test_vjp_with_auxiliary_data():
    value, pullback, aux = autoinfer.vjp(lambda x: (jnp.sin(x), {"n": 4}), X, has_aux=True)
    np.testing.assert_allclose(pullback(jnp.ones(4))[0], np.cos(X))
    np.testing.assert_allclose(value, np.sin(X))
    assert aux == {"n": 4}


def test_hvp():
    want = jax.jvp(jax.grad(energy), (X,), (np.cos(X),))[1]
    assert_same(autoinfer.hvp(energy, (X,), (np.cos(X),)), (want,))


# -- composition ------------------------------------------------------------------------------------------------------

COMPOSED = {
    "jit": lambda g: jax.jit(g(energy))(X),
    "vmap": lambda g: jax.vmap(g(energy))(W),
    "jit of vmap": lambda g: jax.jit(jax.vmap(g(energy)))(W),
    "grad of grad": lambda g: g(lambda x: jnp.sum(g(energy)(x) ** 2))(X),
    "jax.grad outside": lambda g: jax.grad(lambda x: jnp.sum(g(energy)(x) ** 2))(X),
    "jax.grad inside": lambda g: g(lambda x: jnp.sum(jax.grad(energy)(x) ** 2))(X),
    "jvp of grad": lambda g: jax.jvp(g(energy), (X,), (X,)),
    "scan": lambda g: jax.lax.scan(lambda x, _: (x - 0.1 * g(energy)(x), jnp.sum(x)), jnp.asarray(X), None, length=3),
    "captured tracer": lambda g: jax.jit(lambda y: g(lambda x: energy(x * y))(jnp.asarray(X)))(X),
    "captured variable": lambda g: jax.grad(lambda y: jnp.sum(g(lambda x: energy(x * y))(jnp.asarray(X))))(X),
    "third order": lambda g: g(g(g(lambda t: jnp.sin(t) * jnp.exp(t))))(0.3),
    "optimized inside": lambda g: g(autoinfer.optimize(energy, tune="off"))(X),
    "optimized outside": lambda g: autoinfer.optimize(g(energy), tune="off")(jnp.asarray(X)),
    "checkpoint": lambda g: g(jax.checkpoint(energy))(X),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composition(name):
    assert_same(COMPOSED[name](autoinfer.grad), COMPOSED[name](jax.grad))


def test_custom_rules_are_the_users():
    @jax.custom_vjp
    def f(x):
        return jnp.sum(x**2)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (7 * ct * x,))

    @jax.custom_jvp
    def g(x):
        return jnp.sin(x)

    g.defjvp(lambda primals, tangents: (g(*primals), 5 * tangents[0]))
    assert_same(autoinfer.grad(f)(X), 7 * jnp.asarray(X))
    assert_same(autoinfer.grad(lambda x: jnp.sum(g(x)))(X), jnp.full(4, 5.0))
    assert_same(jax.grad(lambda x: jnp.sum(autoinfer.grad(lambda x: jnp.sum(g(x) * x))(x)))(X), jnp.full(4, 10.0))
    assert set(autoinfer.grad(f).explain(X).borrowed) == {"custom_vjp_call"}


def test_stop_gradient_stops_derivatives_of_every_order():
    def f(x):
        return x**2 * jax.lax.stop_gradient(x)

    for g in (autoinfer.grad, jax.grad):
        assert float(g(f)(2.0)) == 8.0
    assert float(autoinfer.grad(autoinfer.grad(f))(2.0)) == float(jax.grad(jax.grad(f))(2.0)) == 4.0


# -- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "no scalar": (lambda: autoinfer.grad(jnp.sin)(X), "scalar-output functions only; the output had shape"),
    "a tree": (lambda: autoinfer.grad(lambda x: {"a": x})(1.0), "scalar-output functions only"),
    "integers": (lambda: autoinfer.grad(lambda x: x * 1.0)(3), "allow_int=True"),
    "text": (lambda: autoinfer.grad(lambda x: 1.0)("text"), "arrays or numbers"),
    "complex": (lambda: autoinfer.grad(jnp.abs)(1j), "holomorphic=True"),
    "real, but holomorphic": (lambda: autoinfer.grad(jnp.sin, holomorphic=True)(1.0), "requires complex inputs"),
    "complex result": (lambda: autoinfer.grad(lambda x: x * 1j)(1.0), "real-valued outputs"),
    "no pair": (lambda: autoinfer.grad(jnp.sin, has_aux=True)(1.0), "returns a pair"),
    "tangent's shape": (lambda: autoinfer.jvp(jnp.sin, (X,), (X[:2],)), "needs a tangent of"),
    "tangent's structure": (lambda: autoinfer.jvp(jnp.sin, (X,), ({"a": X},)), "same structure"),
    "cotangent's structure": (lambda: autoinfer.vjp(jnp.sin, X)[1]((X, X)), "structure"),
}


@pytest.mark.parametrize("name", WRONG)
def test_type_errors(name):
    call, message = WRONG[name]
    with pytest.raises(TypeError, match=message.replace("(", r"\(")):
        call()


def test_other_errors():
    with pytest.raises(ValueError, match="argument 2"):
        autoinfer.grad(jnp.sin, argnums=2)(1.0)
    with pytest.raises(ValueError, match="cotangent of type"):
        autoinfer.vjp(jnp.sin, X)[1](X[:2])
    with pytest.raises(ValueError, match=r"Use lax\.scan"):
        autoinfer.grad(lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x))[1])(2.0)


# -- reports ----------------------------------------------------------------------------------------------------------


def test_explain_is_data_and_text():
    report = autoinfer.grad(lambda x: jnp.sum(jax.nn.relu(x))).explain(X)
    assert report.borrowed == {"custom_jvp_call": 1}
    assert report.original >= 2 and report.derivative >= 1
    assert "Left to JAX's own rules" in str(report) and "custom_jvp_call" in str(report)


def test_a_gradient_does_not_compute_the_value():
    graph = autoinfer.grad(lambda x: jnp.sum(jnp.exp(x) * W[0])).graph(X)
    assert graph.count("reduce_sum") == 0
