"""The primitive test cases that ship with JAX, and what happens to each on its way through a graph."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxinfer.graph import check, emit, trace
from jaxinfer.pipeline import Settings, improve

# Importing the cases reads absl's flags and lists dtypes that depend on the x64 setting; both happen once, here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from jax._src.internal_test_util.test_harnesses import all_harnesses

Flat = Callable[..., Sequence[Any]]


@dataclass
class Report:
    """What became of the cases."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def ran(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        figures = ", ".join(f"{count} {what}" for what, count in self.counts.most_common())
        reasons = "".join(f"\n  {count} skipped: {why}" for why, count in self.skipped.most_common())
        return f"{self.ran} cases run: {figures}; {len(self.failures)} failed{reasons}"


class Case:
    """One case: a function of flat arrays, its arguments, and its trace under plain ``jit``."""

    def __init__(self, harness: Any):
        self.name = harness.fullname
        arguments = harness.dyn_args_maker(np.random.RandomState(0))
        self.leaves, tree = jax.tree.flatten(arguments)

        def case(*leaves: Any) -> Any:
            return jax.tree.leaves(harness.dyn_fun(*jax.tree.unflatten(tree, leaves)))

        self.traced = jax.jit(case).trace(*self.leaves)
        self.avals = self.traced.jaxpr.out_avals

    def stage(self, flat: Flat) -> Any:
        """Another function traced on the same arguments."""

        def case(*leaves: Any) -> Any:
            return list(flat(*leaves))

        return jax.jit(case).trace(*self.leaves)


def cases(step: int, report: Report) -> Any:
    """Every ``step``-th case that plain ``jit`` takes; the others are noted with their reason."""
    with warnings.catch_warnings():
        # What a case makes JAX warn about is the case's own business.
        warnings.simplefilter("ignore")
        for harness in all_harnesses[::step]:
            try:
                case = Case(harness)
            except (TypeError, ValueError, NotImplementedError) as error:
                report.skipped[f"plain jit: {type(error).__name__}: {str(error)[:60]}"] += 1
                continue
            yield case


def lowered(case: Case, report: Report) -> Any:
    """The case as plain ``jit`` lowers it; None, and a note, where that fails."""
    try:
        return case.traced.lower()
    except NotImplementedError as error:
        report.skipped[f"plain jit: NotImplementedError: {str(error)[-60:]}"] += 1
        return None


def round_trip(case: Case, report: Report) -> None:
    """Function → graph → function: the same avals, and the same StableHLO or, where that differs, the same bits."""
    graph = trace(case.traced.jaxpr)
    check(graph)
    run = emit(graph)
    again = case.stage(lambda *leaves: run([w.value for w in graph.weights], *leaves))
    if again.jaxpr.out_avals != case.avals:
        report.failures.append(f"{case.name}: avals {again.jaxpr.out_avals}, not {case.avals}")
        return
    before = lowered(case, report)
    if before is None:
        return
    after = again.lower()
    if before.as_text() == after.as_text():
        report.counts["with the same HLO"] += 1
        return
    want, have = before.compile()(*case.leaves), after.compile()(*case.leaves)
    if all(same_bits(a, b) for a, b in zip(want, have, strict=True)):
        report.counts["with other HLO and the same bits"] += 1
    else:
        report.failures.append(f"{case.name}: other bits")


def bits(array: Any) -> np.ndarray:
    """An array's contents, keys unwrapped."""
    extended = jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended)
    return np.asarray(jax.random.key_data(array) if extended else array)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays are the same, NaN payloads and signed zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a).tobytes() == bits(b).tobytes()


def improved(case: Case, report: Report) -> None:
    """Every registered rule that applies, then the same results within the rounding the default tier allows."""
    graph = trace(case.traced.jaxpr)
    done = improve(graph, Settings(tune="off"), "cpu", measure=False)
    if done.graph is graph or str(done.graph) == str(graph):
        report.counts["left as it was"] += 1
        return
    run = emit(done.graph)
    again = case.stage(lambda *leaves: run([w.value for w in done.graph.weights], *leaves))
    fired = ", ".join(done.applied()) or "nothing but folding"
    if again.jaxpr.out_avals != case.avals:
        report.failures.append(f"{case.name}: avals {again.jaxpr.out_avals}, not {case.avals} ({fired})")
        return
    before = lowered(case, report)
    if before is None:
        return
    after = again.lower()
    if before.as_text() == after.as_text():
        report.counts["rewritten, with the same HLO"] += 1
        return
    want, have = before.compile()(*case.leaves), after.compile()(*case.leaves)
    wrong = [problem for a, b in zip(want, have, strict=True) if (problem := differs(a, b))]
    if wrong:
        report.failures.append(f"{case.name}: {wrong[0]} ({fired})")
    else:
        report.counts["rewritten, with the same results"] += 1


def differs(want: Any, have: Any) -> str:
    """What is wrong with a result, or nothing: exact where no floats are, else within rounding of the largest."""
    if not jax.numpy.issubdtype(want.dtype, jax.numpy.inexact):
        return "" if same_bits(want, have) else f"other {want.dtype} values"
    wide = np.complex128 if want.dtype.kind == "c" else np.float64
    a, b = np.asarray(want).astype(wide), np.asarray(have).astype(wide)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return "NaN or Inf at other places"
    error, largest = np.abs(a - b)[finite].max(initial=0.0), np.abs(a)[finite].max(initial=0.0)
    limit = 256 * float(jax.numpy.finfo(want.dtype).eps) * largest
    return f"off by {error:.3g}, the largest being {largest:.3g}" if error > limit else ""
