"""How the results of linear operations depend on their operands: a table of local matrices.

A rule is called as ``rule(node, inputs)`` with what is known of the operands, at least one of which depends on the
inputs, and returns the results, or None where it cannot say: then everything depends on everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import sparse

from jaxinfer.analysis.structure import ELEMENTWISE
from jaxinfer.differentiation.sparse.moves import gathered, numbers, origins, starts_of, targets
from jaxinfer.differentiation.sparse.pattern import (
    SOMETHING,
    Flow,
    Known,
    Rows,
    blurred,
    combined,
    scaled,
    size,
    take,
    total,
)
from jaxinfer.differentiation.sparse.products import convolution, dot, window_pairs
from jaxinfer.graph import Node

Rule = Callable[[Node, Sequence[Flow]], Sequence[Flow] | None]


def whole(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    """Every element of every result depends on all that any operand depends on."""
    rows = [x.rows for x in inputs if x.rows is not None]
    found = np.unique(np.concatenate([r.indices for r in rows]))
    one = sparse.csr_array((np.full(len(found), SOMETHING), found, [0, len(found)]), shape=(1, rows[0].shape[1]))
    return [Flow(take(one, np.zeros(size(aval), int))) for aval in node.avals]


def width(inputs: Sequence[Flow]) -> int:
    """The number of input elements that rows have coefficients for."""
    return next(x.rows.shape[1] for x in inputs if x.rows is not None)


# -- elementwise ------------------------------------------------------------------------------------------------------


def _spread(rows: Rows, shape: tuple[int, ...], result: tuple[int, ...]) -> Rows:
    """Rows of an operand that is repeated along axes of length one, or is a scalar."""
    if shape == result:
        return rows
    aligned = shape if len(shape) == len(result) else (1,) * len(result)
    return take(rows, np.broadcast_to(np.arange(math.prod(shape)).reshape(aligned), result))


def _operand_rows(node: Node, inputs: Sequence[Flow]) -> list[Rows | None]:
    shape = node.avals[0].shape
    return [None if x.rows is None else _spread(x.rows, v.shape, shape) for x, v in zip(inputs, node.inputs)]


def _elementwise(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    return [Flow(total([None if r is None else blurred(r) for r in _operand_rows(node, inputs)]))]


def _sum(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    rows = _operand_rows(node, inputs)
    if node.op == "sub" and rows[1] is not None:
        rows[1] = scaled(rows[1], np.full(rows[1].shape[0], -1.0))
    return [Flow(total(rows))]


def _neg(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    (rows,) = _operand_rows(node, inputs)
    assert rows is not None
    return [Flow(scaled(rows, np.full(rows.shape[0], -1.0)))]


def coefficients(flow: Flow, shape: tuple[int, ...]) -> np.ndarray:
    """A factor for each element: the known number, zero where that is known, or something."""
    known = flow.array()
    if known is not None and np.iscomplexobj(known):
        return np.broadcast_to(np.where(known == 0, 0.0, SOMETHING), shape)
    if known is not None:
        return np.broadcast_to(known.astype(np.float64), shape)
    zeros = flow.zero_places()
    return np.broadcast_to(SOMETHING if zeros is None else np.where(zeros, 0.0, SOMETHING), shape)


def _product(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    if all(x.rows is not None for x in inputs):
        return _elementwise(node, inputs)
    side = 0 if inputs[0].rows is not None else 1
    rows = _operand_rows(node, inputs)[side]
    assert rows is not None
    factors = coefficients(inputs[1 - side], node.inputs[1 - side].shape)
    aligned = factors if factors.ndim == len(node.aval.shape) else factors.reshape((1,) * len(node.aval.shape))
    return [Flow(scaled(rows, np.broadcast_to(aligned, node.aval.shape)))]


def _quotient(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    divisor = inputs[1].array()
    if inputs[1].rows is not None or divisor is None or np.iscomplexobj(divisor):
        return _elementwise(node, inputs)
    with np.errstate(all="ignore"):
        inverse = 1.0 / divisor.astype(np.float64)
    # A rounded inverse is not known; an infinite one is something.
    exact = np.isfinite(inverse) & (np.frexp(np.abs(inverse))[0] == 0.5)
    return _product(node, [inputs[0], _numbers(np.where(exact, inverse, SOMETHING))])


def _numbers(array: np.ndarray) -> Flow:
    return Flow(known=Known(lambda: array))


def _select(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    rows = [None if r is None else blurred(r) for r in _operand_rows(node, inputs)]
    return [Flow(total(rows))]


# -- movement ---------------------------------------------------------------------------------------------------------


def moved(node: Node, inputs: Sequence[Flow], index: np.ndarray) -> Flow:
    """Rows of the elements that a result is made of."""
    columns = width(inputs)
    starts = np.cumsum([0, *(size(v.aval) for v in node.inputs)])
    carriers = [i for i, x in enumerate(inputs) if x.rows is not None]
    if len(carriers) == 1:
        (i,) = carriers
        local = index - starts[i]
        inside = (local >= 0) & (index < starts[i + 1])
        rows = take(inputs[i].rows, np.where(inside, local, -1))
    else:
        empty = [sparse.csr_array((size(v.aval), columns)) for v in node.inputs]
        stacked = sparse.vstack([e if x.rows is None else x.rows for x, e in zip(inputs, empty)], "csr")
        rows = take(sparse.csr_array(stacked), index)
    return Flow(rows if rows.nnz else None)


def _movement(unplaced: Rule | None = None) -> Rule:
    """The rule of an operation that moves elements where positions are known, and another one where they are not."""

    def rule(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
        index = origins(node, inputs)
        if index is None:
            return None if unplaced is None else unplaced(node, inputs)
        return [moved(node, inputs, i) for i in index]

    return rule


def groups_without(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """Numbers that are equal for elements which differ along the given axes only."""
    kept = [1 if i in axes else d for i, d in enumerate(shape)]
    return np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), shape)


def united(rows: Rows, groups: np.ndarray) -> Rows:
    """For each group the entries of all its rows."""
    flat = groups.reshape(-1)
    count = int(flat.max()) + 1 if len(flat) else 0
    return combined(blurred(rows), flat, np.arange(len(flat)), count, 1.0)


def _slice_somewhere(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    sizes, shape = node.params["slice_sizes"], node.inputs[0].shape
    if inputs[0].rows is None or len(inputs) != 1 + len(sizes):
        return None
    starts = starts_of(inputs[1:], shape, sizes)
    groups = groups_without(shape, [a for a, s in enumerate(starts) if s is None])
    window = tuple(slice(s or 0, (s or 0) + n) for s, n in zip(starts, sizes))
    return [Flow(take(united(inputs[0].rows, groups), groups[window]))]


def _update_somewhere(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    shape, part = node.inputs[0].shape, node.inputs[1].shape
    starts = starts_of(inputs[2:], shape, part)
    anywhere = [a for a, s in enumerate(starts) if s is None]
    rows = None if inputs[0].rows is None else blurred(inputs[0].rows)
    if inputs[1].rows is None:
        return [Flow(rows)]
    groups = groups_without(part, anywhere)
    narrow = groups[tuple(slice(0, 1) if a in anywhere else slice(None) for a in range(len(part)))]
    wide = np.broadcast_to(narrow, [shape[a] if a in anywhere else part[a] for a in range(len(part))])
    places = np.full(shape, -1)
    places[tuple(slice(None) if s is None else slice(s, s + n) for s, n in zip(starts, part))] = wide
    return [Flow(total([rows, take(united(inputs[1].rows, groups), places)]))]


def _gather_somewhere(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    if inputs[0].rows is None:
        return None
    groups = groups_without(node.inputs[0].shape, node.params["dimension_numbers"].start_index_map)
    picked = gathered(groups, node, np.zeros(node.inputs[1].shape, node.inputs[1].dtype))
    return [Flow(take(united(inputs[0].rows, groups), picked))]


def _scatter(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    """``scatter`` (where an element may also stay) and ``scatter-add``."""
    adds = node.op in ("scatter-add", "scatter_add")
    old, updates, indices = inputs[0].rows, inputs[2].rows, inputs[1].array()
    if inputs[1].rows is not None:
        return None
    shape = node.inputs[0].shape
    if old is not None and not adds:
        old = blurred(old)
    if updates is None:
        return [Flow(old)]
    if indices is not None:
        to = targets(node, indices, np.arange(math.prod(shape)).reshape(shape))
        inside = np.flatnonzero(to >= 0)
        factor = 1.0 if adds else SOMETHING
        return [Flow(total([old, combined(updates, to[inside], inside, math.prod(shape), factor)]))]
    groups = groups_without(shape, node.params["dimension_numbers"].scatter_dims_to_operand_dims)
    to = targets(node, np.zeros(node.inputs[1].shape, node.inputs[1].dtype), groups)
    somewhere = combined(blurred(updates), to, np.arange(len(to)), int(groups.max()) + 1, 1.0)
    return [Flow(total([None if old is None else blurred(old), take(somewhere, groups)]))]


# -- reductions -------------------------------------------------------------------------------------------------------


def _reduce_sum(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    groups = groups_without(node.inputs[0].shape, node.params["axes"]).reshape(-1)
    assert inputs[0].rows is not None
    return [Flow(combined(inputs[0].rows, groups, np.arange(len(groups)), size(node.aval), 1.0))]


def _cumsum(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    axis, ids = node.params["axis"], numbers(node)[0]
    lines = np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis])
    later, earlier = np.tril_indices(ids.shape[axis])
    if node.params["reverse"]:
        later, earlier = earlier, later
    assert inputs[0].rows is not None
    return [Flow(combined(inputs[0].rows, lines[:, later].ravel(), lines[:, earlier].ravel(), ids.size, 1.0))]


def _along(axes_of: Callable[[Node, int], Sequence[int]], operand: int = 0) -> Rule:
    """Results that depend on the whole of an operand along some axes, and have its shape."""

    def rule(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
        shape = node.inputs[operand].shape
        others = [x for i, x in enumerate(inputs) if i != operand]
        if inputs[operand].rows is None or any(x.rows is not None for x in others) or node.avals[0].shape != shape:
            return None
        groups = groups_without(shape, axes_of(node, len(shape)))
        return [Flow(take(united(inputs[operand].rows, groups), groups))] * len(node.avals)

    return rule


def _solve_axes(node: Node, rank: int) -> Sequence[int]:
    return (rank - 2,) if node.params["left_side"] else (rank - 1,)


def _window_sum(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    """Sums over windows, and elements picked from windows."""
    p = node.params
    dilations = p.get("base_dilation"), p.get("window_dilation")
    if inputs[0].rows is None or any(x.rows is not None for x in inputs[1:]):
        return None
    to, of = window_pairs(
        node.inputs[0].shape, p["window_dimensions"], p["window_strides"], p["padding"], node.aval.shape, *dilations
    )
    factor = 1.0 if node.op == "reduce_window_sum" else SOMETHING
    return [Flow(combined(inputs[0].rows, to, of, size(node.aval), factor))]


def _window_scatter(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    """``select_and_scatter_add(source, operand)``: an element of the source goes somewhere into its window."""
    p = node.params
    if inputs[0].rows is None or inputs[1].rows is not None:
        return None
    of, to = window_pairs(
        node.aval.shape, p["window_dimensions"], p["window_strides"], p["padding"], node.inputs[0].shape
    )
    return [Flow(combined(inputs[0].rows, to, of, size(node.aval), SOMETHING))]


_moves = _movement()

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys("add add_any sub".split(), _sum),
    **dict.fromkeys("complex conj clamp real imag".split(), _elementwise),
    **dict.fromkeys(
        "broadcast_in_dim concatenate convert_element_type copy copy_p expand_dims optimization_barrier pad "
        "reduce_precision reshape rev slice split squeeze stack tile transpose unstack".split(),
        _moves,
    ),
    **dict.fromkeys(("scatter-add", "scatter_add"), _scatter),
    "conv_general_dilated": convolution,
    "cumsum": _cumsum,
    "div": _quotient,
    "dot_general": dot,
    "dynamic_slice": _movement(_slice_somewhere),
    "dynamic_update_slice": _movement(_update_somewhere),
    "fft": _along(lambda node, rank: range(rank - len(node.params["fft_lengths"]), rank)),
    "gather": _movement(_gather_somewhere),
    "mul": _product,
    "neg": _neg,
    "reduce_sum": _reduce_sum,
    "reduce_window_sum": _window_sum,
    "scatter": _movement(_scatter),
    "select_and_gather_add": _window_sum,
    "select_and_scatter_add": _window_scatter,
    "select_n": _movement(_select),
    "triangular_solve": _along(_solve_axes, operand=1),
}
