"""Malformed graphs are refused, with the operation and the user's line."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxinfer.graph import Graph, GraphError, Node, Value, check, trace_function

X = jnp.ones((2, 3))


def graph_of(function):
    return trace_function(lambda x: jax.tree.leaves(function(x)), X.aval)


def with_nodes(graph, nodes, outputs=None):
    return Graph(graph.inputs, tuple(nodes), outputs or graph.outputs, None, graph.out_avals)


def with_params(graph, op, **params):
    """The graph with other parameters in its only node of the given operation."""
    (old,) = [n for n in graph.nodes if n.op == op]
    new = dataclasses.replace(old, params={**old.params, **params})
    outputs = tuple(Value(new, v.index) if v.node is old else v for v in graph.outputs)
    return with_nodes(graph, [new if n is old else n for n in graph.nodes], outputs)


SCAN = graph_of(lambda x: lax.scan(lambda c, r: (c + r, c * 2), x[0], x)[0])


def test_what_is_traced_is_well_formed():
    for function in (jnp.sin, lambda x: (x, 1.0), lambda x: lax.fori_loop(0, 3, lambda i, v: v + i, x)):
        check(graph_of(function))
    check(SCAN)


def test_an_operand_that_comes_later():
    graph = graph_of(lambda x: jnp.cos(jnp.sin(x)))
    with pytest.raises(GraphError, match=r"cos\[f32\[2,3\]\] from .*test_check.py.* uses .*before it is computed"):
        check(with_nodes(graph, graph.nodes[::-1]))


def test_an_operand_of_another_graph():
    graph, other = graph_of(jnp.sin), graph_of(jnp.exp)
    stray = dataclasses.replace(graph.nodes[0], inputs=(other.outputs[0],))
    with pytest.raises(GraphError, match="before it is computed"):
        check(with_nodes(graph, [stray], (Value(stray, 0),)))


def test_a_result_that_the_operation_does_not_have():
    graph = graph_of(lambda x: jnp.cos(jnp.sin(x)))
    sine, cosine = graph.nodes
    wrong = dataclasses.replace(cosine, inputs=(Value(sine, 1),))
    with pytest.raises(GraphError, match="uses result 1"):
        check(with_nodes(graph, [sine, wrong], (Value(wrong, 0),)))


def test_an_output_that_is_never_computed():
    graph = graph_of(jnp.sin)
    with pytest.raises(GraphError, match="is an output but never computed"):
        check(with_nodes(graph, ()))


def test_an_output_of_another_type_than_promised():
    graph = graph_of(jnp.sin)
    promised = Graph(graph.inputs, graph.nodes, graph.outputs, None, (X.astype(jnp.bfloat16).aval,))
    with pytest.raises(GraphError, match="is an output of type"):
        check(promised)


def test_constants_and_inputs_may_be_outputs():
    check(graph_of(lambda x: (jnp.float32(3), x)))


def test_loop_bodies_keep_their_carries():
    body = SCAN.nodes[-1].params["body"]
    swapped = Graph(body.inputs, body.nodes, tuple(Value(n, 0) for n in body.inputs[:1]) * 2, None)
    wrong = Graph(
        body.inputs,
        body.nodes,
        (Value(_cast(body), 0), body.outputs[1]),
        None,
        (_cast(body).avals[0], body.out_avals[1]),
    )
    check(with_params(SCAN, "scan", body=swapped))
    with pytest.raises(GraphError):
        check(with_params(SCAN, "scan", body=wrong))


def _cast(body):
    node = body.nodes[0]
    return Node(node.op, node.primitive, node.params, node.inputs, (node.aval.update(dtype=jnp.dtype("int32")),))


def test_loop_bodies_take_as_many_operands_as_the_loop():
    body = SCAN.nodes[-1].params["body"]
    short = Graph(body.inputs[:1], (), (Value(body.inputs[0], 0),) * 2, None)
    with pytest.raises(GraphError, match="different numbers of operands"):
        check(with_params(SCAN, "scan", body=short))


def test_while_bodies_keep_their_carries():
    graph = graph_of(lambda x: lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x))
    body = graph.nodes[0].params["body"]
    scalar = graph_of(lambda x: x.sum())
    with pytest.raises(GraphError, match="other types"):
        check(with_params(graph, "while", body=scalar))
    check(with_params(graph, "while", body=body))


def test_branches_agree():
    graph = graph_of(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x))
    (node,) = [n for n in graph.nodes if n.op == "cond"]
    first, second = node.params["branches"]
    check(with_params(graph, "cond", branches=(second, first)))
    with pytest.raises(GraphError, match="other types"):
        check(with_params(graph, "cond", branches=(first, graph_of(lambda x: x.astype(jnp.int32)))))


def test_nested_programs_are_checked_too():
    body = SCAN.nodes[-1].params["body"]
    broken = Graph(body.inputs, (), body.outputs, None, body.out_avals)
    with pytest.raises(GraphError, match="is an output but never computed"):
        check(with_params(SCAN, "scan", body=broken))
