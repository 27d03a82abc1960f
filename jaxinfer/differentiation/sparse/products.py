"""How products, convolutions and windows depend on one operand: the zeros of the other one cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.differentiation.sparse.pattern import SOMETHING, Flow, Rows, blurred, combined, size, take
from jaxinfer.graph import Node

# Pairs (element of the result, element of the operand) that are written down; beyond them zeros are not looked at.
_MOST_PAIRS = 8_000_000
# A known factor without zeros has nothing to say but its coefficients, which matter where there are few.
_FEW_PAIRS = 100_000


def factor_values(flow: Flow, shape: tuple[int, ...]) -> np.ndarray | None:
    """A factor's numbers, with something where they are not known; None where nothing is known."""
    known = flow.array()
    if known is not None:
        return np.where(known == 0, 0.0, SOMETHING) if np.iscomplexobj(known) else known.astype(np.float64)
    zeros = flow.zero_places()
    return None if zeros is None else np.where(np.broadcast_to(zeros, shape), 0.0, SOMETHING)


def dot(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    """A product of which one operand depends."""
    if all(x.rows is not None for x in inputs):
        return None
    side = 0 if inputs[0].rows is not None else 1
    rows = inputs[side].rows
    assert rows is not None
    contract, batch = node.params["dimension_numbers"]

    def canonical(array: np.ndarray, which: int) -> np.ndarray:
        """With the axes (batch, free, contracted)."""
        taken = (*batch[which], *contract[which])
        free = [a for a in range(array.ndim) if a not in taken]
        shape = [math.prod(array.shape[a] for a in axes) for axes in (batch[which], free, contract[which])]
        return array.transpose(*batch[which], *free, *contract[which]).reshape(shape)

    shapes = [v.shape for v in node.inputs]
    operand = canonical(np.arange(math.prod(shapes[side])).reshape(shapes[side]), side)
    batches, free, inner = operand.shape
    other_free = math.prod(shapes[1 - side]) // max(1, batches * inner)
    out_shape = (batches, free, other_free) if side == 0 else (batches, other_free, free)
    result = np.arange(size(node.aval)).reshape(out_shape)
    result = result if side == 0 else result.transpose(0, 2, 1)

    values = factor_values(inputs[1 - side], shapes[1 - side])
    pairs = batches * other_free * inner * free
    if values is None and pairs <= _FEW_PAIRS:
        values = np.full(shapes[1 - side], SOMETHING)
    if values is not None:
        factor = canonical(values, 1 - side)
        b, g, k = np.nonzero(factor)
        sparse_enough = len(b) * free <= _MOST_PAIRS and (len(b) < factor.size or pairs <= _FEW_PAIRS)
        if sparse_enough:
            to, of = result[b, :, g].ravel(), operand[b, :, k].ravel()
            return [Flow(combined(rows, to, of, result.size, np.repeat(factor[b, g, k], free)))]
    lines = np.broadcast_to(np.arange(batches * free).reshape(batches, free, 1), operand.shape)
    united = combined(blurred(rows), lines.ravel(), operand.ravel(), batches * free, 1.0)
    line_of = np.empty(result.size, int)
    line_of[result.ravel()] = np.broadcast_to(lines[:, :, :1], result.shape).ravel()
    return [Flow(take(united, line_of))]


# -- windows ----------------------------------------------------------------------------------------------------------


def _window_axis(size: int, out: int, window: int, stride: int, low: int, base: int, dilation: int) -> np.ndarray:
    """For each output position and place in the window the position of the input, -1 where there is none."""
    at = np.arange(out)[:, None] * stride + np.arange(window)[None, :] * dilation - low
    inside = (at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0)
    return np.where(inside, at // base, -1)


def window_pairs(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    out: Sequence[int],
    base: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (element of the result, element of the operand) of sums over windows."""
    to, of, _ = _windows(shape, window, strides, padding, out, base, dilation)
    return to, of


def _windows(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    out: Sequence[int],
    base: Sequence[int] | None,
    dilation: Sequence[int] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs, and the place in the window of each."""
    ones = (1,) * len(shape)
    to = of = place = np.zeros(1, np.int64)
    sides = zip(shape, out, window, strides, padding, base or ones, dilation or ones, strict=True)
    for n, m, w, stride, (low, _), step, spread in sides:
        axis = _window_axis(n, m, w, stride, low, step, spread)
        i, k = np.nonzero(axis >= 0)
        to = (to[:, None] * m + i).ravel()
        of = (of[:, None] * n + axis[i, k]).ravel()
        place = (place[:, None] * w + k).ravel()
    return to, of, place


def convolution(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow] | None:
    """A convolution of which one operand depends."""
    if all(x.rows is not None for x in inputs) or node.params["batch_group_count"] != 1:
        return None
    return _image(node, inputs) if inputs[0].rows is not None else _kernel(node, inputs)


def _numbered(aval: Any, spec: Sequence[int]) -> np.ndarray:
    """Numbers of an array's elements, with its axes in the order (batch or features out, features in, space...)."""
    return np.arange(size(aval)).reshape(aval.shape).transpose(spec)


def _pairs_in_space(node: Node, image: np.ndarray, kernel: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, ...]:
    p = node.params
    return _windows(
        image.shape[2:],
        kernel.shape[2:],
        p["window_strides"],
        p["padding"],
        out.shape[2:],
        p["lhs_dilation"],
        p["rhs_dilation"],
    )


def _image(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    p, rows = node.params, inputs[0].rows
    assert rows is not None
    lhs, rhs, res = p["dimension_numbers"]
    image, kernel, out = (
        _numbered(v, s) for v, s in zip((node.inputs[0].aval, node.inputs[1].aval, node.aval), (lhs, rhs, res))
    )
    to, of, place = _pairs_in_space(node, image, kernel, out)
    image, out = image.reshape(*image.shape[:2], -1), out.reshape(*out.shape[:2], -1)
    features, inner = kernel.shape[:2]
    groups = p["feature_group_count"]
    values = factor_values(inputs[1], node.inputs[1].shape)
    if values is not None:
        values = values.transpose(rhs).reshape(features, inner, -1)
        pairs = np.count_nonzero(values) * len(to) // max(1, values.shape[2]) * len(image)
        if pairs <= _MOST_PAIRS and (pairs <= _FEW_PAIRS or not values.all()):
            return [Flow(_image_by_entry(rows, image, out, values, (to, of, place), groups))]
    # Over the features of a group first, then over space, then out to all features of the group.
    batch, space_in, space_out = len(image), image.shape[2], out.shape[2]
    lines = np.arange(batch * groups * space_in).reshape(batch, groups, 1, space_in)
    lines = np.broadcast_to(lines, (batch, groups, inner, space_in))
    per_group = combined(blurred(rows), lines.ravel(), image.ravel(), batch * groups * space_in, 1.0)
    outer = np.arange(batch * groups)[:, None]
    summed = combined(
        per_group,
        (outer * space_out + to).ravel(),
        (outer * space_in + of).ravel(),
        batch * groups * space_out,
        1.0,
    )
    source = np.arange(batch * groups * space_out).reshape(batch, groups, 1, space_out)
    line_of = np.empty(out.size, int)
    line_of[out.ravel()] = np.broadcast_to(source, (batch, groups, features // groups, space_out)).ravel()
    return [Flow(take(summed, line_of))]


def _image_by_entry(
    rows: Rows,
    image: np.ndarray,
    out: np.ndarray,
    values: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    groups: int,
) -> Rows:
    to, of, place = pairs
    features, inner = values.shape[:2]
    o, c = (x.ravel() for x in np.indices((features, inner)))
    channel = o // (features // groups) * inner + c
    coefficient = values[o, c][:, place]
    entry, pair = np.nonzero(coefficient)
    return combined(
        rows,
        out[:, o[entry], to[pair]].ravel(),
        image[:, channel[entry], of[pair]].ravel(),
        out.size,
        np.tile(coefficient[entry, pair], len(image)),
    )


def _kernel(node: Node, inputs: Sequence[Flow]) -> Sequence[Flow]:
    """An element of an output feature depends on the weights of that feature that meet the image."""
    p, rows = node.params, inputs[1].rows
    assert rows is not None
    lhs, rhs, res = p["dimension_numbers"]
    image, kernel, out = (
        _numbered(v, s) for v, s in zip((node.inputs[0].aval, node.inputs[1].aval, node.aval), (lhs, rhs, res))
    )
    features, inner = kernel.shape[:2]
    to, of, place = _pairs_in_space(node, image, kernel, out)
    image, kernel, out = (x.reshape(*x.shape[:2], -1) for x in (image, kernel, out))
    values = factor_values(inputs[0], node.inputs[0].shape)
    if len(image) * features * inner * len(to) <= (_FEW_PAIRS if values is None else _MOST_PAIRS):
        n, o, c = (x.ravel()[:, None] for x in np.indices((len(image), features, inner)))
        channel = o // (features // p["feature_group_count"]) * inner + c
        numbers = image[n, channel, of]
        factors = SOMETHING if values is None else values.ravel()[numbers].ravel()
        return [Flow(combined(rows, out[n, o, to].ravel(), kernel[o, c, place].ravel(), out.size, factors))]
    feature = np.broadcast_to(np.arange(features)[:, None, None], kernel.shape)
    united = combined(blurred(rows), feature.ravel(), kernel.ravel(), features, 1.0)
    line_of = np.empty(out.size, int)
    line_of[out.ravel()] = np.broadcast_to(np.arange(features)[None, :, None], out.shape).ravel()
    return [Flow(take(united, line_of))]
