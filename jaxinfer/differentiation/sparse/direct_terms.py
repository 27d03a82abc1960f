"""Terms: the parts that the derivative of a value is the sum of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# A value that is the sum of more terms is better computed by passes.
MOST_TERMS = 32


class Declined(Exception):
    """The entries of a program cannot be followed through one of its operations."""


class Term(NamedTuple):
    """Part of the derivative of a value.

    Attributes:
        numbers: for each element, flat, the input element that its coefficient belongs to, -1 for none.
        coefficient: a number for all elements, an array of numbers, or a traced array of the value's shape.
        clean: whether coefficients are zero where they belong to none.
    """

    numbers: np.ndarray
    coefficient: Any
    clean: bool

    @property
    def is_known(self) -> bool:
        """Whether the coefficients are numbers."""
        return isinstance(self.coefficient, (np.ndarray, np.generic))

    def everywhere(self, shape: tuple[int, ...]) -> Any:
        """Coefficients of the given shape, zero where they belong to none."""
        inside = (self.numbers >= 0).reshape(shape)
        c = self.coefficient
        if self.is_known:
            return np.where(inside, c, np.zeros((), c.dtype)).astype(c.dtype)
        return c if self.clean else jnp.where(inside, c, jnp.zeros((), c.dtype))


def same(a: Any, b: Any) -> bool:
    return a is b or (np.ndim(a) == np.ndim(b) == 0 and a == b)


def agree(a: Term, b: Term) -> bool:
    """Whether no element belongs to two different input elements."""
    both = (a.numbers >= 0) & (b.numbers >= 0)
    return bool(np.array_equal(a.numbers[both], b.numbers[both]))


def added(a: Term, b: Term, shape: tuple[int, ...]) -> Term:
    """One term for the sum of two that agree."""
    index = np.maximum(a.numbers, b.numbers)
    full = bool((index >= 0).all())
    if np.array_equal(a.numbers, b.numbers):
        if a.is_known and b.is_known:
            return Term(index, np.asarray(a.coefficient + b.coefficient), full or (a.clean and b.clean))
        return Term(index, jnp.add(a.coefficient, b.coefficient), full or (a.clean and b.clean))
    disjoint = not ((a.numbers >= 0) & (b.numbers >= 0)).any()
    if disjoint and a.is_known and b.is_known and same(a.coefficient, b.coefficient):
        return Term(index, a.coefficient, full)
    x, y = a.everywhere(shape), b.everywhere(shape)
    return Term(index, x + y if a.is_known and b.is_known else jnp.add(x, y), True)


def merged(terms: Sequence[Term], shape: tuple[int, ...]) -> tuple[Term, ...]:
    """Terms for a sum, as few as agreement allows; known zeros disappear."""
    found: list[Term] = []
    for term in terms:
        for i, other in enumerate(found):
            if agree(term, other):
                found[i] = added(other, term, shape)
                break
        else:
            found.append(term)
    kept = tuple(t for t in map(_without_zeros, found) if (t.numbers >= 0).any())
    if len(kept) > MOST_TERMS:
        raise Declined("a sum of too many terms")
    return kept


def _without_zeros(term: Term) -> Term:
    if not term.is_known or np.all(term.coefficient):
        return term
    zero = np.broadcast_to(np.ravel(term.coefficient) == 0, term.numbers.shape)
    return term._replace(numbers=np.where(zero, -1, term.numbers))
