"""Matrix products and convolutions as linear operations: which axes of the operands meet which axes of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True)
class Linear:
    """A product with one known operand, the weights.

    Attributes:
        node: the product.
        side: which operand is the weights.
        out_axes: for each axis of the result, the axis of the weights it runs along, or None.
        in_axes: for each axis of the other operand, the axis of the weights that meets it in the same place, or None.
            Where a convolution has groups, its feature axis meets the weights group by group: see ``groups``.
        groups: number of feature groups of a convolution, 1 for a matrix product.
    """

    node: Node
    side: int
    out_axes: tuple[int | None, ...]
    in_axes: tuple[int | None, ...]
    groups: int = 1

    @property
    def weights(self) -> Value:
        """The known operand."""
        return self.node.inputs[self.side]

    @property
    def input(self) -> Value:
        """The operand that is not known."""
        return self.node.inputs[1 - self.side]

    def operands(self, weights: Any, x: Any) -> tuple[Any, Any]:
        """The two operands in the order of the primitive."""
        return (x, weights) if self.side else (weights, x)


def linear(graph: Graph, value: Value) -> Linear | None:
    """A product with known weights, all of one dtype, or None."""
    node = value.node
    if node.op not in PRODUCTS:
        return None
    known = [graph.is_known(v) for v in node.inputs]
    if known[0] == known[1] or not is_static(value, *node.inputs) or 0 in value.shape:
        return None
    if any(v.dtype != value.dtype for v in node.inputs) or node.params.get("out_sharding") is not None:
        return None
    return _dot(node, known.index(True)) if node.op == "dot_general" else _convolution(node, known.index(True))


def _dot(node: Node, side: int) -> Linear:
    (contract, batch) = node.params["dimension_numbers"]
    ranks = [len(v.shape) for v in node.inputs]
    free = [[i for i in range(ranks[k]) if i not in contract[k] and i not in batch[k]] for k in (0, 1)]
    weights: list[int | None] = [*batch[side]]
    weights += [*free[0], *[None] * len(free[1])] if side == 0 else [*[None] * len(free[0]), *free[1]]
    meets = dict(zip((*contract[1 - side], *batch[1 - side]), (*contract[side], *batch[side])))
    return Linear(node, side, tuple(weights), tuple(meets.get(i) for i in range(ranks[1 - side])))


def _convolution(node: Node, side: int) -> Linear | None:
    if side == 0:
        return None
    numbers = node.params["dimension_numbers"]
    rank = len(node.aval.shape)
    out_axes: list[int | None] = [None] * rank
    in_axes: list[int | None] = [None] * rank
    out_axes[numbers.out_spec[1]] = numbers.rhs_spec[0]
    if node.params["batch_group_count"] == 1:
        in_axes[numbers.lhs_spec[1]] = numbers.rhs_spec[1]
    return Linear(node, side, tuple(out_axes), tuple(in_axes), node.params["feature_group_count"])


def is_valid_convolution(node: Node) -> bool:
    """Whether a convolution never reads beyond its input: no padding and no holes in the input."""
    return (
        all(low <= 0 and high <= 0 for low, high in node.params["padding"])
        and all(d == 1 for d in node.params["lhs_dilation"])
        and node.params["batch_group_count"] == 1
    )


def free_axes(node: Node) -> tuple[list[int], list[int]]:
    """For a matrix product, the axes of each operand that are neither contracted nor batched."""
    contract, batch = node.params["dimension_numbers"]
    lhs, rhs = (
        [i for i in range(len(v.shape)) if i not in contract[k] and i not in batch[k]]
        for k, v in enumerate(node.inputs)
    )
    return lhs, rhs


def same_product(a: Node, b: Node, ignore: Sequence[str] = ()) -> bool:
    """Whether two products do the same to operands of any size."""
    return (
        a.op == b.op
        and a.aval.dtype == b.aval.dtype
        and all(a.params[k] == b.params[k] for k in a.params if k not in ignore)
    )
