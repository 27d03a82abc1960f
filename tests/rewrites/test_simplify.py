"""What is left of programs that say things twice, undo what they did, or repeat data before working on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rewritten import compare, random, rewrite, total_flops

from jaxinfer.graph import run, trace_function
from jaxinfer.rewrites import control_flow, conversions, movement, reductions, simplify, slicing
from jaxinfer.rewriting import Rewriter

RULES = (
    *simplify.RULES,
    *conversions.RULES,
    *movement.RULES,
    *reductions.RULES,
    *slicing.RULES,
    *control_flow.RULES,
)
X = random(4, 6)


def _split_and_join(x):
    left, right = jnp.split(x, 2, axis=1)
    return jnp.concatenate([left, right], axis=1)


def _channels_first_and_back(x):
    return (jnp.tanh(x.transpose(1, 0)) * 2 + random(6, 1)).transpose(1, 0)


# What is left, by operation.
LEFT = {
    "neutral elements": (lambda x: (x * 1 + 0) / 1 - 0, []),
    "transposes": (lambda x: x.T.T, []),
    "reshapes": (lambda x: x.reshape(3, 8).reshape(2, 2, 6).reshape(4, 6), []),
    "axes of length one": (lambda x: jnp.squeeze(x[:, None, :, None], (1, 3)), []),
    "expand, transpose, squeeze": (lambda x: x[None].transpose(1, 0, 2)[:, 0], []),
    "broadcast twice": (
        lambda x: jnp.broadcast_to(jnp.broadcast_to(x[:, None], (4, 3, 6)), (2, 4, 3, 6)),
        ["broadcast_in_dim"],
    ),
    "pad by nothing": (lambda x: jnp.pad(x, 0), []),
    "slice of a slice": (lambda x: x[1:][:2, 1::2], ["slice"]),
    "split and join": (_split_and_join, []),
    "slice of a concatenation": (lambda x: jnp.concatenate([x, x * 2])[:4], []),
    "known place": (lambda x: lax.dynamic_slice(x, (0, 2), (4, 3)), ["slice"]),
    "static index": (lambda x: x[jnp.asarray(1)], ["reshape", "slice"]),
    "transposes around elementwise": (_channels_first_and_back, ["add", "mul", "tanh"]),
    "bounds": (lambda x: jnp.clip(jnp.clip(jax.nn.relu6(x), 0, 5), -1, 9), ["max", "min"]),
    "clamp": (lambda x: lax.clamp(0.0, jnp.maximum(x, -1), 6.0), ["max", "min"]),
    "numbers": (lambda x: -(x * 2.0 * 3.0) / 4.0, ["mul"]),
    "powers": (lambda x: x**2.0 + lax.pow(x, 1.0), ["add", "integer_pow"]),
    "types": (lambda x: x.astype(jnp.complex64).real.astype(jnp.float32), ["convert_element_type", "real"]),
    "widening": (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32).astype(jnp.bfloat16), ["convert_element_type"]),
    "known predicate": (lambda x: jnp.where(jnp.array(True), x, jnp.exp(x)), []),
    "sums of repeats": (lambda x: jnp.sum(jnp.broadcast_to(x[:, None], (4, 9, 6)), 1), ["mul"]),
    "sum of sums": (lambda x: x.sum(0).sum(0), ["reduce_sum"]),
    "sum of a transpose": (lambda x: x.T.sum(0), ["reduce_sum"]),
    "marks": (lambda x: jnp.copy(lax.stop_gradient(x)), []),
    "known branch": (lambda x: lax.cond(True, jnp.sin, jnp.cos, x), ["sin"]),
    "one step": (
        lambda x: lax.scan(lambda c, r: (c + r, c * r), x[0], x[1:2])[0],
        ["add", "reshape", "slice", "slice"],
    ),
    "no step": (lambda x: lax.fori_loop(3, 3, lambda i, c: c * i, x), []),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    function, ops = LEFT[name]
    after = compare(function, (X,), RULES, tolerance=1e-6)
    assert sorted(n.op for n in after.walk() if n not in after.known) == ops


def test_elementwise_work_is_done_before_repeating():
    def function(x, y):
        return jnp.exp(jnp.broadcast_to(x[:, None], (64, 32))) * jnp.broadcast_to(y, (64, 32))

    before, after = rewrite(function, (random(64), random()), RULES)
    assert total_flops(after) < total_flops(before) / 16
    compare(function, (random(64), random()), RULES)


def test_slices_reach_the_operands():
    def function(x, y, b):
        return (jnp.tanh(x) * y.T + b)[2:3, 1]

    after = compare(function, (random(30, 40), random(40, 30), random(40)), RULES)
    assert total_flops(after) < 40


def test_value_used_elsewhere_is_not_sliced_apart():
    def function(x):
        y = jnp.tanh(x)
        return y, y[:1]

    after = compare(function, (X,), RULES)
    assert after.count("tanh") == 1


@pytest.mark.parametrize("index", [-7, 0, 1, 2, 9])
def test_branch_index_is_clamped(index):
    branches = [jnp.sin, jnp.cos, jnp.tanh]
    after = compare(lambda i, x: lax.switch(i, branches, x), (np.int32(index), X), RULES, known=(0,))
    assert after.count("cond") == 0


@pytest.mark.parametrize("length", [0, 1, 2])
def test_scan_lengths(length):
    def function(c, xs):
        return lax.scan(lambda c, x: (c + x, c * x), c, xs, reverse=True)

    after = compare(function, (random(3), random(length, 3)), RULES)
    assert after.count("scan") == (length > 1)


def test_loop_that_runs_stays():
    after = compare(
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))[1], (X,), RULES
    )
    assert after.count("while") == 1


def test_narrowing_is_not_dropped():
    after = compare(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (X,), RULES, tolerance=1e-2)
    assert after.count("convert_element_type") == 2
    _, after = rewrite(lambda x: x.astype(jnp.float32).astype(jnp.int32), (np.int32([2**24 + 1]),), RULES)
    assert after.count("convert_element_type") == 2


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("float32", "bfloat16", True),
        ("float32", "float16", True),
        ("float16", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float32", "int16", True),
        ("float32", "int32", False),
        ("float64", "int32", True),
        ("float16", "int16", False),
        ("int32", "uint8", True),
        ("int32", "uint32", False),
        ("int8", "bool", True),
        ("bool", "int8", False),
        ("complex64", "float32", True),
        ("complex64", "float64", False),
        ("complex128", "complex64", True),
        ("complex64", "complex128", False),
        ("int32", "float32", False),
    ],
)
def test_which_types_hold_which(wide, narrow, expected):
    assert conversions.holds(wide, narrow) is expected


def test_signed_zero_is_kept_where_bits_count():
    """At the strictest tier nothing that could change the sign of a zero fires."""
    bitwise = [r for r in RULES if r.tier == "bitwise"]
    _, after = rewrite(lambda x: x + 0.0, (np.float32([-0.0]),), bitwise)
    assert not np.signbit(run(after, {}, np.float32([-0.0]))[0])[0]


def test_power_of_two_is_exact_only():
    _, after = rewrite(lambda x: (x / 8.0, x / 3.0, x / np.float32(2.0**127)), (X,), RULES)
    assert after.count("mul") == 1
    assert after.count("div") == 2


def test_empty_axes():
    def function(x):
        y = jnp.tanh(x.T) * 2
        return y.reshape(5, 0, 1).sum(1), jnp.concatenate([y, y[:, :0]], 1), jnp.broadcast_to(y[None], (3, 5, 0)).max(0)

    compare(function, (random(0, 5),), RULES)


def test_symbolic_sizes_are_left_alone():
    (n,) = jax.export.symbolic_shape("n")
    aval = jax.ShapeDtypeStruct((n, 4), jnp.float32)

    def function(x):
        y = jnp.squeeze(jnp.tanh(x.T.T)[:, None, 1:], 1)
        return [y.reshape(-1), jnp.broadcast_to(y.sum(0), (n, 3)) * 2, jnp.concatenate([y, y])[1:]]

    graph = trace_function(function, aval)
    after = Rewriter(RULES).fixpoint(graph)
    assert [str(v.aval) for v in after.outputs] == [str(v.aval) for v in graph.outputs]


def test_rules_end_on_random_mixtures():
    """Random chains of moves and elementwise operations come to an end and keep their values."""
    moves = [
        lambda x: x.T,
        lambda x: x.reshape(x.shape[::-1]),
        lambda x: x[:, None].reshape(x.shape),
        lambda x: jnp.tanh(x),
        lambda x: x * 2 + 1,
        lambda x: x + x.sum(0, keepdims=True),
        lambda x: jnp.maximum(x, 0)[::-1][1:-1] if x.shape[0] > 3 else x,
        lambda x: jnp.concatenate([x[:1], x[1:], x]),
        lambda x: jnp.broadcast_to(x[0], x.shape) - x,
        lambda x: jnp.where(x > 0, x, x.T.T),
    ]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chosen = [moves[i] for i in rng.integers(0, len(moves), 7)]

        def function(x, chosen=chosen):
            for move in chosen:
                x = move(x)
            return x

        compare(function, (X,), RULES)
