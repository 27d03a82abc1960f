"""From a settled program to its explanation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxinfer.analysis.cost import cost, nbytes
from jaxinfer.graph import Graph
from jaxinfer.native import why_missing
from jaxinfer.pipeline import Settings, platform_now, registered_rules
from jaxinfer.program import Program
from jaxinfer.report.explain import (
    Candidate,
    Choice,
    Explanation,
    RuleCount,
    Speedup,
    Verification,
    Weights,
)
from jaxinfer.report.explain import Program as Figures
from jaxinfer.rewriting import Rule


def explain(program: Program, settings: Settings, notes: tuple[str, ...] = ()) -> Explanation:
    """Everything there is to say about a settled program."""
    ratio = program.ratio
    improved = program.improved
    device = jax.devices()[0]
    return Explanation(
        function=program.name,
        signature=", ".join(_type(n.aval) for n in program.original.inputs),
        verdict="optimized" if program.optimized else "original",
        reason=program.reason,
        backend=f"{device.platform}: {device.device_kind}",
        numerics=settings.numerics,
        tune=str(settings.tune),
        rules=_rules(program, settings),
        choices=_choices(program),
        before=_figures(program, program.original, "original", ratio.before_ms if ratio else None),
        after=_figures(
            program, program.graph if program.form else improved.graph, "optimized", ratio.after_ms if ratio else None
        ),
        speedup=Speedup(1 / ratio.ratio, 1 / ratio.high, 1 / ratio.low) if ratio else None,
        verification=_verification(program),
        weights=_weights(program),
        notes=notes + _opaque(program.original),
    )


def _rules(program: Program, settings: Settings) -> tuple[RuleCount, ...]:
    platform = platform_now()
    active = {r.name for r in settings.active_rules(platform)}
    chosen: dict[str, int] = {}
    for choice in program.improved.choices:
        chosen[choice.chosen] = chosen.get(choice.chosen, 0) + choice.sites
    every = registered_rules() if settings.rules is None else settings.rules
    return tuple(
        RuleCount(
            r.name,
            r.tier,
            program.improved.fired.get(r.name, 0),
            program.improved.offered.get(r.name, 0),
            chosen.get(r.name, 0),
            _why_not(r, r.name in active, settings, platform),
        )
        for r in every
    )


def _why_not(rule: Rule, active: bool, settings: Settings, platform: str) -> str | None:
    """Why a rule was not even tried, if so."""
    if rule.native and settings.tune == "off":
        return "kernels are chosen by measurement only"
    if not active:
        return f"not within {settings.numerics!r}, or not for {platform}"
    return why_missing() or None if rule.native else None


def _choices(program: Program) -> tuple[Choice, ...]:
    def milliseconds(value: float | None) -> float | None:
        return None if value is None else 1e3 * value

    return tuple(
        Choice(
            c.site,
            tuple(Candidate(n, milliseconds(t), milliseconds(e)) for n, (t, e) in c.candidates.items()),
            c.chosen,
            c.source,
            c.sites,
        )
        for c in program.improved.choices
    )


def _figures(program: Program, graph: Graph, side: str, milliseconds: float | None) -> Figures:
    work = cost(graph)
    return Figures(
        equations=graph.size,
        flops=work.flops,
        bytes=work.nbytes,
        milliseconds=milliseconds,
        temporary_bytes=program.temporary_bytes.get(side),
        compile_seconds=program.compile_seconds.get(side),
    )


def _verification(program: Program) -> Verification:
    if program.agreement is None:
        return Verification(None, "never", program.reason if not program.optimized else "")
    a = program.agreement
    return Verification(a.passed, program.verified, a.reason, a.max_absolute_error, a.max_relative_error)


def _weights(program: Program) -> Weights:
    folded = [w.aval for w in program.form.graph.weights] if program.form else []
    size = sum(map(nbytes, folded))
    return Weights(
        len(folded),
        size,
        sum(
            int(np.asarray(x).nbytes) if not isinstance(x, jax.Array) else nbytes(x.aval)
            for x in program.known.values()
        ),
        2 * size if program.form and program.form.holds_weights else size,
    )


def _opaque(graph: Graph) -> tuple[str, ...]:
    foreign = sorted({node.op.partition("@")[0] for node in graph.walk() if "@" in node.op})
    return (f"primitives passed through untouched: {', '.join(foreign)}",) if foreign else ()


def _type(aval: Any) -> str:
    return aval.str_short(short_dtypes=True) if hasattr(aval, "str_short") else str(aval)
