"""Sums of a product of matrices with something else, entry by entry, taken from another product that is there already.

Gradients hold them: where O = P V, that of a softmax sums (Ō Vᵀ) ∘ P along each row, which is what Ō ∘ O sums to. The
rows of O are as long as one head, those of P as long as the sequence (Dao et al., FlashAttention, 2022, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value
from jaxinfer.rewriting import Find, Match, Rule

# Axes that stand for the same index have the same label: a number.
Labels = tuple[int, ...]
# In fewer bits the other product has been rounded once more than what it takes the place of.
_DTYPES = frozenset(("float32", "float64"))


@dataclass
class _Sum(Match):
    """Σ K ∘ E in the place of Σ (K U) ∘ Q, where E = Q U.

    Attributes:
        k_labels, e_labels: of the axes of both.
        summed: labels that the sum runs over.
        out: labels of the result.
    """

    k_labels: Labels = ()
    e_labels: Labels = ()
    summed: frozenset[int] = frozenset()
    out: Labels = ()


def _find(graph: Graph, node: Node) -> Match | None:
    total = node.inputs[0].node
    if total.op != "mul" or not is_static(*total.inputs) or len(graph.uses[node.inputs[0]]) != 1:
        return None
    reduced = frozenset(node.params["axes"])
    for p, q in (total.inputs, total.inputs[::-1]):
        labels = tuple(range(len(p.shape)))
        product, product_labels = _base(p, labels)
        if product.node.op != "dot_general" or p.shape != q.shape or 0 in p.shape:
            continue
        # Operands in fewer bits than their product are another matter, too.
        if len(types := {str(v.dtype) for v in (p, q, *product.node.inputs)}) > 1 or not types <= _DTYPES:
            continue
        for k, k_labels, u, u_labels in _operands(product.node, product_labels):
            if (frozenset(u_labels) & frozenset(labels)) - frozenset(k_labels) != reduced:
                continue
            summed = frozenset(k_labels) - frozenset(labels)
            if math.prod(_sizes(k, k_labels, summed)) > math.prod(p.shape[i] for i in reduced):
                continue
            found = _existing(graph, product.node, _base(q, labels), _base(u, u_labels), reduced)
            if found is not None:
                out = tuple(i for i in labels if i not in reduced)
                values = {"k": k, "e": found[0]}
                return _Sum(
                    graph, (Value(node, 0),), values, k_labels=k_labels, e_labels=found[1], summed=summed, out=out
                )
    return None


def _base(value: Value, labels: Labels) -> tuple[Value, Labels]:
    """What a value is a transpose of, and the labels of its axes."""
    while value.node.op == "transpose":
        order = value.node.params["permutation"]
        labels = tuple(labels[order.index(i)] for i in range(len(labels)))
        value = value.node.inputs[0]
    return value, labels


def _operands(product: Node, labels: Labels) -> Iterator[tuple[Value, Labels, Value, Labels]]:
    """Both operands of a product with their labels, in either order; summed axes get labels of their own."""
    (contract, batch), count = product.params["dimension_numbers"], len(labels)
    found: list[Labels] = []
    place = len(batch[0])
    for side, value in enumerate(product.inputs):
        own: dict[int, int] = {axis: count + i for i, axis in enumerate(contract[side])}
        own |= {axis: labels[i] for i, axis in enumerate(batch[side])}
        for axis in range(len(value.shape)):
            if axis not in own:
                own[axis] = labels[place]
                place += 1
        found.append(tuple(own[axis] for axis in range(len(value.shape))))
    a, b = product.inputs
    yield a, found[0], b, found[1]
    yield b, found[1], a, found[0]


def _sizes(value: Value, labels: Labels, wanted: frozenset[int]) -> list[int]:
    return [size for size, label in zip(value.shape, labels) if label in wanted]


def _existing(
    graph: Graph, like: Node, q: tuple[Value, Labels], u: tuple[Value, Labels], reduced: frozenset[int]
) -> tuple[Value, Labels] | None:
    """A product of Q and U in the program that sums over the reduced labels alone, and the labels of its axes."""
    shared = (frozenset(q[1]) & frozenset(u[1])) - reduced
    for product in _products_of(graph, q[0], like):
        bases = [_base(v, tuple(range(len(v.shape)))) for v in product.inputs]
        for operands in ((q, u), (u, q)):
            if [value for value, _ in bases] != [value for value, _ in operands]:
                continue
            labels = [
                tuple(known[axes.index(i)] for i in range(len(axes))) for (_, known), (_, axes) in zip(operands, bases)
            ]
            found = _result_labels(product, labels, reduced, shared)
            if found is not None:
                return Value(product, 0), found
    return None


def _products_of(graph: Graph, value: Value, like: Node) -> Iterator[Node]:
    """The products, alike in type and precision, that read a value or a transpose of it."""
    users = [node for node, _ in graph.uses[value] if node is not None]
    turned = [Value(node, 0) for node in users if node.op == "transpose"]
    users += [node for view in turned for node, _ in graph.uses[view] if node is not None]
    return (node for node in users if node.op == "dot_general" and _alike(node, like))


def _alike(a: Node, b: Node) -> bool:
    return a.aval.dtype == b.aval.dtype and all(
        a.params.get(name) == b.params.get(name) for name in ("precision", "out_sharding")
    )


def _result_labels(
    product: Node, labels: Sequence[Labels], reduced: frozenset[int], shared: frozenset[int]
) -> Labels | None:
    """Labels of a product's result if it sums over the reduced ones and runs over the shared ones side by side."""
    contract, batch = (
        [[own[i] for i in axes] for own, axes in zip(labels, pair)] for pair in product.params["dimension_numbers"]
    )
    if contract[0] != contract[1] or batch[0] != batch[1] or set(contract[0]) != reduced or set(batch[0]) != shared:
        return None
    done = {*contract[0], *batch[0]}
    return (*batch[0], *(i for own in labels for i in own if i not in done))


def _sum(m: _Sum, k: Any, e: Any) -> Any:
    product = lax.mul(e, _turned(k, m.k_labels, m.e_labels))
    total = lax.reduce_sum(product, tuple(i for i, label in enumerate(m.e_labels) if label in m.summed))
    return _turned(total, tuple(label for label in m.e_labels if label not in m.summed), m.out)


def _turned(x: Any, labels: Labels, wanted: Labels) -> Any:
    return x if labels == wanted else lax.transpose(x, tuple(labels.index(label) for label in wanted))


# -- cases ------------------------------------------------------------------------------------------------------------


def _softmax_gradient(g: Any, p: Any, v: Any) -> Any:
    """[heads, rows, width], [heads, rows, keys], [heads, keys, width]."""
    return p @ v, jnp.sum((g @ v.swapaxes(1, 2)) * p, -1)


def _score_gradient(g: Any, q: Any, u: Any) -> Any:
    """[users, items], [items, features], [users, features]."""
    return u @ q.T, jnp.sum((g.T @ u) * q, 1)


def _cases(s: Any) -> Iterator[Any]:
    s.only(*_DTYPES)
    yield _softmax_gradient, (s.array(2, 3, 4), s.array(2, 3, 5), s.array(2, 5, 4))
    yield _score_gradient, (s.array(2, 6), s.array(6, 3), s.array(2, 3))


RULES: tuple[Rule, ...] = (
    Rule(
        "sum-beside-product",
        "Σ (K U) ∘ Q → Σ K ∘ (Q U) where Q U is there already and its sum is no longer",
        Find(("reduce_sum",), _find),
        _sum,
        "reassociate",
        finite=True,
        cases=_cases,
    ),
)
