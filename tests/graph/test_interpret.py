"""Domains: one walk, many meanings, with control flow for nothing."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxinfer.graph import Domain, interpret, trace_function

X = jnp.ones((3, 4))


def graph_of(function, *arrays):
    return trace_function(lambda *xs: jax.tree.leaves(function(*xs)), *(jnp.asarray(a).aval for a in arrays or (X,)))


class Inputs(Domain[frozenset]):
    """Which arguments a value depends on."""

    def constant(self, node):
        return frozenset()

    def default(self, node, *inputs):
        return [frozenset().union(*inputs)] * len(node.avals)

    def join(self, a, b):
        return a | b


class Sign(Domain[str]):
    """What is known of the sign of all elements: "+", "0", "-", or "?"."""

    rules: ClassVar = {
        "exp": lambda domain, node, x: ["+"],
        "neg": lambda domain, node, x: [{"+": "-", "-": "+"}.get(x, x)],
        "mul": lambda domain, node, x, y: [domain.product(x, y)],
        "add": lambda domain, node, x, y: [x if y in (x, "0") else y if x == "0" else "?"],
    }

    def product(self, x, y):
        if "0" in (x, y):
            return "0"
        return "?" if "?" in (x, y) else "+" if x == y else "-"

    def constant(self, node):
        return "0" if node.value == 0 else "+" if node.value > 0 else "-"

    def default(self, node, *inputs):
        return ["?"] * len(node.avals)

    def join(self, a, b):
        return a if a == b else "?"


def inputs_of(function, *arrays):
    graph = graph_of(function, *arrays)
    return [set(d) for d in interpret(graph, Inputs(), *(frozenset({i}) for i in range(len(graph.inputs))))]


def test_a_table_with_a_default():
    graph = graph_of(lambda x: (-jnp.exp(x) * jnp.exp(x), jnp.exp(x) + 2.0, jnp.sin(x), jnp.exp(x) * 0.0))
    assert interpret(graph, Sign(), "?") == ["-", "+", "?", "0"]


def test_results_of_inputs_and_constants():
    assert inputs_of(lambda x, y: (y, 2.0, x + y), X, X) == [{1}, set(), {0, 1}]


def test_each_operation_is_visited_once():
    visited = []

    class Count(Inputs):
        def default(self, node, *inputs):
            visited.append(node)
            return super().default(node, *inputs)

    graph = graph_of(lambda x: (jnp.sin(x) + jnp.sin(x), jnp.sin(x)))
    interpret(graph, Count(), frozenset())
    assert visited == list(graph.nodes)


def test_scan_carries_reach_a_fixpoint():
    """Each step moves a dependence one carry on, so it takes as many rounds as there are carries."""

    def function(a, b, c, d, rows):
        def step(carry, row):
            a, b, c, d = carry
            return (a + row, a, b, c), d

        return lax.scan(step, (a, b, c, d), rows)

    scalar = jnp.float32(0)
    assert inputs_of(function, scalar, scalar, scalar, scalar, jnp.ones(3)) == [
        {0, 4},
        {0, 1, 4},
        {0, 1, 2, 4},
        {0, 1, 2, 3, 4},
        {0, 1, 2, 3, 4},
    ]


def test_while_carries_reach_a_fixpoint_and_read_their_constants():
    def function(x, y, limit, step):
        return lax.while_loop(lambda c: c[0].sum() < limit, lambda c: (c[0] + step, c[0]), (x, y))

    scalar = jnp.float32(0)
    assert inputs_of(function, scalar, scalar, scalar, scalar) == [{0, 3}, {0, 1, 3}]


def test_branches_are_joined():
    def function(i, x, y):
        return lax.switch(i, [lambda x, y: (x, y), lambda x, y: (y, y), lambda x, y: (x * 0, y)], x, y)

    assert inputs_of(function, jnp.int32(0), X, X)[0] >= {1, 2}
    assert inputs_of(function, jnp.int32(0), X, X)[1] == {2}


def test_signs_through_loops_and_branches():
    def grows(x):
        return lax.fori_loop(0, 5, lambda i, v: v + jnp.exp(v), jnp.exp(x))

    def alternates(x):
        return lax.scan(lambda c, _: (-c, c), jnp.exp(x), None, length=3)

    graph = graph_of(lambda x: (grows(x), *alternates(x), lax.cond(x.sum() > 0, jnp.exp, lambda y: jnp.exp(-y), x)))
    assert interpret(graph, Sign(), "?") == ["+", "?", "?", "+"]


def test_loops_inside_loops():
    def function(x, y):
        def outer(carry, row):
            inner = lax.while_loop(lambda v: v.sum() < 9, lambda v: v + y.sum(), carry)
            return inner, row

        return lax.scan(outer, x[0], x)

    assert inputs_of(function, X, X)[0] == {0, 1}


def test_elements_and_stacks_of_scanned_arrays():
    class Rank(Domain[int]):
        def constant(self, node):
            return len(node.aval.shape)

        def default(self, node, *inputs):
            return [len(a.shape) for a in node.avals]

        def join(self, a, b):
            assert a == b
            return a

        def element(self, value):
            return value - 1

        def stack(self, value):
            return value + 1

    graph = graph_of(lambda x: lax.scan(lambda c, r: (c, r), x[0], x))
    assert interpret(graph, Rank(), 2) == [1, 2]


def test_rematerialised_calls_compute_their_body():
    graph = graph_of(jax.grad(lambda x: jax.checkpoint(jnp.exp)(x).sum()))
    assert graph.count("remat") == 1
    assert interpret(graph, Inputs(), frozenset({"x"})) == [{"x"}]


def test_a_rule_may_take_over_control_flow():
    class Loops(Inputs):
        rules: ClassVar = {"scan": lambda domain, node, *inputs: [frozenset({"scan"})] * len(node.avals)}

    graph = graph_of(lambda x: lax.scan(lambda c, r: (c + r, None), x[0], x)[0])
    assert interpret(graph, Loops(), frozenset()) == [{"scan"}]


def test_what_a_domain_does_not_say_is_told():
    class Nothing(Domain[int]):
        pass

    class Constants(Nothing):
        def constant(self, node):
            return 0

    class Defaults(Constants):
        def default(self, node, *inputs):
            return [0] * len(node.avals)

    with pytest.raises(NotImplementedError, match="Nothing says nothing about constants"):
        interpret(graph_of(lambda x: x + 1.0), Nothing(), 0)
    with pytest.raises(NotImplementedError, match="Constants has no rule for 'sin'"):
        interpret(graph_of(jnp.sin), Constants(), 0)
    with pytest.raises(NotImplementedError, match="Defaults cannot join values"):
        interpret(graph_of(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)), Defaults(), 0)


def test_the_number_of_inputs_must_be_the_graphs():
    with pytest.raises(ValueError, match="takes 1 inputs, 2 were given"):
        interpret(graph_of(jnp.sin), Inputs(), frozenset(), frozenset())
