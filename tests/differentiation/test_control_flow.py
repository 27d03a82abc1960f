"""Loops and branches, against JAX's derivatives; what their derivatives keep and carry."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_jvp, our_vjp
from jax import lax

from jaxinfer import _jax

pytestmark = pytest.mark.usefixtures("float64")
RNG = np.random.default_rng(0)
W, X, XS = RNG.normal(size=(3, 3)), RNG.normal(size=3), RNG.normal(size=(4, 3))
CONTROL = {"scan", "cond", "while"}
check = functools.partial(check, ours=CONTROL, mixed=False)


def cell(w, c, r):
    """One step of a recurrent network."""
    return jnp.tanh(w @ c) + r, c * r


def recurrent(w, x, xs, **options):
    """A small recurrent network."""
    return lax.scan(functools.partial(cell, w), x, xs, **options)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 3}, {"unroll": 2, "reverse": True}], ids=str)
def test_loops(options):
    check(functools.partial(recurrent, **options), W, X, XS, order=2 if options == {"reverse": True} else 1)


@pytest.mark.parametrize("length", [0, 1])
def test_short_loops(length):
    check(lambda w, x: recurrent(w, x, XS[:length]), W, X, order=1)


def test_loops_of_a_length_only():
    check(lambda w, x: lax.scan(lambda c, _: (jnp.tanh(w @ c), c), x, None, length=3), W, X)


def test_carries_that_become_active_through_others():
    def step(c, _):
        return (c[0], c[1] + c[0] ** 2, c[2] * jnp.sin(c[1]), c[3] + 1), (c[2], c[3])

    check(lambda x: lax.scan(step, (x, jnp.ones(3), jnp.ones(3), 0), None, length=4), X)


def test_integers_and_keys_in_carries_and_rows():
    check(lambda x: lax.fori_loop(0, 4, lambda i, c: c * jnp.sin(c) + i + x[i % 3], x), X)
    check(lambda x: lax.scan(lambda c, i: (c.at[i].add(c[0] ** 2), c[i]), x, jnp.arange(3)), X, order=1)

    def draw(c, r):
        return (c[0] * jax.random.normal(c[1], (3,)), jax.random.split(c[1])[0]), c[0] * r

    check(lambda x: lax.scan(draw, (x, jax.random.key(0)), XS)[1], X, order=1)


def test_swapped_carries_unused_results_and_closed_over_arrays():
    check(lambda x: lax.scan(lambda c, r: ((c[1], c[0] * r), c[0]), (x, x * 2), XS), X, order=1)
    check(lambda w, x: recurrent(w, x, XS)[0], W, X, order=1)
    check(lambda w, x: recurrent(w, x, XS)[1][1], W, X, order=1)
    check(lambda x: lax.scan(lambda c, r: (c * W[0] + r, (W @ c).sum()), x, jnp.asarray(XS)), X, order=1)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("float32", 1e-5, 1e-5), ("bfloat16", 0.05, 0.1)])
def test_narrow_types(dtype, rtol, atol):
    arrays = [jnp.asarray(a, dtype) for a in (W, X, XS)]
    check(lambda w, x, xs: recurrent(w, x, xs), *arrays, order=1, rtol=rtol, atol=atol)


def test_mixed_and_weak_types_and_complex():
    def mixed(c, r):
        return (jnp.tanh(c[0] * 2), c[1] + c[0].astype("float32")), c[1] * r

    xs = XS.astype("float32")
    check(lambda x: lax.scan(mixed, (x, jnp.zeros(3, "float32")), xs), X, order=1, rtol=1e-5, atol=1e-5)
    check(lambda x: lax.scan(lambda c, _: (c * 2.0 + x.sum(), c), 1.0, None, length=3), X, order=1)
    check(lambda x: lax.scan(lambda c, r: (c * jnp.exp(1j * c) + r, jnp.abs(c)), x * (1 + 1j), XS), X)


def test_nested_loops():
    def outer(w, c, r):
        return lax.scan(lambda d, e: (jnp.sin(d * e + c), d), c, w)[0] + r, c.sum()

    check(lambda w, x, xs: lax.scan(functools.partial(outer, w), x, xs), W, X, XS, mixed=True)


def test_branches_in_loops_in_branches():
    def step(w, c, r):
        return lax.cond(r[0] > 0, lambda c: jnp.sin(w @ c), lambda c: c * r, c), c

    def program(w, x, xs):
        return lax.cond(x[1] < 9, lambda x: lax.scan(functools.partial(step, w), x, xs)[0], lambda x: x**2, x)

    check(program, W, X, XS, mixed=True)


@pytest.mark.parametrize("index", [-1, 0, 1, 2, 5])
def test_branches_that_keep_different_values(index):
    branches = [lambda w, c: c, lambda w, c: jnp.sin(w @ c) * jnp.cos(c), lambda w, c: (c**2).sum() * jnp.ones(3)]
    check(lambda w, x, i: lax.switch(i, branches, w, x), W, X, index, order=2 if index == 1 else 1)


def test_branches_without_operands_and_with_integers():
    check(lambda x: lax.cond(x[1] > 0, lambda: x * 2, lambda: jnp.zeros(3)), X, order=1)
    check(lambda x: lax.cond(x[1] > 0, lambda x: (x * 2, 1), lambda x: (jnp.sin(x), 2), x), X, order=1)
    check(jax.vmap(lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)), XS, order=1)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable], ids=["nothing", "dots"])
def test_rematerialised_steps(policy):
    step = jax.checkpoint(lambda c, r: (jnp.sin(jnp.sin(W @ c)) + r, c), policy=policy)
    check(lambda x: lax.scan(step, x, XS), X)


@jax.custom_jvp
def tripled(x):
    """A sine that says it is three times as steep."""
    return jnp.sin(x)


@jax.custom_vjp
def quintupled(x):
    """A sine that says it is five times as steep."""
    return jnp.sin(x)


tripled.defjvp(lambda primals, tangents: (tripled(primals[0]), 3 * tangents[0] * jnp.cos(primals[0])))
quintupled.defvjp(lambda x: (quintupled(x), x), lambda x, ct: (5 * ct * jnp.cos(x),))


def test_custom_forward_rules_inside():
    check(lambda x, y: lax.scan(lambda c, r: (c * tripled(y) + r, tripled(c * r)), x, XS), X, X)
    check(lambda x: lax.cond(x[1] > 0, lambda x: tripled(x) * x, lambda x: tripled(x * x), x), X)


@pytest.mark.parametrize(
    "program",
    [
        lambda x: lax.scan(lambda c, r: (quintupled(c) + r, quintupled(c * r)), x, XS)[0],
        lambda x: lax.cond(x[1] > 0, lambda x: quintupled(x) * x, lambda x: quintupled(x * x), x),
    ],
    ids=["loop", "branch"],
)
def test_custom_reverse_rules_inside(program):
    """JAX has reverse mode only; twice reverse keeps the custom rule of what is left of the function."""
    x = jnp.asarray(X)
    ours = lambda x: our_vjp(lambda x: (program(x),), [x], [np.cos(X)], Counter())[1][0]  # noqa: E731
    jaxs = lambda x: jax.vjp(program, x)[1](jnp.cos(X))[0]  # noqa: E731
    np.testing.assert_allclose(ours(x), jaxs(x), rtol=1e-9)
    twice = our_vjp(lambda x: (ours(x),), [x], [np.sin(X)], Counter())[1][0]
    np.testing.assert_allclose(twice, jax.vjp(jaxs, x)[1](jnp.sin(X))[0], rtol=1e-9)


def test_while_loops_forward():
    def grow(x):
        return lax.while_loop(
            lambda c: c[1].sum() < 50, lambda c: (c[0] * jnp.sin(c[1]), c[1] * 2 + 1, c[2] + 1), (x, jnp.ones(3), 0)
        )

    check(grow, X, reverse=False)
    check(lambda x: lax.while_loop(lambda c: c[1] < x[0] + 5, lambda c: (c[0] * jnp.sin(x), c[1] + 1), (x, 0.0))[0], X,
          reverse=False, order=1)  # fmt: skip
    # Values that are not differentiated may come from a while loop in reverse mode too.
    check(lambda x: lax.while_loop(lambda c: c < 5, lambda c: c + 1, 0.0) * x, X, order=1)


def test_while_loops_in_reverse_are_refused_at_the_callers_line():
    program = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c * 2, x)  # noqa: E731
    with pytest.raises(ValueError, match=r"Use lax\.scan(.|\n)*test_control_flow\.py"):
        our_vjp(lambda x: (program(x),), [jnp.abs(X)], [X], Counter())


# -- effects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_happen_once_a_step(ordered):
    seen = []

    def step(c, r):
        jax.debug.callback(lambda i: seen.append(int(i)), r, ordered=ordered)
        return jnp.sin(c), c

    def program(x):
        y = lax.scan(step, x, jnp.arange(3))[0]
        return (
            lax.cond(
                y[0] < 9, lambda y: (jax.debug.callback(lambda: seen.append(9), ordered=ordered), y)[1], jnp.sin, y
            ),
        )

    jax.block_until_ready(jax.jit(lambda x: our_vjp(program, [x], [X], Counter()))(X))
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 9]
    seen.clear()
    jax.block_until_ready(jax.jit(lambda x: our_jvp(program, [x], [X], Counter()))(X))
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 9]


def test_effects_of_custom_rules_happen_on_the_way_back():
    seen = []

    @jax.custom_vjp
    def spied(x):
        return x * 2

    def back(_, ct):
        jax.debug.callback(lambda: seen.append("back"))
        return (ct * 2,)

    spied.defvjp(lambda x: (x * 2, None), back)
    program = lambda x: (lax.scan(lambda c, _: (spied(c), None), x, None, length=3)[0],)  # noqa: E731
    _, (got,) = our_vjp(program, [jnp.asarray(X)], [X], Counter())
    jax.effects_barrier()
    np.testing.assert_allclose(got, 8 * X)
    assert seen == ["back"] * 3


# -- structure --------------------------------------------------------------------------------------------------------


def loops_of(program, *args):
    """The loops of a program's values and cotangents: types of what each carries and of the rows it reads and gives."""

    def run(*args):
        outs = jax.eval_shape(program, *args)
        return our_vjp(program, args, [jnp.ones(a.shape, a.dtype) for a in outs], Counter())

    found = []
    for eqn in jax.make_jaxpr(run)(*map(jnp.asarray, args)).eqns:
        if eqn.primitive.name == "scan":
            consts, carries = _jax.scan_counts(eqn.params)
            shapes = [v.aval.shape for v in eqn.invars]
            ys = [v.aval.shape for v in eqn.outvars[carries:]]
            found.append((shapes[consts : consts + carries], shapes[consts + carries :], ys))
    return found


def test_loop_constants_and_rows_are_not_stored_again():
    """Only tanh's values are new: weights are there, rows of xs too, and each step's carry is a row of ys."""
    program = lambda w, x, xs: lax.scan(lambda c, r: (jnp.tanh(w @ c) * r, c), x, xs)  # noqa: E731
    forward, backward = loops_of(program, W, X, XS)
    assert forward[2] == [(4, 3)] * 2
    assert sorted(backward[1]) == [(4, 3)] * 4  # xs, ys, tanh, cotangents of ys
    assert sorted(backward[0]) == [(3,), (3, 3)]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_carry_that_is_a_row_of_ys_after_its_step_is_not_stored_before_it(reverse):
    def program(w, x, xs):
        def step(c, r):
            new = jnp.tanh(w @ c) * r
            return new, new

        return lax.scan(step, x, xs, reverse=reverse)

    forward, backward = loops_of(program, W, X, XS)
    assert forward[2] == [(4, 3)] * 2  # ys, tanh
    assert sorted(backward[1]) == [(4, 3)] * 4
    check(program, W, X, XS, order=2)
    check(lambda w, x: program(w, x, XS[:0]), W, X, order=1)
    check(lambda w, x: program(w, x, XS[:1]), W, X, order=1)


def test_what_depends_on_loop_constants_alone_is_kept_once():
    program = lambda w, x: (lax.scan(lambda c, _: (jnp.sin(jnp.exp(w) @ c), None), x, None, length=4)[0],)  # noqa: E731
    forward, backward = loops_of(program, W, X)
    assert all(len(shape) < 3 for shape in (*forward[2], *backward[1]))


def test_masks_and_repeated_values_are_kept_small():
    def step(c, r):
        wide = jnp.broadcast_to(jnp.sin(c)[:, None], (3, 50))
        return (wide * r).sum(1) * jnp.where(c > 0, 1.0, 0.5), None

    xs = np.ones((4, 3, 50))
    forward, _ = loops_of(lambda x, xs: (lax.scan(step, x, xs)[0],), X, xs)
    assert (4, 3, 50) not in forward[2]


def test_carries_that_are_not_differentiated_have_no_cotangents():
    def step(c, r):
        return (jnp.sin(c[0]) * c[1][0], c[1] * 2, c[2] + 1), None

    program = lambda x: (lax.scan(step, (x, jnp.ones(7), 0), XS)[0][0],)  # noqa: E731
    _, backward = loops_of(program, X)
    assert backward[0] == [(3,)]


def test_results_without_cotangents_leave_no_zeros():
    """Of three carries one reaches the result: the others have no cotangents, and ys neither."""

    def step(c, r):
        return (jnp.sin(c[0]) * r, jnp.cos(c[1]) + c[0][0], c[2] * 2), c[1]

    program = lambda x, y, z: (lax.scan(step, (x, y, z), XS)[0][0],)  # noqa: E731
    _, backward = loops_of(program, X, np.ones(5), np.ones(6))
    assert backward[0] == [(3,)]
    assert (4, 5) not in backward[1]


def test_linear_loops_keep_nothing():
    program = lambda x: (lax.scan(lambda c, r: (c * r, None), x, jnp.asarray(XS))[0],)  # noqa: E731
    forward, backward = loops_of(program, X)
    assert forward[2] == []
    assert backward[1] == [(4, 3)]


def test_branches_keep_no_known_values():
    def run(x):
        return our_vjp(lambda x: (lax.cond(x[0] > 0, lambda x: jnp.where(x > 1, 2.0, 3.0) * x, lambda x: x * 5, x),),
                       [x], [X], Counter())  # fmt: skip

    first = next(e for e in jax.make_jaxpr(run)(jnp.asarray(X)).eqns if e.primitive.name == "cond")
    assert len(first.outvars) <= 2
