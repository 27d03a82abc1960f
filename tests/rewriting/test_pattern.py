"""What patterns match and what they bind."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.graph import Value, trace_function
from jaxinfer.rewriting import Match, is_float, known, number, op, var

X = jnp.ones((2, 3))


def last(function, *arrays):
    """The graph of a function and the value it returns."""
    graph = trace_function(lambda *xs: [function(*xs)], *(jnp.asarray(a).aval for a in arrays or (X,)))
    return graph, graph.outputs[0]


def match(pattern, function, *arrays):
    graph, value = last(function, *arrays)
    m = Match(graph, (value,))
    return m if pattern.match(value, m) else None


def test_operands_bind_in_order_of_mention():
    m = match(op("sub", var("a"), var("b"), name="difference"), lambda x, y: y - x, X, X)
    assert list(m.values) == ["a", "b"]
    assert [v.node.params["position"] for v in m.values.values()] == [1, 0]
    assert m.nodes["difference"].op == "sub" and m["a"] == m.values["a"]


def test_the_same_name_is_the_same_value():
    pattern = op("mul", var("a"), var("a"))
    assert match(pattern, lambda x, y: x * x, X, X)
    assert not match(pattern, lambda x, y: x * y, X, X)


def test_commutative_operations_match_either_way_and_others_do_not():
    assert match(op("add", op("neg", var("a")), var("b")), lambda x, y: y + -x, X, X)
    assert not match(op("sub", op("neg", var("a")), var("b")), lambda x, y: y - -x, X, X)


def test_a_failed_order_leaves_no_binding():
    # Tried as written, "a" takes the first operand before the second one fails.
    m = match(op("add", var("a"), op("neg", var("b"))), lambda x, y: -x + y, X, X)
    assert m["a"].node.params["position"] == 1 and m["b"].node.params["position"] == 0


def test_several_operations_any_operands_and_conditions():
    assert match(op(("sin", "cos"), var("x")), jnp.cos)
    assert match(op("concatenate"), lambda x: jnp.concatenate([x, x, x]))
    assert not match(op("sub", var("a")), lambda x: x - x)
    assert not match(op("neg", var("x"), where=lambda n: n.aval.shape == ()), lambda x: -x)
    assert match(op("neg", var("x", is_float)), lambda x: -x)
    assert not match(op("neg", var("x", is_float)), lambda x: -x, jnp.arange(3))


def test_one_name_for_two_different_nodes_does_not_match():
    pattern = op("add", op("neg", var("a"), name="n"), op("neg", var("b"), name="n"))
    assert not match(pattern, lambda x, y: -x + -y, X, X)


def test_once_needs_a_single_use():
    pattern = op("sin", op("neg", var("x"), once=True))
    assert match(pattern, lambda x: jnp.sin(-x))
    graph = trace_function(lambda x: [jnp.sin(-x), jnp.cos(-x)], X.aval)
    assert not pattern.match(graph.outputs[0], Match(graph, (graph.outputs[0],)))
    used_twice_by_one = trace_function(lambda x: [jnp.sin(-x), -x], X.aval)
    assert not pattern.match(used_twice_by_one.outputs[0], Match(used_twice_by_one, ()))


def test_known_takes_what_depends_on_constants_alone():
    w = np.ones((2, 3), np.float32)
    assert match(op("mul", var("x"), known("w")), lambda x: x * w)
    assert match(op("mul", var("x"), known("w")), lambda x: x * jnp.sin(w))
    assert not match(op("mul", op("neg", var("x")), known("w")), lambda x: -x * x)
    m = match(op("mul", var("x"), known("w", lambda v: v.shape == (2, 3))), lambda x: x * (2 * w))
    np.testing.assert_array_equal(
        match(op("mul", var("x"), known("w")), lambda x: x * (w * 3).astype("f")).known("w"), 3
    )
    assert m["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("wanted", "constant", "matches"),
    [
        (0, 0.0, True),
        (0, -0.0, False),
        (-0.0, -0.0, True),
        (1, 1.0, True),
        (1, np.ones((2, 3), np.float32), True),
        (1, np.array([1, 1, 2], np.float32), False),
        (0, np.zeros((0, 3), np.float32), False),
        (2, np.full(3, 2, jnp.bfloat16), True),
        (1, np.nan, False),
    ],
)
def test_numbers(wanted, constant, matches):
    graph = trace_function(lambda x: [x * constant if np.ndim(constant) == 0 else jnp.sin(constant)], X.aval)
    value = next(v for n in graph.nodes for v in n.inputs if v.node.is_const)
    assert number(wanted).match(value, Match(graph, ())) is matches


def test_integers_and_booleans_are_numbers_too():
    graph = trace_function(lambda i: [i + 1], jnp.arange(3).aval)
    assert op("add", var("i"), number(1)).match(graph.outputs[0], Match(graph, ()))


def test_depth_counts_operations():
    assert var("x").depth() == 0
    assert op("neg", var("x")).depth() == 1
    assert op("add", op("neg", op("sin", var("x"))), var("y")).depth() == 3


def test_inputs_and_constants_are_no_operations():
    graph = trace_function(lambda x: [x], X.aval)
    assert not op("neg").match(Value(graph.inputs[0], 0), Match(graph, ()))
