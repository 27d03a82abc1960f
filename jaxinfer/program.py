"""One signature of an optimized function: rewritten, verified, timed, and kept only if it is right and faster."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxinfer import _jax, ready
from jaxinfer.analysis.cost import nbytes, seconds
from jaxinfer.graph import Graph, GraphBuilder, Value, emit, is_inline, trace
from jaxinfer.pipeline import Improved, RuleError, Settings, improve, platform_now
from jaxinfer.search.batch import batch_variants
from jaxinfer.search.cache import default_cache
from jaxinfer.search.device import default_peaks
from jaxinfer.search.measure import PairedRatio, compare, time_candidates
from jaxinfer.search.options import compiler_options
from jaxinfer.search.verify import Agreement, agree, guilty, nudge, split_at_decisions
from jaxinfer.verdict import Verdict

# Shares of the tuning budget after which no more sites are timed, and no further form of the whole program is compiled.
# The rest is for timing the whole program.
_SITES, _FORMS = 0.6, 0.7
# Seconds for comparing its forms with each other, and as many for the best of them beside the original.
_GATE_SECONDS = 4.0
# What is faster by less is within the noise: the plainer form, which comes first, is taken.
_MARGIN = 0.95
# Forms are compared in steady use: in shorter samples each would wake or disturb the threads of those timed before it.
_SAMPLE_SECONDS = 0.02
# A form may need this many times the original's peak memory, besides folded weights and a little that never matters.
_MEMORY = 1.05
_FREE_BYTES = 1 << 20


class VerificationWarning(UserWarning):
    """A rewritten program gave other results than the original, which is used instead."""


@dataclass(frozen=True, eq=False)
class Form:
    """A whole program that could run in the place of the original.

    Attributes:
        name: how reports call it.
        graph: the program.
        options: compiler options it is compiled with.
    """

    name: str
    graph: Graph
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Program:
    """What runs for one signature.

    Attributes:
        name: the user's function.
        jaxpr: the program as written, a closed jaxpr over known and unknown arguments.
        known: the frozen arguments, by position.
        original: the graph of that program.
        improved: what rewriting made of it.
        form: what runs; None for the original.
        reason: why, in one sentence.
        agreement: how the results compared, None where they were not.
        ratio: time of ``form`` (or the best form tried) relative to the original, None where it was not measured.
        verified: ``"now"``, ``"earlier"`` (by another process, on the same weights) or ``"never"``.
        compile_seconds: of the original and the form, where compiled.
        temporary_bytes: memory both need besides arguments and results, where known.
        tried: seconds of every form that was timed, by name.
        released: whether the original weights were let go.
    """

    name: str
    jaxpr: Any
    known: Mapping[int, Any]
    original: Graph
    improved: Improved
    form: Form | None = None
    reason: str = ""
    agreement: Agreement | None = None
    ratio: PairedRatio | None = None
    verified: Literal["now", "earlier", "never"] = "never"
    compile_seconds: dict[str, float] = field(default_factory=dict)
    temporary_bytes: dict[str, int] = field(default_factory=dict)
    tried: dict[str, float] = field(default_factory=dict)
    released: bool = False

    @property
    def optimized(self) -> bool:
        """Whether something else than the original runs."""
        return self.form is not None

    @property
    def graph(self) -> Graph:
        """The graph of the program that runs."""
        return self.original if self.form is None else self.form.graph

    def weights(self, form: Form | None) -> list[Any]:
        """The arrays that :meth:`flat` of the same form takes first."""
        if form is None and not self.known:
            return []
        return [w.value for w in (self.original if form is None else form.graph).weights]

    def flat(self, form: Form | None) -> Callable[..., list[Any]]:
        """``f(weights, *unknown arguments) -> results`` of a form, or of the original."""
        if form is None and not self.known:
            return lambda weights, *operands: _jax.jaxpr_as_fun(self.jaxpr)(*operands)
        return emit(self.original if form is None else form.graph)

    def release_original(self) -> None:
        """Lets go of the original weights; only their types are kept."""
        self.released = True
        self.known = _jax.shapes_of(dict(self.known))
        self.original = _without_values(self.original)


@dataclass
class Recalled:
    """What an earlier process settled, loaded and ready to run.

    Attributes:
        run: the loaded program with its weights.
        complete: makes the program that belongs to it, and tells whether that has come out the same.
    """

    run: ready.Ready
    complete: Callable[[], tuple[Program, bool]]


class Runnable(Protocol):
    """A form compiled for the arguments of the first call."""

    compiled: jax.stages.Compiled
    compile_seconds: float
    temporary_bytes: int | None
    peak_bytes: int | None
    weights: list[Any]

    def __call__(self, operands: Sequence[Any], weights: Sequence[Any] | None = None) -> list[Any]:
        """Runs it: flat operands in, flat results out."""


Compile = Callable[[Program, "Form | None"], Runnable]


def settle(
    name: str,
    jaxpr: Any,
    known: Mapping[int, Any],
    operands: Sequence[Any] | None,
    settings: Settings,
    compile_form: Compile,
    keep: bool = True,
) -> Program | Recalled:
    """Optimizes a program for one signature.

    Args:
        name: name of the user's function, for messages.
        jaxpr: its closed jaxpr over flat arguments.
        known: frozen arguments by position.
        operands: the other arguments, concrete; None where they are abstract, so that nothing can be run.
        settings: how.
        compile_form: compiles a form of the program.
        keep: whether what it compiles is what will run, so that later processes may run it too.

    Returns:
        The program to run. It is the original where rewriting changes nothing, fails, gives other results or is not
        faster; ``reason`` says which. Where an earlier process kept one, that is loaded and nothing is rewritten.
    """
    original = trace(jaxpr, known)
    program = Program(name, jaxpr, known, original, Improved(original))
    if _jax.uses_refs(jaxpr):
        program.reason = "the program reads or writes Refs, which are left alone"
        return program
    single = jax.process_count() == 1
    measure = operands is not None and single and settings.tune != "off"
    verdict = Verdict.of(original, settings) if operands is not None and single else None
    stored = verdict.load() if verdict else None
    if stored is not None and stored["form"] is None:
        _recall(program, stored, None)
        return program
    if stored is not None and keep and (run := _load(program, verdict, stored, operands)) is not None:
        return Recalled(run, functools.partial(_complete, program, stored, settings, run))
    start = time.perf_counter()
    record = ready.Record(default_cache())
    forms = _forms(program, settings, measure, start + _SITES * settings.seconds if measure else None, record)
    recalled = _find(forms, stored)
    after: Runnable | None = None
    if recalled is not None:
        assert stored is not None
        _recall(program, stored, recalled)
        after = compile_form(program, recalled) if keep else None
    elif not forms:
        pass
    elif operands is None or original.has_effects:
        program.form = forms[0]
        why = "nothing was run" if operands is None else "a program with effects never runs twice"
        program.reason = f"rewritten; {why}, so it is neither verified nor timed"
    else:
        latest = start + _FORMS * settings.seconds if measure else None
        after = _judge(program, forms, [_copy(x) for x in operands], settings, measure, latest, compile_form)
        stored = _stored(program)
        if verdict and settings.verify and measure:
            verdict.save(stored)
    if verdict and keep and after is not None:
        assert stored is not None and operands is not None
        ready.save(verdict.name, stored["form"], original, operands, after.weights, after.compiled, record)
    return program


def _load(
    program: Program, verdict: Verdict | None, stored: Mapping[str, Any], operands: Sequence[Any] | None
) -> ready.Ready | None:
    assert verdict is not None and operands is not None
    return ready.load(verdict.name, stored["form"], program.name, program.original, operands)


def _complete(
    program: Program, stored: Mapping[str, Any], settings: Settings, run: ready.Ready
) -> tuple[Program, bool]:
    """Makes the graphs of a loaded program, from what was looked up when it was settled."""
    forms = _forms(program, settings, True, 0.0, run.replay())
    form = _find(forms, stored)
    if form is not None:
        _recall(program, stored, form)
    elif forms:
        # Rules that do not always do the same.
        program.form = forms[0]
        program.reason = "rewritten anew, and otherwise than before; this form is neither verified nor timed"
    return program, form is not None


def _find(forms: Sequence[Form], stored: Mapping[str, Any] | None) -> Form | None:
    return next((f for f in forms if stored and (f.name, f.graph.fingerprint) == stored["form"]), None)


def _forms(
    program: Program, settings: Settings, measure: bool, deadline: float | None, record: ready.Record | ready.Replay
) -> list[Form]:
    """What could run in the place of the original, the plainly rewritten program first; fills in ``improved``."""
    platform = platform_now()

    def improved(graph: Graph) -> Improved:
        return improve(
            graph, settings, platform, measure=measure, deadline=deadline, evaluate=record.evaluate, cache=record
        )

    try:
        program.improved = improved(program.original)
    except RuleError as error:
        warnings.warn(f"{program.name} runs as written: {error}", VerificationWarning, stacklevel=2)
        program.reason = f"rewriting failed: {error}"
        return []
    graph = program.improved.graph
    changed = graph is not program.original and str(graph) != str(program.original)
    forms = [Form("rewritten", graph)] if changed else []
    # Batches in parts and other libraries round otherwise.
    if measure and not program.original.has_effects and settings.numerics != "bitwise":
        whole = ("rewritten" if changed else "as written", graph)
        variants = batch_variants(program.original, lambda part: improved(part).graph)
        parts = [(f"rewritten, {name}", g) for name, g in variants]
        for name, form in parts:
            forms.append(Form(name, form))
        for trial in compiler_options(platform, seconds(graph, default_peaks(platform), platform)):
            forms.extend(Form(f"{name}, {trial.words}", form, trial.options) for name, form in (whole, *parts[:1]))
    if not forms:
        program.reason = "no rule improves it"
    return forms


def _judge(
    program: Program,
    forms: Sequence[Form],
    operands: Sequence[Any],
    settings: Settings,
    measure: bool,
    deadline: float | None,
    compile_form: Compile,
) -> Runnable | None:
    """Verifies the forms and times them against the original on the operands of the first call.

    Returns:
        The form that won; None where it is the original or nothing was compiled.
    """
    program.form, program.reason = forms[0], forms[0].name
    if not settings.verify and not measure:
        return None
    before = compile_form(program, None)
    right: dict[Form, Runnable] = {}
    heavy: list[str] = []
    reference = moved = None
    if settings.verify:
        reference = before(operands)
        moved = before(nudge(operands), nudge(before.weights))
    for form in forms:
        if form is not forms[0] and deadline is not None and time.perf_counter() > deadline:
            break
        after = compile_form(program, form)
        if _needs_too_much(before, after):
            heavy.append(form.name)
            continue
        if reference is not None and moved is not None:
            agreement = agree(reference, after(operands), moved, settings.numerics)
            if not agreement.passed:
                agreement = _second_opinion(program, operands, settings) or agreement
            if form is forms[0] or agreement.passed:
                program.agreement, program.verified = agreement, "now"
            if form is forms[0] and not agreement.passed:
                _reject(program, operands, settings, reference, moved)
                return None
            if not agreement.passed:
                continue
        right[form] = after
    if not right:
        program.form = None
        program.reason = f"more than {_MEMORY}× the original's peak memory when {' or '.join(heavy)}"
    elif not measure:
        program.form = next(iter(right))
        program.reason = "rewritten and verified; not timed, as asked"
    else:
        _time(program, before, right, operands)
    winner = right.get(program.form) if program.form else None
    _record(program, before, winner)
    return winner


def _needs_too_much(before: Runnable, after: Runnable) -> bool:
    """Whether a form needs more memory than the original, beyond its own weights and a little."""
    if before.peak_bytes is None or after.peak_bytes is None:
        return False
    folded = sum(nbytes(_jax.aval_of(w)) for w in after.weights)
    return after.peak_bytes > _MEMORY * before.peak_bytes + folded + _FREE_BYTES


def _time(program: Program, before: Runnable, right: Mapping[Form, Runnable], operands: Sequence[Any]) -> None:
    """Keeps the fastest form if it is faster than the original beyond doubt."""
    calls = [lambda run=run: run(operands) for run in right.values()]
    several = len(calls) > 1
    times = time_candidates(calls, budget_s=_GATE_SECONDS, sample_s=_SAMPLE_SECONDS) if several else [0.0]
    best, least = next(iter(right)), times[0]
    for form, now in zip(right, times):
        if now < _MARGIN * least:
            best, least = form, now
    program.tried = {form.name: now for form, now in zip(right, times)} if several else {}
    program.ratio = compare(lambda: before(operands), lambda: right[best](operands), budget_s=_GATE_SECONDS)
    ratio, low, high = 1 / program.ratio.ratio, 1 / program.ratio.high, 1 / program.ratio.low
    measured = f"{ratio:.2f}× the original's speed (95 % bounds {low:.2f} to {high:.2f})"
    program.form = best if program.ratio.is_faster else None
    program.reason = f"{best.name}: {measured}" if program.form else f"not faster: {measured} when {best.name}"


def _record(program: Program, before: Runnable, after: Runnable | None) -> None:
    for side, run in (("original", before), ("optimized", after)):
        if run is not None:
            program.compile_seconds[side] = run.compile_seconds
            if run.temporary_bytes is not None:
                program.temporary_bytes[side] = run.temporary_bytes


def _second_opinion(program: Program, operands: Sequence[Any], settings: Settings) -> Agreement | None:
    """Where only discontinuous results differ (indices, counts, comparisons), judges the floats they come from.

    A tie broken the other way by rounding changes an argmax wholly; the values it looked at agree all the same. What is
    computed from those values must come out the same for the same values, and no rule may have gone unexamined.
    """
    parts = split_at_decisions(program.original)
    if parts is None:
        return None
    improved = [improve(part, settings, platform_now(), measure=False) for part in parts]
    if not set(program.improved.applied()) <= {name for done in improved for name in done.applied()}:
        return None
    (smooth, decided), (new_smooth, new_decided) = parts, (done.graph for done in improved)
    values = _run(smooth, operands)
    moved = jax.jit(emit(smooth))(nudge([w.value for w in smooth.weights]), *nudge(operands))
    agreement = agree(values, _run(new_smooth, operands), moved, settings.numerics)
    looked_at = [*operands, *values[len(values) - (len(decided.inputs) - len(operands)) :]]
    same = agree(_run(decided, looked_at), _run(new_decided, looked_at), None, settings.numerics)
    return agreement if agreement.passed and same.passed else None


def _run(graph: Graph, operands: Sequence[Any]) -> list[Any]:
    return jax.jit(emit(graph))([w.value for w in graph.weights], *operands)


def _reject(
    program: Program, operands: Sequence[Any], settings: Settings, reference: Sequence[Any], moved: Sequence[Any]
) -> None:
    """Falls back to the original and says which rule is to blame."""
    platform = platform_now()
    fired = program.improved.applied()
    every = [r.name for r in settings.active_rules(platform)]

    def passes(names: Sequence[str]) -> bool:
        trial = settings.without(set(every) - set(names))
        graph = improve(program.original, trial, platform, measure=False).graph
        results = jax.jit(emit(graph))([w.value for w in graph.weights], *operands)
        return agree(reference, results, moved, settings.numerics).passed

    culprit = guilty(fired, passes)
    blame = f"rule {culprit!r} is to blame" if culprit else "no single rule is to blame"
    assert program.agreement is not None
    program.form = None
    program.reason = f"verification failed ({program.agreement.reason}); {blame}"
    warnings.warn(
        f"{program.name} runs as written: the rewritten program gave other results ({program.agreement.reason}); "
        f"{blame}. Leave it out with rules=..., and report it to whoever registered it.",
        VerificationWarning,
        stacklevel=2,
    )


# -- verdicts of earlier processes ------------------------------------------------------------------------------------


def _stored(program: Program) -> dict[str, Any]:
    """What is kept of a settled program; :func:`_recall` reads it."""
    form, ratio = program.form, program.ratio
    return {
        "form": None if form is None else (form.name, form.graph.fingerprint),
        "reason": program.reason,
        "agreement": None if program.agreement is None else vars(program.agreement),
        "ratio": None if ratio is None else {k: getattr(ratio, k) for k in PairedRatio.__slots__},
    }


def _recall(program: Program, stored: Mapping[str, Any], form: Form | None) -> None:
    program.form = form
    program.reason = stored["reason"]
    if stored.get("agreement"):
        program.agreement = Agreement(**stored["agreement"])
        program.verified = "earlier"
    if stored.get("ratio"):
        program.ratio = PairedRatio(**stored["ratio"])


def _copy(x: Any) -> Any:
    """An operand of our own: verification and timing must not use up buffers that the caller donates."""
    return jnp.array(x, copy=True) if isinstance(x, jax.Array) and not _jax.is_extended(x.dtype) else x


def _without_values(graph: Graph) -> Graph:
    """A graph to be looked at only: large constants are types without contents."""
    builder = GraphBuilder()
    builder.inputs = list(graph.inputs)
    moved: dict[Value, Value] = {}

    def now(value: Value) -> Value:
        if value.node.is_const and not is_inline(value.node):
            return builder.const(jax.ShapeDtypeStruct(value.shape, value.dtype), value.aval)
        return moved.get(value, value)

    for node in graph.nodes:
        new = builder.copy(node, [now(v) for v in node.inputs])
        moved.update((Value(node, i), Value(new, i)) for i in range(len(node.avals)))
    return builder.build([now(v) for v in graph.outputs], out_avals=graph.out_avals)
