"""Partial evaluation: what is computed ahead of time, what is left, and what it may cost."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxinfer.graph import check, emit, trace
from jaxinfer.rewriting import fold

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)


def _folded(fun, *known):
    graph = trace(jax.make_jaxpr(fun)(*known, X), dict(enumerate(known)))
    new = fold(graph)
    check(new)
    got = jax.jit(emit(new))([w.value for w in new.weights], X)
    np.testing.assert_allclose(got[0], fun(*known, X), rtol=1e-5, atol=1e-5)
    return graph, new


def test_a_chain_of_known_operations_becomes_one_array():
    _, new = _folded(lambda w, x: x @ jnp.tanh(w @ w).T, W)
    assert [n.op for n in new.nodes] == ["dot_general"]
    assert len(new.constants) == 1


def test_a_broadcast_of_something_small_is_left_as_an_operation():
    bias = jnp.arange(8.0)
    _, new = _folded(lambda b, x: x[None] + jnp.broadcast_to(2 * b, (500, 4, 8)), bias)
    assert any(n.op == "broadcast_in_dim" and n.inputs[0].node.is_const for n in new.nodes)
    assert max(c.aval.size for c in new.constants) <= 8


def test_literals_alone_are_left_to_the_compiler():
    graph, new = _folded(lambda x: x + jnp.zeros((4, 8)))
    assert new is graph


def test_tables_of_costly_functions_become_arrays():
    def encoded(x):
        frequencies = 1e4 ** (-jnp.arange(4) / 4)
        angles = jnp.arange(4)[:, None] * frequencies
        return x + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)

    _, new = _folded(encoded)
    assert [n.op for n in new.nodes] == ["add"] and [c.aval.shape for c in new.constants] == [(4, 8)]
    # The numbers of rows cost nothing, and a table of a million entries is not held.
    graph, new = _folded(lambda x: x + jnp.arange(8))
    assert new is graph
    graph, new = _folded(lambda x: x + jnp.sin(jnp.arange(1e6).reshape(-1, 8)).max(0))
    assert new is graph


def test_folded_values_are_those_of_the_program_bit_for_bit():
    w = jnp.linspace(0.1, 3, 4096)
    for fun in (jnp.tanh, lax.rsqrt, jnp.exp, jax.nn.gelu, jax.scipy.special.erfinv):
        graph = trace(jax.make_jaxpr(lambda w, fun=fun: fun(w))(w), {0: w})
        new = fold(graph)
        assert not new.nodes
        np.testing.assert_array_equal(new.outputs[0].node.value, jax.jit(fun)(w))


def test_parts_of_one_array_stay_one_array():
    def taps(w, x):
        return sum(x * w[i] for i in range(8))

    _, new = _folded(taps, W)
    assert [c.aval.shape for c in new.constants if c.aval.shape] == [(8, 8)]


def test_weights_in_fewer_bits_are_widened_where_that_is_fused():
    narrow = jnp.arange(64, dtype=jnp.int8).reshape(8, 8)
    _, new = _folded(lambda w, x: jnp.sum(w.T.astype(jnp.float32) * x[:, None], 2), narrow)
    assert [c.aval.dtype for c in new.constants if c.aval.shape] == [jnp.int8]
    assert sum(n.op == "convert_element_type" for n in new.nodes) == 1 and not any(
        n.op == "transpose" for n in new.nodes
    )
    _, new = _folded(lambda w, x: x @ w.astype(jnp.float32), narrow)
    assert [c.aval.dtype for c in new.constants if c.aval.shape] == [jnp.float32]


def test_a_part_that_a_product_reads_is_cut_out_beforehand():
    _, new = _folded(lambda w, x: x[:, :4] @ w[:4], W)
    assert new.count("slice") == 1
    assert {c.aval.shape for c in new.constants} == {(4, 8)}


def test_known_values_inside_loops_and_branches_are_folded():
    def program(w, x):
        step = lambda c, _: (jnp.tanh(c @ w), None)  # noqa: E731
        looped = lax.scan(step, x, None, length=3)[0]
        return lax.cond(x[0, 0] > 0, lambda y: y @ (w * 2), lambda y: y, looped)

    _folded(program, W)


def test_effects_and_random_draws_are_never_evaluated_ahead():
    seen = []

    def program(w, x):
        jax.debug.callback(lambda v: seen.append(float(v)), w.sum())
        return x @ w

    graph = trace(jax.make_jaxpr(program)(W, X), {0: W})
    new = fold(graph)
    assert seen == []
    assert sum(bool(n.effects) for n in new.nodes) == 1


def test_a_known_result_is_a_constant():
    graph = trace(jax.make_jaxpr(lambda w, x: (w @ w, x))(W, X), {0: W})
    new = fold(graph)
    assert new.nodes == ()
    np.testing.assert_allclose(new.outputs[0].node.value, W @ W, rtol=1e-5, atol=1e-5)


def test_known_values_of_symbolic_shape_wait_for_the_shape():
    """A known row spread over a batch of unknown size, and a sum over that batch: only what comes before is folded."""
    (batch,) = export.symbolic_shape("batch")
    row = jnp.arange(8.0)

    def program(r, x):
        spread = jnp.broadcast_to(2 * r, (x.shape[0], 8))
        return x + spread, spread.sum(0)

    x = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    graph = trace(jax.make_jaxpr(program)(row, x), {0: row})
    new = fold(graph)
    assert [c.aval.shape for c in new.constants if c.aval.shape] == [(8,)]
    assert new.count("broadcast_in_dim") == 1 and new.count("reduce_sum") == 1
    stored = export.export(jax.jit(emit(new)))([w.value for w in new.weights], x)
    spread, total = jax.jit(stored.call)([w.value for w in new.weights], jnp.zeros((3, 8)))
    np.testing.assert_array_equal(spread, np.tile(2 * np.arange(8.0), (3, 1)))
    np.testing.assert_array_equal(total, 6 * np.arange(8.0))
