"""Which values matter to a derivative: those that depend on what is differentiated and that reach a result."""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer import _jax
from jaxinfer.differentiation.rules import is_flat
from jaxinfer.graph import Domain, Graph, Node, Value, interpret


class Activity(Domain[bool]):
    """Whether a value depends on an active input in a way that may have a derivative."""

    def constant(self, node: Node) -> bool:
        """Known arrays do not change."""
        return False

    def default(self, node: Node, *inputs: bool) -> Sequence[bool]:
        """A result is active when an operand is and the result has derivatives at all."""
        moves = any(inputs) and not is_flat(node)
        return [moves and _jax.has_tangent(aval) for aval in node.avals]

    def join(self, a: bool, b: bool) -> bool:
        """Active in any step or branch."""
        return a or b

    def cond(self, node: Node, index: bool, *inputs: bool) -> Sequence[bool]:
        """The index picks a branch and has no derivative."""
        return super().cond(node, False, *inputs)


def active_outputs(graph: Graph, active: Sequence[bool]) -> list[bool]:
    """Which outputs depend on the active inputs."""
    return interpret(graph, Activity(), *active)


def useful_values(graph: Graph, outputs: Sequence[bool]) -> set[Value]:
    """The values that some of the outputs depend on.

    Args:
        graph: the program.
        outputs: which outputs count.
    """
    found = {v for v, counts in zip(graph.outputs, outputs) if counts}
    for node in reversed(graph.nodes):
        if any(Value(node, i) in found for i in range(len(node.avals))):
            found.update(node.inputs)
    return found


def useful_inputs(graph: Graph, outputs: Sequence[bool]) -> list[bool]:
    """Which inputs some of the outputs depend on."""
    found = useful_values(graph, outputs)
    return [Value(node, 0) in found for node in graph.inputs]
