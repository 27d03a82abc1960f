"""All derivative rules of the project, from one table for each subject."""

from __future__ import annotations

from collections.abc import Mapping

from jaxinfer.differentiation import (
    bilinear,
    cumulative,
    elementwise,
    fft,
    indexing,
    linear,
    reductions,
    special_functions,
)
from jaxinfer.differentiation.rules import PullbackRule, TangentRule

_SUBJECTS = (bilinear, cumulative, elementwise, fft, indexing, linear, reductions, special_functions)

TANGENTS: Mapping[str, TangentRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.TANGENTS.items()}
PULLBACKS: Mapping[str, PullbackRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.PULLBACKS.items()}
