"""Coupling through matrix products and convolutions, and what of their work goes with which units.

y[b, i, j] = Σ_k x[b, i, k] · w[b, k, j]:    b goes together, k goes together, i and j go on to the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.analysis.cost import flops
from jaxinfer.graph import Node
from jaxinfer.sparsity.coupling.elementwise import Axes, Rule
from jaxinfer.sparsity.coupling.index_sets import FREE, GIVEN, Vector, given, is_real

if TYPE_CHECKING:
    from jaxinfer.sparsity.coupling.domain import Coupling

Pairs = tuple[Sequence[int], Sequence[int]]
"""Axes of two operands that belong together."""


def _dot(domain: Coupling, node: Node, x: Axes, y: Axes) -> Sequence[Axes]:
    contract, batch = node.params["dimension_numbers"]
    return [_product(domain, node, flops(node) / 2, contract, batch, x, y)]


def _ragged(domain: Coupling, node: Node, x: Axes, y: Axes, sizes: Axes) -> Sequence[Axes]:
    """Rows are multiplied by one matrix of several: which one depends on data, so all of them stay."""
    d = node.params["ragged_dot_dimension_numbers"]
    contract, batch = d.dot_dimension_numbers
    if {*d.lhs_ragged_dimensions} & {*contract[0], *batch[0]}:
        return domain.default(node, x, y, sizes)
    for axis in d.rhs_group_dimensions:
        domain.units.lock(y[axis], "one of several matrices, by data")
    macs = math.prod(node.aval.shape) * math.prod(node.inputs[0].shape[axis] for axis in contract[0])
    return [_product(domain, node, macs, contract, batch, x, y, d.rhs_group_dimensions)]


def _product(
    domain: Coupling,
    node: Node,
    macs: float,
    contract: Pairs,
    batch: Pairs,
    x: Axes,
    y: Axes,
    chosen: Sequence[int] = (),
) -> Axes:
    """The axes of a product; ``chosen`` are axes of the second operand of which one index is taken."""
    summed = [_contract(domain, node, (i, j), x[i], y[j]) for i, j in zip(*contract)]
    batched = [domain.units.unify(x[i], y[j], zeroing=True) for i, j in zip(*batch)]
    gone = (*contract[0], *batch[0]), (*contract[1], *batch[1], *chosen)
    rest = [[v for axis, v in enumerate(side) if axis not in gone[k]] for k, side in enumerate((x, y))]
    if all(any(GIVEN in vector for vector in side) for side in (x, y)):
        # Parameters are not given, so both sides are activations.
        for vector in batched:
            domain.units.mark("head", vector)
    for side, free in zip((x, y), rest):
        if not any(GIVEN in vector for vector in side):
            for vector in free:
                domain.units.mark("made", vector)
    axes = tuple(map(_varying, (*batched, *rest[0], *rest[1])))
    domain.record(node, macs, (*axes, *summed))
    return axes


def _contract(domain: Coupling, node: Node, axes: tuple[int, int], a: Vector, b: Vector) -> Vector:
    """Where both sides have units they are the same; a unit that meets data or constants must be zero there."""
    units = domain.units
    units.mark("mixed", a[~is_real(b)])
    units.mark("mixed", b[~is_real(a)])
    for value, axis, data, reader in zip(node.inputs, axes, (a, b), (b, a)):
        reading = np.where(data == GIVEN, reader, FREE)
        units.mark("reads", reading)
        domain.read(value, axis, reading)
    return units.unify(a, b, zeroing=True)


def _varying(vector: Vector) -> Vector:
    """What goes on from an operand to a product: data where it was constant."""
    return np.where(vector == FREE, GIVEN, vector)


def _convolution(domain: Coupling, node: Node, x: Axes, w: Axes) -> Sequence[Axes]:
    """A convolution with groups is a product whose feature axes are (group, feature within the group)."""
    if node.params["batch_group_count"] != 1:
        return domain.default(node, x, w)
    units, groups = domain.units, node.params["feature_group_count"]
    lhs, rhs, out = node.params["dimension_numbers"]
    for vector in (*(x[a] for a in lhs[2:]), *(w[a] for a in rhs[2:])):
        units.lock(vector, "a convolution along its axis")
    features, kernels = x[lhs[1]], w[rhs[0]]
    units.mark("made", kernels)
    if groups == 1:
        summed, produced = _contract(domain, node, (lhs[1], rhs[1]), features, w[rhs[1]]), kernels
    else:
        of_x, within_x = units.split(features, groups, len(features) // groups)
        of_w, within_w = units.split(kernels, groups, len(kernels) // groups)
        summed = _contract(domain, node, (lhs[1], rhs[1]), within_x, w[rhs[1]])
        produced = units.compose(units.unify(of_x, of_w, zeroing=True), within_w)
    axes = list(map(given, node.aval.shape))
    axes[out[0]], axes[out[1]] = _varying(x[lhs[0]]), _varying(produced)
    domain.record(node, flops(node) / 2, (axes[out[0]], axes[out[1]], summed))
    return [tuple(axes)]


RULES: Mapping[str, Rule] = {"dot_general": _dot, "ragged_dot_general": _ragged, "conv_general_dilated": _convolution}
