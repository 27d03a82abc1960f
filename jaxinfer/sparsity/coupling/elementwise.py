"""Coupling through operations that keep axes in place, and through sums and other reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxinfer.analysis.structure import BINARY, UNARY
from jaxinfer.graph import Node
from jaxinfer.sparsity.coupling.index_sets import Vector, free, given

if TYPE_CHECKING:
    from jaxinfer.sparsity.coupling.domain import Coupling

Axes = tuple[Vector, ...]
"""What runs along the axes of a value: a vector for each."""
Rule = Callable[..., Sequence[Axes]]

# A zero operand makes a zero result.
_ZEROING = frozenset({"mul", "and"})


def _elementwise(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
    shape = node.avals[0].shape
    units, zeroing = domain.units, node.op in _ZEROING
    operands = [domain.spread(x, shape, node.op) for x in inputs]
    merge = functools.partial(units.unify, zeroing=zeroing)
    axes = tuple(functools.reduce(merge, vectors) for vectors in zip(*operands))
    return [axes] * len(node.avals)


def _select(domain: Coupling, node: Node, which: Axes, *cases: Axes) -> list[Axes]:
    shape, units = node.aval.shape, domain.units
    operands = [domain.spread(x, shape, node.op) for x in cases]
    axes = [functools.reduce(units.unify, vectors) for vectors in zip(*operands)]
    # Which case is taken may vary along an axis without making anything differ from zero.
    chosen = domain.spread(which, shape, node.op)
    return [tuple(units.unify(a, c, zeroing=True) for a, c in zip(axes, chosen))]


def _identity(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
    return list(inputs)


def _sum(domain: Coupling, node: Node, x: Axes) -> list[Axes]:
    """Removed indices must be zero, or alike, to be summed over; nothing else is asked of them."""
    for axis in node.params["axes"]:
        domain.units.mark("mixed", x[axis])
    return [tuple(v for axis, v in enumerate(x) if axis not in node.params["axes"])]


def _extremum(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
    """A removed index would still take part."""
    gone = node.params["dimensions" if node.op == "reduce" else "axes"]
    for x in inputs[: len(node.avals)]:
        for axis in gone:
            domain.units.lock(x[axis], f"{node.op} over its axis")
    kept = [tuple(v for axis, v in enumerate(x) if axis not in gone) for x in inputs[: len(node.avals)]]
    return [domain.meet(kept)] * len(node.avals)


def _ordered(name: str) -> Rule:
    """Operations that work along one axis, all operands alike, and leave the others alone."""

    def rule(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
        axis = node.params[name] % len(node.inputs[0].shape)
        axes = list(domain.meet(inputs))
        domain.units.lock(axes[axis], f"{node.op} along its axis")
        results = []
        for aval in node.avals:
            axes[axis] = given(aval.shape[axis])
            results.append(tuple(axes))
        return results

    return rule


def _leading(core: Callable[[Node], int]) -> Rule:
    """Operations on the last axes, all operands alike along the others."""

    def rule(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
        count = core(node)
        for x in inputs:
            for vector in x[len(x) - count :]:
                domain.units.lock(vector, f"{node.op} over its axis")
        outer = domain.meet([x[: len(x) - count] for x in inputs])
        return [(*outer, *map(given, aval.shape[len(outer) :])) for aval in node.avals]

    return rule


def _window(domain: Coupling, node: Node, x: Axes, *rest: Axes) -> Sequence[Axes]:
    """Axes with windows of one element pass; along the others neighbours meet."""
    p = node.params
    if len(node.avals) != 1:
        return domain.default(node, x, *rest)
    sides = zip(p["window_dimensions"], p["window_strides"], map(tuple, p["padding"]), p["base_dilation"])
    axes = []
    for vector, side, size in zip(x, sides, node.avals[0].shape):
        if side == (1, 1, (0, 0), 1):
            axes.append(vector)
        else:
            domain.units.lock(vector, f"{node.op} along its axis")
            axes.append(given(size))
    return [tuple(axes)]


def _new(domain: Coupling, node: Node, *inputs: Axes) -> list[Axes]:
    """What is made of nothing, such as random numbers."""
    return [tuple(map(free if node.op == "iota" else given, aval.shape)) for aval in node.avals]


def _table(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY | BINARY, _elementwise),
    **_table(
        "add_any bessel_i1e clamp complex igamma igammac polygamma regularized_incomplete_beta zeta erf_inv mulhi",
        _elementwise,
    ),
    "select_n": _select,
    **_table(
        "copy copy_p stop_gradient name optimization_barrier sharding_constraint device_put reduce_precision pvary",
        _identity,
    ),
    "reduce_sum": _sum,
    **_table("argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_xor", _extremum),
    **_table("cumlogsumexp cummax cummin cumprod cumsum top_k", _ordered("axis")),
    "sort": _ordered("dimension"),
    **_table("reduce_window reduce_window_max reduce_window_min reduce_window_sum", _window),
    **_table("cholesky eigh lu qr svd triangular_solve householder_product", _leading(lambda node: 2)),
    "fft": _leading(lambda node: len(node.params["fft_lengths"])),
    "iota": _new,
    **_table("random_bits random_seed random_wrap random_unwrap random_split random_fold_in threefry2x32", _new),
}
