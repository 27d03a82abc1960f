"""Which axis of every value runs over the examples of a batch, and whether examples ever meet.

A program is batch-parallel when each of its results, cut along its batch axis, depends on the same cut of its inputs
and on nothing else of them, and is computed by the same operations for every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.axes import Way, takes, ways
from jaxinfer.graph import Domain, Graph, Node, Value, interpret

# Known arrays up to this many elements are searched for repeats (a loop's initial state, say).
_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class Spread:
    """How a value is spread over the examples.

    Attributes:
        axis: the axis that runs over the examples, in as many equal blocks; None where no example enters the value.
        repeats: of a value without batch axis, the axes along which it consists of equal blocks, one for each example.
    """

    axis: int | None = None
    repeats: frozenset[int] = frozenset()

    def fits(self, axis: int | None) -> bool:
        """Whether the value can be used as one whose batch axis is ``axis`` (or that has none)."""
        return self.axis == axis or (self.axis is None and axis in self.repeats)


MIXED = Spread(-1)
"""A value in which examples meet, or of which nothing is known."""


@dataclass(frozen=True)
class BatchAxes:
    """The batch axes of a batch-parallel program.

    Attributes:
        size: number of examples.
        inputs: the batch axis of each input, None for those that all examples share.
        outputs: the batch axis of each output, None for those that no example enters.
    """

    size: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def batch_axes(graph: Graph) -> BatchAxes | None:
    """Finds whether a program computes its results example by example.

    Examples are taken to lie along axis 0 of every input; inputs of rank 0 are shared.

    Args:
        graph: the program.

    Returns:
        The batch axes, or None if examples meet, if they may meet, if there is only one, or if the program has effects.
    """
    shapes = [getattr(node.aval, "shape", None) for node in graph.inputs]
    sizes = {s[0] if type(s[0]) is int else 1 for s in shapes if s}
    if None in shapes or len(sizes) != 1 or not all(node.is_pure for node in graph.walk()):
        return None
    (size,) = sizes
    if size < 2:
        return None
    axes = tuple(0 if s else None for s in shapes)
    outputs = [s.axis for s in interpret(graph, Spreads(size), *map(Spread, axes))]
    return (
        None if MIXED.axis in outputs or outputs.count(None) == len(outputs) else BatchAxes(size, axes, tuple(outputs))
    )


def value_axes(graph: Graph, axes: BatchAxes) -> dict[Value, int]:
    """The batch axis of every value of a program that has one, nested graphs not included."""
    values = [Value(node, i) for node in (*graph.inputs, *graph.nodes) for i in range(len(node.avals))]
    everything = Graph(graph.inputs, graph.nodes, tuple(values))
    spreads = interpret(everything, Spreads(axes.size), *map(Spread, axes.inputs))
    return {value: spread.axis for value, spread in zip(values, spreads) if spread.axis is not None}


class Spreads(Domain[Spread]):
    """The domain of :class:`Spread`.

    Args:
        size: number of examples.
    """

    def __init__(self, size: int):
        self.size = size

    def constant(self, node: Node) -> Spread:
        return Spread(repeats=frozenset(_repeated_axes(node, self.size)))

    def default(self, node: Node, *inputs: Spread) -> Sequence[Spread]:
        if MIXED not in inputs:
            if all(s.axis is None for s in inputs):
                return self._shared(node, inputs)
            if (way := self.way(node, inputs)) is not None:
                return [Spread(axis) for axis in way.results]
        return [MIXED] * len(node.avals)

    def way(self, node: Node, inputs: Sequence[Spread]) -> Way | None:
        """How the examples run through an operation some of whose operands have a batch axis; None if they meet."""
        axes = [s.axis for s in inputs]
        return next(
            (w for w in ways(node, self.size) if takes(w, axes) and all(s.fits(a) for s, a in zip(inputs, w.operands))),
            None,
        )

    def _shared(self, node: Node, inputs: Sequence[Spread]) -> list[Spread]:
        """A result consists of equal blocks where all the operands do that enter block by block."""
        repeats: list[set[int]] = [set() for _ in node.avals]
        for way in ways(node, self.size):
            if all(a is None or a in s.repeats for s, a in zip(inputs, way.operands)):
                for found, axis in zip(repeats, way.results):
                    found.add(axis)
        return [Spread(repeats=frozenset(found)) for found in repeats]

    def join(self, a: Spread, b: Spread) -> Spread:
        if a.axis is None and b.axis is None:
            return Spread(repeats=a.repeats & b.repeats)
        for one, other in ((a, b), (b, a)):
            if other.axis is not None and one.fits(other.axis):
                return other
        return MIXED

    def element(self, value: Spread) -> Spread:
        if value.axis is None:
            return Spread(repeats=frozenset(a - 1 for a in value.repeats if a))
        # A loop over the examples is left as it is.
        return MIXED if value.axis <= 0 else Spread(value.axis - 1)

    def stack(self, value: Spread) -> Spread:
        if value == MIXED:
            return MIXED
        axis = None if value.axis is None else value.axis + 1
        return Spread(axis, frozenset(a + 1 for a in value.repeats))

    def while_loop(self, node: Node, *inputs: Spread) -> Sequence[Spread]:
        carry = super().while_loop(node, *inputs)
        conds, bodies = node.params["cond_nconsts"], node.params["body_nconsts"]
        (goes_on,) = interpret(node.params["cond"], self, *inputs[:conds], *carry)
        # Where one example decides how long all of them go on, they meet.
        return carry if goes_on.axis is None else [MIXED] * (len(inputs) - conds - bodies)

    def cond(self, node: Node, index: Spread, *inputs: Spread) -> Sequence[Spread]:
        return super().cond(node, index, *inputs) if index.axis is None else [MIXED] * len(node.avals)

    def remat(self, node: Node, *inputs: Spread) -> Sequence[Spread]:
        # What is to be computed again belongs to a derivative, and derivatives of weights sum over examples.
        return [Spread() if all(s.axis is None for s in inputs) else MIXED] * len(node.avals)


def _repeated_axes(node: Node, size: int) -> list[int]:
    """The axes of length ``size`` along which all elements of a known array are the same, bit by bit."""
    aval, value = node.aval, node.value
    concrete = isinstance(value, (np.ndarray, np.generic, jax.Array)) and _jax.is_concrete(value)
    if not concrete or _jax.is_extended(aval.dtype) or size not in aval.shape or np.prod(aval.shape) > _LOOKED_AT:
        return []
    array = np.ascontiguousarray(value)
    bits: Any = array.view(np.uint8).reshape(*array.shape, -1)
    return [a for a, d in enumerate(aval.shape) if d == size and (bits == bits.take([0], axis=a)).all()]
