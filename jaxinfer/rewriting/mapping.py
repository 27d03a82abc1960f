"""Programs as loops over parts of their batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.batch import BatchAxes, batch_axes, value_axes
from jaxinfer.graph import Graph, GraphBuilder, Value, run, trace_function
from jaxinfer.rewriting.rebatch import rebatch

Improve = Callable[[Graph], Graph]


@dataclass(frozen=True)
class Stage:
    """A stretch of a program that runs for some examples at a time.

    Attributes:
        start: position in ``graph.nodes`` of the first operation; the stage ends where the next one starts.
        step: number of examples at a time; divides the number of examples.
    """

    start: int
    step: int


def map_batch(graph: Graph, step: int, improve: Improve = lambda graph: graph) -> Graph | None:
    """The program as a loop over parts of its batch.

    A part's intermediate values stay in the cache, and the memory they take is used again for the next part.

    Args:
        graph: a program whose inputs hold the examples along axis 0.
        step: number of examples in a part; divides the number of examples and is smaller.
        improve: optimizes the program of a part.

    Returns:
        A program with the same inputs and outputs, or None where examples meet or ``step`` does not fit.
    """
    found = batch_axes(graph)
    if found is None or step >= found.size:
        return None
    return map_stages(graph, [Stage(0, step)], improve)


def map_stages(graph: Graph, stages: Sequence[Stage], improve: Improve = lambda graph: graph) -> Graph | None:
    """The program as loops over parts of its batch, one after the other, each with parts of its own size.

    Args:
        graph: a program whose inputs hold the examples along axis 0.
        stages: the stages in order, the first of which starts at 0.
        improve: optimizes the program of a part.

    Returns:
        A program with the same inputs and outputs, or None where examples meet or a step does not fit.
    """
    found = batch_axes(graph)
    if found is None or any(found.size % stage.step for stage in stages):
        return None
    axes = value_axes(graph, found)
    loops = [_loop(graph, found.size, axes, stage, crossing, improve) for stage, crossing in _cut(graph, stages, axes)]
    shared = [v for v, axis in zip(graph.outputs, found.outputs) if axis is None]
    rest = _between(graph, [Value(n, 0) for n in graph.inputs], shared)

    def fun(*inputs: Any) -> list[Any]:
        values = {Value(node, 0): x for node, x in zip(graph.inputs, inputs)}
        for loop in loops:
            values.update(loop(values))
        values.update(zip(shared, run(rest, {}, *inputs)))
        return [_jax.with_aval(values[v], aval) for v, aval in zip(graph.outputs, graph.out_avals)]

    return trace_function(fun, *(node.aval for node in graph.inputs))


def crossing_values(graph: Graph, axes: Mapping[Value, int], position: int) -> list[Value]:
    """The values with a batch axis that are computed before a position in the program and needed at or after it."""
    before = {*graph.inputs, *graph.nodes[:position]}
    needed = dict.fromkeys(v for node in graph.nodes[position:] for v in node.inputs)
    needed.update(dict.fromkeys(graph.outputs))
    return [v for v in needed if v.node in before and v in axes]


def _cut(
    graph: Graph, stages: Sequence[Stage], axes: Mapping[Value, int]
) -> list[tuple[Stage, tuple[list[Value], list[Value]]]]:
    """Every stage with the batched values it reads and those it gives to later ones."""
    ends = [*(stage.start for stage in stages[1:]), len(graph.nodes)]
    cut = []
    given = [v for n in graph.inputs if (v := Value(n, 0)) in axes]
    for stage, end in zip(stages, ends):
        wanted = crossing_values(graph, axes, end)
        cut.append((stage, (given, [v for v in wanted if v not in given])))
        given = wanted
    return cut


def _loop(
    graph: Graph,
    size: int,
    axes: Mapping[Value, int],
    stage: Stage,
    crossing: tuple[list[Value], list[Value]],
    improve: Improve,
) -> Callable[[Mapping[Value, Any]], dict[Value, Any]]:
    """A stage as a function from the values before it to those after it."""
    given, wanted = crossing
    shared = [v for n in graph.inputs if (v := Value(n, 0)) not in axes]
    known = BatchAxes(size, tuple(axes.get(v) for v in (*given, *shared)), tuple(axes[v] for v in wanted))
    whole = _between(graph, [*given, *shared], wanted)
    resized = whole if stage.step == size else rebatch(whole, stage.step, known)
    assert resized is not None
    part = improve(resized)

    def loop(values: Mapping[Value, Any]) -> dict[Value, Any]:
        batched, others = [values[v] for v in given], [values[v] for v in shared]
        if stage.step == size:
            return dict(zip(wanted, run(part, {}, *batched, *others)))
        split = tuple(_split(x, axes[v], size, size // stage.step) for x, v in zip(batched, given))
        _, parts = lax.scan(lambda _, xs: (None, tuple(run(part, {}, *xs, *others))), None, split)
        return {v: jnp.moveaxis(y, 0, axes[v]).reshape(v.shape) for v, y in zip(wanted, parts)}

    return loop


def _split(x: Any, axis: int, size: int, parts: int) -> Any:
    """An array as ``parts`` arrays, stacked along a new first axis."""
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _between(graph: Graph, given: Sequence[Value], wanted: Sequence[Value]) -> Graph:
    """The part of a pure program that computes some values from others (and from constants)."""
    builder = GraphBuilder()
    moved = {v: builder.input(v.aval) for v in given}
    for node in graph.nodes:
        operands = [moved.get(v, v) for v in node.inputs]
        # Without its inputs, what comes before the stage cannot be computed, nor is it needed.
        if any(v.node.op != "const" and v not in moved for v in node.inputs):
            continue
        new = builder.copy(node, operands)
        for i in range(len(node.avals)):
            moved.setdefault(Value(node, i), Value(new, i))
    return builder.build([moved.get(v, v) for v in wanted], out_avals=[v.aval for v in wanted])
