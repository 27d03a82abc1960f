"""Splitting a program that computes values and derivatives into what runs first and what waits for cotangents."""

from __future__ import annotations

from collections.abc import Sequence
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


def split(graph: Graph, count: int, outputs: int) -> Split:
    """Splits a program.

    Args:
        graph: inputs: ``count`` early ones, then late ones; outputs: ``outputs`` early ones, which depend on early
            inputs only, then late ones.
        count: number of early inputs.
        outputs: number of early outputs.
    """
    early_inputs = [Value(n, 0) for n in graph.inputs[:count]]
    late_inputs = [Value(n, 0) for n in graph.inputs[count:]]
    late: set[Node] = {v.node for v in late_inputs}
    for node in graph.nodes:
        if any(v.node in late for v in node.inputs):
            late.add(node)
    kept: dict[Value, None] = {}
    needed = _needed(graph.outputs[outputs:], late)
    for node in graph.nodes:
        if node in needed and node in late:
            kept.update((v, None) for v in node.inputs if v.node not in late and not v.node.is_const)
    kept.update((v, None) for v in graph.outputs[outputs:] if v.node not in late and not v.node.is_const)
    inputs = set(early_inputs)
    again = tuple(i for i, v in enumerate(early_inputs) if v in kept)
    residuals = tuple(v for v in kept if v not in inputs)
    avals = graph.out_avals
    return Split(
        cut(
            [*graph.outputs[:outputs], *residuals],
            early_inputs,
            out_avals=[*avals[:outputs], *(v.aval for v in residuals)],
        ),
        cut(
            graph.outputs[outputs:],
            [*(early_inputs[i] for i in again), *residuals, *late_inputs],
            out_avals=avals[outputs:],
        ),
        again,
        residuals,
    )


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
