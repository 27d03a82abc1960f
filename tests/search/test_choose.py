"""Choosing between forms: what decides, what is remembered, and which sites are one."""

import time

import jax.numpy as jnp
import pytest
from jax import lax

from jaxinfer.graph import check, trace_function
from jaxinfer.rewriting import Match, Rewriter, Rule, op, var
from jaxinfer.search import choose as choosing
from jaxinfer.search.cache import Cache
from jaxinfer.search.choose import Policy, choose
from jaxinfer.search.device import default_peaks


def _offer(name, after, ops="dot_general"):
    return Rule(
        name, "dot(x, w) → another form", op(ops, var("x"), var("w"), name="dot"), after, "reassociate", "offer"
    )


def _again(m: Match, x, w):
    return lax.dot_general_p.bind(x, w, **m.params("dot"))


HEAVIER = _offer("heavier", lambda m, x, w: _again(m, x, w) + 0 * _again(m, x @ x.T @ x, w))
# Half of the work, and wrong: choosing is not what finds that out.
LIGHTER = _offer("lighter", lambda m, x, w: jnp.tile(_again(m, x[: x.shape[0] // 2], w), (2, 1)))


def _two_layers(x, w):
    return [jnp.tanh(jnp.tanh(x @ w) @ w)]


def _graph():
    square = jnp.ones((256, 256))
    return trace_function(_two_layers, square, square)


def _policy(**changes):
    return Policy(**{"platform": "cpu", "peaks": default_peaks("cpu"), **changes})


def test_the_analytic_model_takes_the_cheaper_form_and_leaves_the_dearer():
    graph = _graph()
    rewriter = Rewriter([HEAVIER, LIGHTER])
    chosen, choices = choose(graph, rewriter.offers(graph), _policy())
    assert {r.rule.name for r in chosen.values()} == {"lighter"}
    assert {c.source for c in choices} == {"analytic"}
    check(rewriter.apply(graph, chosen))


def test_without_a_better_form_nothing_is_chosen():
    graph = _graph()
    chosen, choices = choose(graph, Rewriter([HEAVIER]).offers(graph), _policy())
    assert chosen == {}
    assert all(c.chosen == "original" for c in choices)


def test_equal_sites_are_one_choice():
    graph = _graph()
    offers = Rewriter([LIGHTER]).offers(graph)
    assert len(offers) == 2
    chosen, choices = choose(graph, offers, _policy())
    assert len(chosen) == 2
    assert [c.sites for c in choices] == [2]


def _timing(monkeypatch, seconds):
    """Replaces the clock's verdict by a given one and counts how often it was asked."""
    asked = []

    def time_candidates(calls, budget_s, sample_s):
        asked.append(len(calls))
        for call in calls:
            call()
        return seconds[: len(calls)]

    monkeypatch.setattr(choosing, "time_candidates", time_candidates)
    return asked


def test_measurement_overrules_the_model_and_is_remembered(monkeypatch, tmp_path):
    asked = _timing(monkeypatch, [1.0, 2.0])
    cache, graph = Cache(tmp_path), _graph()
    policy = _policy(cache=cache, deadline=time.perf_counter() + 60)
    chosen, choices = choose(graph, Rewriter([LIGHTER]).offers(graph), policy)
    assert chosen == {}
    assert [c.source for c in choices] == ["measured"]
    again, choices = choose(graph, Rewriter([LIGHTER]).offers(graph), _policy(cache=cache))
    assert again == {}
    assert [c.source for c in choices] == ["cached"]
    assert len(asked) == 1


def test_what_is_within_the_noise_stays_as_it_was(monkeypatch, tmp_path):
    _timing(monkeypatch, [1.0, 0.97])
    policy = _policy(cache=Cache(tmp_path), deadline=time.perf_counter() + 60)
    graph = _graph()
    assert choose(graph, Rewriter([LIGHTER]).offers(graph), policy)[0] == {}


def test_past_the_deadline_the_model_decides(monkeypatch, tmp_path):
    asked = _timing(monkeypatch, [1.0, 2.0])
    policy = _policy(cache=Cache(tmp_path), deadline=time.perf_counter() - 1)
    graph = _graph()
    chosen, choices = choose(graph, Rewriter([LIGHTER]).offers(graph), policy)
    assert len(chosen) == 2
    assert [c.source for c in choices] == ["analytic"]
    assert asked == []


@pytest.mark.parametrize("garbage", [None, 3, {"original": "soon"}, {"somebody-else": 1.0}])
def test_a_stored_value_of_another_kind_is_not_believed(monkeypatch, tmp_path, garbage):
    asked = _timing(monkeypatch, [1.0, 2.0])
    cache, graph = Cache(tmp_path), _graph()
    policy = _policy(cache=cache, deadline=time.perf_counter() + 60)
    offers = Rewriter([LIGHTER]).offers(graph)
    choose(graph, offers, policy)
    monkeypatch.setattr(Cache, "get", lambda self, key, default=None: garbage)
    choose(graph, offers, policy)
    assert len(asked) == 2
