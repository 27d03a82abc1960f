"""The Laplacian of log|det A|: tr(A⁻¹ L(A)) − Σᵢ tr((A⁻¹ Jᵢ)²), where Jᵢ(log|det A|) = tr(A⁻¹ Jᵢ).

In wave functions of electrons each input is in one row of A, the orbitals of one electron. Then Jᵢ has rank one, both
traces are one, and where A = H W with a fixed W, tr(A⁻¹ Jᵢ(H) W) = tr((W A⁻¹) Jᵢ(H)) needs no Jacobian of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer.differentiation.laplacian.blocks import Block, is_disjoint
from jaxinfer.differentiation.laplacian.moves import through_moves
from jaxinfer.differentiation.laplacian.products import Image
from jaxinfer.differentiation.laplacian.sums import summed, without_axes
from jaxinfer.differentiation.laplacian.terms import Term, Triple, added, triple


def slogdet(x: Triple, leading: int) -> Sequence[Any]:
    """Sign and log|det A|, from one factorization of A; the axis `leading` comes first in the results."""
    if leading:
        value = jnp.moveaxis(x.value, leading, 0)
        x = through_moves(x, value, ("lead", leading), lambda t, _: t.transpose(_led(t.ndim, 1 + leading)))
    sign, value, inverse = _factored_inverse(x.value)
    found = _by_rows(x, value, inverse)
    return [sign, _dense(x, value, inverse) if found is None else found]


def _led(rank: int, axis: int) -> list[int]:
    """The order of axes that puts one behind the first."""
    return [0, axis, *(a for a in range(1, rank) if a != axis)]


def _by_rows(x: Triple, value: Any, inverse: Any) -> Any:
    """The result where each input is in one row only, or in one column; else None."""
    rank = jnp.ndim(x.value)
    for along, across in ((rank - 2, rank - 1), (rank - 1, rank - 2)):
        source, weights, place, axes = _paired(x, inverse, along, across)
        block = source.block
        rows = block.rows
        varies = [a for a in (place, *axes) if rows.shape[1 + a] > 1]
        if varies != [place] or not is_disjoint(rows, [place]):
            continue
        traces = jnp.sum(block.data * weights, tuple(1 + a for a in axes))
        kept = place - sum(a < place for a in axes)
        terms = (Term(None, Block(traces, without_axes(rows, axes), traces.shape[1:])),)
        slope = summed(Triple(jnp.zeros(traces.shape[1:], traces.dtype), terms), value, [kept])
        lap = None if source.laplacian is None else jnp.sum(weights * source.laplacian, (place, *axes))
        return triple(value, slope.terms, added(lap, -jnp.sum(traces * traces, (0, 1 + kept))))
    return None


def _paired(x: Triple, inverse: Any, along: int, across: int) -> tuple[Triple, Any, int, list[int]]:
    """What tr(A⁻¹ B) is an inner product of, for every B that A may be replaced by.

    Returns:
        A value that A is linear in; weights of its shape, whose inner product with it is the trace; its axis that runs
        along the rows (or columns) of A; and its axes that do not appear in A, or appear across.
    """
    plain = x, jnp.swapaxes(inverse, -1, -2), along, [across]
    image: Image | None = x.image
    if image is None:
        return plain
    left, right, out = image.product.left, image.product.right, image.product.out
    batch, row, column = out[:-2], out[along], out[across]
    fits = row in left and row not in right and column not in left and all(c in left for c in batch)
    if not fits or [c for c in left if c in batch] != list(batch):
        return plain
    weights = jnp.einsum(f"{right},{batch}{out[-1]}{out[-2]}->{left}", image.other, inverse)
    return image.source, weights, left.index(row), [left.index(c) for c in image.product.contracted]


def _dense(x: Triple, value: Any, inverse: Any) -> Any:
    block, rank = x.block.as_uniform(), jnp.ndim(x.value)
    lap = None if x.laplacian is None else jnp.einsum("...ij,...ji->...", inverse, x.laplacian)
    solved = jnp.einsum("...ij,k...jl->k...il", inverse, block.full)
    slope = jnp.trace(solved, axis1=-2, axis2=-1)
    quadratic = jnp.einsum("k...ij,k...ji->...", solved, solved)
    rows = block.rows.reshape(block.count, *(1,) * (rank - 2))
    return triple(value, [Term(None, Block(slope, rows, value.shape))], added(lap, -quadratic))


def _factored_inverse(a: Any) -> tuple[Any, Any, Any]:
    """Sign, log|det| and inverse from one factorization."""
    lu, pivots, order = lax.linalg.lu(a)
    diagonal = jnp.diagonal(lu, axis1=-2, axis2=-1)
    swaps = jnp.sum(pivots != jnp.arange(a.shape[-1], dtype=pivots.dtype), -1)
    negative = jnp.sum(diagonal < 0, -1)
    singular = jnp.any(diagonal == 0, -1)
    parity = (1 - 2 * ((swaps + negative) % 2)).astype(a.dtype)
    sign = jnp.where(singular, jnp.zeros((), a.dtype), parity)
    value = jnp.where(singular, -jnp.inf, jnp.sum(jnp.log(jnp.abs(diagonal)), -1))
    eye = (order[..., :, None] == jnp.arange(a.shape[-1], dtype=order.dtype)).astype(a.dtype)
    lower = lax.linalg.triangular_solve(lu, eye, left_side=True, lower=True, unit_diagonal=True)
    return sign, value, lax.linalg.triangular_solve(lu, lower, left_side=True, lower=False)
