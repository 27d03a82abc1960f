"""Values that carry their Jacobian and Laplacian, and the algebra of Jacobians written as sums.

A Jacobian is a sum of terms: an elementwise factor times a block. Whatever is done element by element changes factors
only, so that rows are touched where elements meet (products, sums over axes), and Σᵢ Jᵢ² is computed once for all
values that are functions of the same block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinfer.differentiation.laplacian.blocks import Block, same_rows, union

# Sums of more terms than this become one block.
_TERMS = 3


class Term(NamedTuple):
    """A factor, broadcastable to the value's shape and of its rank (None: one), times a block."""

    factor: Any
    block: Block

    def times(self, factor: Any) -> Term:
        """The term multiplied element by element."""
        return Term(factor if self.factor is None else self.factor * factor, self.block)

    @property
    def data(self) -> Any:
        """The product, with axes of length one where it does not vary."""
        return self.block.data if self.factor is None else self.block.data * self.factor

    @property
    def whole(self) -> Block:
        """The term as a block."""
        return self.block if self.factor is None else Block(self.data, self.block.rows, self.block.shape)

    def repeats(self, axes: Sequence[int]) -> bool:
        """Whether the block, if not the factor, is the same along some axes."""
        return self.block.repeats(axes)


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Triple:
    """A value with its Jacobian and Laplacian with respect to the inputs.

    Attributes:
        value: an array of shape s.
        terms: the Jacobian, a sum.
        laplacian: Σᵢ ∂²value/∂xᵢ², an array of shape s, or None where it is zero.
        image: how the value came about, where that may spare its Jacobian: see `products.Image`.
    """

    value: Any
    terms: Terms
    laplacian: Any = None
    image: Any = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return jnp.shape(self.value)

    @cached_property
    def block(self) -> Block:
        """The Jacobian as one block."""
        return merged(self.terms)

    @cached_property
    def squares(self) -> Any:
        """Σᵢ Jᵢ², broadcastable to the shape."""
        if len(self.terms) > 1:
            return self.block.squares
        (term,) = self.terms
        return term.block.squares if term.factor is None else term.factor * term.factor * term.block.squares

    @property
    def curvature(self) -> Any:
        """The Laplacian as an array."""
        return jnp.zeros_like(self.value) if self.laplacian is None else self.laplacian


def is_active(value: Any) -> bool:
    """Whether a value depends on the inputs."""
    return isinstance(value, Triple)


def primal(value: Any) -> Any:
    """The value alone."""
    return value.value if isinstance(value, Triple) else value


def triple(value: Any, terms: Sequence[Term], laplacian: Any) -> Any:
    """A value with what it carries; the value alone where its Jacobian is zero."""
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if not terms or 0 in shape:
        return value
    if laplacian is not None:
        laplacian = jnp.broadcast_to(laplacian, shape).astype(dtype)
    return Triple(value, simplified(terms), laplacian)


def added(*parts: Any) -> Any:
    """The sum of the parts that are not None, or None."""
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total


# -- sums of terms ----------------------------------------------------------------------------------------------------


def simplified(terms: Sequence[Term]) -> Terms:
    """The same sum with one term for each block, and no more terms than pay.

    Dense terms are added up, since every later product would be computed for each; a term whose block repeats along an
    axis, or that has few rows of its own, costs less apart.
    """
    factors: dict[Block, Any] = {}
    for factor, block in terms:
        if block in factors:
            one = jnp.ones((), block.data.dtype)
            factor = (one if factor is None else factor) + (one if factors[block] is None else factors[block])
        factors[block] = factor
    kept = [Term(_ranked(f, b), b) for b, f in factors.items()]
    if len(kept) < 2:
        return tuple(kept)
    plain = [t for t in kept if not _is_repeated(t)]
    if len(plain) > 1:
        block = merged(plain)
        if block.count < sum(t.block.count for t in plain) or len(kept) > _TERMS:
            kept = [t for t in kept if _is_repeated(t)] + [Term(None, block)]
    return (Term(None, merged(kept)),) if len(kept) > _TERMS else tuple(kept)


def _ranked(factor: Any, block: Block) -> Any:
    """A factor with the rank of the value, so that its axes can be named."""
    if factor is None or jnp.ndim(factor) == len(block.shape):
        return factor
    return jnp.reshape(factor, (1,) * len(block.shape))


def _is_repeated(term: Term) -> bool:
    block = term.block
    return math.prod(block.data.shape[1:]) < math.prod(block.shape) and math.prod(block.shape) > 1


def merged(terms: Sequence[Term]) -> Block:
    """A sum of terms as one block."""
    if len(terms) == 1:
        return terms[0].whole
    rows = terms[0].block.rows
    for term in terms[1:]:
        rows = union(rows, term.block.rows)
    total = None
    for term in terms:
        part = term.block.at(rows)
        part = part if term.factor is None else part * term.factor
        total = part if total is None else total + part
    return Block(total, rows, terms[0].block.shape)


def cross(a: Triple, b: Triple) -> Any:
    """Σᵢ Jᵢ(a) Jᵢ(b), element by element, for values of one shape; None where no element of both shares an input."""
    x, y = a.terms, b.terms
    if len(x) * len(y) > 2 and {t.block for t in x} != {t.block for t in y}:
        x, y = (Term(None, a.block),), (Term(None, b.block),)
    return added(*(_cross(s, t) for s in x for t in y))


def _cross(a: Term, b: Term) -> Any:
    total = inner(a.block, b.block)
    if total is None:
        return None
    for factor in (a.factor, b.factor):
        total = total if factor is None else total * factor
    return total


def inner(a: Block, b: Block) -> Any:
    """Σᵢ aᵢ bᵢ, element by element, broadcastable to the shape."""
    if a is b:
        return a.squares
    if same_rows(a.rows, b.rows):
        return jnp.sum(a.data * b.data, 0)
    if a.count > b.count:
        a, b = b, a
    if not _meet(a.rows, b.rows):
        return None
    return jnp.sum(a.data * b.at(a.rows), 0)


def _meet(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables name the same input at any element."""
    if a.shape[0] * b.size > 1 << 22:
        return True
    return any(((row == b) & (row >= 0)).any() for row in a)
