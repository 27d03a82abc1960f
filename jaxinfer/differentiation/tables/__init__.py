"""All derivative rules of the project, from one table for each subject."""

from __future__ import annotations

from collections.abc import Mapping

from jaxinfer.differentiation.rules import PullbackRule, ResultsRule, TangentRule
from jaxinfer.differentiation.tables import (
    bilinear,
    convolution,
    cumulative,
    elementwise,
    factorizations,
    fft,
    indexing,
    linear,
    reductions,
    special_functions,
)

_SUBJECTS = (
    bilinear,
    convolution,
    cumulative,
    elementwise,
    factorizations,
    fft,
    indexing,
    linear,
    reductions,
    special_functions,
)

TANGENTS: Mapping[str, TangentRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.TANGENTS.items()}
PULLBACKS: Mapping[str, PullbackRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.PULLBACKS.items()}
RESULTS: Mapping[str, ResultsRule] = {
    op: rule for subject in _SUBJECTS for op, rule in getattr(subject, "RESULTS", {}).items()
}
