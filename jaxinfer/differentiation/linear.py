"""Operations that are linear in all their array operands together, and those that are linear in each of two."""

from __future__ import annotations

from collections.abc import Mapping

from jaxinfer.differentiation.rules import PullbackRule, TangentRule

TANGENTS: Mapping[str, TangentRule] = {}
PULLBACKS: Mapping[str, PullbackRule] = {}
