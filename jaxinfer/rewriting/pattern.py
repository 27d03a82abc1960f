"""Patterns over operations: what a rule looks for.

A pattern is a small tree. ``var("x")`` takes any value, ``known("w")`` only what depends on constants alone,
``number(0)`` a constant all of whose elements are that number, and ``op("mul", a, b)`` a result of that operation on
operands that match. Matching fills a :class:`Match`, which the rule's condition and replacement read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph, Node, Value, is_inline

COMMUTATIVE = frozenset({"add", "add_any", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})


@dataclass
class Match:
    """Where a pattern was found.

    Attributes:
        graph: the graph that was searched, for questions about uses.
        roots: the values that the replacement takes the place of.
        values: what each variable of the pattern stands for, in the order of first mention.
        nodes: the nodes of the named operations of the pattern.
        alike: of a match that no pattern made: what its replacement depends on besides the types of the values and the
            parameters and types of the roots and of the named operations. Of matches that are the same in all of this
            one is traced. None traces each.
    """

    graph: Graph
    roots: tuple[Value, ...]
    values: dict[str, Value] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    alike: Any = None

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def params(self, name: str) -> Any:
        """Parameters of a named operation."""
        return self.nodes[name].params

    def known(self, name: str) -> np.ndarray:
        """The array of a constant variable. Rules that read it must be marked ``reads_values``."""
        return np.asarray(self.values[name].node.value)

    def used_once(self, value: Value) -> bool:
        """Whether a value has one single use, so that replacing its user leaves it dead."""
        return len(self.graph.uses.get(value, ())) == 1

    def save(self) -> tuple[dict[str, Value], dict[str, Node]]:
        """The bindings so far, to come back to when an alternative fails."""
        return dict(self.values), dict(self.nodes)

    def restore(self, saved: tuple[dict[str, Value], dict[str, Node]]) -> None:
        """Back to bindings from :meth:`save`."""
        self.values, self.nodes = dict(saved[0]), dict(saved[1])


class Pattern:
    """Something a value may match."""

    def match(self, value: Value, m: Match) -> bool:
        """Whether ``value`` matches, given the bindings in ``m``; extends them if it does."""
        raise NotImplementedError

    def may_match(self, value: Value) -> bool:
        """Whether a value is of the right operation: asked first, since most are not."""
        return True

    def depth(self) -> int:
        """How many operations deep the pattern looks."""
        return 0


@dataclass(frozen=True)
class Var(Pattern):
    """Any value; the same name must be the same value wherever it stands."""

    name: str
    where: Callable[[Value], bool] | None = None

    def match(self, value: Value, m: Match) -> bool:
        if self.where is not None and not self.where(value):
            return False
        return m.values.setdefault(self.name, value) == value


@dataclass(frozen=True)
class Number(Pattern):
    """A known array all of whose elements are one number (the sign of zero counts)."""

    number: float

    def may_match(self, value: Value) -> bool:
        return value.node.is_const

    def match(self, value: Value, m: Match) -> bool:
        node = value.node
        if not node.is_const or not is_inline(node):
            return False
        array = np.asarray(node.value)
        if array.size == 0 or array.dtype.kind not in "biufV":
            return False
        same = array.astype(np.float64) == self.number
        return bool(np.all(same)) and not np.any(np.signbit(array.astype(np.float64)) != np.signbit(self.number))


@dataclass(frozen=True)
class Op(Pattern):
    """The result of an operation."""

    ops: tuple[str, ...]
    operands: tuple[Pattern, ...] | None
    name: str | None
    where: Callable[[Node], bool] | None
    once: bool

    def may_match(self, value: Value) -> bool:
        return value.node.op in self.ops

    def match(self, value: Value, m: Match) -> bool:
        node = value.node
        if node.op not in self.ops or (self.where is not None and not self.where(node)):
            return False
        if self.once and not m.used_once(value):
            return False
        if self.operands is None:
            matched = True
        elif len(self.operands) != len(node.inputs):
            return False
        else:
            matched = self._match_operands(node, m)
        if matched and self.name is not None:
            if m.nodes.get(self.name, node) is not node:
                return False
            m.nodes[self.name] = node
        return matched

    def _match_operands(self, node: Node, m: Match) -> bool:
        assert self.operands is not None
        if node.op not in COMMUTATIVE or len(node.inputs) != 2:
            # Whoever goes on after a failure goes back to bindings of its own.
            pairs = tuple(zip(self.operands, node.inputs))
            return all(p.may_match(v) for p, v in pairs) and all(p.match(v, m) for p, v in pairs)
        left, right = self.operands
        for first, second in (node.inputs, node.inputs[::-1]):
            if not (left.may_match(first) and right.may_match(second)):
                continue
            saved = m.save()
            if left.match(first, m) and right.match(second, m):
                return True
            m.restore(saved)
        return False

    def depth(self) -> int:
        return 1 + max((p.depth() for p in self.operands or ()), default=0)


@dataclass(frozen=True)
class Known(Var):
    """A value that depends on constants only."""

    def match(self, value: Value, m: Match) -> bool:
        return m.graph.is_known(value) and super().match(value, m)


def var(name: str, where: Callable[[Value], bool] | None = None) -> Pattern:
    """Any value, optionally one that ``where`` accepts."""
    return Var(name, where)


def known(name: str, where: Callable[[Value], bool] | None = None) -> Pattern:
    """A value that depends on constants only: a literal, a captured or frozen array, or anything computed from such.

    What is known is evaluated once, after rewriting, so a replacement may compute with it freely.
    """
    return Known(name, where)


def number(value: float) -> Pattern:
    """A known array whose elements all equal ``value``."""
    return Number(float(value))


def op(
    ops: str | tuple[str, ...],
    *operands: Pattern,
    name: str | None = None,
    where: Callable[[Node], bool] | None = None,
    once: bool = False,
) -> Pattern:
    """The result of an operation.

    Args:
        ops: name of the operation, or several.
        *operands: patterns for the operands; none at all means any operands. Commutative operations match either way.
        name: a name under which the replacement finds the node and its parameters.
        where: a condition on the node.
        once: only if the result has a single use. For intermediates that must die with the rewrite, since a pattern
            whose intermediate has other users adds work instead of saving it.
    """
    return Op((ops,) if isinstance(ops, str) else tuple(ops), operands or None, name, where, once)


def is_float(value: Value) -> bool:
    """Whether a value is a floating-point or complex array."""
    dtype = value.dtype
    return not _jax.is_extended(dtype) and _jax.is_inexact(dtype)
