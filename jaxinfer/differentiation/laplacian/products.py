"""The Laplacian through products: L(xy) = L(x) y + x L(y) + 2 Σᵢ Jᵢ(x) Jᵢ(y)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.differentiation.laplacian.blocks import Block, compress, occurring
from jaxinfer.differentiation.laplacian.sums import over_axes, without_axes
from jaxinfer.differentiation.laplacian.terms import Term, Triple, added, is_active, merged, primal, triple
from jaxinfer.graph import Node

Rule = Callable[..., Sequence[Any]]
_LETTERS = "abcdefghijlmnopqrstuvwxyz"
# Names the axis of rows.
_ROWS = "k"


@dataclass(frozen=True)
class Product:
    """A contraction of two operands in the notation of `einsum`.

    Attributes:
        left, right: a letter for each axis of the operands.
        out: a letter for each axis of the result.
        options: precision and type of the result, as the user asked for them.
    """

    left: str
    right: str
    out: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, node: Node) -> Product:
        """The product that a `dot_general` computes."""
        (contract_l, contract_r), (batch_l, batch_r) = node.params["dimension_numbers"]
        left = list(_LETTERS[: len(node.inputs[0].shape)])
        right = list(_LETTERS[len(left) : len(left) + len(node.inputs[1].shape)])
        for a, b in zip((*contract_l, *batch_l), (*contract_r, *batch_r)):
            right[b] = left[a]
        batch = [left[a] for a in batch_l]
        free_l = [c for i, c in enumerate(left) if i not in (*contract_l, *batch_l)]
        free_r = [c for i, c in enumerate(right) if i not in (*contract_r, *batch_r)]
        options = {k: node.params[k] for k in ("precision", "preferred_element_type")}
        return cls("".join(left), "".join(right), "".join(batch + free_l + free_r), options)

    @property
    def swapped(self) -> Product:
        """The same with its operands the other way round."""
        return Product(self.right, self.left, self.out, self.options)

    @property
    def contracted(self) -> str:
        """The axes that are summed over."""
        return "".join(c for c in self.left if c not in self.out)

    def __call__(self, left: Any, right: Any) -> Any:
        return self.rows(left, right, "", "")

    def rows(self, left: Any, right: Any, on_left: str, on_right: str, out: str | None = None) -> Any:
        """The product with further axes in front of its operands."""
        out = (on_left or on_right) if out is None else out
        spec = f"{on_left}{self.left},{on_right}{self.right}->{out}{self.out}"
        return jnp.einsum(spec, left, right, **self.options)


def dot_general(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """Products of matrices. Rows are further rows of the matrix that has them."""
    value = domain.bind(node, primal(a), primal(b))[0]
    product = Product.of(node)
    terms: list[Term] = []
    lap = None
    if is_active(a):
        terms += _terms(product, a, primal(b))
        lap = None if a.laplacian is None else product(a.laplacian, primal(b))
    if is_active(b):
        terms += _terms(product.swapped, b, primal(a))
        lap = added(lap, None if b.laplacian is None else product(primal(a), b.laplacian))
    if is_active(a) and is_active(b):
        both = added(
            *(
                _meeting(product, s, t)
                for s in _parts(product.left, product, a)
                for t in _parts(product.right, product, b)
            )
        )
        lap = added(lap, None if both is None else 2 * both)
    found = triple(value, terms, lap)
    if is_active(a) != is_active(b):
        image = Image(a, product, b) if is_active(a) else Image(b, product.swapped, a)
        found = replace(found, image=image)
    return [found]


@dataclass(frozen=True, eq=False)
class Image:
    """A value that is the product of another, on the left, with something that does not depend on the inputs."""

    source: Triple
    product: Product
    other: Any


def _parts(letters: str, product: Product, x: Triple) -> Sequence[Term]:
    """The terms of an operand to multiply one by one: those for which that costs less than the product of the sum."""
    axes = [letters.index(c) for c in product.contracted]
    apart = [t for t in x.terms if t.repeats(axes) and axes]
    rest = [t for t in x.terms if not (t.repeats(axes) and axes)]
    if len(rest) > 1:
        whole = x.block if not apart else merged(rest)
        if whole.count <= sum(t.block.count for t in rest):
            rest = [Term(None, whole)]
    return [*apart, *rest]


def _terms(product: Product, x: Triple, other: Any) -> list[Term]:
    """The Jacobian of a product with something that is fixed."""
    axes = [product.left.index(c) for c in product.contracted]
    found = []
    for term in _parts(product.left, product, x):
        if axes and term.repeats(axes):
            found.append(_factored(product, axes, term, other, x.shape))
        else:
            found += _multiplied(product, axes, term, other)
    return found


def _factored(product: Product, axes: Sequence[int], term: Term, other: Any, shape: tuple[int, ...]) -> Term:
    """Where the block is the same along the sum it comes out of it, and the factor alone is multiplied."""
    factor = jnp.ones(shape, term.block.data.dtype) if term.factor is None else jnp.broadcast_to(term.factor, shape)
    lengths = dict(zip(product.left + product.right, (*shape, *jnp.shape(other))))
    result = tuple(lengths[c] for c in product.out)

    def placed(table: Any) -> Any:
        return _placed(table, [product.left[a] for a in range(len(shape)) if a not in axes], product.out, axes)

    block = Block(placed(term.block.data), placed(term.block.rows), result)
    return Term(product(factor, other), block)


def _placed(table: Any, letters: Sequence[str], out: str, dropped: Sequence[int]) -> Any:
    """A table without some axes, the others where they stand in the result."""
    kept = [d for a, d in enumerate(table.shape[1:]) if a not in dropped]
    order = sorted(range(len(letters)), key=lambda i: out.index(letters[i]))
    table = table.reshape(table.shape[0], *kept).transpose(0, *(1 + i for i in order))
    at = {letters[i]: d for i, d in zip(order, table.shape[1:])}
    return table.reshape(table.shape[0], *(at.get(c, 1) for c in out))


def _multiplied(product: Product, axes: Sequence[int], term: Term, other: Any) -> list[Term]:
    """Rows times the other operand: one product for all rows."""
    kept = [c for c in product.left if c not in product.contracted]
    summed = product.contracted

    def outer(data: Any) -> Any:
        # Without a sum there is nothing for a matrix product to do.
        out = _ROWS + summed + product.out
        left = _spread(data, _ROWS + product.left, out)
        return left * _spread(other, product.right, out)

    def multiplied(data: Any) -> Any:
        # Left to itself XLA:CPU computes the product anew, or slower, inside of what its result is used for.
        return lax.optimization_barrier(product.rows(data, other, _ROWS, ""))

    blocks = over_axes(term, axes, multiplied, outer)
    return [
        Term(None, Block(b.data, _placed(without_axes(b.rows, axes), kept, product.out, ()), b.shape)) for b in blocks
    ]


def _spread(x: Any, letters: str, out: str) -> Any:
    """An array with its axes where the result has them, and length one along the others."""
    order = sorted(range(len(letters)), key=lambda i: out.index(letters[i]))
    x = jnp.transpose(x, order)
    at = {letters[i]: d for i, d in zip(order, x.shape)}
    return jnp.reshape(x, [at.get(c, 1) for c in out])


def _meeting(product: Product, a: Term, b: Term) -> Any:
    """Σᵢ Jᵢ(a) · Jᵢ(b), the rows of both operands multiplied pair by pair; None where none are equal."""
    axes_a = [product.left.index(c) for c in product.contracted]
    axes_b = [product.right.index(c) for c in product.contracted]
    if b.block.is_uniform and not a.block.is_uniform:
        return _meeting(product.swapped, b, a)
    if not np.intersect1d(occurring(a.block.rows), occurring(b.block.rows)).size:
        return None
    if a.block.is_uniform and not b.block.is_uniform:
        shared = [product.right[i] for i, d in enumerate(b.block.rows.shape[1:]) if d > 1]
        if all(c in product.left for c in shared):
            # Of the dense operand only the rows that the sparse one has at the same place.
            table = _spread_table(b.block.rows, product.right, product.left)
            data = Term(a.factor, Block(a.block.at(table), table, a.block.shape)).data
            data = jnp.broadcast_to(data, (b.block.count, *a.block.shape))
            return product.rows(data, b.whole.full, _ROWS, _ROWS, "")
    constant = all(a.block.rows.shape[1 + i] == 1 for i in axes_a) and all(
        b.block.rows.shape[1 + i] == 1 for i in axes_b
    )
    if constant and not a.block.is_uniform:
        return _meeting_pairs(product, a, b)
    names = np.union1d(occurring(a.block.rows), occurring(b.block.rows))
    left, right = (t.whole.as_uniform(names).full for t in (a, b))
    return product.rows(left, right, _ROWS, _ROWS, "")


def _spread_table(rows: np.ndarray, letters: str, out: str) -> np.ndarray:
    """A table of rows of one operand for the axes of the other."""
    at = dict(zip(letters, rows.shape[1:]))
    kept = [c for c in letters if at[c] > 1]
    order = sorted(range(len(kept)), key=lambda i: out.index(kept[i]))
    table = rows.reshape(rows.shape[0], *(at[c] for c in kept)).transpose(0, *(1 + i for i in order))
    return table.reshape(rows.shape[0], *(at.get(c, 1) if c in kept else 1 for c in out))


def _meeting_pairs(product: Product, a: Term, b: Term) -> Any:
    """The same for two operands whose rows do not vary along the sum: products of the pairs that meet somewhere."""
    rows_a, rows_b = (
        _placed(
            without_axes(t.block.rows, [letters.index(c) for c in product.contracted]),
            [c for c in letters if c not in product.contracted],
            product.out,
            (),
        )
        for t, letters in ((a, product.left), (b, product.right))
    )
    pairs, masks = [], []
    for i, x in enumerate(rows_a):
        for j, y in enumerate(rows_b):
            mask = (x == y) & (x >= 0)
            if mask.any():
                pairs.append((i, j))
                masks.append(mask)
    if not pairs:
        return None
    left, right = (jnp.take(t.whole.full, np.array(which), 0) for t, which in zip((a, b), zip(*pairs)))
    found = product.rows(left, right, _ROWS, _ROWS, _ROWS)
    return jnp.sum(jnp.where(compress(np.stack(masks)), found, jnp.zeros((), found.dtype)), 0)


def bilinear(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """Any operation that is linear in each of two operands, such as a convolution."""
    value = domain.bind(node, primal(a), primal(b))[0]

    def fun(x: Any, y: Any) -> Any:
        return domain.bind(node, x, y)[0]

    if not is_active(b):
        return [domain.jointly(value, lambda x: fun(x, b), a)]
    if not is_active(a):
        return [domain.jointly(value, lambda y: fun(a, y), b)]
    x = domain.jointly(value, lambda x: fun(x, b.value), a)
    y = domain.jointly(value, lambda y: fun(a.value, y), b)
    names = np.union1d(occurring(a.block.rows), occurring(b.block.rows))
    both = jax.vmap(fun)(a.block.as_uniform(names).full, b.block.as_uniform(names).full)
    return [triple(value, [*x.terms, *y.terms], added(x.laplacian, y.laplacian, 2 * jnp.sum(both, 0)))]


def triangular_solve(domain: Any, node: Node, a: Any, b: Any) -> Sequence[Any]:
    """From a x = b: J(x) = a⁻¹ (J(b) − J(a) x), L(x) = a⁻¹ (L(b) − L(a) x − 2 Σᵢ Jᵢ(a) Jᵢ(x)); here a is fixed."""
    if is_active(a):
        return domain.unknown(node, a, b)
    return [domain.jointly(domain.bind(node, a, b.value)[0], lambda y: domain.bind(node, a, y)[0], b)]


RULES: Mapping[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": bilinear,
    "triangular_solve": triangular_solve,
}
