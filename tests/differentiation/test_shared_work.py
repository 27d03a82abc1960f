"""What a function, its gradient and its Hessian have in common is computed once where they are asked for together."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer

pytestmark = pytest.mark.usefixtures("float64")
_RNG = np.random.default_rng(0)
X, W, V = _RNG.standard_normal(4), _RNG.standard_normal((5, 4)), _RNG.standard_normal((3, 5))


def network(x):
    return jnp.sum(jnp.exp(V @ jnp.tanh(W @ x)))


def log_partition(x):
    return jnp.log(jnp.sum(jnp.exp(W @ x)))


def log_determinant(x):
    return jnp.linalg.slogdet(W.T @ jnp.diag(jnp.exp(W @ x)) @ W)[1]


def factor(x):
    return jnp.sum(jnp.sin(jnp.linalg.cholesky(jnp.eye(4) + jnp.outer(x, x))))


def all_orders(fun, module):
    """(x) -> the function's value, gradient and Hessian, differentiated by `jax` or by this project."""
    return lambda x: (fun(x), module.grad(fun)(x), module.hessian(fun)(x))


def operations(fun, *args):
    """How many of each operation are left after rewriting."""
    graph = autoinfer.optimize(fun, tune="off", verify=False).program(*args).improved.graph
    return Counter(node.op for node in graph.walk())


@pytest.mark.parametrize(
    ("fun", "once"),
    [
        (network, ("tanh", "exp")),
        (log_partition, ("exp", "log")),
        (log_determinant, ("exp", "lu", "log")),
        (factor, ("cholesky", "sin", "cos")),
    ],
)
def test_values_of_the_function_are_computed_once(fun, once):
    left = operations(all_orders(fun, autoinfer), X)
    assert {op: left[op] for op in once} == dict.fromkeys(once, 1)
    for have, want in zip(all_orders(fun, autoinfer)(X), all_orders(fun, jax)(X), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-10)


def test_products_of_lower_orders_serve_higher_ones():
    # Value: W x, V tanh. Gradient: Vᵀ e, Wᵀ …. Hessian: A = V diag(tanh') W, Aᵀ diag(e) A and Wᵀ diag(…) W.
    assert operations(all_orders(network, autoinfer), X)["dot_general"] == 2 + 2 + 3


def test_products_of_a_quadratic_form():
    matrix = _RNG.standard_normal((4, 4))
    # A x, x · (A x) and x A; the Hessian A + Aᵀ needs none.
    assert operations(all_orders(lambda x: x @ matrix @ x, autoinfer), X)["dot_general"] == 3


def test_value_and_gradient_share_with_gradient_and_value():
    def both(x):
        return (
            autoinfer.value_and_grad(network)(x),
            network(x),
            autoinfer.grad(network)(x),
            autoinfer.vjp(network, x)[0],
        )

    assert operations(both, X) == operations(autoinfer.value_and_grad(network), X)


# -- loops ------------------------------------------------------------------------------------------------------------

STEPS, BATCH, INPUTS, UNITS = 6, 2, 3, 5
SIZES = {"input": (INPUTS, UNITS), "state": (UNITS, UNITS), "bias": (UNITS,)}
PARAMS = {name: _RNG.standard_normal(shape) / 2 for name, shape in SIZES.items()}
XS = _RNG.standard_normal((STEPS, BATCH, INPUTS))


def recurrent(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["input"] + h @ params["state"] + params["bias"])
        return h, h

    start = jnp.zeros((BATCH, UNITS), xs.dtype)
    return jnp.mean(jax.lax.scan(step, start, xs)[1] ** 2)


def test_loops_of_all_orders_run_once():
    def fun(c):
        return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(W[:4] @ h), None), c, length=5)[0] ** 2)

    left = operations(all_orders(fun, autoinfer), X)
    # One way there, one way back: those of the Hessian.
    assert left["scan"] == 2 and left["tanh"] == 1
    assert left["dot_general"] == operations(autoinfer.hessian(fun), X)["dot_general"]
    for have, want in zip(all_orders(fun, autoinfer)(X), all_orders(fun, jax)(X), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-10)


def test_choices_of_all_orders_are_made_once():
    def fun(x):
        return jax.lax.cond(x.sum() > 0, network, log_partition, x)

    left = operations(all_orders(fun, autoinfer), X)
    # One way there, one way back.
    assert left["cond"] == 2
    assert (left["tanh"], left["exp"], left["log"]) == (1, 2, 1)
    for x in (X, -X):
        for have, want in zip(all_orders(fun, autoinfer)(x), all_orders(fun, jax)(x), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-9, atol=1e-10)


def test_sums_over_steps_of_weight_gradients_leave_the_loop():
    graph = autoinfer.grad(recurrent).graph(PARAMS, XS)
    loops = [node for node in graph.nodes if node.op == "scan"]
    weights = {shape for name, shape in SIZES.items() if name != "bias"}
    inside = [node for loop in loops for node in loop.params["body"].nodes]
    assert not weights & {aval.shape for node in inside for aval in node.avals}
    carried = [aval.shape for loop in loops for aval in loop.avals[: loop.params["num_carry"]]]
    assert not weights & set(carried)
    # h W of each step and its transpose stay; for all steps at once: x W, and what the weights' gradients are.
    assert sum(node.op == "dot_general" for node in inside) == 2
    assert sum(node.op == "dot_general" for node in graph.nodes) == 3
    have, want = autoinfer.grad(recurrent)(PARAMS, XS), jax.grad(recurrent)(PARAMS, XS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), have, want)


def test_weight_gradients_of_nested_loops_leave_both():
    def deep(w, xs):
        def outer(h, rows):
            h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), h, rows)
            return h, None

        return jnp.sum(jax.lax.scan(outer, jnp.zeros((BATCH, INPUTS)), xs)[0])

    w, xs = _RNG.standard_normal((INPUTS, INPUTS)), _RNG.standard_normal((4, STEPS, BATCH, INPUTS))
    graph = autoinfer.grad(deep).graph(w, xs)
    loops = [node for node in graph.walk() if node.op == "scan"]
    carried = [aval.shape for loop in loops for aval in loop.avals[: loop.params["num_carry"]]]
    assert len(loops) == 4 and set(carried) == {(BATCH, INPUTS)}
    # h W and its transpose in the innermost loops, and one product over all steps of both.
    assert [node.op for node in graph.nodes].count("dot_general") == 1
    assert sum(node.op == "dot_general" for node in graph.walk()) == 3
    np.testing.assert_allclose(autoinfer.grad(deep)(w, xs), jax.grad(deep)(w, xs), rtol=1e-9, atol=1e-12)
