"""Kinds and needs of entries through matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxinfer.graph import Node
from jaxinfer.sparsity.shrinking.flow import (
    CONSTANT,
    DYNAMIC,
    FROZEN,
    NUMBER,
    OPAQUE,
    PARAMETER,
    ZERO,
    Kinds,
    Needs,
    Rule,
)

Letters = Sequence[int]


def _meet(a: np.ndarray, of_a: Letters, b: np.ndarray, of_b: Letters, out: Letters) -> np.ndarray:
    """Whether, for each index of ``out``, ``a`` and ``b`` are true together somewhere; axes are named by numbers."""
    sizes: dict[int, int] = {}
    for letters, table in ((of_a, a), (of_b, b)):
        for letter, n in zip(letters, table.shape):
            sizes[letter] = max(n, sizes.get(letter, 1)) if n else 0
    x, y = (np.broadcast_to(t, [sizes[c] for c in letters]).astype(np.float32) for t, letters in ((a, of_a), (b, of_b)))
    return np.einsum(x, list(of_a), y, list(of_b), list(out), optimize=True) > 0


def product(x: Kinds, of_x: Letters, w: Kinds, of_w: Letters, out: Letters) -> Kinds:
    """The kinds of a sum of products."""
    found = np.zeros((1,) * len(out), np.uint8)
    for kind in (CONSTANT, FROZEN, PARAMETER, DYNAMIC):
        if (x >= kind).any():
            found = np.where(_meet(x >= kind, of_x, w > ZERO, of_w, out), np.uint8(kind), found)
        if (w >= kind).any():
            found = np.where(_meet(x > ZERO, of_x, w >= kind, of_w, out), np.uint8(kind), found)
    return found


def product_need(x: Kinds, of_x: Letters, w: Kinds, of_w: Letters, need: Needs, out: Letters) -> Needs:
    """The needs of the first operand of a sum of products.

    A term whose other factor is frozen stays alive only through an operand that is dynamic.
    """

    def through(level: int, other: np.ndarray) -> np.ndarray:
        return _meet(need >= level, out, other, of_w, of_x)

    alive = through(2, (w > ZERO) & (w != FROZEN)) | (through(2, w == FROZEN) & (x == DYNAMIC))
    number = through(1, w > ZERO)
    return np.where(alive, 2, np.where(number, NUMBER, 0)).astype(np.uint8)


def _dot_letters(node: Node) -> tuple[list[int], list[int], list[int]]:
    (cx, cw), (bx, bw) = node.params["dimension_numbers"]
    rank = len(node.inputs[0].shape)
    of_x = list(range(rank))
    of_w = list(range(rank, rank + len(node.inputs[1].shape)))
    for a, b in (*zip(cx, cw), *zip(bx, bw)):
        of_w[b] = of_x[a]
    free_x = [c for a, c in enumerate(of_x) if a not in (*cx, *bx)]
    free_w = [c for b, c in enumerate(of_w) if b not in (*cw, *bw)]
    return of_x, of_w, [*(of_x[a] for a in bx), *free_x, *free_w]


def _dot(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    of_x, of_w, out = _dot_letters(node)
    return [product(kinds[0], of_x, kinds[1], of_w, out)]


def _dot_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    of_x, of_w, out = _dot_letters(node)
    x, w = kinds
    return [product_need(x, of_x, w, of_w, needs[0], out), product_need(w, of_w, x, of_x, needs[0], out)]


class _Channels:
    """A convolution as a product over channels: x[group, in], w[group, in, out] → y[group, out]."""

    def __init__(self, node: Node):
        self.lhs, self.rhs, self.out = node.params["dimension_numbers"]
        self.groups = node.params["feature_group_count"]
        self.shapes = node.inputs[0].shape, node.inputs[1].shape, node.aval.shape

    def x(self, table: np.ndarray) -> np.ndarray:
        others = (self.lhs[0], *self.lhs[2:])
        channels = self.shapes[0][self.lhs[1]]
        return np.broadcast_to(table.max(axis=others, initial=0), (channels,)).reshape(self.groups, -1)

    def w(self, table: np.ndarray) -> np.ndarray:
        o, i, *space = self.rhs
        table = table.max(axis=tuple(space), keepdims=True, initial=0)
        table = np.moveaxis(table, (i, o), (0, 1)).reshape(table.shape[i], table.shape[o])
        inner, outer = self.shapes[1][i], self.shapes[1][o]
        return np.broadcast_to(table, (inner, outer)).reshape(inner, self.groups, -1).transpose(1, 0, 2)

    def y(self, table: np.ndarray) -> np.ndarray:
        others = (self.out[0], *self.out[2:])
        channels = self.shapes[2][self.out[1]]
        return np.broadcast_to(table.max(axis=others, initial=0), (channels,)).reshape(self.groups, -1)

    @staticmethod
    def along(table: np.ndarray, axis: int, rank: int) -> np.ndarray:
        return table.reshape([-1 if a == axis else 1 for a in range(rank)])

    def kernel(self, table: np.ndarray) -> np.ndarray:
        """A table over [group, in, out] for the kernel."""
        o, i, *_ = self.rhs
        inner, outer = self.shapes[1][i], self.shapes[1][o]
        flat = table.transpose(1, 0, 2).reshape(inner, outer)
        rank = len(self.shapes[1])
        shape = [1] * rank
        shape[i], shape[o] = inner, outer
        return (flat if i < o else flat.T).reshape(shape)


def _conv(node: Node, kinds: Sequence[Kinds]) -> Sequence[Kinds]:
    if node.params["batch_group_count"] != 1:
        return OPAQUE.forward(node, kinds)
    c = _Channels(node)
    found = product(c.x(kinds[0]), (0, 1), c.w(kinds[1]), (0, 1, 2), (0, 2))
    return [c.along(np.broadcast_to(found, (c.groups, found.shape[1])), c.out[1], len(node.aval.shape))]


def _conv_back(node: Node, kinds: Sequence[Kinds], needs: Sequence[Needs]) -> Sequence[Needs]:
    if node.params["batch_group_count"] != 1:
        return OPAQUE.backward(node, kinds, needs)
    c = _Channels(node)
    x, w, need = c.x(kinds[0]), c.w(kinds[1]), c.y(needs[0])
    for_x = product_need(x, (0, 1), w, (0, 1, 2), need, (0, 2))
    for_w = product_need(w, (0, 1, 2), x, (0, 1), need, (0, 2))
    return [c.along(for_x, c.lhs[1], len(c.shapes[0])), c.kernel(for_w)]


RULES: Mapping[str, Rule] = {
    "dot_general": Rule(_dot, _dot_back),
    "conv_general_dilated": Rule(_conv, _conv_back),
}
