"""A wrong rule is caught twice: by the prover, and by verification when the program first runs."""

import importlib.metadata
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import autoinfer
from jaxinfer.pipeline import VerificationWarning, registered_rules
from jaxinfer.rewriting import Rule, op, var
from jaxinfer.rewriting.case import ProofError
from jaxinfer.rewriting.prove import prove
from jaxinfer.search.verify import agree, guilty, nudge


def rule(name, before, after, function, tier="bitwise"):
    def cases(sampler):
        yield function, (sampler.array(*sampler.shape(2)),)

    return Rule(name, "before → after", before, after, tier, cases=cases)


def twice_negated(x):
    return jnp.negative(jnp.negative(x))


TRUE = rule("minus-minus-one", op("neg", op("neg", var("x"))), lambda m, x: x, twice_negated)
WRONG = rule("tanh-is-linear", op("tanh", var("x")), lambda m, x: 0.9 * x, jnp.tanh)
SLIGHTLY_WRONG = rule(
    "exp-in-half", op("exp", var("x")), lambda m, x: jnp.exp(x.astype(jnp.float16)).astype(x.dtype), jnp.exp
)
WRONG_FOR_INTEGERS = rule(
    "halves-add-up",
    op("add", var("x"), var("y"), where=lambda node: jnp.issubdtype(node.aval.dtype, jnp.integer)),
    lambda m, x, y: x,
    lambda x: x + x,
)
X = jnp.linspace(-2, 2, 24).reshape(4, 6)


def program(x):
    return twice_negated(jnp.sin(x)) + jnp.tanh(x)


def optimize(fun, rules, **options):
    return autoinfer.optimize(fun, rules=rules, **{"tune": "off", **options})


# -- the prover -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [WRONG, SLIGHTLY_WRONG, WRONG_FOR_INTEGERS])
def test_the_prover_rejects_wrong_rules(wrong):
    with pytest.raises(ProofError, match=wrong.name):
        prove(wrong)


def test_the_prover_accepts_the_true_one():
    assert prove(TRUE).runs


# -- at run time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["off", 2.0])
def test_a_wrong_rule_is_named_and_the_original_runs(tune):
    fast = optimize(program, [TRUE, WRONG], tune=tune)
    with pytest.warns(VerificationWarning, match="rule 'tanh-is-linear' is to blame") as caught:
        have = fast(X)
    assert len(caught) == 1
    assert np.array_equal(have, jax.jit(program)(X))
    settled = fast.program(X)
    assert not settled.optimized and not settled.agreement.passed
    assert "tanh-is-linear" in settled.reason and "tanh-is-linear" in str(fast.explain(X))
    assert np.array_equal(fast(X), have), "and there is no second warning"


def test_the_same_program_without_the_wrong_rule_is_optimized():
    fast = optimize(program, [TRUE])
    np.testing.assert_allclose(fast(X), jax.jit(program)(X), rtol=1e-6)
    assert fast.program(X).optimized


@pytest.mark.parametrize("place", range(4))
def test_the_guilty_one_among_several(place):
    others = [
        TRUE,
        rule("sine-of-minus", op("sin", op("neg", var("x"))), lambda m, x: -jnp.sin(x), lambda x: jnp.sin(-x)),
        rule("subtract-minus", op("sub", var("x"), op("neg", var("y"))), lambda m, x, y: x + y, lambda x: x - (-x)),
    ]
    rules = [*others[:place], WRONG, *others[place:]]
    fast = optimize(lambda x: twice_negated(jnp.sin(-x)) - (-jnp.tanh(x)), rules)
    with pytest.warns(VerificationWarning, match="rule 'tanh-is-linear' is to blame"):
        fast(X)
    assert len(fast.program(X).improved.applied()) == 4


def test_a_wrong_rule_among_all_registered_ones():
    fast = optimize(lambda a, x: jnp.tanh(a @ a @ x) * 1.0, [*registered_rules(), WRONG])
    with pytest.warns(VerificationWarning, match="tanh-is-linear"):
        fast(X @ X.T, X)


def test_less_precision_than_promised_is_noticed():
    fast = optimize(lambda x: jnp.exp(x) + 1, [SLIGHTLY_WRONG])
    with pytest.warns(VerificationWarning, match="exp-in-half"):
        fast(X)


def test_wrong_whole_numbers_are_noticed():
    fast = optimize(lambda n: n + 2 * n, [WRONG_FOR_INTEGERS])
    with pytest.warns(VerificationWarning, match="halves-add-up"):
        assert np.array_equal(fast(jnp.arange(5)), jnp.arange(5) * 3)


def test_wrong_whole_numbers_behind_right_floats_are_noticed():
    fast = optimize(lambda x: jnp.argmax(x, 1) + jnp.arange(4) + 1, [TRUE, WRONG_FOR_INTEGERS])
    with pytest.warns(VerificationWarning, match="halves-add-up"):
        assert np.array_equal(fast(X), jnp.argmax(X, 1) + jnp.arange(4) + 1)


def test_wrong_inside_loops_and_branches():
    def looped(x):
        step = jax.lax.scan(lambda c, _: (jnp.tanh(c) + 1, None), x, length=3)[0]
        return jax.lax.cond(x[0, 0] < 0, jnp.tanh, jnp.sin, step)

    with pytest.warns(VerificationWarning, match="tanh-is-linear"):
        assert np.array_equal(optimize(looped, [WRONG])(X), jax.jit(looped)(X))


def test_wrong_on_frozen_weights():
    frozen = optimize(lambda w, x: jnp.tanh(x @ w), [WRONG]).freeze(jnp.ones((6, 30)))
    with pytest.warns(VerificationWarning, match="tanh-is-linear"):
        assert np.array_equal(frozen(X), jnp.tanh(X @ jnp.ones((6, 30))))


def test_verification_can_be_left_out():
    fast = optimize(program, [WRONG], verify=False)
    assert not np.allclose(fast(X), program(X))
    assert fast.program(X).verified == "never"


def test_a_rule_that_never_ends_falls_back_with_a_warning():
    there = rule("there", op("sin", var("x")), lambda m, x: jnp.cos(x), jnp.sin)
    back = rule("back", op("cos", var("x")), lambda m, x: jnp.sin(x), jnp.cos)
    fast = optimize(jnp.sin, [there, back])
    with pytest.warns(VerificationWarning, match="never ends: back, there"):
        assert np.array_equal(fast(X), jnp.sin(X))


@pytest.mark.parametrize("tune", ["off", 2.0])
@pytest.mark.parametrize("part", ["match", "replacement"])
def test_a_rule_that_raises_an_error_falls_back_with_a_warning(tune, part):
    def slip(*_, **__):
        raise TypeError("a slip")

    name = f"slips-in-{part}"
    slips = Rule(name, "a → b", op("sin", var("x")), slip, "bitwise", when=slip if part == "match" else None)
    fast = optimize(lambda x: jnp.sin(x) * 2, [slips], tune=tune)
    with pytest.warns(VerificationWarning, match=f"'{name}' fails at sin.*test_verification.py.*TypeError: a slip"):
        assert np.array_equal(fast(X), jnp.sin(X) * 2)
    assert not fast.program(X).optimized and name in str(fast.explain(X))
    with pytest.warns(VerificationWarning, match=name):
        assert np.array_equal(jax.jit(lambda x: fast(x) + 1)(X), jax.jit(lambda x: jnp.sin(x) * 2 + 1)(X))


# -- from another package ---------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    """An installed package that registers the wrong rule."""
    module = types.ModuleType("plugin_of_a_test")
    module.RULES = (TRUE, WRONG)
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    found = importlib.metadata.entry_points

    def entry_points(**selection):
        extra = importlib.metadata.EntryPoint("plugin", module.__name__, selection.get("group", ""))
        return (*found(**selection), extra)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registered_rules.cache_clear()
    yield module
    monkeypatch.undo()
    registered_rules.cache_clear()


def test_a_wrong_rule_of_a_plugin(plugin):
    fast = autoinfer.optimize(program, tune="off")
    with pytest.warns(VerificationWarning, match="rule 'tanh-is-linear' is to blame"):
        assert np.array_equal(fast(X), jax.jit(program)(X))
    with pytest.raises(ProofError, match="tanh-is-linear"):
        for registered in registered_rules():
            if registered.name in ("tanh-is-linear", "minus-minus-one"):
                prove(registered)


# -- ties -------------------------------------------------------------------------------------------------------------


def ranked(x):
    return jnp.argmax(jnp.sin(x), 1) * 2, jnp.sin(x)


@pytest.fixture
def ties():
    """Rows of scores whose sines are equal to the last unit or two."""
    row = np.random.default_rng(0).uniform(0.5, 1, (64, 1)).astype(np.float32)
    return jnp.asarray(row * (1 + np.arange(8) * np.float32(2**-23)))


def test_ties_broken_another_way_are_no_error(ties, recwarn):
    """Rounding decides between equal scores; the scores themselves agree."""

    def rounded(m, x):
        return jnp.imag(jnp.exp(1j * x)) * (1 + 2**-23 * (x * 2**20 % 7 > 3))

    last_unit = rule("last-unit", op("sin", var("x")), rounded, jnp.sin, "reassociate")
    fast = optimize(ranked, [last_unit])
    before, after = jax.jit(ranked)(ties), fast(ties)
    assert not np.array_equal(before[0], after[0]), "a tie was broken another way"
    settled = fast.program(ties)
    assert settled.optimized and settled.agreement.passed and not recwarn.list
    for row, want, have in zip(before[1], before[0] // 2, after[0] // 2):
        assert abs(float(row[want] - row[have])) < 1e-6


def test_no_tie_excuses_a_decision_taken_wrongly(ties):
    worst = rule("worst-is-best", op("argmax", var("x"), name="a"), lambda m, x: jnp.argmin(x, 1), lambda x: x)
    with pytest.warns(VerificationWarning, match="worst-is-best"):
        assert np.array_equal(optimize(ranked, [worst])(ties)[0], jax.jit(ranked)(ties)[0])


def test_no_tie_excuses_a_rule_that_spans_the_decision(ties):
    skips = rule("argmax-of-sine", op("argmax", op("sin", var("x"))), lambda m, x: jnp.argmax(-x, 1), lambda x: x)
    with pytest.warns(VerificationWarning, match="argmax-of-sine"):
        assert np.array_equal(optimize(ranked, [skips])(ties)[0], jax.jit(ranked)(ties)[0])


# -- the comparison itself --------------------------------------------------------------------------------------------


def test_agreement_is_about_rounding():
    want = [jnp.array([1.0, 100.0]), jnp.array([1, 2])]
    assert agree(want, [want[0] * (1 + 1e-6), want[1]]).passed
    assert not agree(want, [want[0] * (1 + 1e-3), want[1]]).passed
    assert not agree(want, [want[0], want[1] + 1]).passed
    assert agree([jnp.array([jnp.nan, jnp.inf, 1.0])], [jnp.array([jnp.nan, jnp.inf, 1.0])]).passed
    for other in ([jnp.nan, -jnp.inf, 1.0], [1.0, jnp.inf, 1.0], [jnp.nan, jnp.inf, jnp.nan]):
        assert not agree([jnp.array([jnp.nan, jnp.inf, 1.0])], [jnp.array(other)]).passed


def test_what_the_program_amplifies_is_allowed():
    def ill(x):
        return (x + 1e4) - 1e4

    x = jnp.linspace(0, 1, 11)
    exact, rounded = [x], [ill(x)]
    assert not agree(exact, rounded).passed
    assert agree(exact, rounded, [ill(x * (1 + 1e-7)) + x - ill(x) + 1e-4]).passed


def test_nudge_moves_floats_by_one_unit_and_nothing_else():
    values = [jnp.ones(5), jnp.arange(3), jax.random.key(0), jnp.ones(2, jnp.bfloat16), 2.0]
    moved = nudge(values)
    assert np.all(np.abs(np.asarray(moved[0]) - 1) == np.float32(2**-23))
    assert moved[1] is values[1] and moved[2] is values[2] and moved[3].dtype == jnp.bfloat16
    assert moved[4].weak_type and moved[4] != 2.0


def test_bisection():
    names = [f"r{i}" for i in range(13)]
    for culprit in names:
        assert guilty(names, lambda subset, culprit=culprit: culprit not in subset) == culprit
    assert guilty(names, lambda subset: True) is None
