"""Which form of a program runs: verified against the original, then timed beside it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.analysis.cost import nbytes
from jaxinfer.graph import Graph, emit
from jaxinfer.pipeline import RuleError, Settings, VerificationWarning, described, improve, platform_now
from jaxinfer.program import Compile, Form, Program, Runnable
from jaxinfer.ready import placement
from jaxinfer.search.measure import compare, time_candidates
from jaxinfer.search.verify import Agreement, agree, guilty, nudge, split_at_decisions

# Seconds for comparing its forms with each other, and as many for the best of them beside the original.
_GATE_SECONDS = 4.0
# Seconds for comparing the best form with the plainest one in single calls.
_SINGLE_SECONDS = 1.0
# What is faster by less is within the noise: the plainer form, which comes first, is taken.
_MARGIN = 0.95
# Weights are written into a program up to this size, as it holds them a second time, and where that gains this much.
_WRITTEN_BYTES = 32 << 20
_WRITTEN_MARGIN = 0.97
# Forms are compared in steady use: in shorter samples each would wake or disturb the threads of those timed before it.
_SAMPLE_SECONDS = 0.02
# A form may need this many times the original's peak memory, besides folded weights and a little that never matters.
_MEMORY = 1.05
_FREE_BYTES = 1 << 20


def judge(
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
    unfit: list[str] = []
    reference = moved = None
    if settings.verify:
        reference = jax.block_until_ready(before(operands))
        moved = before(nudge(operands), nudge(before.weights))
    for form in forms:
        if form is not forms[0] and deadline is not None and time.perf_counter() > deadline:
            break
        try:
            after = compile_form(program, form)
            if _needs_too_much(before, after):
                unfit.append(f"more than {_MEMORY}× the original's peak memory when {form.name}")
                continue
            results = jax.block_until_ready(after(operands)) if reference is not None else None
        except Exception as error:  # The original has run: what fails here is of our making
            unfit.append(f"{described(error)} when {form.name}")
            continue
        if reference is not None and results is not None and moved is not None:
            agreement = agree(reference, results, moved, settings.numerics)
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
        program.reason = "; ".join(unfit)
    elif not measure:
        program.form = next(iter(right))
        program.reason = "rewritten and verified; not timed, as asked"
    else:
        best = _fastest(program, right, operands)
        if deadline is None or time.perf_counter() < deadline:
            held = _holding_weights(program, best, right[best], operands, settings, compile_form)
            if held is not None and (
                reference is None or agree(reference, held[1](operands), moved, settings.numerics).passed
            ):
                best = held[0]
                right.update([held])
        _gate(program, before, best, right[best], operands)
    winner = right.get(program.form) if program.form else None
    _record(program, before, winner)
    return winner


def _needs_too_much(before: Runnable, after: Runnable) -> bool:
    """Whether a form needs more memory than the original, beyond its own weights and a little."""
    if before.peak_bytes is None or after.peak_bytes is None:
        return False
    folded = sum(nbytes(_jax.aval_of(w)) for w in after.weights)
    return after.peak_bytes > _MEMORY * before.peak_bytes + folded + _FREE_BYTES


def _fastest(program: Program, right: Mapping[Form, Runnable], operands: Sequence[Any]) -> Form:
    """The form that is fastest in steady use, if it is faster than the plainest one in single calls too."""
    calls = [lambda run=run: run(operands) for run in right.values()]
    several = len(calls) > 1
    times = time_candidates(calls, budget_s=_GATE_SECONDS, sample_s=_SAMPLE_SECONDS) if several else [0.0]
    plain = best = next(iter(right))
    least = times[0]
    for form, now in zip(right, times):
        if now < _MARGIN * least:
            best, least = form, now
    program.tried = {form.name: now for form, now in zip(right, times)} if several else {}
    if best is not plain:
        # One that gains only as long as it is called again and again, its threads awake, is no gain to all.
        singly = compare(lambda: right[plain](operands), lambda: right[best](operands), budget_s=_SINGLE_SECONDS)
        best = best if singly.is_faster else plain
    return best


def _holding_weights(
    program: Program, best: Form, run: Runnable, operands: Sequence[Any], settings: Settings, compile_form: Compile
) -> tuple[Form, Runnable] | None:
    """A form with its weights written into the program, where that is faster than passing them; else None."""
    weights = [w.value for w in best.graph.weights]
    place = placement([*weights, *operands])
    if platform_now() != "cpu" or settings.numerics == "bitwise" or not weights or place is None or place[1]:
        return None
    if sum(nbytes(_jax.aval_of(w)) for w in weights) > _WRITTEN_BYTES:
        return None
    form = best.holding_weights()
    try:
        held = compile_form(program, form)
        jax.block_until_ready(held(operands))
    except Exception:  # Not worth a word: there is a form that runs
        return None
    ratio = compare(lambda: run(operands), lambda: held(operands), budget_s=_SINGLE_SECONDS)
    return (form, held) if ratio.high < _WRITTEN_MARGIN else None


def _gate(program: Program, before: Runnable, best: Form, after: Runnable, operands: Sequence[Any]) -> None:
    """Keeps a form if it is faster than the original beyond doubt."""
    program.ratio = compare(lambda: before(operands), lambda: after(operands), budget_s=_GATE_SECONDS)
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
        try:
            graph = improve(program.original, trial, platform, measure=False).graph
        except RuleError:
            return False
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
