"""One signature of an optimized function: rewritten, verified, timed, and kept only if it is right and faster."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, GraphBuilder, Value, emit, is_inline, trace
from jaxinfer.pipeline import Improved, RuleError, Settings, improve, platform_now, rules_digest
from jaxinfer.search.cache import default_cache, key
from jaxinfer.search.device import environment_key
from jaxinfer.search.measure import PairedRatio, compare
from jaxinfer.search.verify import Agreement, agree, guilty, nudge

# Seconds for timing the whole program, out of the tuning budget.
_GATE_SECONDS = 4.0


class VerificationWarning(UserWarning):
    """A rewritten program gave other results than the original, which is used instead."""


@dataclass
class Program:
    """What runs for one signature.

    Attributes:
        name: the user's function.
        jaxpr: the program as written, a closed jaxpr over known and unknown arguments.
        known: the frozen arguments, by position.
        original: the graph of that program.
        improved: what rewriting made of it.
        optimized: whether the rewritten program runs, or the original.
        reason: why, in one sentence.
        agreement: how the results compared, None where they were not.
        ratio: time of the rewritten program relative to the original, None where it was not measured.
        verified: ``"now"``, ``"earlier"`` (by another process, on the same weights) or ``"never"``.
        compile_seconds: of the original and the rewritten program, where compiled.
        released: whether the original weights were let go.
        temporary_bytes: memory both need besides arguments and results, where known.
    """

    name: str
    jaxpr: Any
    known: Mapping[int, Any]
    original: Graph
    improved: Improved
    optimized: bool = False
    reason: str = ""
    agreement: Agreement | None = None
    ratio: PairedRatio | None = None
    verified: str = "never"
    compile_seconds: dict[str, float] = field(default_factory=dict)
    temporary_bytes: dict[str, int] = field(default_factory=dict)

    released: bool = False

    def release_original(self) -> None:
        """Lets go of the original weights; only their types are kept."""
        self.released = True
        self.known = _jax.shapes_of(dict(self.known))
        self.original = _without_values(self.original)

    @property
    def weights(self) -> list[Any]:
        """The arrays that :meth:`flat` takes first."""
        return self.weights_of(self.optimized)

    def weights_of(self, optimized: bool) -> list[Any]:
        """The arrays of the rewritten program, or those of the original."""
        if not optimized and not self.known:
            return []
        return [w.value for w in (self.improved.graph if optimized else self.original).weights]

    def flat(self, optimized: bool | None = None) -> Callable[..., list[Any]]:
        """``f(weights, *unknown arguments) -> results`` of the program that runs (or of the one asked for)."""
        optimized = self.optimized if optimized is None else optimized
        if not optimized and not self.known:
            return lambda weights, *operands: _jax.jaxpr_as_fun(self.jaxpr)(*operands)
        return emit(self.improved.graph if optimized else self.original)


def settle(
    name: str, jaxpr: Any, known: Mapping[int, Any], operands: Sequence[Any] | None, settings: Settings
) -> Program:
    """Optimizes a program for one signature.

    Args:
        name: name of the user's function, for messages.
        jaxpr: its closed jaxpr over flat arguments.
        known: frozen arguments by position.
        operands: the other arguments, concrete; None where they are abstract, so that nothing can be run.
        settings: how.

    Returns:
        The program to run. It is the original where rewriting changes nothing, fails, gives other results or is not
        faster; ``reason`` says which.
    """
    # What was frozen stays as it was given in the original program: weights that no operation was applied to.
    original = trace(jaxpr, known)
    program = Program(name, jaxpr, known, original, Improved(original))
    if _jax.uses_refs(jaxpr):
        program.reason = "the program reads or writes Refs, which are left alone"
        return program
    single = jax.process_count() == 1
    measure = operands is not None and single and settings.tune != "off"
    verdict = _Verdict(program, settings) if operands is not None and single else None
    stored = verdict.load() if verdict else None
    if stored is not None and not stored["optimized"]:
        _recall(program, stored)
        return program
    deadline = time.perf_counter() + settings.seconds if measure else None
    if not _rewrite(program, settings, measure, deadline):
        return program
    if stored is not None and stored["result"] == program.improved.graph.fingerprint:
        _recall(program, stored)
        return program
    program.optimized = True
    if operands is None:
        program.reason = "rewritten; nothing was run, so it is neither verified nor timed"
    elif original.has_effects:
        program.reason = "rewritten; a program with effects never runs twice, so it is neither verified nor timed"
    else:
        _judge(program, operands, settings, measure)
        if verdict and (settings.verify and measure):
            verdict.save()
    return program


def _rewrite(program: Program, settings: Settings, measure: bool, deadline: float | None) -> bool:
    """Fills in ``improved``; False where the original is all there is."""
    try:
        program.improved = improve(program.original, settings, platform_now(), measure=measure, deadline=deadline)
    except RuleError as error:
        warnings.warn(f"{program.name} runs as written: {error}", VerificationWarning, stacklevel=2)
        program.reason = f"rewriting failed: {error}"
        return False
    graph = program.improved.graph
    if graph is program.original or str(graph) == str(program.original):
        program.reason = "no rule improves it"
        return False
    return True


def _judge(program: Program, operands: Sequence[Any], settings: Settings, measure: bool) -> None:
    """Verifies and times the rewritten program against the original on the operands of the first call."""
    program.reason = "rewritten"
    if not settings.verify and not measure:
        return
    operands = [_copy(x) for x in operands]
    before = _compile(program, False, operands)
    after = _compile(program, True, operands)
    if settings.verify:
        reference = before()
        moved = _compiled_original(program, operands, before)
        program.agreement = agree(reference, after(), moved, settings.numerics)
        program.verified = "now"
        if not program.agreement.passed:
            program.agreement = _second_opinion(program, operands, settings) or program.agreement
        if not program.agreement.passed:
            _reject(program, operands, settings, reference, moved)
            return
    if not measure:
        program.reason = "rewritten and verified; not timed, as asked"
        return
    program.ratio = compare(before, after, budget_s=_GATE_SECONDS)
    program.optimized = program.ratio.is_faster
    ratio, low, high = 1 / program.ratio.ratio, 1 / program.ratio.high, 1 / program.ratio.low
    measured = f"{ratio:.2f}× the original's speed (95 % bounds {low:.2f} to {high:.2f})"
    program.reason = f"rewritten: {measured}" if program.optimized else f"not faster: {measured}"


class _Compiled:
    """A compiled program bound to its operands."""

    def __init__(self, compiled: Any, weights: Sequence[Any], operands: Sequence[Any]):
        self._compiled, self._weights, self._operands = compiled, list(weights), list(operands)

    def __call__(self, operands: Sequence[Any] | None = None, weights: Sequence[Any] | None = None) -> list[Any]:
        return self._compiled(
            self._weights if weights is None else weights, *(self._operands if operands is None else operands)
        )

    @property
    def weights(self) -> list[Any]:
        return self._weights


def _compile(program: Program, optimized: bool, operands: Sequence[Any]) -> _Compiled:
    start = time.perf_counter()
    weights = program.weights_of(optimized)
    compiled = jax.jit(program.flat(optimized)).lower(weights, *operands).compile()
    side = "optimized" if optimized else "original"
    program.compile_seconds[side] = time.perf_counter() - start
    if (memory := compiled.memory_analysis()) is not None:
        program.temporary_bytes[side] = memory.temp_size_in_bytes
    return _Compiled(compiled, weights, operands)


def _compiled_original(program: Program, operands: Sequence[Any], before: _Compiled) -> list[Any]:
    """Results of the original for operands and weights moved by one unit in the last place."""
    return before(nudge(operands), nudge(before.weights))


def _second_opinion(program: Program, operands: Sequence[Any], settings: Settings) -> Agreement | None:
    """Where only discontinuous results differ (indices, counts, comparisons), judges the floats they come from.

    A tie broken the other way by rounding changes an argmax wholly; the values it looked at agree all the same.
    """
    smooth = _smooth_view(program.original)
    if smooth is None:
        return None
    improved = improve(smooth, settings, platform_now(), measure=False)
    results = [jax.jit(emit(g))([w.value for w in g.weights], *operands) for g in (smooth, improved.graph)]
    moved = jax.jit(emit(smooth))(nudge([w.value for w in smooth.weights]), *nudge(operands))
    agreement = agree(*results, moved, settings.numerics)
    return agreement if agreement.passed else None


_DISCONTINUOUS = frozenset(
    "argmax argmin sort top_k lt le gt ge eq ne lt_to le_to floor ceil round sign convert_element_type is_finite".split()
)


def _smooth_view(graph: Graph) -> Graph | None:
    """The program that gives the float results, and the float values behind the others, instead of the results."""
    outputs = [v for v in graph.outputs if _jax.is_inexact(v.dtype)]
    if len(outputs) == len(graph.outputs):
        return None
    stack = [v for v in graph.outputs if not _jax.is_inexact(v.dtype)]
    seen = set(stack)
    while stack:
        value = stack.pop()
        for operand in value.node.inputs:
            if operand in seen:
                continue
            seen.add(operand)
            crosses = value.node.op in _DISCONTINUOUS and _jax.is_inexact(operand.dtype)
            (outputs if crosses and not operand.node.is_const else stack).append(operand)
    return Graph(graph.inputs, graph.nodes, tuple(dict.fromkeys(outputs)))


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
    program.optimized = False
    program.reason = f"verification failed ({program.agreement.reason}); {blame}"
    warnings.warn(
        f"{program.name} runs as written: the rewritten program gave other results ({program.agreement.reason}); "
        f"{blame}. Leave it out with rules=..., and report it to whoever registered it.",
        VerificationWarning,
        stacklevel=2,
    )


# -- verdicts of earlier processes ------------------------------------------------------------------------------------


class _Verdict:
    """What an earlier process found out about the same program with the same weights on this machine."""

    def __init__(self, program: Program, settings: Settings):
        self.program = program
        fingerprint = program.original.fingerprint
        self.name = None
        if fingerprint is not None and settings.tune not in ("off", "full"):
            environment = environment_key(rules_digest(settings.active_rules(platform_now())))
            contents = _digest(w.value for w in program.original.weights)
            self.name = key("program", environment, fingerprint, contents, settings.numerics, settings.verify)

    def load(self) -> dict[str, Any] | None:
        stored = default_cache().get(self.name) if self.name else None
        return stored if isinstance(stored, dict) and {"optimized", "reason", "result"} <= set(stored) else None

    def save(self) -> None:
        if self.name is None:
            return
        p = self.program
        default_cache().put(
            self.name,
            {
                "optimized": p.optimized,
                "reason": p.reason,
                "result": p.improved.graph.fingerprint,
                "agreement": None if p.agreement is None else vars(p.agreement),
                "ratio": None if p.ratio is None else {k: getattr(p.ratio, k) for k in PairedRatio.__slots__},
            },
        )


def _recall(program: Program, stored: Mapping[str, Any]) -> None:
    program.optimized = stored["optimized"]
    program.reason = stored["reason"]
    if stored.get("agreement"):
        program.agreement = Agreement(**stored["agreement"])
        program.verified = "earlier"
    if stored.get("ratio"):
        program.ratio = PairedRatio(**stored["ratio"])


def _digest(arrays: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        data = jax.random.key_data(array) if _jax.is_extended(array.dtype) else array
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(np.asarray(data)).view(np.uint8).data)
    return digest.hexdigest()


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
