"""A rule: a pattern, a replacement written as plain JAX code, and what must hold.

``replace`` rules are always at least as good and run to a fixpoint. ``offer`` rules add an equivalent form beside the
old one; the search decides. The tier says how equal both sides are:

* ``bitwise``: every remaining operation computes what it computed before;
* ``reassociate``: equal over the reals, with an error of the same order as the original's;
* ``lossy``: anything weaker.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting.pattern import Match, Op, Pattern

Tier = Literal["bitwise", "reassociate", "lossy"]
Kind = Literal["replace", "offer"]
TIERS: tuple[Tier, ...] = ("bitwise", "reassociate", "lossy")
ENTRY_POINTS = "jaxinfer.rewrites"

Finder = Callable[[Graph, Node], Match | None]


class RuleError(Exception):
    """A rule is malformed, raises an error, gives a value of the wrong type, or never comes to an end."""


@dataclass(frozen=True)
class Find:
    """A matcher for what no tree can say (several roots, nested graphs): a function from graph and node to a match.

    Attributes:
        ops: operations of the nodes it wants to be asked about.
        find: ``find(graph, node) -> Match | None``.
    """

    ops: tuple[str, ...]
    find: Finder


@dataclass(frozen=True, eq=False)
class Rule:
    """One rewrite.

    Attributes:
        name: short, unique, in the field's words; reports and errors show it.
        note: ``before → after`` in one line.
        before: a pattern, or a :class:`Find`.
        after: ``after(m, **values) -> array | tuple | None``: plain JAX code. ``values`` are the pattern's variables;
            ``m`` is the :class:`Match`. Returning None declines. What it returns must have the shapes and dtypes of
            ``m.roots``.
        tier: how equal both sides are.
        kind: ``"replace"`` or ``"offer"``.
        when: a cheap condition, asked before ``after`` is traced.
        cases: programs on which the prover tries the rule: ``cases(sampler)`` yields ``(function, arguments)``, in each
            of which the rule must fire. ``sampler`` is a :class:`jaxinfer.rewriting.prove.Sampler`.
        finite: the rule promises its tier for finite values only (say why in the note).
        reads_values: ``after`` or ``when`` look at the contents of known arrays, not only at their types.
        platforms: the only platforms the form exists for, or None for all.
        native: the form is a kernel of this machine, so it is nothing for programs that are exported or stored.
    """

    name: str
    note: str
    before: Pattern | Find
    after: Callable[..., Any]
    tier: Tier
    kind: Kind = "replace"
    when: Callable[[Match], bool] | None = None
    cases: Callable[[Any], Iterable[tuple[Callable[..., Any], Sequence[Any]]]] | None = None
    finite: bool = False
    reads_values: bool = False
    platforms: frozenset[str] | None = None
    native: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.name):
            raise RuleError(f"rule name {self.name!r}: use lower-case words joined by hyphens")
        if self.tier not in TIERS:
            raise RuleError(f"rule {self.name!r}: tier {self.tier!r} is none of {', '.join(TIERS)}")
        if self.kind not in ("replace", "offer"):
            raise RuleError(f"rule {self.name!r}: kind {self.kind!r} is neither 'replace' nor 'offer'")
        if not isinstance(self.before, (Op, Find)):
            raise RuleError(f"rule {self.name!r}: a pattern starts with op(...), or is a Find")

    @property
    def ops(self) -> tuple[str, ...]:
        """Operations of the nodes at which the rule may match."""
        return self.before.ops  # type: ignore[union-attr]

    def match(self, graph: Graph, node: Node) -> Match | None:
        """Where the rule applies with ``node`` as the root, or None."""
        if isinstance(self.before, Find):
            m = self.before.find(graph, node)
        else:
            if len(node.avals) != 1:
                return None
            root = Value(node, 0)
            m = Match(graph, (root,))
            if not self.before.match(root, m):
                return None
        if m is None or (self.when is not None and not self.when(m)):
            return None
        return m


def within(rules: Iterable[Rule], tier: Tier, platform: str | None = None) -> tuple[Rule, ...]:
    """The rules whose tier is at most ``tier`` and that exist on ``platform`` (None: on every platform)."""
    limit = TIERS.index(tier)
    return tuple(r for r in rules if TIERS.index(r.tier) <= limit and (r.platforms is None or platform in r.platforms))


def load_rules() -> tuple[Rule, ...]:
    """All registered rules: the project's own and those of the entry-point group ``jaxinfer.rewrites``.

    Each entry point names a module or object with an iterable ``RULES``.

    Raises:
        RuleError: if an entry point cannot be loaded, has no ``RULES``, or two rules share a name.
    """
    rules: list[Rule] = []
    points = sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: (e.name != "jaxinfer", e.name))
    for point in {(p.name, p.value): p for p in points}.values():
        rules.extend(_rules_of(point))
    return check_names(rules)


def check_names(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules as a tuple.

    Raises:
        RuleError: if two rules share a name.
    """
    seen: dict[str, Rule] = {}
    for rule in rules:
        if seen.setdefault(rule.name, rule) is not rule:
            raise RuleError(f"two rules are called {rule.name!r}: give one of them another name")
    return tuple(seen.values())


def _rules_of(point: Any) -> Iterator[Rule]:
    try:
        found = point.load()
    except Exception as error:
        raise RuleError(f"rules of entry point {point.name!r} ({point.value}) cannot be loaded: {error}") from error
    rules = getattr(found, "RULES", None)
    if rules is None:
        raise RuleError(f"entry point {point.name!r} ({point.value}) has no RULES")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise RuleError(f"entry point {point.name!r} ({point.value}): {rule!r} is no jaxinfer Rule")
        yield rule
