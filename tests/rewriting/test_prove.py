"""The prover accepts rules that hold and rejects those that do not, saying what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.graph import Value, interpret, trace_function
from jaxinfer.rewriting import Find, Match, Rule, RuleError, known, number, op, var
from jaxinfer.rewriting.case import ProofError
from jaxinfer.rewriting.evaluate import Integers, NotExact, OpByOp, Reals
from jaxinfer.rewriting.prove import DTYPES, prove, prove_all
from jaxinfer.rewriting.sampler import Sampler


def dot(a, b):
    return op("dot_general", a, b, where=lambda n: n.params["dimension_numbers"] == (((1,), (0,)), ((), ())))


def chain_cases(s):
    a, b, c, d = s.shape(4)
    yield lambda x, y, z: (x @ y) @ z, (s.array(a, b), s.array(b, c), s.array(c, d))


def one_array(function):
    def cases(s):
        yield function, (s.array(*s.shape(2)),)

    return cases


def floats(function):
    def cases(s):
        s.floating_only()
        yield function, (s.array(*s.shape(2)),)

    return cases


def rule(before, after, tier="bitwise", **options):
    options.setdefault("name", "tried")
    return Rule(note="before → after", before=before, after=after, tier=tier, **options)


CHAIN = rule(
    dot(dot(var("x"), var("y")), var("z")),
    lambda m, x, y, z: x @ (y @ z),
    "reassociate",
    kind="offer",
    name="chain",
    cases=chain_cases,
    finite=True,
)
DOUBLE_NEGATION = rule(
    op("neg", op("neg", var("x"))), lambda m, x: x, name="double", cases=one_array(lambda x: lax.neg(lax.neg(x)))
)


# -- rules that hold --------------------------------------------------------------------------------------------------


def test_a_true_rule_is_proved_in_every_way():
    proof = prove(CHAIN)
    assert set(proof.runs) == set(DTYPES)
    assert proof.exact == 1 and proof.derivatives == 1 and proof.edges >= 1
    assert set(proof.error_ratio) == set(DTYPES) - {"int32"}
    assert proof.special == 4 * 4 - 2, (
        "zeros and denormals, twice, in four dtypes, but no denormals in bfloat16; no NaN"
    )


def test_a_bitwise_rule_is_proved_bit_by_bit():
    proof = prove(DOUBLE_NEGATION, trials=2)
    assert proof.runs["float16"] == 2 and not proof.error_ratio
    assert proof.special == 2 * (4 * (4 + 3) - 2)


def test_a_rule_on_known_arrays():
    def cases(s):
        rows, columns = s.shape(2)
        yield lambda x, w, scale: (x @ w) * scale, (s.array(3, rows), s.frozen(rows, columns), s.frozen(columns))

    scale_into_weights = rule(
        op("mul", dot(var("x"), known("w")), op("broadcast_in_dim", known("scale"))),
        lambda m, x, w, scale: x @ (w * scale),
        "reassociate",
        cases=cases,
    )
    proof = prove(scale_into_weights)
    assert proof.exact == 1 and set(proof.runs) == set(DTYPES)


def test_a_case_may_leave_out_dtypes():
    def cases(s):
        s.only("float32", "float64")
        yield lambda x: lax.neg(lax.neg(x)), (s.array(3),)

    proof = prove(rule(op("neg", op("neg", var("x"))), lambda m, x: x, cases=cases))
    assert set(proof.runs) == {"float32", "float64"}


def test_a_loop_without_reverse_mode_is_compared_in_forward_mode():
    def cases(s):
        s.floating_only()

        def halve(x, count):
            return lax.while_loop(lambda c: c[1] < count, lambda c: (lax.neg(lax.neg(c[0] / 2)), c[1] + 1), (x, 0))[0]

        yield halve, (s.array(4), jnp.int32(3))

    proof = prove(rule(op("neg", op("neg", var("x"))), lambda m, x: x, cases=cases))
    assert proof.derivatives == 1


def test_prove_all_tells_all_failures():
    never = rule(op("neg", var("x")), lambda m, x: None, name="never", cases=one_array(lambda x: -x))
    bare = rule(op("neg", var("x")), lambda m, x: -x, name="bare")
    assert [p.rule for p in prove_all([CHAIN, DOUBLE_NEGATION])] == ["chain", "double"]
    with pytest.raises(ProofError, match=r"(?s)'never'.*does not fire.*'bare'.*must bring programs"):
        prove_all([never, CHAIN, bare])


def test_a_derivative_that_vanishes_is_not_counted():
    def cases(s):
        s.floating_only()
        yield lambda x: -jnp.sign(x), (s.array(3),)

    vanishing = rule(op("neg", var("x")), lambda m, x: lax.stop_gradient(x) * -1, "reassociate", cases=cases)
    assert prove(vanishing).derivatives == 0


# -- rules that do not hold -------------------------------------------------------------------------------------------


def false_product_cases(s):
    n = s.dim(2)
    yield lambda x, y, z: (x @ y) * (x @ z), (s.array(n, n), s.array(n, n), s.array(n, n))


def narrowing_cases(s):
    s.floating_only()
    yield lambda x: x.astype(jnp.bfloat16).astype(x.dtype), (s.array(8),)


def casts_back(node):
    return node.op == "convert_element_type"


NARROW = op("convert_element_type", op("convert_element_type", var("x"), where=casts_back))

FALSE_RULES = {
    # Taken as an axiom by a published rule set for equality saturation of tensor programs.
    "a product of products is no product": (
        rule(
            op("mul", dot(var("x"), var("y")), dot(var("x"), var("z"))),
            lambda m, x, y, z: x @ (y * z),
            "reassociate",
            finite=True,
            cases=false_product_cases,
        ),
        "differs over the reals",
    ),
    "x + 0 loses the sign of -0.0": (
        rule(
            op("add", var("x"), number(0.0)),
            lambda m, x: x,
            cases=lambda s: [(lambda x: x + jnp.zeros((), x.dtype), (s.array(5),))],
        ),
        r"not the same bit for bit: 0.0 became -0.0",
    ),
    "x * 0 is not 0 for NaN": (
        rule(
            op("mul", var("x"), number(0.0)),
            lambda m, x: jnp.zeros_like(x),
            "reassociate",
            cases=lambda s: [(lambda x: x * jnp.zeros((), x.dtype), (s.array(5),))],
        ),
        "NaN or infinite elsewhere: nan became 0.0.*finite=True",
    ),
    "dropping a narrowing cast": (
        rule(NARROW, lambda m, x: x, "reassociate", cases=narrowing_cases),
        "differs over the reals",
    ),
    "a value without its derivative": (
        rule(
            op("neg", var("x")),
            lambda m, x: jnp.zeros_like(x) - lax.stop_gradient(x),
            "reassociate",
            cases=one_array(lambda x: -x),
        ),
        "derivative 0 differs",
    ),
    "too large an error": (
        rule(
            op("square", var("x")),
            lambda m, x: (x * 64 + x * x) - x * 64,
            "reassociate",
            finite=True,
            cases=one_array(jnp.square),
        ),
        "has the error",
    ),
    "a lossy rule beyond any use": (
        rule(op("neg", var("x")), lambda m, x: x * -1.5, "lossy", cases=floats(lambda x: -x)),
        "differs over the reals",
    ),
    "bits of a reassociated sum": (
        rule(
            op("add", op("add", var("x"), var("y")), var("z")),
            lambda m, x, y, z: x + (y + z),
            kind="offer",
            cases=lambda s: [(lambda x, y, z: (x + y) + z, (s.array(9), s.array(9), s.array(9)))],
        ),
        "not the same bit for bit",
    ),
    "the wrong dtype": (
        rule(op("neg", var("x")), lambda m, x: (-x).astype(jnp.int8), cases=one_array(lambda x: -x)),
        "RuleError.*int8",
    ),
    "the wrong shape": (
        rule(op("neg", var("x")), lambda m, x: -x[:1], cases=one_array(lambda x: -x)),
        "RuleError",
    ),
    "a rule that never fires": (
        rule(op("tanh", var("x")), lambda m, x: -x, cases=one_array(lambda x: -x)),
        "does not fire",
    ),
    "a rule without cases": (rule(op("neg", var("x")), lambda m, x: -x), "must bring programs"),
    "a rule whose case fails": (
        rule(op("neg", var("x")), lambda m, x: -x, cases=lambda s: [(lambda x: x @ x, (s.array(2, 3),))]),
        "the case itself fails",
    ),
}


@pytest.mark.parametrize("name", FALSE_RULES)
def test_false_rules_are_rejected(name):
    false, message = FALSE_RULES[name]
    with pytest.raises(ProofError, match="(?s)" + message) as caught:
        prove(false)
    assert isinstance(caught.value, RuleError) and "tried" in str(caught.value)


def test_a_rule_false_on_empty_axes_only():
    # A product over an empty axis is one, not zero.
    def after(m, x):
        return x[0] if m["x"].shape[0] == 1 else jnp.zeros((), x.dtype) if m["x"].shape[0] == 0 else None

    def cases(s):
        yield lambda x: jnp.prod(x), (s.array(s.dim(1, 1)),)

    with pytest.raises(ProofError, match="edge"):
        prove(rule(op("reduce_prod", var("x")), after, cases=cases))


def test_a_derivative_that_does_not_exist_any_more():
    def after(m, x):
        return jax.pure_callback(lambda a: np.negative(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ProofError, match="cannot be differentiated"):
        prove(rule(op("neg", var("x")), after, "reassociate", cases=one_array(lambda x: -x)))


def test_a_replacement_that_raises_is_told_with_the_program():
    def after(m, x):
        raise KeyError("no such thing")

    with pytest.raises(ProofError, match=r"(?s)applying the rule fails: .*KeyError.*before:.*neg"):
        prove(rule(op("neg", var("x")), after, cases=one_array(lambda x: -x)))


def test_the_message_repeats_the_trial():
    false, _ = FALSE_RULES["a product of products is no product"]
    with pytest.raises(ProofError) as caught:
        prove(false, seed=7)
    text = str(caught.value)
    for part in ("prove(rule, seed=7, trials=1)", "case 0", "float64", "before:", "after:", "inputs:", "dot_general"):
        assert part in text


def test_a_failed_proof_leaves_the_configuration_alone():
    false, _ = FALSE_RULES["a product of products is no product"]
    try:
        prove(false)
    except ProofError:
        assert jnp.ones(1).dtype == jnp.float32


# -- the instruments --------------------------------------------------------------------------------------------------


def test_the_sampler_gives_every_dtype_the_same_choices():
    def draws(dtype):
        s = Sampler(3, dtype)
        return s.shape(2), s.array(2, 2).dtype, s.dim(), s.choice("abc"), s.integers(0, 100)

    assert len({(a, c, d, e) for a, _, c, d, e in map(draws, ("float32", "bfloat16", "int32"))}) == 1


def test_edge_samplers_reach_small_sizes_and_signed_zeros():
    s = Sampler(0, "float32", edge=True)
    assert {0, 1} < {s.dim(3, 6) for _ in range(100)}
    zeros = np.asarray(s.array(1000))
    zeros = zeros[zeros == 0]
    assert 0 < np.signbit(zeros).sum() < zeros.size
    assert min(Sampler(0).dim(3, 6) for _ in range(100)) >= 3


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": "SAME"},
    {"window_strides": (2, 1), "padding": [(0, 3), (-1, 2)]},
    {"window_strides": (1, 2), "padding": "VALID", "rhs_dilation": (2, 1)},
    {"window_strides": (1, 1), "padding": [(2, 1), (1, 1)], "lhs_dilation": (2, 3)},
    {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    {"window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2},
]


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "HWNC")])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_in_numpy_is_that_of_xla(options, layout):
    rng = np.random.default_rng(0)
    inputs = 4 // options.get("feature_group_count", 1)
    x = rng.standard_normal((2, 6, 5, 4)).astype(np.float32)
    w = rng.standard_normal((3, 2, inputs, 6)).astype(np.float32)
    x = x.transpose(["NHWC".index(a) for a in layout[0]])
    w = w.transpose(["HWIO".index(a) for a in layout[1]])

    def convolve(x, w):
        return [lax.conv_general_dilated(x, w, dimension_numbers=layout, precision="highest", **options)]

    graph = trace_function(convolve, jax.typeof(jnp.asarray(x)), jax.typeof(jnp.asarray(w)))
    domain = Reals()
    (found,) = interpret(graph, domain, domain.lift(x), domain.lift(w))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, convolve(x, w)[0], rtol=1e-4, atol=1e-4)


PROGRAMS = {
    "elementwise": lambda x: [jnp.tanh(x) + jnp.exp(-x) * jnp.where(x > 0, x, 2.0), jnp.clip(x, -0.5, 0.5)],
    "moves": lambda x: [jnp.pad(x, ((1, 0), (0, 2))), x.T.reshape(-1)[::-2], jnp.stack([x, x], 1), jnp.tile(x, 2)],
    "negative padding": lambda x: [lax.pad(x, 0.0, ((-1, 2, 1), (1, -1, 2)))],
    "reductions": lambda x: [x.sum(0), x.max(), x.min(1), jnp.argmax(x, 1), jnp.cumsum(x, 1), x.prod(0)],
    "products": lambda x: [jnp.einsum("ab,cb->ac", x, x), jnp.einsum("ab,ac->bac", x, x)],
    "indexing": lambda x: [x[jnp.array([2, 0])], x.at[1].add(3.0), x.at[:, 0].set(0.0), *jnp.split(x, [1], 1)],
    "sorting": lambda x: [jnp.sort(x, 1), lax.top_k(x, 2)[0]],
    "scan": lambda x: [*lax.scan(lambda c, r: (c * 0.5 + r, c.sum()), x[0], x, reverse=True)],
    "while": lambda x: [lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x)],
    "cond": lambda x: [lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), lax.switch(5, [jnp.sin, jnp.cos], x)],
    "integers": lambda x: [jnp.floor(x * 9).astype(jnp.int32) // 2, jnp.floor(x * 9).astype(jnp.int32) % 3],
}


@pytest.mark.parametrize("domain", [OpByOp, Reals])
@pytest.mark.parametrize("name", PROGRAMS)
def test_evaluation_step_by_step_gives_what_jax_gives(name, domain):
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    graph = trace_function(PROGRAMS[name], jax.typeof(jnp.asarray(x)))
    value = domain().lift(x) if domain is Reals else jnp.asarray(x)
    found, expected = interpret(graph, domain(), value), PROGRAMS[name](jnp.asarray(x))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_scan_of_no_steps():
    graph = trace_function(
        lambda x: lax.scan(lambda c, r: (c + r, c * 2), x, jnp.zeros((0, 3))), jax.typeof(jnp.ones(3))
    )
    carry, rows = interpret(graph, Reals(), np.ones(3))
    assert carry.tolist() == [1, 1, 1] and rows.shape == (0, 3) and rows.dtype == np.float64


def test_narrowing_casts_still_round_over_the_reals():
    graph = trace_function(lambda x: [x.astype(jnp.bfloat16).astype(jnp.float32)], jax.typeof(jnp.float32(0)))
    (found,) = interpret(graph, Reals(), np.float64(1 + 2**-12))
    assert found == 1.0


def test_integers_wrap_and_refuse_what_is_no_polynomial():
    aval = jax.typeof(jnp.ones(2))
    graph = trace_function(lambda x: [x * x * x + 2 * x], aval)
    (found,) = interpret(graph, Integers(), np.array([2**31, -3], np.int64))
    assert found.tolist() == [((2**31) ** 3 + 2**32) % 2**64, -33]
    for function in (lambda x: [jnp.exp(x)], lambda x: [x * 0.5], lambda x: [x / x], lambda x: [jnp.maximum(x, 0)]):
        with pytest.raises(NotExact):
            interpret(trace_function(function, aval), Integers(), np.array([1, 2]))


def test_rules_found_by_functions_are_proved_too():
    def find(graph, node):
        return Match(graph, (Value(node, 0),), values={"x": node.inputs[0]})

    def cases(s):
        s.floating_only()
        yield jnp.sin, (s.array(3),)

    sine = rule(Find(("sin",), find), lambda m, x: -jnp.sin(-x), "reassociate", kind="offer", cases=cases)
    assert prove(sine).derivatives == 1


def test_cases_that_support_no_dtype():
    def cases(s):
        s.only("complex64")
        yield lambda x: -x, (s.array(3),)

    with pytest.raises(ProofError, match="none of its cases supports"):
        prove(rule(op("neg", var("x")), lambda m, x: -x, cases=cases))
