"""Nodes and graphs: what is one node, what is dropped, what a program is called."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.graph import GraphBuilder, Value, is_inline, run, trace_function
from jaxinfer.graph.node import INLINE_ELEMENTS, param_key, params_key

X = jnp.ones((2, 3))


def graph_of(function, *arrays):
    return trace_function(lambda *xs: jax.tree.leaves(function(*xs)), *(jnp.asarray(a).aval for a in arrays or (X,)))


def ops(graph):
    return [n.op for n in graph.nodes]


# -- hash-consing -----------------------------------------------------------------------------------------------------


def test_equal_operations_are_one_node():
    graph = graph_of(lambda x: (jnp.sin(x) + 1, jnp.sin(x) + 1))
    assert ops(graph) == ["sin", "add"] and graph.outputs[0] == graph.outputs[1]


def test_operations_that_differ_are_two_nodes():
    assert ops(graph_of(lambda x: (x.sum(0), x.sum(1)))) == ["reduce_sum", "reduce_sum"]
    assert ops(graph_of(lambda x, y: (x - y, y - x), X, X)) == ["sub", "sub"]
    assert ops(graph_of(lambda x: (x * 1.0, x * np.float32(1), x * 2))).count("mul") >= 2


def test_the_sign_of_zero_tells_constants_apart():
    graph = graph_of(lambda x: (x + 0.0, x + -0.0))
    assert ops(graph) == ["add", "add"] and len(graph.constants) == 2


def test_contexts_tell_operations_apart():
    def function(x):
        with jax.threefry_partitionable(True):
            a = jax.random.bits(jax.random.wrap_key_data(x), (2,))
        with jax.threefry_partitionable(False):
            b = jax.random.bits(jax.random.wrap_key_data(x), (2,))
        return a, b

    assert graph_of(function, jnp.zeros(2, jnp.uint32)).count("random_bits") == 2


def test_small_constants_are_merged_by_content_and_large_ones_by_identity():
    small, large = np.ones(3, np.float32), np.ones((2, 300), np.float32)
    twice = graph_of(lambda x: (x * small, x * small.copy(), jnp.dot(x.T, large), jnp.dot(x.T, large)))
    assert sum(c.aval.shape == (3,) for c in twice.constants) == 1
    assert sum(c.aval.shape == (2, 300) for c in twice.constants) == 1
    assert [w.aval.shape for w in twice.weights] == [(2, 300)]


def test_constants_of_two_programs_are_merged_when_they_meet():
    first, second = (graph_of(lambda x: x * 0.5) for _ in range(2))
    builder = GraphBuilder()
    x = builder.input(first.inputs[0].aval)
    halves = [
        builder.copy(g.nodes[0], [v if v.node.is_const else x for v in g.nodes[0].inputs]) for g in (first, second)
    ]
    assert halves[0] is halves[1]


def test_what_is_small():
    def const(n, dtype=np.float32):
        return GraphBuilder().const(np.zeros(n, dtype)).node

    assert is_inline(const(INLINE_ELEMENTS)) and not is_inline(const(INLINE_ELEMENTS + 1))
    assert not is_inline(GraphBuilder().const(jax.random.key(0)).node)


def test_impure_operations_are_never_merged():
    def function(x):
        for _ in range(2):
            jax.debug.print("same {}", x.sum())
        return lax.rng_uniform(0.0, 1.0, (2,)), lax.rng_uniform(0.0, 1.0, (2,))

    graph = graph_of(function)
    assert graph.count("rng_uniform") == 2 and graph.has_effects
    assert sum(bool(n.effects) for n in graph.nodes) == 2
    assert not any(n.is_pure for n in graph.nodes if n.op == "rng_uniform")


def test_equal_loops_are_one_node():
    def loop(x):
        return lax.scan(lambda c, r: (c * 2 + r, None), x[0], x)[0]

    assert graph_of(lambda x: (loop(x), loop(x))).count("scan") == 1


def test_loops_over_different_arrays_of_one_shape_are_two():
    first, second = np.ones((3, 100), np.float32), np.zeros((3, 100), np.float32)

    def loop(x, w):
        return lax.scan(lambda c, r: (c + (r @ w).sum(), None), 0.0, x)[0]

    assert graph_of(lambda x: (loop(x, first), loop(x, second))).count("scan") == 2


class Times:
    """A callback that does not say in its text which one it is."""

    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return "Times"

    def __call__(self, x):
        return np.asarray(x) * self.factor


def test_loops_over_different_callbacks_are_two():
    def loop(x, callback):
        shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        return lax.scan(lambda c, r: (jax.pure_callback(callback, shape, c), None), x[0], x)[0]

    graph = graph_of(lambda x: (loop(x, Times(2)), loop(x, Times(3))))
    assert [float(y[0]) for y in run(graph, {}, X)] == [4, 9]


def test_loops_over_kept_calls_that_hold_different_arrays_are_two():
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def loop(x, w):
        product = jax.jit(lambda r: r @ w, in_shardings=placed)
        return lax.scan(lambda c, r: (c + product(r).sum(), None), 0.0, x)[0]

    graph = graph_of(lambda x: (loop(x, np.ones((3, 4), "f")), loop(x, np.zeros((3, 4), "f"))))
    assert list(map(float, run(graph, {}, X))) == [24, 0]


def test_loops_that_draw_at_random_are_never_merged():
    def loop(x):
        return lax.scan(lambda c, r: (c + lax.rng_uniform(0.0, 1.0, (3,)), None), x[0], x)[0]

    graph = graph_of(lambda x: (loop(x), loop(x)))
    assert graph.count("scan") == 2 and not graph.nodes[-1].is_pure
    first, second = jax.jit(lambda x: run(graph, {}, x))(X)
    assert not np.array_equal(first, second)


# -- dead code, uses, what is known -----------------------------------------------------------------------------------


def test_what_nothing_needs_is_dropped():
    graph = graph_of(lambda x: (jnp.cos(jnp.sin(x)), jnp.exp(x))[1])
    assert ops(graph) == ["exp"]


def test_uses_count_every_operand_and_output():
    graph = graph_of(lambda x: (x * x, -x))
    x = Value(graph.inputs[0], 0)
    mul, neg = graph.nodes
    assert graph.uses[x] == [(mul, 0), (mul, 1), (neg, 0)]
    assert graph.uses[Value(neg, 0)] == [(None, 1)]


def test_what_is_known():
    w = np.ones((2, 3), np.float32)
    graph = graph_of(lambda x: x * jnp.sin(jnp.asarray(w) * 2) + lax.rng_uniform(0.0, 1.0, (2, 3)))
    known = [n.op for n in graph.nodes if n in graph.known]
    assert known == ["mul", "sin"], "what is drawn at random is not known, though it depends on constants only"
    assert graph.is_known(graph.nodes[0].inputs[0]) and not graph.is_known(graph.outputs[0])


def test_size_and_counts_look_into_nested_programs():
    graph = graph_of(
        lambda x: lax.scan(lambda c, r: (lax.cond(c.sum() > 0, jnp.sin, jnp.cos, c) + r, None), x[0], x)[0]
    )
    assert graph.count("sin", "cos") == 2 and graph.count("scan", "cond") == 2
    assert graph.size == len(list(graph.walk()))
    (scan,) = [n for n in graph.nodes if n.op == "scan"]
    assert [n.op for n in graph.walk()].index("scan") < [n.op for n in graph.walk()].index("cond")
    assert [g.size for g in scan.subgraphs] == [scan.params["body"].size]


def test_constants_of_nested_programs_are_found():
    w = np.ones((3, 100), np.float32)
    graph = graph_of(lambda i, x: lax.switch(i, [lambda y: y @ w, lambda y: y @ w * 2], x), jnp.int32(0), X)
    assert [c.aval.shape for c in graph.weights] == [(3, 100)]


# -- building by hand -------------------------------------------------------------------------------------------------


def test_a_copy_with_the_same_operands_is_the_same_node():
    graph = graph_of(lambda x: jnp.sin(x) + 1)
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    sine, add = graph.nodes
    assert builder.copy(sine, sine.inputs) is sine
    moved = builder.copy(add, [Value(graph.inputs[0], 0), add.inputs[1]])
    assert moved is not add and moved.source is add.source and moved.context is add.context
    assert builder.build([Value(moved, 0)]).nodes == (moved,)


def test_values_and_nodes_cannot_be_changed():
    (node,) = graph_of(jnp.sin).nodes
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.op = "cos"
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph_of(jnp.sin).nodes = ()


# -- keys and names ---------------------------------------------------------------------------------------------------


def test_equal_numbers_of_different_kinds_are_different_parameters():
    keys = {param_key(v) for v in (1, 1.0, True, np.float32(1), 1j, 0.0, -0.0, 0, False)}
    assert len(keys) == 9
    assert param_key((1, (True,))) != param_key((True, (1,)))
    assert params_key({"a": 1, "_hidden": 2}) == params_key({"a": 1})


def test_fingerprints_are_equal_for_equal_programs():
    def function(x):
        return lax.scan(lambda c, r: (jnp.sin(c) + r, c), x[0], x)

    name = graph_of(function).fingerprint
    assert name == graph_of(function).fingerprint
    assert name != graph_of(lambda x: lax.scan(lambda c, r: (jnp.cos(c) + r, c), x[0], x)).fingerprint
    assert name != graph_of(function, jnp.ones((3, 3))).fingerprint
    assert graph_of(lambda x: x * 2.0).fingerprint != graph_of(lambda x: x * 3.0).fingerprint


def test_fingerprints_are_the_same_in_another_process():
    program = (
        "import jax, jax.numpy as jnp; from jaxinfer.graph import trace_function;"
        "print(trace_function(lambda x: [jax.lax.scan(lambda c, r: (jnp.sin(c) + r * 2, c), x[0], x)[0],"
        " jax.lax.dot(x, x.T, precision='highest')], jnp.ones((2, 3)).aval).fingerprint)"
    )
    found = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(found) == 1 and len(found.pop().strip()) == 32


def test_programs_with_opaque_parameters_have_no_fingerprint_but_a_text():
    graph = graph_of(lambda x: jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct((2, 3), jnp.float32), x))
    assert graph.fingerprint is None
    assert "pure_callback" in str(graph)


def test_the_text_names_operations_types_and_constants():
    text = str(graph_of(lambda x: jnp.sin(x) * 2))
    assert text.splitlines()[0] == "(a0:float32[2, 3])"
    assert "sin float32[2, 3]" in text and "const float32[]~ 2.0" in text.replace("[] ", "[]~ ") and "return v" in text
    assert repr(graph_of(jnp.sin).nodes[0]) == "sin[f32[2,3]]"


def test_programs_whose_calls_hold_arrays_have_no_fingerprint():
    """Their text does not show the arrays, and programs that differ in them alone must not be taken for each other."""

    def held(values):
        return jax.make_jaxpr(lambda x: jnp.dot(x, np.asarray(values, np.float32)))(jnp.ones(2))

    assert str(held([1.0, 2.0])) == str(held([3.0, 4.0]))
    builder = GraphBuilder()
    node = builder.apply(
        lax.neg_p, {"jaxpr": held([1.0, 2.0])}, [x := builder.input(jax.typeof(jnp.ones(2)))], [x.aval]
    )
    assert builder.build([Value(node, 0)]).fingerprint is None
