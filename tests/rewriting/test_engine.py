"""The engine: fixpoints, several roots, nested programs, loops of rules, cost, and what it may overlook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import io_callback

from jaxinfer.graph import Value, check, run, trace_function
from jaxinfer.rewriting import Find, Match, Rewriter, Rule, RuleError, known, number, op, var

VECTOR = jnp.ones(4)


def rule(name, before, after, **options):
    return Rule(name, f"{name} → …", before, after, options.pop("tier", "bitwise"), **options)


def graph_of(function, *arrays):
    return trace_function(lambda *xs: jax.tree.leaves(function(*xs)), *(a.aval for a in arrays or (VECTOR,)))


def rewritten(graph, *rules):
    rewriter = Rewriter(rules)
    result = rewriter.fixpoint(graph)
    check(result)
    return result, rewriter


DOUBLE = rule("double-negation", op("neg", op("neg", var("x"))), lambda m, x: x)
SINE = rule("sine-of-negation", op("sin", op("neg", var("x"))), lambda m, x: -jnp.sin(x))
COSINE = rule("cosine-of-negation", op("cos", op("neg", var("x"))), lambda m, x: jnp.cos(x))
TO_COSINE = rule("sine-to-cosine", op("sin", var("x")), lambda m, x: jnp.cos(x))
TO_SINE = rule("cosine-to-sine", op("cos", var("x")), lambda m, x: jnp.sin(x))


# -- fixpoints --------------------------------------------------------------------------------------------------------


def test_rules_run_until_none_fires():
    graph, rewriter = rewritten(graph_of(lambda x: functools.reduce(lambda y, _: lax.neg(y), range(9), x)), DOUBLE)
    assert graph.count("neg") == 1 and graph.size == 1
    assert rewriter.log.fired["double-negation"] >= 4 and graph.origin is None


def test_one_rule_makes_way_for_another():
    graph, rewriter = rewritten(graph_of(lambda x: -jnp.sin(-x)), SINE, DOUBLE)
    assert [n.op for n in graph.nodes] == ["sin"]
    assert set(rewriter.log.fired) == {"sine-of-negation", "double-negation"}


def test_nothing_to_do_gives_the_very_same_graph():
    graph = graph_of(lambda x: jnp.tanh(x))
    assert rewritten(graph, DOUBLE, SINE)[0] is graph
    assert graph.origin is not None


def test_the_log_names_the_users_lines():
    _, rewriter = rewritten(graph_of(lambda x: lax.neg(lax.neg(x))), DOUBLE)
    (line,) = rewriter.log.lines["double-negation"]
    assert "test_engine.py" in line


def test_declining_leaves_the_program_alone():
    graph = graph_of(lambda x: -x)
    assert rewritten(graph, rule("declines", op("neg", var("x")), lambda m, x: None))[0] is graph


def test_the_first_rule_that_takes_a_node_wins_and_others_get_the_next_chance():
    shy = rule("shy", op("neg", op("neg", var("x"))), lambda m, x: None)
    assert rewritten(graph_of(lambda x: lax.neg(lax.neg(x))), shy, DOUBLE)[0].size == 0


def test_an_output_may_become_an_input_or_a_constant():
    zero = rule("zero", op("mul", var("x"), number(0)), lambda m, x: jnp.zeros_like(x))
    graph, _ = rewritten(graph_of(lambda x: (lax.neg(lax.neg(x)), x * jnp.zeros(4))), DOUBLE, zero)
    assert graph.outputs[0].node is graph.inputs[0]
    np.testing.assert_array_equal(run(graph, {}, VECTOR)[1], 0)


def test_what_nothing_needs_any_more_is_dropped_but_effects_stay():
    def function(x):
        jax.debug.print("seen {}", x.sum())
        return lax.neg(lax.neg(jnp.exp(x))), jnp.tanh(x) * 0 + 1

    gone = rule("forget", op("mul", op("tanh", var("x")), number(0)), lambda m, x: jnp.zeros_like(x))
    graph, _ = rewritten(graph_of(function), DOUBLE, gone)
    assert graph.count("tanh", "neg") == 0 and graph.has_effects and graph.count("reduce_sum") == 1


def test_equal_results_become_one_node():
    graph, _ = rewritten(graph_of(lambda x: (jnp.cos(-x), jnp.cos(x))), COSINE)
    assert graph.count("cos") == 1 and graph.outputs[0] == graph.outputs[1]


def test_weak_types_and_dtypes_of_the_outputs_stay():
    graph = trace_function(lambda x: [lax.neg(lax.neg(x))], jnp.asarray(2.0).aval.update(weak_type=True))
    (result,) = jax.eval_shape(lambda x: run(rewritten(graph, DOUBLE)[0], {}, x), 1.0)
    assert result.weak_type


# -- rules of several roots -------------------------------------------------------------------------------------------


def _find_parallel_products(graph, node):
    """x @ v and x @ w, both weights known, at the first of the two."""
    x, w = node.inputs
    if not graph.is_known(w):
        return None
    products = [u for u, place in graph.uses[x] if u is not None and u.op == "dot_general" and place == 0]
    products = [u for u in products if graph.is_known(u.inputs[1]) and u.params == node.params]
    if len(products) < 2 or products[0] is not node:
        return None
    weights = {f"w{i}": u.inputs[1] for i, u in enumerate(products)}
    return Match(graph, tuple(Value(u, 0) for u in products), values={"x": x, **weights})


def _merged_product(m, x, **weights):
    sizes = [w.shape[1] for w in weights.values()]
    return jnp.split(x @ jnp.concatenate(list(weights.values()), 1), np.cumsum(sizes)[:-1], 1)


MERGE = rule("merge-products", Find(("dot_general",), _find_parallel_products), _merged_product, tier="reassociate")


def test_several_roots_are_replaced_at_once():
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((4, n)).astype(np.float32) for n in (2, 3, 5))

    def function(x):
        first = jnp.tanh(x @ a)
        return first, x @ b + 1, jnp.exp(x @ c)

    x = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    graph, rewriter = rewritten(graph_of(function, x), MERGE)
    assert graph.count("dot_general") == 1 and rewriter.log.fired["merge-products"] == 1
    for got, want in zip(run(graph, {}, x), function(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_roots_whose_values_come_later_are_left_alone():
    """The second root needs what is computed from the first one: replacing both at the first is impossible."""

    def find(graph, node):
        first, second = [n for n in graph.nodes if n.op == "sin"]
        if node is not first:
            return None
        return Match(graph, (Value(first, 0), Value(second, 0)), values={"x": first.inputs[0], "y": second.inputs[0]})

    pair = rule("pair", Find(("sin",), find), lambda m, x, y: (jnp.cos(x), jnp.cos(y)))
    graph = graph_of(lambda x: jnp.sin(jnp.sin(x) + 1))
    result, rewriter = rewritten(graph, pair)
    assert result is graph and not rewriter.log.fired


def _pair_of_sines(gap):
    """Joins two sines; their operands may be made between the two, by operations that ``gap`` says."""

    def find(graph, node):
        sines = [n for n in graph.nodes if n.op == "sin"]
        if len(sines) < 2 or node is not sines[0]:
            return None
        return Match(
            graph, tuple(Value(n, 0) for n in sines), values={f"x{i}": n.inputs[0] for i, n in enumerate(sines)}
        )

    pair = rule("pair", Find(("sin",), find), lambda m, **xs: tuple(jnp.cos(x) for x in xs.values()))

    def function(x):
        first = jnp.sin(x)
        return jnp.exp(first), jnp.sin(gap(x))

    return rewritten(graph_of(function), pair)


def test_what_another_root_needs_is_computed_first():
    graph, rewriter = _pair_of_sines(lambda x: jnp.tanh(x) + 1)
    assert [n.op for n in graph.nodes] == ["tanh", "add", "cos", "cos", "exp"]
    assert rewriter.log.fired["pair"] == 1
    np.testing.assert_allclose(run(graph, {}, VECTOR)[1], np.cos(np.tanh(VECTOR) + 1), rtol=1e-6)


def test_effects_are_not_brought_forward():
    def gap(x):
        return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def loud(x):
        return io_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ordered=True)

    assert _pair_of_sines(gap)[1].log.fired["pair"] == 1
    graph, rewriter = _pair_of_sines(loud)
    assert not rewriter.log.fired and graph.count("sin") == 2


# -- nested programs --------------------------------------------------------------------------------------------------


def nested(x):
    def step(carry, row):
        return lax.neg(lax.neg(carry)) + row, lax.while_loop(lambda v: v.sum() < 9, lambda v: jnp.cos(-v) + v + 1, row)

    carry, rows = lax.scan(step, x[0], x)
    branch = lax.cond(x.sum() > 0, lambda y: jnp.sin(-y), lambda y: lax.neg(lax.neg(y)), carry)
    return carry, rows, branch, jax.checkpoint(lambda y: lax.neg(lax.neg(y)))(branch)


def test_nested_programs_are_rewritten_where_they_stand():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    graph, rewriter = rewritten(graph_of(nested, x), DOUBLE, SINE, COSINE)
    assert graph.count("neg") == 1
    assert rewriter.log.fired["double-negation"] == 3
    for got, want in zip(run(graph, {}, x), nested(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_body_shared_by_two_loops_is_rewritten_once():
    def body(c, _):
        return lax.neg(lax.neg(c)) * 2, None

    graph = graph_of(lambda x: [lax.scan(body, x, None, length=3)[0], lax.scan(body, x + 1, None, length=3)[0]])
    result, _ = rewritten(graph, DOUBLE)
    assert result.count("neg") == 0 and result.count("scan") == 2


# -- offers -----------------------------------------------------------------------------------------------------------


def test_offers_are_listed_and_chosen():
    offer = rule("sine-as-cosine", op("sin", var("x")), lambda m, x: jnp.cos(np.pi / 2 - x), kind="offer", tier="lossy")
    graph = graph_of(lambda x: (jnp.sin(x), jnp.sin(jnp.exp(x)), lax.map(jnp.sin, x)))
    rewriter = Rewriter([offer])
    assert rewriter.fixpoint(graph) is graph
    offers = rewriter.offers(graph)
    assert len(offers) == 3 and {n.op for n in offers} == {"sin"}
    first = next(n for n in graph.nodes if n.op == "sin")
    result = rewriter.apply(graph, {first: offers[first][0]})
    assert result.count("sin") == 2 and result.count("cos") == 1 and rewriter.log.fired == {"sine-as-cosine": 1}
    everything = rewriter.apply(graph, {n: forms[0] for n, forms in offers.items()})
    assert everything.count("sin") == 0
    for got, want in zip(run(everything, {}, VECTOR), run(graph, {}, VECTOR), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert rewriter.apply(graph, {}) is graph


# -- wrong rules ------------------------------------------------------------------------------------------------------


def test_rules_that_undo_each_other_are_named():
    with pytest.raises(RuleError, match="never ends: cosine-to-sine, sine-to-cosine keep undoing"):
        Rewriter([TO_COSINE, TO_SINE, DOUBLE]).fixpoint(graph_of(lambda x: lax.neg(lax.neg(jnp.sin(x)))))


def test_a_rule_that_grows_forever_is_named():
    grow = rule("grow", op("sin", var("x")), lambda m, x: jnp.sin(x + 1))
    with pytest.raises(RuleError, match="never ends: grow keep"):
        Rewriter([grow]).fixpoint(graph_of(jnp.sin))


@pytest.mark.parametrize("after", [lambda m, x: x[:2], lambda m, x: x.astype(jnp.int32), lambda m, x: (x, x)])
def test_results_of_another_type_or_number_are_refused(after):
    with pytest.raises(RuleError, match=r"rule 'wrong' at neg\[.*test_engine.py.* was needed"):
        Rewriter([rule("wrong", op("neg", var("x")), after)]).fixpoint(graph_of(lambda x: -x))


def test_an_error_in_a_replacement_is_the_authors_to_see():
    def after(m, x):
        raise KeyError("a slip")

    with pytest.raises(RuleError, match=r"rule 'slips' fails at neg\[.*test_engine.py.*KeyError: 'a slip'") as caught:
        Rewriter([rule("slips", op("neg", var("x")), after)]).fixpoint(graph_of(lambda x: -x))
    assert isinstance(caught.value.__cause__, KeyError)


def test_impure_operations_are_never_replaced():
    barrier = rule("drop-barrier", op("optimization_barrier", var("x")), lambda m, x: x)
    graph = graph_of(lambda x: lax.optimization_barrier(x))
    assert rewritten(graph, barrier)[0] is graph


def test_replacements_that_read_values_are_traced_for_each_value():
    def after(m, x, w):
        return x * float(m.known("w").sum())

    scale = rule("sum-of-known", op("add", var("x"), known("w")), after, reads_values=True, tier="lossy")
    a, b = np.full(4, 1, np.float32), np.full(4, 2, np.float32)
    graph, _ = rewritten(graph_of(lambda x: (x + a, x + b)), scale)
    first, second = run(graph, {}, VECTOR)
    assert (first[0], second[0]) == (4, 8)


def test_alike_found_matches_are_traced_once():
    traced = []

    def find(graph, node):
        m = Match(graph, (Value(node, 0),), {"x": node.inputs[0]})
        m.alike = node.params["axis"]
        return m

    def after(m, x):
        traced.append(m.alike)
        return lax.rev(lax.cumsum(lax.rev(x, (m.alike,)), m.alike), (m.alike,))

    backwards = rule("backwards", Find(("cummax",), find), after, tier="lossy")
    x = jnp.arange(9.0).reshape(3, 3)

    def program(x):
        return [lax.cummax(x + i, axis) for i in range(4) for axis in (0, 1)]

    graph, rewriter = rewritten(graph_of(program, x), backwards)
    assert rewriter.log.fired == {"backwards": 8} and sorted(traced) == [0, 1]
    for i, (down, right) in enumerate(zip(*[iter(run(graph, {}, x))] * 2)):
        np.testing.assert_array_equal(down, np.cumsum((x + i)[::-1], 0)[::-1])
        np.testing.assert_array_equal(right, np.cumsum((x + i)[:, ::-1], 1)[:, ::-1])


# -- cost -------------------------------------------------------------------------------------------------------------


class Asked:
    """A rule that never fires and counts how often it is asked."""

    def __init__(self, operation):
        self.count = 0
        self.rule = rule("asked", Find((operation,), self.find), lambda m: None)

    def find(self, graph, node):
        self.count += 1
        return


def queries(length, early):
    """How often the links of a chain are asked about, with one rewrite before or after them."""

    def function(x):
        y = lax.neg(lax.neg(jnp.exp(x))) if early else jnp.exp(x)
        for i in range(length):
            y = jnp.tanh(y + i)
        return y if early else jnp.exp(lax.neg(lax.neg(y)))

    asked = Asked("tanh")
    Rewriter([asked.rule, DOUBLE]).fixpoint(graph_of(function))
    return asked.count


def test_the_number_of_questions_grows_with_the_program_and_not_faster():
    assert queries(400, early=True) == 2 * queries(200, early=True) <= 2 * 400
    assert queries(400, early=False) - queries(200, early=False) == 200, "what lies before a change is not asked again"


def test_an_operation_moves_past_as_many_others_as_there_are():
    past = rule("negation-after", op("sin", op("neg", var("x"))), lambda m, x: -jnp.sin(x))
    graph, _ = rewritten(graph_of(lambda x: functools.reduce(lambda y, _: jnp.sin(y), range(230), -x)), past)
    assert graph.nodes[-1].op == "neg" and graph.size == 231


def test_many_rewrites_far_apart_cost_a_few_passes():
    asked = Asked("tanh")

    def function(x):
        for i in range(200):
            x = lax.neg(lax.neg(jnp.tanh(x + i)))
        return x

    Rewriter([asked.rule, DOUBLE]).fixpoint(graph_of(function))
    assert asked.count <= 3 * 200


# -- nothing is overlooked --------------------------------------------------------------------------------------------

ONE_USE = rule("absorb", op("exp", op("tanh", var("x"), once=True)), lambda m, x: jnp.cos(x))
RULES = (
    DOUBLE,
    SINE,
    COSINE,
    ONE_USE,
    rule("add-zero", op("add", var("x"), number(0)), lambda m, x: x),
    rule("cancel", op("sub", var("x"), var("x")), lambda m, x: jnp.zeros_like(x)),
    rule("forget", op("atan", var("x")), lambda m, x: jnp.zeros_like(x)),
    rule("times-zero", op("mul", var("x"), number(0)), lambda m, x: jnp.zeros_like(x)),
    rule("add-negated", op("add", var("x"), op("neg", var("y"))), lambda m, x, y: x - y),
    rule("pull-negation", op("mul", var("x"), op("neg", var("y"))), lambda m, x, y: -(x * y)),
    rule("nested", op("sub", op("sub", op("sub", var("a"), var("b")), var("c")), var("b")), lambda m, a, b, c: a - c),
)
UNARY = {"neg": lax.neg, "sin": jnp.sin, "cos": jnp.cos, "exp": jnp.exp, "tanh": jnp.tanh, "atan": jnp.atan}
BINARY = {"add": lax.add, "sub": lax.sub, "mul": lax.mul}
STEPS = st.lists(
    st.tuples(st.sampled_from([*UNARY, *BINARY, "neg", "sub"]), st.integers(0, 50), st.integers(0, 50)),
    min_size=1,
    max_size=24,
)


def build(steps, outputs):
    def function(x, y):
        values = [x, y, jnp.zeros_like(x)]
        for name, i, j in steps:
            # Recent values are taken more often, so that patterns of some depth come up.
            a, b = values[-1 - i % min(len(values), 5)], values[-1 - j % len(values)]
            values.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
        return [values[-1 - k % len(values)] for k in outputs]

    return graph_of(function, VECTOR, VECTOR)


def exhausted(graph):
    """The rules that could still fire, asking every rule at every node."""
    return [r.name for node in graph.nodes for r in RULES if r.match(graph, node) is not None]


# One use of tanh(x) dies, and the other, which nothing else touches, becomes the only one.
LAST_USE = ([("tanh", 2, 0), ("exp", 0, 0), ("atan", 1, 0)], [0, 1])


@example(*LAST_USE)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(STEPS, st.lists(st.integers(0, 50), min_size=1, max_size=3))
def test_no_rewrite_is_overlooked(steps, outputs):
    graph = build(steps, outputs)
    result, _ = rewritten(graph, *RULES)
    assert exhausted(result) == []


@example(*LAST_USE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(STEPS, st.lists(st.integers(0, 50), min_size=1, max_size=3))
def test_incremental_rewriting_equals_asking_everywhere(steps, outputs):
    graph = build(steps, outputs)
    everywhere = graph
    rewriter = Rewriter(RULES)
    while True:
        new = rewriter._walk(everywhere, rewriter._first_replacement, lambda g: g, None).run()
        if new is everywhere:
            break
        everywhere = new
    result, _ = rewritten(graph, *RULES)
    assert str(result) == str(everywhere)
