"""The driver that applies rules.

A pass walks the nodes in program order, asks the rules registered for each node's operation, and splices in what the
first one that matches gives. Passes repeat until nothing fires. Only nodes near something that changed are asked again,
so the cost grows with the program and the number of rewrites, not with their product. A set of rules that never comes
to an end is noticed and reported with the names of the rules that keep firing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.graph import Graph, GraphBuilder, Node, Value, splice
from jaxinfer.graph.node import context_key
from jaxinfer.rewriting.pattern import Match
from jaxinfer.rewriting.rule import Find, Rule, RuleError

# A node is asked again when something changed within this many operations below it: the deepest pattern looks this far.
_REACH = 6
_MAX_PASSES = 200
_LOOK_FOR_LOOPS_AFTER = 24


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a rule would put in the place of a match.

    Attributes:
        rule: the rule.
        roots: the values to replace.
        arguments: the values the new form is computed from.
        jaxpr: the new form, a closed jaxpr from ``arguments`` to ``roots``.
    """

    rule: Rule
    roots: tuple[Value, ...]
    arguments: tuple[Value, ...]
    jaxpr: Any


@dataclass
class Log:
    """Which rules fired, how often, and where.

    Attributes:
        fired: times each rule changed the program.
        lines: the user's source lines where it did.
    """

    fired: Counter[str] = field(default_factory=Counter)
    lines: dict[str, set[str]] = field(default_factory=dict)

    def note(self, replacement: Replacement) -> None:
        """Counts one rewrite."""
        name = replacement.rule.name
        self.fired[name] += 1
        lines = self.lines.setdefault(name, set())
        if len(lines) < 8:
            lines.add(_jax.source_line(replacement.roots[0].node.source))


Decide = Callable[[Graph, Node], Replacement | None]


class Rewriter:
    """Applies a set of rules.

    Args:
        rules: the rules; ``replace`` ones are run by :meth:`fixpoint`, ``offer`` ones listed by :meth:`offers`.
    """

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)
        self.log = Log()
        self._replace = _by_operation(r for r in self.rules if r.kind == "replace")
        self._offer = _by_operation(r for r in self.rules if r.kind == "offer")
        self._traced: dict[Any, Any] = {}
        self._finished: dict[Graph, Graph] = {}

    def fixpoint(self, graph: Graph) -> Graph:
        """Applies the ``replace`` rules until none fires, in nested graphs first.

        Raises:
            RuleError: if the rules never come to an end.
        """
        if graph in self._finished:
            return self._finished[graph]
        original = graph
        dirty = set(graph.nodes)
        asked: set[Node] = set()
        seen: dict[str, int] = {}
        fired: list[Counter[str]] = []
        # A rule that moves an operation past the next one needs a pass for each step of the way.
        limit = _MAX_PASSES + graph.size
        for count in range(limit + 1):
            before = self.log.fired.copy()
            walk = self._walk(graph, self._first_replacement, self.fixpoint, dirty)
            new = walk.run()
            asked |= dirty
            if new is graph:
                # Some rules look farther than others: in the end all that stands on something new is asked once more.
                dirty = set(graph.nodes) - asked
                if not dirty:
                    break
                continue
            fired.append(self.log.fired - before)
            dirty = _dirty(graph, new, walk.origin)
            graph = new
            if count >= _LOOK_FOR_LOOPS_AFTER:
                text = graph.fingerprint or str(graph)
                if text in seen or count == limit:
                    guilty = sum(fired[seen.get(text, count - 1) + 1 :], Counter[str]())
                    names = ", ".join(sorted(guilty)) or "unknown rules"
                    raise RuleError(f"rewriting never ends: {names} keep undoing each other; remove one of them")
                seen[text] = count
        self._finished[original] = self._finished[graph] = graph
        return graph

    def offers(self, graph: Graph) -> dict[Node, list[Replacement]]:
        """The other forms that ``offer`` rules have for each node, nested graphs included."""
        found: dict[Node, list[Replacement]] = {}
        for node in graph.nodes:
            for sub in node.subgraphs:
                found.update(self.offers(sub))
            for rule in self._offer.get(node.op, ()) if node.is_pure else ():
                if (replacement := self._replacement(rule, graph, node)) is not None:
                    found.setdefault(node, []).append(replacement)
        return found

    def apply(self, graph: Graph, chosen: Mapping[Node, Replacement]) -> Graph:
        """Puts chosen forms in place; a choice whose place another one took is left out."""
        if not chosen:
            return graph
        return self._walk(graph, lambda _, node: chosen.get(node), lambda sub: self.apply(sub, chosen), None).run()

    # -- one pass --

    def _walk(self, graph: Graph, decide: Decide, nested: Callable[[Graph], Graph], dirty: set[Node] | None) -> _Pass:
        return _Pass(graph, decide, nested, dirty, self.log)

    def _first_replacement(self, graph: Graph, node: Node) -> Replacement | None:
        if not node.is_pure:
            return None
        for rule in self._replace.get(node.op, ()):
            if (replacement := self._replacement(rule, graph, node)) is not None:
                return replacement
        return None

    def _replacement(self, rule: Rule, graph: Graph, node: Node) -> Replacement | None:
        try:
            m = rule.match(graph, node)
            jaxpr = None if m is None else self._traced_after(rule, m)
        except RuleError:
            raise
        except Exception as error:
            where = _jax.source_line(node.source)
            raise RuleError(f"rule {rule.name!r} fails at {node!r} {where}: {type(error).__name__}: {error}") from error
        if m is None or jaxpr is None:
            return None
        return Replacement(rule, m.roots, tuple(m.values.values()), jaxpr)

    def _traced_after(self, rule: Rule, m: Match) -> Any:
        key = _trace_key(rule, m)
        if key is None:
            return _trace_after(rule, m)
        if key not in self._traced:
            self._traced[key] = _trace_after(rule, m)
        return self._traced[key]


class _Pass:
    """One walk over a graph, in program order, that puts forms in the places of others.

    Args:
        graph: the program.
        decide: what to put in the place of a node, if anything.
        nested: what becomes of the graphs that a node holds.
        dirty: the nodes to decide about; None for all.
        log: where rewrites are counted.

    Attributes:
        origin: nodes of the new graph that were taken over, perhaps with other operands, and what they were.
    """

    def __init__(
        self, graph: Graph, decide: Decide, nested: Callable[[Graph], Graph], dirty: set[Node] | None, log: Log
    ):
        self._graph, self._decide, self._nested, self._dirty, self._log = graph, decide, nested, dirty, log
        self._builder = GraphBuilder()
        self._builder.inputs = list(graph.inputs)
        # What is known comes first, so that a form made of several known arrays finds all of them at its place.
        self._order = sorted(graph.nodes, key=lambda n: n not in graph.known)
        self._moved: dict[Value, Value] = {}
        self._begun: set[Node] = set()
        self._decided: dict[Node, Replacement] = {}
        self._changed = False
        self.origin: dict[Node, Node] = {}

    def run(self) -> Graph:
        """The new graph; the very same one where nothing was changed."""
        for node in self._order:
            if self._dirty is None or node in self._dirty:
                replacement = self._decide(self._graph, node)
                if replacement is not None:
                    self._decided[node] = replacement
        if not self._decided and all(self._nested(g) is g for n in self._order for g in n.subgraphs):
            return self._graph
        for node in self._order:
            self._visit(node)
        if not self._changed:
            return self._graph
        outputs = [self._now(v) for v in self._graph.outputs]
        return self._builder.build(outputs, out_avals=self._graph.out_avals)

    def _now(self, value: Value) -> Value:
        return self._moved.get(value, value)

    def _visit(self, node: Node) -> None:
        results = [Value(node, i) for i in range(len(node.avals))]
        if results and all(v in self._moved for v in results) and node.is_pure:
            return
        replacement = self._decided.get(node)
        if replacement is not None and self._makes_ready(replacement, node):
            jaxpr, consts = _jax.open_jaxpr(replacement.jaxpr)
            arguments = [self._now(v) for v in replacement.arguments]
            values = splice(self._builder, jaxpr, consts, arguments, known_inside=True)
            self._moved.update(zip(replacement.roots, values))
            self._log.note(replacement)
            self._changed = True
            if all(v in self._moved for v in results):
                return
        subs = {g: self._nested(g) for g in node.subgraphs}
        params = node.params
        if any(old is not new for old, new in subs.items()):
            params = {k: _swap(v, subs) for k, v in node.params.items()}
            self._changed = True
        extra = {} if params is node.params else {"params": params}
        new = self._builder.copy(node, [self._now(v) for v in node.inputs], **extra)
        self._changed = self._changed or new is not node
        if params is node.params:
            self.origin.setdefault(new, node)
        for i, result in enumerate(results):
            self._moved.setdefault(result, Value(new, i))

    def _makes_ready(self, replacement: Replacement, node: Node) -> bool:
        """Computes what a form of several roots needs that comes later in the program; False where it cannot be."""
        late = self._missing(replacement)
        if not late:
            return late is not None
        self._begun.add(node)
        for other in self._order:
            if other in late:
                self._visit(other)
        self._begun.discard(node)
        return not any(root in self._moved for root in replacement.roots)

    def _missing(self, replacement: Replacement) -> set[Node] | None:
        """What the arguments wait for; None if that includes what is replaced, or effects, whose order is kept."""
        found: set[Node] = set()
        barred = self._begun | {root.node for root in replacement.roots}
        stack = list(replacement.arguments)
        while stack:
            value = stack.pop()
            if value in self._moved or value.node in found or value.node.op in ("const", "input"):
                continue
            if value.node in barred or not value.node.is_pure:
                return None
            found.add(value.node)
            stack.extend(value.node.inputs)
        return found


def _trace_after(rule: Rule, m: Match) -> Any:
    """The replacement as a closed jaxpr from the variables of the match to its roots, or None where it declines."""
    declined = False

    def after(*arguments: Any) -> Sequence[Any]:
        nonlocal declined
        result = rule.after(m, **dict(zip(m.values, arguments)))
        if result is None:
            declined = True
            return ()
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    root = m.roots[0].node
    try:
        with _jax.at_source(root.source, root.context):
            jaxpr = _jax.make_jaxpr(after, [v.aval for v in m.values.values()])
    except jax.errors.InconclusiveDimensionOperation:
        return None
    if declined:
        return None
    have = [v.aval for v in _jax.open_jaxpr(jaxpr)[0].outvars]
    want = [v.aval for v in m.roots]
    if len(have) != len(want) or not all(map(_jax.same_type, have, want)):
        where = _jax.source_line(root.source)
        raise RuleError(f"rule {rule.name!r} at {root!r} {where} gives {have} where {want} was needed")
    return jaxpr


def _trace_key(rule: Rule, m: Match) -> Any:
    """What the replacement may depend on, for rules whose replacement can be traced once and used again."""
    if rule.reads_values or (isinstance(rule.before, Find) and m.alike is None):
        return None
    nodes = [m.roots[0].node, *m.nodes.values()]
    return (
        rule,
        tuple((n.op, n.params_key, tuple(map(str, n.avals))) for n in nodes),
        tuple(m.nodes),
        m.alike,
        tuple((name, str(v.aval), getattr(v.aval, "weak_type", None)) for name, v in m.values.items()),
        _same_values(m),
        context_key(m.roots[0].node.context),
    )


def _same_values(m: Match) -> tuple[int, ...]:
    values = list(m.values.values())
    return tuple(values.index(v) for v in values)


def _by_operation(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.ops:
            table.setdefault(op, []).append(rule)
    return table


def _swap(param: Any, subs: Mapping[Graph, Graph]) -> Any:
    if isinstance(param, Graph):
        return subs[param]
    if isinstance(param, tuple) and any(isinstance(p, Graph) for p in param):
        return tuple(subs[p] if isinstance(p, Graph) else p for p in param)
    return param


def _dirty(old: Graph, new: Graph, origin: Mapping[Node, Node]) -> set[Node]:
    """The nodes of ``new`` at which a rule could match that could not before: new ones, those whose operands' uses
    changed or that became known, and what is built on them within the reach of a pattern."""
    front = {n for n in new.nodes if n not in origin or (n in new.known) != (origin[n] in old.known)}
    for value, uses in new.uses.items():
        node = value.node
        if node.inputs and node not in origin:
            continue
        before = old.uses.get(Value(origin.get(node, node), value.index), ())
        if len(before) != len(uses) or any(u not in origin for u, _ in uses if u is not None):
            front.add(node)
    dirty = set(front)
    users: dict[Node, list[Node]] = {}
    for value, uses in new.uses.items():
        users.setdefault(value.node, []).extend(u for u, _ in uses if u is not None)
    for _ in range(_REACH):
        front = {u for n in front for u in users.get(n, ())} - dirty
        dirty |= front
    return dirty
