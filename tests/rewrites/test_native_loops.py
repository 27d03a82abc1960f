"""Loops as kernels: which loops qualify, what is left of them, and that cells of Flax come out the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer import autoinfer
from jaxinfer.graph import run
from jaxinfer.pipeline import Settings, registered_rules
from jaxinfer.rewrites import native_loops

pytestmark = pytest.mark.usefixtures("kernels")
RULES = native_loops.RULES
WIDTH, STEPS = 24, 6
W = random(WIDTH, WIDTH) / 8
XS = random(STEPS, 1, WIDTH)
H = random(1, WIDTH, seed=3)


def kernel(graph):
    (node,) = (n for n in graph.walk() if n.op == "vector_loop")
    assert not any(n.op == "scan" for n in graph.walk())
    return node.params["loop"]


def is_left_alone(function, *arguments, known=()):
    _, after = rewrite(function, arguments, RULES, known)
    return not any(n.op == "vector_loop" for n in after.walk())


def scanned(step, reverse=False):
    return lambda h, xs: lax.scan(step, h, xs, reverse=reverse)


# -- what qualifies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell])
@pytest.mark.parametrize("backwards", [False, True])
def test_cells_of_flax(cell, backwards):
    network = nn.RNN(cell(WIDTH), reverse=backwards, keep_order=True)
    x = random(1, STEPS, 10)
    variables = network.init(jax.random.key(0), x)
    simpler = tuple(r for r in registered_rules() if r.kind == "replace")
    _, after = rewrite(network.apply, (variables, x), simpler + RULES, known=(0,))
    np.testing.assert_allclose(run(after, {}, x)[0], network.apply(variables, x), atol=2e-6)
    loop = kernel(after)
    assert loop.steps == STEPS
    # Gates of one vector are one product.
    assert sum(i.operation == "product" for i in loop.step) <= 2


def test_products_of_one_vector_are_one():
    def step(h, x):
        return jnp.tanh(h @ W + x) * (h @ W.T) - x @ W, h[:, ::1]

    loop = kernel(compare(scanned(step), (H, XS), RULES))
    assert sorted(i.size for i in loop.step if i.operation == "product") == [WIDTH, 2 * WIDTH]


def test_carries_that_change_places():
    def step(carry, x):
        a, b, c = carry
        return (b, c, a + x), (c, a)

    compare(scanned(step), ((H, 2 * H, 3 * H), XS), RULES)
    compare(scanned(step, reverse=True), ((H, 2 * H, 3 * H), XS), RULES)


def test_what_is_the_same_in_each_step():
    def step(h, x):
        return h * 0.5 + jnp.exp(W[:1]), (jnp.full((2, 3), 7.0), W[:2])

    compare(scanned(step), (H, XS), RULES)


def test_parts_and_wholes():
    def step(h, x):
        a, b, c = h[0, :5], h[0, 5:20], h[0, 20:]
        joined = jnp.concatenate([c, b * 2, a])
        return joined[None] - x, jnp.split(joined.reshape(2, 12), 2)[1]

    compare(scanned(step), (H, XS), RULES)


def test_weights_and_vectors_from_outside():
    def loop(w, b, h, xs):
        return lax.scan(lambda h, x: (jnp.tanh(w @ h + b - x), h**2), h, xs)

    after = compare(loop, (W, W[0], H[0], XS[:, 0]), RULES)
    assert kernel(after).moves.count(True) == 2  # rows of xs, rows of ys


def test_no_rows_and_no_carries():
    compare(lambda h: lax.scan(lambda h, _: (h * 0.5 + 1, None), h, None, length=STEPS), (H,), RULES)
    compare(lambda xs: lax.scan(lambda _, x: (None, jnp.abs(x) + 1), None, xs), (XS,), RULES)


# -- what does not ----------------------------------------------------------------------------------------------------


def simple(h, x):
    return jnp.tanh(h @ W + x), h


def test_several_rows_are_left_alone():
    assert is_left_alone(scanned(simple), np.repeat(H, 2, 0), np.repeat(XS, 2, 1))


def test_other_dtypes_are_left_alone():
    half = [jnp.asarray(x, jnp.bfloat16) for x in (H, XS)]
    assert is_left_alone(scanned(lambda h, x: (jnp.tanh(h + x), h)), *half)
    counting = scanned(lambda c, x: ((c[0] * 0.5 + x, c[1] + 1), c[1]))
    assert is_left_alone(counting, (H, jnp.int32(0)), XS)
    with jax.enable_x64(True):
        assert is_left_alone(scanned(lambda h, x: (jnp.tanh(h + x), h)), np.float64(H), np.float64(XS))


@pytest.mark.parametrize(
    "step",
    [
        lambda h, x: (jnp.sin(h) + x, h),
        lambda h, x: (h - h.sum() * x, h),
        lambda h, x: (h[:, ::-1] + x, h),
        lambda h, x: (jnp.where(x > 0, h, x), h),
        lambda h, x: (h.reshape(4, 6).T.reshape(1, 24) + x, h),
        lambda h, x: (h + x, h.T @ x),
        lambda h, x: (h + x * jax.random.uniform(jax.random.key(0), ()), lax.fori_loop(0, 3, lambda i, y: y * 2, h)),
    ],
    ids=["sine", "sum", "reversed", "where", "transposed", "outer", "loop"],
)
def test_other_operations_are_left_alone(step):
    assert is_left_alone(scanned(step), H, XS)


def test_short_loops_and_effects_are_left_alone():
    assert is_left_alone(scanned(simple), H, XS[:3])

    def printing(h, x):
        jax.debug.print("step")
        return h + x, h

    assert is_left_alone(scanned(printing), H, XS)


def test_empty_vectors_are_left_alone():
    assert is_left_alone(scanned(lambda h, x: (h + x, h)), H[:, :0], XS[:, :, :0])


# -- as a user meets it -----------------------------------------------------------------------------------------------


def test_other_platforms_get_no_kernel():
    settings = Settings()
    assert "loop-kernel" in {r.name for r in settings.active_rules("cpu")}
    assert "loop-kernel" not in {r.name for r in settings.active_rules("cuda")}
    assert "loop-kernel" not in {r.name for r in settings.portable().active_rules("cpu")}


def test_derivatives_of_an_optimized_loop_are_those_of_the_original():
    def plain(h, xs):
        return scanned(simple)(h, xs)[0].sum()

    fast = autoinfer.optimize(plain, rules=RULES, tune="off")
    for transform in (jax.grad, jax.jacfwd, lambda f: jax.grad(lambda *a: jax.grad(f)(*a).sum())):
        np.testing.assert_allclose(transform(fast)(H, XS), transform(plain)(H, XS), atol=1e-6)
    several = random(3, 1, WIDTH)
    np.testing.assert_allclose(
        jax.vmap(fast, (0, None))(several, XS), jax.vmap(plain, (0, None))(several, XS), atol=1e-5
    )
