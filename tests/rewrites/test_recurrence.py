"""Loops: what is left in their bodies, and the results against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, random, rewrite

from jaxinfer import autoinfer
from jaxinfer.analysis.loops import Loop, cut
from jaxinfer.graph import Graph, Node, emit, run, trace_function
from jaxinfer.models.zoo import load
from jaxinfer.pipeline import registered_rules
from jaxinfer.rewrites import loop_forms, loop_operands, parallel_products, recurrence
from jaxinfer.rewriting import within

RULES = (*loop_operands.RULES, *recurrence.RULES, *loop_forms.RULES, *parallel_products.RULES)
REPLACE = tuple(rule for rule in RULES if rule.kind == "replace")
ALL = within(registered_rules(), "reassociate")
H, X, T = 6, 5, 9


def loops(graph: Graph) -> list[Node]:
    return [node for node in graph.walk() if node.op in ("scan", "while")]


def only_loop(graph: Graph) -> Node:
    (node,) = loops(graph)
    return node


def lstm(weights, xs, reverse=False):
    def step(carry, x):
        c, h = carry
        i, f, g, o = (x @ w + h @ u + b for w, u, b in weights)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    start = jnp.zeros((1, H), xs.dtype)
    return lax.scan(step, (start, start), xs, reverse=reverse)[1]


WEIGHTS = [tuple(random(*shape, seed=i) / 2 for shape in ((X, H), (H, H), (H,))) for i in range(4)]
XS = random(T, 1, X)


# -- recurrent layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("known", [(), (0,)], ids=["live", "frozen"])
def test_lstm_keeps_one_product_in_its_body(known, reverse):
    after = compare(lambda weights, xs: lstm(weights, xs, reverse), (WEIGHTS, XS), RULES, known)
    loop = only_loop(after)
    assert loop.params["body"].count("dot_general") == 1
    assert loop.params["reverse"] is reverse
    if known:
        assert loop.params["num_consts"] == 0
        assert after.count("dot_general") == 2


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_optimized"])
def test_layers_of_flax_keep_one_product(name):
    model = load(name, tiny=True)
    (x,) = model.make_inputs(1)
    after = compare(model.apply, (model.variables, x), ALL, known=(0,))
    assert [loop.params["body"].count("dot_general") for loop in loops(after)] == [1]


def test_greedy_decoder_looks_its_gates_up():
    model = load("g2p", tiny=True)
    (word,) = model.make_inputs(1)
    before, after = rewrite(model.apply, (model.variables, word), ALL, known=(0,))
    # State to gates in both loops, and state to logits; letters and phonemes are looked up in tables of gates.
    assert [loop.params["body"].count("dot_general") for loop in loops(after)] == [1, 2]
    assert after.count("dot_general") == 3
    # One lookup for all gates of a letter or phoneme, and the state where the word ends.
    assert after.count("gather") == 3
    for have, want in zip(run(after, {}, word), run(before, {}, word), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_projection_of_the_state_leaves_the_loop():
    w, v, start, xs = random(H, H) / 2, random(H, 3), random(1, H), random(T, 1, H)

    def function(w, v, start, xs):
        def step(h, x):
            h = jnp.tanh(h @ w + x)
            return h, jax.nn.relu(h @ v) + 1

        return lax.scan(step, start, xs, reverse=True)

    after = compare(function, (w, v, start, xs), REPLACE)
    loop = only_loop(after)
    assert loop.params["body"].count("dot_general") == 1
    assert [a.shape for a in loop.avals] == [(1, H), (T, 1, H)]


def test_what_goes_back_into_the_loop_stays():
    w, v, start = random(H, H) / 2, random(H, H) / 2, random(1, H)

    def function(w, v, start):
        def step(h, _):
            y = jnp.tanh(h @ w)
            return y @ v, y @ v

        return lax.scan(step, start, None, length=T)

    _, after = rewrite(function, (w, v, start), REPLACE)
    assert only_loop(after).params["body"].count("dot_general") == 2


def test_memory_decides_what_is_only_offered():
    w, u, start, xs = random(1, 32), random(32, 1), random(512, 1), random(40, 512, 1)

    def function(w, u, start, xs):
        return lax.scan(lambda c, x: (jnp.tanh(c + (x @ w) @ u), None), start, xs)[0]

    _, kept = rewrite(function, (w, u, start, xs), REPLACE)
    assert only_loop(kept).params["body"].count("dot_general") == 2
    offered = compare(function, (w, u, start, xs), RULES)
    assert only_loop(offered).params["body"].count("dot_general") == 0


def test_map_over_large_rows_stays_a_loop():
    w, xs = random(4, 4096), random(64, 32, 4)
    _, after = rewrite(lambda w, xs: lax.map(lambda x: jnp.tanh(x @ w).sum(), xs), (w, xs), RULES)
    assert only_loop(after).params["body"].count("dot_general") == 1


# -- derivatives ------------------------------------------------------------------------------------------------------


def test_backward_loop_adds_no_products_up():
    def loss(weights, xs):
        return jnp.sum(lstm(weights, xs) ** 2)

    gradient = jax.grad(loss)
    after = compare(lambda weights, xs: jax.tree.leaves(gradient(weights, xs)), (WEIGHTS, XS), ALL, tolerance=1e-4)
    # Forward: one product of the state. Backward: the gates' derivatives times their weights.
    assert sorted(loop.params["body"].count("dot_general") for loop in loops(after)) == [1, 4]
    carried = [a.shape for loop in loops(after) for a in loop.avals[: loop.params["num_carry"]]]
    assert (H, H) not in carried
    assert (X, H) not in carried


@pytest.mark.parametrize("reverse", [False, True])
def test_summed_products_match_float64(reverse):
    xs, ys, total = random(T, 2, 3), random(T, 2, 4), random(4, 3)

    def function(xs, ys, total):
        def step(carry, row):
            total, c = carry
            x, y = row
            return (total + (x.T @ (c * y)).T, c + 1), c.sum()

        return lax.scan(step, (total, random(2, 4)), (xs, ys), reverse=reverse)

    after = compare(function, (xs, ys, total), REPLACE)
    assert only_loop(after).params["body"].count("dot_general") == 0


def test_sum_that_steps_read_stays():
    def function(xs, total):
        return lax.scan(lambda s, x: (s + x.T @ x, s.sum()), total, xs)

    _, after = rewrite(function, (random(T, 2, 3), random(3, 3)), REPLACE)
    assert only_loop(after).params["num_carry"] == 1


def _optimized(function):
    return autoinfer.optimize(function, tune="off")


def test_transformations_of_an_optimized_layer():
    def loss(weights, xs):
        return jnp.sum(lstm(weights, xs) ** 2)

    fast = _optimized(loss)
    want, want_gradient = jax.value_and_grad(loss)(WEIGHTS, XS)
    np.testing.assert_allclose(jax.jit(fast)(WEIGHTS, XS), want, rtol=1e-5)
    batch = jnp.stack([XS, 2 * XS])
    np.testing.assert_allclose(
        jax.vmap(fast, (None, 0))(WEIGHTS, batch), jax.vmap(loss, (None, 0))(WEIGHTS, batch), rtol=1e-5
    )
    for gradient in (jax.grad(fast), _optimized(jax.grad(loss)), jax.jit(jax.grad(fast))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(WEIGHTS, XS), want_gradient)


# -- operands and carries ---------------------------------------------------------------------------------------------


def test_unneeded_carries_go_to_a_fixpoint():
    def function(c, xs):
        def step(carry, x):
            a, b, d, e = carry
            return (a + x, b * d, d + e, e + 1), (b, a)

        (a, *_), (_, ys) = lax.scan(step, (c, c, c, c), xs)
        return a, ys

    after = compare(function, (random(3), random(T, 3)), REPLACE)
    assert only_loop(after).params["num_carry"] == 1
    assert len(only_loop(after).avals) == 2


def test_carries_that_condition_each_other_stay():
    def function(c):
        def go_on(carry):
            return carry[0] < carry[2].sum()

        def step(carry):
            count, x, limit, unused = carry
            return count + 1, x * 2, limit, unused + x

        return lax.while_loop(go_on, step, (0, c, 3 + 0 * c, c))[1]

    after = compare(function, (random(3),), REPLACE)
    assert len(only_loop(after).avals) == 2


def test_equal_carries_become_one_and_different_ones_stay():
    def function(c, xs):
        def step(carry, x):
            a, b, d = carry
            return (a * x, b * x, d + x), (a, b, d)

        return lax.scan(step, (c, c, c), xs)

    after = compare(function, (random(3), random(T, 3)), REPLACE)
    assert only_loop(after).params["num_carry"] == 2
    assert len(only_loop(after).avals) == 4


def test_known_operands_are_folded_inside():
    w, scale, start, xs = random(H, H) / 4, random(H), random(1, H), random(T, 1, H)

    def function(w, scale, start, xs):
        return lax.scan(lambda h, x: (jnp.tanh(h @ (w * scale).T + x), None), start, xs)[0]

    after = compare(function, (w, scale, start, xs), REPLACE, known=(0, 1))
    loop = only_loop(after)
    assert loop.params["num_consts"] == 0
    assert loop.params["body"].count("mul", "transpose") == 0


def test_invariants_leave_the_loop_unless_they_repeat():
    w, b, start, xs = random(H, H), random(H), random(3, H), random(T, 3, H)

    def function(w, b, start, xs):
        def step(h, x):
            return jnp.tanh(h @ jnp.exp(w) + jnp.broadcast_to(jnp.sin(b), (3, H)) + x), None

        return lax.scan(step, start, xs)[0]

    after = compare(function, (w, b, start, xs), REPLACE, tolerance=1e-4)
    body = only_loop(after).params["body"]
    assert body.count("exp", "sin") == 0
    assert body.count("broadcast_in_dim") == 1


def test_nested_loops():
    w, u, start, xs = random(H, H) / 4, random(X, H), random(1, H), random(3, T, 1, X)

    def function(w, u, start, xs):
        def outer(h, rows):
            h, _ = lax.scan(lambda h, x: (jnp.tanh(h @ (2 * w) + x @ u), None), h, rows)
            return h, h @ w

        return lax.scan(outer, start, xs)

    for known in ((), (0, 1)):
        after = compare(function, (w, u, start, xs), REPLACE, known)
        assert sorted(loop.params["body"].count("dot_general") for loop in loops(after)) == [1, 1]


# -- what is left alone -----------------------------------------------------------------------------------------------


def test_loop_with_effects_is_left_alone():
    seen = []

    def function(w, start, xs):
        def step(h, x):
            jax.debug.callback(seen.append, h.sum())
            return h + x @ w, None

        return lax.scan(step, start, xs)[0]

    arguments = (random(X, H), random(1, H), XS)
    _, after = rewrite(function, arguments, RULES)
    assert only_loop(after).params["body"].count("dot_general") == 1
    jax.block_until_ready(jax.jit(emit(after))([w.value for w in after.weights], *arguments))
    jax.effects_barrier()
    assert len(seen) == T


def test_random_numbers_of_each_step_stay_in_it():
    def function(w, keys):
        return lax.map(lambda key: jax.random.normal(key, (1, X)) @ w, keys)

    keys, w = jax.random.split(jax.random.key(0), T), random(X, H)
    before, after = rewrite(function, (w, keys), RULES)
    assert only_loop(after).params["body"].count("dot_general") == 0
    np.testing.assert_allclose(run(after, {}, w, keys)[0], run(before, {}, w, keys)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "complex64"])
def test_other_dtypes(dtype):
    rng = np.random.default_rng(0)
    w, u, start, xs = (jnp.asarray(rng.integers(-1, 2, shape), dtype) for shape in ((X, H), (H, H), (1, H), (3, 1, X)))

    def function(w, u, start, xs):
        return lax.scan(lambda h, x: (h @ u + x @ w, h @ u), start, xs)

    before, after = rewrite(function, (w, u, start, xs), REPLACE)
    assert only_loop(after).params["body"].count("dot_general") == 1
    for have, want in zip(run(after, {}, w, u, start, xs), run(before, {}, w, u, start, xs), strict=True):
        # Small whole numbers: every dtype is exact.
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(have, "complex64"), np.asarray(want, "complex64"))


def test_weak_types_of_carries_are_kept():
    def function(w, xs):
        return lax.scan(lambda c, x: ((c[0] + 1.0, c[1] * 2), (x @ w) * c[0]), (0.0, 1), xs)

    jaxpr = jax.make_jaxpr(function)(random(X, H), XS)
    _, after = rewrite(function, (random(X, H), XS), REPLACE)
    emitted = jax.make_jaxpr(lambda *x: emit(after)([], *x))(random(X, H), XS)
    assert only_loop(after).params["body"].count("dot_general") == 0
    assert [v.weak_type for v in emitted.out_avals] == [v.weak_type for v in jaxpr.out_avals]


def test_cut_refuses_what_is_not_given():
    graph = trace_function(
        lambda c, xs: lax.scan(lambda c, x: (c + x, c), c, xs), *map(jnp.asarray, (random(3), random(T, 3)))
    )
    loop = Loop.of(only_loop(graph))
    _, carries, _ = loop.steps_inputs
    with pytest.raises(ValueError, match="not given"):
        cut(loop.carried, carries)
