"""Rules say what is wrong with them before they are used, and plugins are loaded by name."""

import importlib.metadata
import types

import jax.numpy as jnp
import pytest

from jaxinfer.graph import Value, trace_function
from jaxinfer.rewriting import Find, Match, Rule, RuleError, load_rules, op, var, within
from jaxinfer.rewriting.rule import ENTRY_POINTS, check_names


def rule(name="some-rule", before=None, tier="bitwise", **options):
    return Rule(name, "a → b", op("neg", var("x")) if before is None else before, lambda m, x: -x, tier, **options)


@pytest.mark.parametrize("name", ["", "Some-rule", "some_rule", "some rule", "-rule"])
def test_names_are_lower_case_words(name):
    with pytest.raises(RuleError, match="lower-case words joined by hyphens"):
        rule(name)


def test_unknown_tiers_kinds_and_patterns():
    with pytest.raises(RuleError, match="'exact' is none of bitwise, reassociate, lossy"):
        rule(tier="exact")
    with pytest.raises(RuleError, match="neither 'replace' nor 'offer'"):
        rule(kind="maybe")
    with pytest.raises(RuleError, match="starts with op"):
        rule(before=var("x"))


def test_a_rule_knows_its_operations():
    assert rule(before=op(("sin", "cos"), var("x"))).ops == ("sin", "cos")
    assert rule(before=Find(("scan",), lambda graph, node: None)).ops == ("scan",)


def test_the_condition_is_asked_after_the_pattern():
    graph = trace_function(lambda x: [-x], jnp.ones(3).aval)
    asked = []
    conditional = rule(when=lambda m: bool(asked.append(m["x"].shape)))
    assert conditional.match(graph, graph.nodes[0]) is None and asked == [(3,)]
    assert rule().match(graph, graph.nodes[0]).roots == (graph.outputs[0],)


def test_the_condition_holds_for_found_matches_too():
    graph = trace_function(lambda x: [-x], jnp.ones(3).aval)

    def find(graph, node):
        return Match(graph, (Value(node, 0),), values={"x": node.inputs[0]})

    assert rule(before=Find(("neg",), find)).match(graph, graph.nodes[0]) is not None
    assert rule(before=Find(("neg",), find), when=lambda m: False).match(graph, graph.nodes[0]) is None


def test_within_keeps_weaker_rules_and_other_platforms_out():
    exact, close, rough = rule("a"), rule("b", tier="reassociate"), rule("c", tier="lossy")
    gpu = rule("d", platforms=frozenset({"cuda"}))
    everything = (exact, close, rough, gpu)
    assert within(everything, "bitwise") == (exact,)
    assert within(everything, "reassociate") == (exact, close)
    assert within(everything, "lossy", "cpu") == (exact, close, rough)
    assert within(everything, "bitwise", "cuda") == (exact, gpu)


def test_names_are_unique():
    first, second = rule("a"), rule("a")
    assert check_names([first, first]) == (first,)
    with pytest.raises(RuleError, match="two rules are called 'a'"):
        check_names([first, second])


# -- entry points -----------------------------------------------------------------------------------------------------


class Point:
    """An installed entry point that loads to a given object."""

    def __init__(self, name, loaded):
        self.name, self.value, self.loaded = name, f"{name}.rules", loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def installed(monkeypatch):
    """Makes the given entry points the installed ones."""

    def install(*points):
        def entry_points(*, group):
            assert group == ENTRY_POINTS
            return points

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


def module(*rules):
    return types.SimpleNamespace(RULES=rules)


def test_the_projects_own_rules_come_first(installed):
    own, foreign = rule("own"), rule("foreign")
    installed(Point("another", module(foreign)), Point("jaxinfer", module(own)))
    assert load_rules() == (own, foreign)


def test_an_entry_point_listed_twice_is_loaded_once(installed):
    own = rule("own")
    installed(Point("jaxinfer", module(own)), Point("jaxinfer", module(own)))
    assert load_rules() == (own,)


def test_two_plugins_with_the_same_rule_name(installed):
    installed(Point("one", module(rule("same"))), Point("two", module(rule("same"))))
    with pytest.raises(RuleError, match="two rules are called 'same'"):
        load_rules()


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (ImportError("no module"), r"entry point 'bad' \(bad.rules\) cannot be loaded: no module"),
        (types.SimpleNamespace(), "'bad'.*has no RULES"),
        (module("a string"), "'bad'.*'a string' is no jaxinfer Rule"),
    ],
)
def test_a_broken_plugin_is_named(installed, loaded, message):
    installed(Point("jaxinfer", module(rule())), Point("bad", loaded))
    with pytest.raises(RuleError, match=message):
        load_rules()


def test_the_installed_rules_load():
    assert {"pointwise-as-dot"} <= {r.name for r in load_rules()}
