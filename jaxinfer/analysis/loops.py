"""Loops: what a body reads and gives, which of it depends on what, and loops made anew from parts of old ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from jaxinfer.graph import Graph, GraphBuilder, Node, Value
from jaxinfer.graph.emit import Emit


@dataclass(frozen=True, eq=False)
class Loop:
    """A ``scan`` or ``while`` by the roles of its operands; both kinds read loop constants and carries.

    Attributes:
        node: the loop.
        fixed: operands that are the same in every step of the body.
        init: operands that carries start from.
        xs: operands of which each step reads one row; a ``while`` has none.
        body: one step: (fixed, carries, rows) → (carries, rows of ys).
        cond: for a ``while``, whether to go on: (cond_fixed, carries) → bool.
        cond_fixed: operands that only the condition reads.
    """

    node: Node
    fixed: tuple[Value, ...]
    init: tuple[Value, ...]
    xs: tuple[Value, ...]
    body: Graph
    cond: Graph | None = None
    cond_fixed: tuple[Value, ...] = ()

    @staticmethod
    def of(node: Node) -> Loop:
        """A ``scan`` or ``while`` node as a loop."""
        p, operands = node.params, node.inputs
        if node.op == "scan":
            first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
            return Loop(node, operands[:first], operands[first:last], operands[last:], p["body"])
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        fixed, init = operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
        return Loop(node, fixed, init, (), p["body"], p["cond"], operands[:n_cond])

    @property
    def length(self) -> int | None:
        """Number of steps, None where it is decided while running or symbolic."""
        length = self.node.params.get("length")
        return length if isinstance(length, int) else None

    @property
    def steps_inputs(self) -> tuple[tuple[Value, ...], tuple[Value, ...], tuple[Value, ...]]:
        """The body's inputs: fixed, carries, rows of xs."""
        values = tuple(Value(n, 0) for n in self.body.inputs)
        first, last = len(self.fixed), len(self.fixed) + len(self.init)
        return values[:first], values[first:last], values[last:]

    @property
    def carried(self) -> tuple[Value, ...]:
        """What the body gives to the next step."""
        return self.body.outputs[: len(self.init)]

    @property
    def rows(self) -> tuple[Value, ...]:
        """What the body gives to ys."""
        return self.body.outputs[len(self.init) :]

    @property
    def results(self) -> tuple[Value, ...]:
        """The loop's results: final carries, then ys."""
        return tuple(Value(self.node, i) for i in range(len(self.node.avals)))

    def run(
        self,
        body: Graph,
        fixed: Sequence[Any],
        init: Sequence[Any],
        xs: Sequence[Any] = (),
        *,
        cond: Graph | None = None,
        cond_fixed: Sequence[Any] = (),
    ) -> list[Any]:
        """Runs a loop of this one's length and direction with another body, on JAX values.

        Args:
            body: one step.
            fixed: loop constants of the body.
            init: what carries start from.
            xs: arrays of rows.
            cond: the condition of a ``while``.
            cond_fixed: loop constants of the condition.

        Returns:
            Final carries, then ys.
        """
        body = dataclasses.replace(body, origin=None)
        if cond is None:
            changes = {"body": body, "num_consts": len(fixed), "num_carry": len(init)}
            return list(Emit({}).scan(_changed(self.node, changes), *fixed, *init, *xs))
        changes = {"body": body, "cond": cond, "cond_nconsts": len(cond_fixed), "body_nconsts": len(fixed)}
        return list(Emit({}).while_loop(_changed(self.node, changes), *cond_fixed, *fixed, *init))


def _changed(node: Node, changes: Mapping[str, Any]) -> Node:
    """A node with other bodies, whose parameters in JAX's own words no longer hold."""
    params = {name: value for name, value in node.params.items() if name != "_original"}
    return dataclasses.replace(node, params={**params, **changes})


# -- parts of programs ------------------------------------------------------------------------------------------------


def cut(
    outputs: Sequence[Value],
    inputs: Sequence[Value],
    same: Mapping[Value, Value] | None = None,
    out_avals: Sequence[Any] = (),
    also: Sequence[Node] = (),
) -> Graph:
    """The program that computes some values of a graph from others.

    Args:
        outputs: what it gives.
        inputs: what it is given; distinct values.
        same: values in the place of which others are used.
        out_avals: types of the outputs; by default those of the values.
        also: operations with effects that it has besides, in their order.

    Raises:
        ValueError: if the outputs depend on an input of the graph that is not given.
    """
    same = same or {}
    builder = GraphBuilder()
    env = {v: builder.input(v.aval) for v in inputs}

    def read(value: Value) -> Value:
        value = same.get(value, value)
        return value if value.node.is_const else env[value]

    def copy(node: Node) -> None:
        new = builder.copy(node, [read(v) for v in node.inputs])
        for i in range(len(node.avals)):
            env.setdefault(Value(node, i), Value(new, i))

    def compute(values: Sequence[Value]) -> None:
        stack = list(reversed(values))
        while stack:
            value = same.get(stack[-1], stack[-1])
            if value in env or value.node.is_const:
                stack.pop()
                continue
            node = value.node
            if node.op == "input":
                raise ValueError(f"the outputs depend on {node!r}, which is not given")
            operands = [same.get(v, v) for v in node.inputs]
            missing = [v for v in operands if v not in env and not v.node.is_const]
            if missing:
                stack.extend(reversed(missing))
            else:
                copy(node)

    for node in also:
        compute(node.inputs)
        copy(node)
    compute(outputs)
    found = [read(v) for v in outputs]
    return builder.build(found, out_avals=tuple(out_avals) or tuple(v.aval for v in outputs))


def copied(builder: GraphBuilder, graph: Graph, inputs: Mapping[Value, Value]) -> list[Value]:
    """Adds a graph's operations to another under construction.

    Args:
        builder: where they go.
        graph: the program, without effects.
        inputs: for each of its inputs a value there.

    Returns:
        The values of its outputs.
    """
    env = dict(inputs)
    for node in graph.nodes:
        new = builder.copy(node, [env.get(v, v) for v in node.inputs])
        env.update((Value(node, i), Value(new, i)) for i in range(len(node.avals)))
    return [env.get(v, v) for v in graph.outputs]


def below(outputs: Sequence[Value], stop: Callable[[Value], bool] = lambda _: False) -> set[Node]:
    """The nodes that values are computed by, inputs and constants included, down to where ``stop`` says so."""
    found: set[Node] = set()
    stack = [v for v in outputs if not stop(v)]
    while stack:
        node = stack.pop().node
        if node not in found:
            found.add(node)
            stack.extend(v for v in node.inputs if not stop(v))
    return found


# -- what depends on what ---------------------------------------------------------------------------------------------


class Dependence(IntEnum):
    """What a value of a loop body changes with."""

    KNOWN = 0
    FIXED = 1
    ROW = 2
    CARRY = 3


def dependence(loop: Loop, movable: Callable[[Node], bool]) -> dict[Node, Dependence]:
    """What each input and operation of a loop's body depends on.

    Args:
        loop: the loop.
        movable: whether an operation can be applied to the rows of all steps at once. What cannot stays in the body,
            as if it depended on the carries.
    """
    kinds: dict[Node, Dependence] = {}
    groups = (Dependence.FIXED, Dependence.CARRY, Dependence.ROW)
    for kind, values in zip(groups, loop.steps_inputs):
        kinds.update((v.node, kind) for v in values)
    for node in loop.body.nodes:
        kind = max((kinds.get(v.node, Dependence.KNOWN) for v in node.inputs), default=Dependence.KNOWN)
        if not node.is_pure or (kind is Dependence.ROW and not movable(node)):
            kind = Dependence.CARRY
        kinds[node] = kind
    return kinds
