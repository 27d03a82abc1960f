"""Which of several whole programs runs, where their times are given."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import judge as judging
from jaxinfer.graph import trace
from jaxinfer.pipeline import Improved, Settings
from jaxinfer.program import Form, Program
from jaxinfer.search.measure import PairedRatio

X = jnp.arange(4.0)


class Run:
    """A compiled form that needs no memory, and whose times are given elsewhere."""

    def __init__(self, form):
        self.form = form
        self.code = self.temporary_bytes = self.peak_bytes = None
        self.compile_seconds, self.weights = 0.0, []

    def __call__(self, operands, weights=None):
        return [2 * x for x in operands]


def judged(monkeypatch, steady, single):
    """The form that runs: `steady` times of the forms in use, `single` those of calls apart, the original's first."""
    jaxpr = jax.make_jaxpr(lambda x: 2 * x)(X)
    original = trace(jaxpr, {})
    program = Program("double", jaxpr, {}, original, Improved(original))
    forms = [Form(f"form {i}", original) for i in range(len(steady))]
    seconds = dict(zip([None, *forms], single))

    def compare(before, after, *, budget_s):
        sides = [called(run) for run in (before, after)]
        ratio = seconds[sides[1]] / seconds[sides[0]]
        return PairedRatio(ratio, ratio * 0.99, ratio * 1.01, 8, 1.0, ratio)

    def called(run):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(Run, "__call__", lambda self, *_: seen.append(self.form))
            run()
        return seen[0]

    monkeypatch.setattr(judging, "time_candidates", lambda calls, budget_s, sample_s: list(steady))
    monkeypatch.setattr(judging, "compare", compare)
    judging.judge(program, forms, [X], Settings(), True, None, lambda _, form: Run(form))
    return program.form and program.form.name


@pytest.mark.parametrize("ratio, held", [(0.9, True), (0.96, False), (1.0, False)])
def test_weights_are_written_in_where_that_is_faster(monkeypatch, ratio, held):
    w = jnp.ones((400, 4))
    jaxpr = jax.make_jaxpr(lambda x: w @ x)(X)
    original = trace(jaxpr, {})
    program = Program("times", jaxpr, {}, original, Improved(original))
    runs = {}

    def compile_form(_, form):
        return runs.setdefault(form, Run(form))

    def compare(before, after, *, budget_s):
        now = ratio if len(runs) == 3 and not program.ratio else 0.5
        program.ratio = PairedRatio(now, now * 0.98, now * 1.02, 8, 1.0, now)
        return program.ratio

    monkeypatch.setattr(judging, "compare", compare)
    judging.judge(program, [Form("rewritten", original)], [X], Settings(), True, None, compile_form)
    assert program.form.holds_weights == held
    assert program.form.name == ("rewritten, weights written in" if held else "rewritten")
    written = [form for form in runs if form is not None and form.holds_weights]
    assert len(written) == 1 and written[0].graph is original


@pytest.mark.parametrize("settings, operand", [(Settings(numerics="bitwise"), X), (Settings(), jax.random.key(0))])
def test_weights_are_passed_where_they_must_be(settings, operand):
    w = jnp.ones((400, 4))
    graph = trace(jax.make_jaxpr(lambda x: w @ x)(X), {})
    run = Run(Form("rewritten", graph))
    assert judging._holding_weights(None, run.form, run, [operand], settings, lambda *_: run) is None
    large = Form("rewritten", trace(jax.make_jaxpr(lambda x: x + jnp.ones((3000, 3000)).sum())(X), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "_WRITTEN_BYTES", 8)
        assert judging._holding_weights(None, large, run, [X], Settings(), lambda *_: run) is None


def test_a_form_that_fails_gives_way_to_the_others(monkeypatch):
    failing = set()

    def call(self, operands, weights=None):
        if self.form is not None and self.form.name in failing:
            raise MemoryError("too much")
        return [2 * x for x in operands]

    monkeypatch.setattr(Run, "__call__", call)
    jaxpr = jax.make_jaxpr(lambda x: 2 * x)(X)
    original = trace(jaxpr, {})
    program = Program("double", jaxpr, {}, original, Improved(original))
    forms = [Form(f"form {i}", original) for i in range(2)]
    for name, runs in (("form 0", "form 1"), ("form 1", None)):
        failing.add(name)
        judging.judge(program, forms, [X], Settings(), False, None, lambda _, form: Run(form))
        assert (program.form and program.form.name) == runs
    assert program.reason == "MemoryError: too much when form 0; MemoryError: too much when form 1"


@pytest.mark.parametrize(
    "steady, single, runs",
    [
        ([1.0], [2.0, 1.0], "form 0"),
        ([1.0], [1.0, 2.0], None),
        ([1.0, 0.5], [2.0, 1.0, 0.8], "form 1"),
        ([1.0, 0.97], [2.0, 1.0, 0.8], "form 0"),
        ([1.0, 0.5], [2.0, 1.0, 1.2], "form 0"),
        ([1.0, 0.5], [2.0, 1.0, 1.0], "form 0"),
        ([1.0, 0.5, 0.8], [2.0, 1.0, 1.2, 0.7], "form 0"),
        ([1.0, 0.5], [1.0, 1.0, 0.9], "form 1"),
    ],
    ids=[
        "faster than the original",
        "slower than the original",
        "faster in steady use and singly",
        "faster within the noise",
        "faster in steady use alone",
        "no faster singly",
        "the best in steady use counts",
        "only the other form is faster",
    ],
)
def test_the_form_that_runs(monkeypatch, steady, single, runs):
    assert judged(monkeypatch, steady, single) == runs
