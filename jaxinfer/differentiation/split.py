"""Splitting a program that computes values and derivatives into what runs first and what waits for cotangents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxinfer.analysis.loops import cut
from jaxinfer.graph import Graph, Node, Value


@dataclass(frozen=True)
class Split:
    """A program in two stages.

    Attributes:
        early: early inputs → early outputs, then residuals.
        late: early inputs that are used again, residuals, late inputs → late outputs.
        again: positions of the early inputs that the late stage reads.
        residuals: the values that are kept in between.
    """

    early: Graph
    late: Graph
    again: tuple[int, ...]
    residuals: tuple[Value, ...]


# Operations that only arrange the elements of their operand, or repeat them: what they are applied to is kept instead.
_VIEWS = frozenset("broadcast_in_dim expand_dims reshape squeeze transpose".split())
# Known values that these give are made again and not kept.
_MADE = _VIEWS | {"convert_element_type", "iota"}
# What these few give of values that are there anyway is computed again, which costs less than storing and reading it.
_CHEAP = _MADE | frozenset(
    "add and clamp eq ge gt integer_pow is_finite le lt max min mul ne neg not or select_n sign square sub xor".split()
)
_FEW = 8


def split(graph: Graph, count: int, outputs: int, free: Collection[int] = (), steady: Collection[int] = ()) -> Split:
    """Splits a program.

    Args:
        graph: inputs: ``count`` early ones, then late ones; outputs: ``outputs`` early ones, which depend on early
            inputs only, then late ones.
        count: number of early inputs.
        outputs: number of early outputs.
        free: positions of early inputs that the late stage can read at no cost.
        steady: positions of early inputs that are the same whenever the program runs. What follows from these alone
            is kept and not computed again, as it is computed once.
    """
    early_inputs = [Value(n, 0) for n in graph.inputs[:count]]
    late_inputs = [Value(n, 0) for n in graph.inputs[count:]]
    late: set[Node] = {v.node for v in late_inputs}
    for node in graph.nodes:
        if any(v.node in late for v in node.inputs):
            late.add(node)
    effects = [n for n in graph.nodes if n.effects]
    late_effects = [n for n in effects if n in late]
    needed = _needed([*graph.outputs[outputs:], *(v for n in late_effects for v in n.inputs)], late)
    needed.update(late_effects)
    kept = _kept(graph, [v for n in graph.nodes if n in needed for v in n.inputs], graph.outputs[outputs:], late)
    kept = _least(kept, [early_inputs[i] for i in free], _following(graph, [early_inputs[i] for i in steady]))
    inputs = set(early_inputs)
    again = tuple(i for i, v in enumerate(early_inputs) if v in kept)
    residuals = tuple(v for v in kept if v not in inputs)
    avals = graph.out_avals
    return Split(
        cut(
            [*graph.outputs[:outputs], *residuals],
            early_inputs,
            out_avals=[*avals[:outputs], *(v.aval for v in residuals)],
            also=[n for n in effects if n not in late],
        ),
        cut(
            graph.outputs[outputs:],
            [*(early_inputs[i] for i in again), *residuals, *late_inputs],
            out_avals=avals[outputs:],
            also=late_effects,
        ),
        again,
        residuals,
    )


def _kept(graph: Graph, operands: Sequence[Value], outputs: Sequence[Value], late: set[Node]) -> dict[Value, None]:
    """The early values that late operations read, in order, traced back to what is least to keep."""
    made: set[Node] = set()
    for node in graph.nodes:
        if node.op in _MADE and all(v.node.is_const or v.node in made for v in node.inputs):
            made.add(node)
    kept: dict[Value, None] = {}
    for value in (*operands, *outputs):
        node = value.node
        if node in late or node.is_const:
            continue
        while node.op in _VIEWS and len(node.inputs) == 1 and node not in made:
            value = node.inputs[0]
            node = value.node
        if node not in made and not node.is_const:
            kept[value] = None
    return kept


def _following(graph: Graph, values: Sequence[Value]) -> set[Node]:
    """The operations that depend on some inputs alone."""
    found = {v.node for v in values}
    for node in graph.nodes:
        if node.is_pure and all(v.node.is_const or v.node in found for v in node.inputs):
            found.add(node)
    return found - {v.node for v in values}


def _least(kept: dict[Value, None], free: Sequence[Value], steady: set[Node]) -> dict[Value, None]:
    """The kept values without those that follow from others by a few cheap operations."""
    found = dict.fromkeys((*kept, *free))
    read = {v: None for v in free if v in kept}
    for value in reversed(kept):
        if (sources := _sources(value, found, steady)) is not None:
            del found[value]
            read.update((v, None) for v in sources if v in free)
    return {v: None for v in found if v in read or v not in free}


def _sources(value: Value, found: Collection[Value], steady: set[Node]) -> set[Value] | None:
    """Which of the values found a value follows from by a few cheap operations, None where it does not."""
    sources: set[Value] = set()
    seen: set[Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        if current in seen or current.node.is_const:
            continue
        seen.add(current)
        if current in found and current != value:
            sources.add(current)
        elif current.node.op in _CHEAP and current.node not in steady and len(seen) - len(sources) <= _FEW:
            stack.extend(current.node.inputs)
        else:
            return None
    return sources


def _needed(outputs: Sequence[Value], late: set[Node]) -> set[Node]:
    """The late operations that late outputs need."""
    found: set[Node] = set()
    stack = [v.node for v in outputs]
    while stack:
        node = stack.pop()
        if node in late and node not in found:
            found.add(node)
            stack.extend(v.node for v in node.inputs)
    return found
