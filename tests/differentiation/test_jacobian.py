"""Jacobians and Hessians equal JAX's and keep the structure that they have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(0)
# More elements than are written into a program.
N = 12
W, X = RNG.normal(size=(N, N)), RNG.normal(size=N)


def assert_same(have, want):
    assert jax.tree.structure(have) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        if jnp.result_type(b) != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def trees(params, y):
    return {"outer": jnp.outer(params["a"], y), "place": jnp.argmax(y), "sum": jnp.tanh(params["b"]).sum(axis=0)}


ARGS = ({"a": X, "b": W[:3]}, X[:2])


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_pytrees(argnums, mode):
    def floats(*args):
        return {k: v for k, v in trees(*args).items() if k != "place"}

    assert_same(autoinfer.jacobian(floats, argnums, mode=mode)(*ARGS), jax.jacobian(floats, argnums)(*ARGS))


def test_results_without_derivatives():
    want = jax.jacfwd(trees)(*ARGS)
    have = autoinfer.jacobian(trees)(*ARGS)
    assert_same({k: have[k] for k in ("outer", "sum")}, {k: want[k] for k in ("outer", "sum")})
    assert have["place"]["a"].dtype == jax.dtypes.float0 and have["place"]["a"].shape == (N,)


def test_auxiliary_data_and_holomorphic():
    found, aux = autoinfer.jacobian(lambda x: (jnp.sin(x), {"double": 2 * x}), has_aux=True)(X)
    assert_same(found, jnp.diag(jnp.cos(X)))
    assert_same(aux, {"double": 2 * X})
    z = X + 1j * X[::-1]
    assert_same(autoinfer.jacobian(jnp.exp, holomorphic=True)(z), jax.jacobian(jnp.exp, holomorphic=True)(z))


def energy(x, w):
    return jnp.sum(jnp.sin(x) * jnp.tanh(w @ x)) ** 2


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_hessian(argnums):
    args = (X[:4], W[:4, :4])
    assert_same(autoinfer.hessian(energy, argnums)(*args), jax.hessian(energy, argnums)(*args))


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])[0]])
def test_composition(transform):
    def f(x):
        return jnp.tanh(W @ x) * x

    assert_same(transform(autoinfer.jacobian(f))(X), jax.jacobian(f)(X))
    assert_same(autoinfer.jacobian(autoinfer.jacobian(f))(X[:]), jax.jacobian(jax.jacobian(f))(X))


def test_unknown_mode():
    with pytest.raises(ValueError, match="'forward' or 'reverse'"):
        autoinfer.jacobian(jnp.sin, mode="sideways")


# -- structure --------------------------------------------------------------------------------------------------------


def test_a_dense_layer_costs_no_matrix_product():
    graph = autoinfer.jacobian(lambda x, w: jnp.tanh(w @ x)).graph(X, W)
    products = [n for n in graph.walk() if n.op == "dot_general"]
    assert [n.aval.shape for n in products] == [(N,)], "only W x itself"
    assert_same(autoinfer.jacobian(lambda x, w: jnp.tanh(w @ x))(X, W), jax.jacobian(lambda x: jnp.tanh(W @ x))(X))


def test_the_hessian_of_a_quadratic_form_is_a_sum():
    def form(x, a):
        return x @ a @ x

    graph = autoinfer.hessian(form).graph(X, W)
    assert graph.count("dot_general") == 0 and graph.count("add", "add_any") == 1
    assert_same(autoinfer.hessian(form)(X, W), W + W.T)


# -- sparse -----------------------------------------------------------------------------------------------------------


def test_sparse_matrices_are_the_dense_ones():
    def step(u):
        return u[1:-1] + 0.1 * (u[2:] - 2 * u[1:-1] + u[:-2]) - u[1:-1] ** 2

    def chain(u):
        return jnp.sum((u[1:] - u[:-1] ** 2) ** 2)

    jacobian, hessian = autoinfer.jacobian(step, sparse=True)(X), autoinfer.hessian(chain, sparse=True)(X)
    assert jacobian.nse == 3 * (N - 2) and hessian.nse == 3 * N - 2
    assert_same(jacobian.todense(), jax.jacobian(step)(X))
    assert_same(hessian.todense(), jax.hessian(chain)(X))
    assert "derivative" in str(autoinfer.jacobian(step, sparse=True).explain(X))
