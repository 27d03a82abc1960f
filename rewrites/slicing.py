"""Slices: composed, taken before the operation they follow, and told from lookups at known places."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.analysis.structure import ELEMENTWISE, again, aligned_axes, is_static, known_number, moves_units, rebind
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule, op, var
from jaxinfer.rewriting.sampler import Frozen

Window = list[tuple[int, int, int]]


def window(node: Node) -> Window:
    """Start, limit and stride of a slice along each axis."""
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    return list(zip(starts, limits, strides))


def take(x: Any, along: Window) -> Any:
    """The slice of an array."""
    if not along:
        return x
    return lax.slice(x, *zip(*along))


def _whole(shape: Sequence[int]) -> Window:
    return [(0, d, 1) for d in shape]


# -- slices -----------------------------------------------------------------------------------------------------------


def _takes_all(node: Node) -> bool:
    return is_static(*node.inputs) and node.inputs[0].shape == node.aval.shape


def _slice_twice(m: Match, x: Any) -> Any:
    along = []
    for (start, _, stride), (s, limit, t) in zip(window(m.nodes["inner"]), window(m.nodes["outer"])):
        last = start + stride * max(limit - 1, 0)
        along.append((start + stride * s, last + 1 if limit > s else start + stride * s, stride * t))
    return take(x, along)


def _find_sliced_elementwise(graph: Graph, node: Node) -> Match | None:
    """A slice of an elementwise result that is used nowhere else."""
    result = node.inputs[0]
    producer = result.node
    if producer.op not in ELEMENTWISE or not is_static(result, *producer.inputs):
        return None
    if len(graph.uses[result]) != 1 or _takes_all(node):
        return None
    values = {f"x{i}": v for i, v in enumerate(producer.inputs)}
    return Match(graph, (Value(node, 0),), values, {"elementwise": producer})


def _slice_operands(m: Match, **operands: Any) -> Any:
    along = window(m.roots[0].node)
    shape = m.roots[0].node.inputs[0].shape

    def part(x: Any) -> Any:
        if x.ndim != len(shape):
            return x
        return take(x, [w if d == full else (0, d, 1) for w, d, full in zip(along, x.shape, shape)])

    return rebind(m.nodes["elementwise"], *map(part, operands.values()))


def _slice_before_transpose(m: Match, x: Any) -> Any:
    permutation, along = m.params("inner")["permutation"], window(m.nodes["outer"])
    return lax.transpose(take(x, [along[permutation.index(i)] for i in range(x.ndim)]), permutation)


def _slice_before_broadcast(m: Match, x: Any) -> Any:
    node, places = m.nodes["outer"], m.params("inner")["broadcast_dimensions"]
    along, full = window(node), node.inputs[0].shape
    part = take(x, [along[p] if d == full[p] else (0, d, 1) for p, d in zip(places, x.shape)])
    return lax.broadcast_in_dim(part, node.aval.shape, places)


def _moves_units(m: Match) -> bool:
    return is_static(m["x"], m.roots[0]) and moves_units(m["x"].shape, m.nodes["inner"].aval.shape)


def _keeps_units(m: Match) -> bool:
    """Whether a slice of a reshape leaves the axes of length one whole."""
    return _moves_units(m) and 0 not in m.roots[0].shape


def _slice_before_reshape(m: Match, x: Any) -> Any:
    node = m.nodes["outer"]
    after = aligned_axes(x.shape, node.inputs[0].shape)
    along = window(node)
    part = take(x, [(0, d, 1) if a is None else along[a] for a, d in zip(after, x.shape)])
    return lax.reshape(part, node.aval.shape)


def _find_split(graph: Graph, node: Node) -> Match | None:
    if not is_static(*node.inputs):
        return None
    return Match(graph, tuple(Value(node, i) for i in range(len(node.avals))), {"x": node.inputs[0]})


def _split_as_slices(m: Match, x: Any) -> Any:
    node = m.roots[0].node
    sizes, axis = node.params["sizes"], node.params["axis"]
    stops = list(itertools.accumulate(sizes))
    return [lax.slice_in_dim(x, stop - size, stop, axis=axis) for size, stop in zip(sizes, stops)]


# -- concatenations ---------------------------------------------------------------------------------------------------


def _find_nested_concatenation(graph: Graph, node: Node) -> Match | None:
    dimension = node.params["dimension"]
    parts: list[Value] = []
    for value in node.inputs:
        inner = value.node
        nested = inner.op == "concatenate" and inner.params["dimension"] == dimension and len(graph.uses[value]) == 1
        parts.extend(inner.inputs if nested else [value])
    parts = [v for v in parts if v.shape[dimension] != 0] or parts[:1]
    if tuple(parts) == node.inputs and len(parts) > 1:
        return None
    return Match(graph, (Value(node, 0),), {f"x{i}": v for i, v in enumerate(parts)})


def _concatenate(m: Match, **parts: Any) -> Any:
    dimension = m.roots[0].node.params["dimension"]
    return next(iter(parts.values())) if len(parts) == 1 else lax.concatenate(list(parts.values()), dimension)


def _joined(values: Sequence[Value], dimension: int) -> list[tuple[Value, Window | None]]:
    """Neighbouring slices of one array as one slice; other values with no window."""
    found: list[tuple[Value, Window | None]] = []
    for value in values:
        node = value.node
        if node.op != "slice" or not is_static(*node.inputs):
            found.append((value, None))
            continue
        source, along = node.inputs[0], window(node)
        if found and found[-1][0] == source and (before := found[-1][1]) is not None:
            (start, limit, stride), (s, t, u) = before[dimension], along[dimension]
            others = [w for i, w in enumerate(before) if i != dimension]
            if limit == s and stride == u == 1 and others == [w for i, w in enumerate(along) if i != dimension]:
                before[dimension] = (start, t, 1)
                continue
        found.append((source, along))
    return found


def _find_concatenated_slices(graph: Graph, node: Node) -> Match | None:
    if not is_static(*node.inputs):
        return None
    joined = _joined(node.inputs, node.params["dimension"])
    if len(joined) == len(node.inputs):
        return None
    return Match(graph, (Value(node, 0),), {f"x{i}": v for i, (v, _) in enumerate(joined)})


def _concatenate_joined(m: Match, **sources: Any) -> Any:
    node = m.roots[0].node
    joined = _joined(node.inputs, node.params["dimension"])
    parts = [x if w is None else take(x, w) for x, (_, w) in zip(sources.values(), joined)]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, node.params["dimension"])


def _pieces(node: Node) -> list[tuple[Value, Window]] | None:
    """The parts of a concatenation that a slice of it touches, and the slices of them; None if it touches all."""
    whole = node.inputs[0].node
    dimension, along = whole.params["dimension"], window(node)
    start, limit, stride = along[dimension]
    found, offset = [], 0
    for value in whole.inputs:
        length = value.shape[dimension]
        low, high = max(start - offset, 0), min(limit - offset, length)
        low += (start - offset - low) % stride
        if low < high:
            found.append((value, [*along[:dimension], (low, high, stride), *along[dimension + 1 :]]))
        offset += length
    return found if 0 < len(found) < len(whole.inputs) else None


def _find_sliced_concatenation(graph: Graph, node: Node) -> Match | None:
    if node.inputs[0].node.op != "concatenate" or not is_static(*node.inputs[0].node.inputs):
        return None
    pieces = _pieces(node)
    if pieces is None or (len(pieces) > 1 and len(graph.uses[node.inputs[0]]) > 1):
        return None
    return Match(graph, (Value(node, 0),), {f"x{i}": v for i, (v, _) in enumerate(pieces)})


def _concatenate_pieces(m: Match, **sources: Any) -> Any:
    node = m.roots[0].node
    parts = [take(x, w) for x, (_, w) in zip(sources.values(), _pieces(node) or ())]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, node.inputs[0].node.params["dimension"])


# -- padding ----------------------------------------------------------------------------------------------------------


def _pads_nothing(node: Node) -> bool:
    return all(low == high == inside == 0 for low, high, inside in node.params["padding_config"])


# -- known places -----------------------------------------------------------------------------------------------------


def _find_known_start(graph: Graph, node: Node) -> Match | None:
    operand, *starts = node.inputs
    if not is_static(operand) or not starts or any(known_number(graph, v) is None for v in starts):
        return None
    return Match(graph, (Value(node, 0),), {"x": operand})


def _slice_at_known_start(m: Match, x: Any) -> Any:
    node = m.roots[0].node
    sizes = node.params["slice_sizes"]
    starts = [int(again(known_number(m.graph, v))) for v in node.inputs[1:]]
    at = [min(max(s, 0), d - size) for s, d, size in zip(starts, x.shape, sizes)]
    return take(x, [(s, s + size, 1) for s, size in zip(at, sizes)])


def _consecutive(node: Node) -> tuple[int, int] | None:
    """Axis and first index of a lookup of consecutive whole rows at known places, all of them inside."""
    operand, indices = node.inputs
    numbers = node.params["dimension_numbers"]
    if not indices.node.is_const or not is_static(operand) or len(numbers.start_index_map) != 1:
        return None
    (axis,) = numbers.start_index_map
    if numbers.operand_batching_dims or numbers.collapsed_slice_dims != (axis,):
        return None
    if any(size != d for i, (size, d) in enumerate(zip(node.params["slice_sizes"], operand.shape)) if i != axis):
        return None
    places = np.asarray(indices.node.value).reshape(-1)
    batch = [i for i in range(len(node.aval.shape)) if i not in numbers.offset_dims]
    if places.size == 0 or len(batch) > 1 or node.params["slice_sizes"][axis] != 1:
        return None
    if np.any(np.diff(places.astype(np.int64)) != 1) or places[0] < 0 or places[-1] >= operand.shape[axis]:
        return None
    return axis, int(places[0])


def _find_consecutive(graph: Graph, node: Node) -> Match | None:
    return None if _consecutive(node) is None else Match(graph, (Value(node, 0),), {"x": node.inputs[0]})


def _slice_rows(m: Match, x: Any) -> Any:
    node = m.roots[0].node
    axis, first = _consecutive(node) or (0, 0)
    numbers, shape = node.params["dimension_numbers"], node.aval.shape
    batch = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    count = shape[batch[0]] if batch else 1
    part = lax.slice_in_dim(x, first, first + count, axis=axis)
    order = [axis] if batch else []
    others = [i for i in range(x.ndim) if i != axis]
    if not batch:
        return lax.reshape(part, shape)
    permutation = [0] * x.ndim
    for place, i in zip((batch[0], *numbers.offset_dims), (*order, *others)):
        permutation[place] = i
    return lax.transpose(part, permutation)


# -- cases ------------------------------------------------------------------------------------------------------------


def _case(function: Callable[..., Any], *shapes: Sequence[int]) -> Callable[[Any], Iterator[Any]]:
    return lambda s: iter([(function, tuple(s.array(*shape) for shape in shapes))])


def _case_rows(s: Any) -> Iterator[Any]:
    first = s.integers(0, 3)
    numbers = lax.GatherDimensionNumbers(offset_dims=(0,), collapsed_slice_dims=(1,), start_index_map=(1,))
    indices = Frozen(jnp.arange(first, first + 2)[:, None])
    yield lambda x, i: lax.gather(x, i, numbers, (3, 1)), (s.array(3, 5), indices)


_x = var("x")

RULES: tuple[Rule, ...] = (
    Rule(
        "slice-all",
        "x[:] → x",
        op("slice", _x, where=_takes_all),
        lambda m, x: x,
        "bitwise",
        cases=_case(lambda x: lax.slice_p.bind(x, start_indices=(0, 0), limit_indices=(2, 3), strides=None), (2, 3)),
    ),
    Rule(
        "split-as-slices",
        "split(x) → x[:i], x[i:j], ...",
        Find(("split",), _find_split),
        _split_as_slices,
        "bitwise",
        cases=_case(lambda x: jnp.split(x, (1, 4), axis=1), (2, 6)),
    ),
    Rule(
        "slice-twice",
        "x[a:b][c:d] → x[a+c:a+d]",
        op("slice", op("slice", _x, name="inner"), name="outer"),
        _slice_twice,
        "bitwise",
        when=lambda m: is_static(m["x"]),
        cases=_case(lambda x: x[1:8:2, 1:][1:, 1:3], (9, 5)),
    ),
    Rule(
        "slice-before-elementwise",
        "f(x, y)[i:j] → f(x[i:j], y[i:j]), f elementwise and used here only",
        Find(("slice",), _find_sliced_elementwise),
        _slice_operands,
        "bitwise",
        cases=_case(lambda x, b: jnp.tanh(x * b)[1:3, :2], (4, 5), (1, 5)),
    ),
    Rule(
        "slice-before-transpose",
        "transpose(x)[i:j] → transpose(x[:, i:j])",
        op("slice", op("transpose", _x, name="inner", once=True), name="outer"),
        _slice_before_transpose,
        "bitwise",
        when=lambda m: is_static(m["x"]),
        cases=_case(lambda x: x.transpose(2, 0, 1)[1:3, :2, ::2], (3, 4, 5)),
    ),
    Rule(
        "slice-before-broadcast",
        "broadcast(x)[i:j] → broadcast(x[i:j])",
        op("slice", op("broadcast_in_dim", _x, name="inner"), name="outer"),
        _slice_before_broadcast,
        "bitwise",
        when=lambda m: is_static(m["x"], m.roots[0]),
        cases=_case(lambda x: jnp.broadcast_to(x, (4, 5))[1:3, 1:4], (5,)),
    ),
    Rule(
        "slice-before-reshape",
        "reshape(x)[i:j] → reshape(x[i:j]), axes of length one added or dropped",
        op(
            "slice",
            op("reshape", _x, name="inner", once=True, where=lambda n: n.params.get("dimensions") is None),
            name="outer",
        ),
        _slice_before_reshape,
        "bitwise",
        when=_keeps_units,
        cases=_case(lambda x: x.reshape(4, 1, 5)[1:3, :, 1:4], (4, 5)),
    ),
    Rule(
        "concatenate-nested",
        "[[x, y], z] → [x, y, z]; [x] → x; empty parts go",
        Find(("concatenate",), _find_nested_concatenation),
        _concatenate,
        "bitwise",
        cases=_case(lambda x, y, z: jnp.concatenate([jnp.concatenate([x, y]), z]), (2, 3), (1, 3), (4, 3)),
    ),
    Rule(
        "concatenate-slices",
        "[x[a:b], x[b:c]] → x[a:c]",
        Find(("concatenate",), _find_concatenated_slices),
        _concatenate_joined,
        "bitwise",
        cases=_case(lambda x, y: jnp.concatenate([x[1:3], x[3:6], y]), (7, 2), (3, 2)),
    ),
    Rule(
        "slice-of-concatenate",
        "[x, y][i:j] → x[i:j], or of the parts it touches",
        Find(("slice",), _find_sliced_concatenation),
        _concatenate_pieces,
        "bitwise",
        cases=_case(lambda x, y, z: jnp.concatenate([x, y, z])[1:8:2], (5, 2), (4, 2), (4, 2)),
    ),
    Rule(
        "pad-nothing",
        "pad(x) by nothing → x",
        op("pad", _x, var("value"), where=_pads_nothing),
        lambda m, x, value: x,
        "bitwise",
        cases=lambda s: iter([(lambda x: lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)]), (s.array(4),))]),
    ),
    Rule(
        "dynamic-slice-at-known",
        "dynamic_slice(x, known) → slice(x)",
        Find(("dynamic_slice",), _find_known_start),
        _slice_at_known_start,
        "bitwise",
        reads_values=True,
        cases=_case(lambda x: lax.dynamic_slice(x, (1, 4), (2, 3)), (4, 5)),
    ),
    Rule(
        "consecutive-rows",
        "x[known consecutive indices] → slice(x)",
        Find(("gather",), _find_consecutive),
        _slice_rows,
        "bitwise",
        reads_values=True,
        cases=_case_rows,
    ),
)
