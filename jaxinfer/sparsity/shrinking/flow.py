"""What depends on what, entry by entry, once masks have made some parameters zero.

Forward, each entry of each value gets a kind: zero by the masks, a constant of the program, frozen (it would depend on
the inputs, but masks have cut it off from them), made of parameters alone, or dynamic. Backward, it gets a need:
nothing depends on it; its value counts but as a number only; or it stays alive. From these :mod:`plan` decides which
slices of parameters go. Nothing here has to be exact: what is claimed to be cut off is computed with its fill, and what
is claimed to be unused is checked not to be, when the program is replayed.

Arrays of kinds and needs have, along each axis, the full size, or one where all entries are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Domain, Graph, Node, Value, interpret

ZERO, CONSTANT, FROZEN, PARAMETER, DYNAMIC = range(5)
UNUSED, NUMBER, ALIVE = range(3)
Kinds = np.ndarray
Needs = np.ndarray


@dataclass(frozen=True, eq=False)
class Entry:
    """The kinds of a value's entries, with the masks and without."""

    now: Kinds
    before: Kinds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and _alike(self.now, other.now) and _alike(self.before, other.before)

    __hash__ = None  # type: ignore[assignment]


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether tables say the same of the same value."""
    return bool(np.all(a == b))


class Rule(NamedTuple):
    """How kinds go forward through an operation, and needs backward.

    Attributes:
        forward: (node, kinds of the operands) → kinds of the results.
        backward: (node, kinds of the operands, needs of the results) → needs of the operands.
    """

    forward: Callable[[Node, Sequence[Kinds]], Sequence[Kinds]]
    backward: Callable[[Node, Sequence[Kinds], Sequence[Needs]], Sequence[Needs]]


def uniform(kind: int, rank: int) -> np.ndarray:
    """The same kind or need everywhere."""
    return np.full((1,) * rank, kind, np.uint8)


def rank_of(aval: Any) -> int:
    return len(getattr(aval, "shape", ()))


def _worst(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    """Every entry of the results depends on every entry of the operands."""
    worst = max([CONSTANT, *(int(k.max(initial=0)) for k in kinds)])
    return [uniform(worst, rank_of(a)) for a in node.avals]


def _all_needed(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    most = max((int(n.max(initial=0)) for n in needs), default=UNUSED)
    return [uniform(ALIVE if node.effects else most, k.ndim) for k in kinds]


OPAQUE = Rule(_worst, _all_needed)


class Flow(Domain[Entry]):
    """The domain of kinds; it remembers what it saw at each operation.

    Args:
        table: rules by operation.
    """

    def __init__(self, table: Mapping[str, Rule]):
        self.table = table
        self.seen: dict[Node, tuple[list[Entry], list[Entry]]] = {}

    def constant(self, node: Node) -> Entry:
        if not is_static(Value(node, 0)) or not _jax.is_concrete(node.value):
            kinds = uniform(CONSTANT, rank_of(node.aval))
        else:
            kinds = np.where(np.asarray(node.value) != 0, CONSTANT, ZERO).astype(np.uint8)
        return Entry(kinds, kinds)

    def rule(self, node: Node) -> Rule:
        """The rule of an operation."""
        known = is_static(*node.inputs, *(Value(node, i) for i in range(len(node.avals))))
        return self.table.get(node.op, self.table["*"]) if known else OPAQUE

    def default(self, node: Node, *inputs: Entry) -> Sequence[Entry]:
        forward = self.rule(node).forward
        now = forward(node, [x.now for x in inputs])
        before = forward(node, [x.before for x in inputs])
        results = [Entry(_frozen(n, b), b) for n, b in zip(now, before)]
        return self._remember(node, inputs, results)

    def _remember(self, node: Node, inputs: Sequence[Entry], results: Sequence[Entry]) -> Sequence[Entry]:
        self.seen[node] = (list(inputs), list(results))
        return results

    def scan(self, node: Node, *inputs: Entry) -> Sequence[Entry]:
        return self._remember(node, inputs, super().scan(node, *inputs))

    def while_loop(self, node: Node, *inputs: Entry) -> Sequence[Entry]:
        return self._remember(node, inputs, super().while_loop(node, *inputs))

    def cond(self, node: Node, index: Entry, *inputs: Entry) -> Sequence[Entry]:
        return self._remember(node, [index, *inputs], super().cond(node, index, *inputs))

    def remat(self, node: Node, *inputs: Entry) -> Sequence[Entry]:
        return self._remember(node, inputs, super().remat(node, *inputs))

    def join(self, a: Entry, b: Entry) -> Entry:
        return Entry(np.maximum(a.now, b.now), np.maximum(a.before, b.before))

    def element(self, value: Entry) -> Entry:
        return Entry(value.now.max(axis=0, initial=0), value.before.max(axis=0, initial=0))

    def stack(self, value: Entry) -> Entry:
        return Entry(value.now[None], value.before[None])


def _frozen(now: Kinds, before: Kinds) -> Kinds:
    """What depended on the inputs and does not any more."""
    cut = (before == DYNAMIC) & (now < DYNAMIC) & (now > ZERO)
    return np.where(cut, np.uint8(FROZEN), now).astype(np.uint8)


# -- backward ---------------------------------------------------------------------------------------------------------


class Backward:
    """Needs, from the results of a program to its inputs.

    Args:
        flow: what has walked the program forward.
        masked: whether to go by the kinds with the masks, or by those without.
    """

    def __init__(self, flow: Flow, masked: bool):
        self.flow = flow
        self.masked = masked

    def __call__(self, graph: Graph, needs: Sequence[Needs]) -> list[Needs]:
        """The needs of a graph's inputs for given needs of its results."""
        found: dict[Value, Needs] = {}

        def add(value: Value, need: Needs) -> None:
            have = found.get(value)
            found[value] = need if have is None else np.maximum(have, need)

        for value, need in zip(graph.outputs, needs):
            add(value, need)
        for node in reversed(graph.nodes):
            wanted = [found.get(Value(node, i), uniform(UNUSED, rank_of(a))) for i, a in enumerate(node.avals)]
            for value, need in zip(node.inputs, self._through(node, wanted)):
                if not value.node.is_const:
                    add(value, need)
        return [found.get(Value(n, 0), uniform(UNUSED, rank_of(n.aval))) for n in graph.inputs]

    def _through(self, node: Node, wanted: Sequence[Needs]) -> Sequence[Needs]:
        if node.op in _NESTED:
            return _NESTED[node.op](self, node, wanted)
        entries, results = self.flow.seen[node]
        kinds = [e.now if self.masked else e.before for e in entries]
        reduced = [_as_results_are(n, r.now if self.masked else r.before) for n, r in zip(wanted, results)]
        return [
            np.where(k == FROZEN, np.minimum(n, NUMBER), n).astype(np.uint8)
            for k, n in zip(kinds, self.flow.rule(node).backward(node, kinds, reduced))
        ]


def _as_results_are(need: Needs, kinds: Kinds) -> Needs:
    """What is zero needs nothing, and what is frozen nothing alive."""
    return np.where(kinds == ZERO, UNUSED, np.where(kinds == FROZEN, np.minimum(need, NUMBER), need)).astype(np.uint8)


def _same(a: Sequence[Needs], b: Sequence[Needs]) -> bool:
    return all(map(_alike, a, b))


def _scan(back: Backward, node: Node, wanted: Sequence[Needs]) -> Sequence[Needs]:
    p = node.params
    consts, carries = p["num_consts"], p["num_carry"]
    carry = list(wanted[:carries])
    each = [n.max(axis=0, initial=0) for n in wanted[carries:]]
    while True:
        needs = back(p["body"], [*carry, *each])
        after = [np.maximum(a, b) for a, b in zip(carry, needs[consts : consts + carries])]
        if _same(carry, after):
            return [*needs[:consts], *after, *(n[None] for n in needs[consts + carries :])]
        carry = after


def _while(back: Backward, node: Node, wanted: Sequence[Needs]) -> Sequence[Needs]:
    p = node.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    decided = back(p["cond"], [uniform(ALIVE, 0)])
    carry = [np.maximum(a, b) for a, b in zip(wanted, decided[n_cond:])]
    while True:
        needs = back(p["body"], carry)
        after = [np.maximum(a, b) for a, b in zip(carry, needs[n_body:])]
        if _same(carry, after):
            return [*decided[:n_cond], *needs[:n_body], *after]
        carry = after


def _cond(back: Backward, node: Node, wanted: Sequence[Needs]) -> Sequence[Needs]:
    branches = [back(graph, wanted) for graph in node.params["branches"]]
    return [uniform(ALIVE, 0), *(_most(needs) for needs in zip(*branches))]


def _most(needs: Sequence[Needs]) -> Needs:
    found = needs[0]
    for n in needs[1:]:
        found = np.maximum(found, n)
    return found


_NESTED: Mapping[str, Callable[[Backward, Node, Sequence[Needs]], Sequence[Needs]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat": lambda back, node, wanted: back(node.params["body"], wanted),
}


def needs_of(
    graph: Graph, table: Mapping[str, Rule], inputs: Sequence[Entry]
) -> tuple[list[Needs], list[Needs], list[Entry]]:
    """What the inputs of a program are needed for.

    Args:
        graph: the program, calls inlined.
        table: rules by operation; ``"*"`` stands for all others.
        inputs: the kinds of its inputs.

    Returns:
        The needs of its inputs with the masks, those without, and the kinds of its results.
    """
    flow = Flow(table)
    results = interpret(graph, flow, *inputs)
    alive = [uniform(ALIVE, rank_of(v.aval)) for v in graph.outputs]
    return Backward(flow, True)(graph, alive), Backward(flow, False)(graph, alive), results
