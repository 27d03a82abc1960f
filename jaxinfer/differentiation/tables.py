"""All derivative rules of the project, from one table for each subject."""

from __future__ import annotations

from collections.abc import Mapping

from jaxinfer.differentiation import cumulative, elementwise, fft, linear, reductions
from jaxinfer.differentiation.rules import PullbackRule, TangentRule

_SUBJECTS = (cumulative, elementwise, fft, linear, reductions)

TANGENTS: Mapping[str, TangentRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.TANGENTS.items()}
PULLBACKS: Mapping[str, PullbackRule] = {op: rule for subject in _SUBJECTS for op, rule in subject.PULLBACKS.items()}
