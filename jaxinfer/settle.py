"""One signature of an optimized function: rewritten, judged, and kept for later processes."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import _jax, ready
from jaxinfer.analysis.cost import seconds
from jaxinfer.graph import Graph, trace
from jaxinfer.judge import judge
from jaxinfer.pipeline import Improved, Settings, VerificationWarning, described, improve, platform_now
from jaxinfer.program import Compile, Form, Program, Runnable
from jaxinfer.search.batch import batch_variants
from jaxinfer.search.cache import default_cache
from jaxinfer.search.device import default_peaks
from jaxinfer.search.measure import PairedRatio
from jaxinfer.search.options import compiler_options
from jaxinfer.search.verify import Agreement
from jaxinfer.verdict import Verdict

# Shares of the tuning budget after which no more sites are timed, and no further form of the whole program is compiled.
# The rest is for timing the whole program.
_SITES, _FORMS = 0.5, 0.75


@dataclass
class Recalled:
    """What an earlier process settled, loaded and ready to run.

    Attributes:
        run: the loaded program with its weights.
        complete: makes the program that belongs to it, and tells whether that has come out the same.
    """

    run: ready.Ready
    complete: Callable[[], tuple[Program, bool]]


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
        after = judge(program, forms, [_copy(x) for x in operands], settings, measure, latest, compile_form)
        stored = _stored(program)
        if verdict and settings.verify and measure:
            verdict.save(stored)
    if verdict and keep and after is not None:
        assert stored is not None and operands is not None
        ready.save(verdict.name, stored["form"], original, operands, after.weights, after.code, record)
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
    every = [f for form in forms for f in (form, form.holding_weights())]
    return next((f for f in every if stored and (f.name, f.graph.fingerprint) == stored["form"]), None)


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
    except Exception as error:  # Whatever goes wrong here, the original is at hand
        warnings.warn(f"{program.name} runs as written: {described(error)}", VerificationWarning, stacklevel=2)
        program.reason = f"rewriting failed: {described(error)}"
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
