"""Matrix factorizations and triangular systems, batched, real and complex.

Each tangent rule differentiates the equation that defines the factors and uses the freedom that is left (triangles,
unit columns) to solve for theirs. Where eigenvalues or singular values are equal, vectors have no derivative, and the
result is infinite or not a number, as in JAX.

References: Giles, *Collected matrix derivative results for forward and reverse mode algorithmic differentiation*
(2008); Murray, *Differentiation of the Cholesky decomposition* (2016); de Hoog, Anderssen and Lukas, *Differentiation
of matrix functionals using triangular factorization* (2011); Walter and Lehmann, *Algorithmic differentiation of linear
algebra functions with application in optimum experimental design* (2013); Roberts and Roberts, *QR and LQ decomposition
matrix backpropagation algorithms for square, wide, and deep matrices* (2020); arXiv:2409.13374 for complements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import linalg

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, ResultsRule, TangentRule, add, place
from jaxinfer.graph import Node

# -- matrices ---------------------------------------------------------------------------------------------------------


def _t(x: Any) -> Any:
    return jnp.swapaxes(x, -1, -2)


def _h(x: Any) -> Any:
    return _t(jnp.conj(x))


def _mm(*factors: Any) -> Any:
    """A product of matrices in full precision, from the left."""
    total = factors[0]
    for factor in factors[1:]:
        total = jnp.matmul(total, factor, precision=lax.Precision.HIGHEST)
    return total


def _eye(like: Any, size: Any) -> Any:
    """Identity matrices for the batch of an array."""
    return jnp.broadcast_to(jnp.eye(size, dtype=like.dtype), (*like.shape[:-2], size, size))


def _diagonal(x: Any) -> Any:
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def _rows(x: Any) -> Any:
    """A vector as one row, to scale columns."""
    return jnp.expand_dims(x, -2)


def _columns(x: Any) -> Any:
    return jnp.expand_dims(x, -1)


# -- triangular and tridiagonal systems -------------------------------------------------------------------------------


def _solve_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """op(A) X = B → Ẋ = op(A)⁻¹ (Ḃ − op(Ȧ) X), on either side."""
    p, (a, _), (x,), (moved, right) = node.params, primals, outs, tangents
    if moved is not None:
        moved = _triangle(p, moved)
        moved = _t(moved) if p["transpose_a"] else moved
        moved = jnp.conj(moved) if p["conjugate_a"] else moved
        right = add(right, lax.neg(_mm(moved, x) if p["left_side"] else _mm(x, moved)))
    return _jax.bind(node.primitive, [a, right], dict(p))


def _solve_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    p, (a, _), (x,) = node.params, primals, outs
    (right,) = _jax.bind(node.primitive, [a, cotangents[0]], {**p, "transpose_a": not p["transpose_a"]})
    if not active[0]:
        return [None, right]
    back = lax.neg(_mm(right, _t(x)) if p["left_side"] else _mm(_t(x), right))
    back = _t(back) if p["transpose_a"] else back
    back = jnp.conj(back) if p["conjugate_a"] else back
    return [_triangle(p, back), right]


def _triangle(params: Mapping[str, Any], a: Any) -> Any:
    """What a triangular system reads of its matrix."""
    skipped = 1 if params["unit_diagonal"] else 0
    return jnp.tril(a, -skipped) if params["lower"] else jnp.triu(a, skipped)


def _after(x: Any, axis: int) -> Any:
    """Each element's successor along an axis counted from the end, then zero."""
    return _moved(x, axis, (-1, 1, 0))


def _before(x: Any, axis: int) -> Any:
    """Each element's predecessor along an axis counted from the end, first zero."""
    return _moved(x, axis, (1, -1, 0))


def _moved(x: Any, axis: int, padding: tuple[int, int, int]) -> Any:
    config = [(0, 0, 0)] * x.ndim
    config[axis] = padding
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _tridiagonal_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """A x = b → ẋ = A⁻¹ (ḃ − Ȧ x); row i is (dlᵢ, dᵢ, duᵢ), and dl₀ and the last du are not read."""
    (low, middle, high, right), (x,) = tangents, outs
    for diagonal, values in ((low, _before(x, -2)), (middle, x), (high, _after(x, -2))):
        if diagonal is not None:
            right = add(right, lax.neg(_columns(diagonal) * values))
    return _jax.bind(node.primitive, [*primals[:3], right], dict(node.params))


def _tridiagonal_pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    (low, middle, high, _), (x,) = primals, outs
    transposed = [_before(high, -1), middle, _after(low, -1), cotangents[0]]
    (right,) = _jax.bind(node.primitive, transposed, dict(node.params))
    values = (_before(x, -2), x, _after(x, -2))
    back = [lax.neg(jnp.sum(right * v, -1)) if a else None for a, v in zip(active, values)]
    return [*back, right]


# -- Cholesky and LU --------------------------------------------------------------------------------------------------


def _cholesky_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """A = L Lᴴ → L̇ = L Φ(L⁻¹ Ȧ L⁻ᴴ), where Φ takes the lower triangle with half the diagonal.

    Only the lower triangle of A is read.
    """
    low = jnp.tril(outs[0])
    moved = jnp.tril(tangents[0])
    half = moved * (1 - _eye(moved, moved.shape[-1]) / 2)
    inner = linalg.triangular_solve(low, half + _h(half), transpose_a=True, conjugate_a=True, lower=True)
    inner = jnp.tril(linalg.triangular_solve(low, inner, left_side=True, lower=True))
    return [_mm(low, inner * (1 - _eye(inner, inner.shape[-1]) / 2))]


def _lu_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """P A = L U → with M = L⁻¹ P Ȧ U⁻¹: L̇ = L tril₋₁(M), U̇ = triu(M) U; L and U are squared with identity."""
    lu, _, permutation = outs[:3]
    m, n = lu.shape[-2:]
    k = min(m, n)
    none = [(0, 0, 0)] * (lu.ndim - 2)
    zero = jnp.zeros((), lu.dtype)
    low = lax.pad(jnp.tril(lu[..., :, :k], -1), zero, [*none, (0, 0, 0), (0, m - k, 0)]) + _eye(lu, m)
    high = lax.pad(jnp.triu(lu[..., :k, :]), zero, [*none, (0, n - k, 0), (0, 0, 0)])
    if n > k:
        rest = jnp.concatenate([jnp.zeros(k, lu.dtype), jnp.ones(n - k, lu.dtype)])
        high = high + jnp.broadcast_to(jnp.diag(rest), high.shape)
    moved = jnp.take_along_axis(tangents[0], _columns(permutation), -2)
    inner = linalg.triangular_solve(low, moved, left_side=True, lower=True, unit_diagonal=True)
    inner = linalg.triangular_solve(high, inner)
    return [_mm(low, jnp.tril(inner, -1)) + _mm(jnp.triu(inner), high), None, None]


# -- QR ---------------------------------------------------------------------------------------------------------------


def _qr_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """X = Q R, X thin, square or wide, with or without the complement of Q's columns, columns permuted or not."""
    (x,), (q, r, *order), (moved,) = primals, outs, tangents
    m, n = x.shape[-2:]
    flat = [None] * len(order)
    if order:
        moved = jnp.take_along_axis(moved, _rows(order[0]), -1)
    if m < n:
        # X = Q [R₁ R₂]: the square part decides Q; R₂ = Qᴴ X₂.
        dq, first = _thin_qr(q, r[..., :m], moved[..., :m])
        rest = _mm(_h(dq), _mm(q, r[..., m:])) + _mm(_h(q), moved[..., m:])
        return [dq, jnp.concatenate([first, rest], -1), *flat]
    dq, dr = _thin_qr(q[..., :n], r[..., :n, :], moved)
    if q.shape[-1] > n:
        dq = jnp.concatenate([dq, _complement(q, dq, n)], -1)
        dr = jnp.concatenate([dr, jnp.zeros((*dr.shape[:-2], m - n, n), dr.dtype)], -2)
    return [dq, dr, *flat]


def _thin_qr(q: Any, r: Any, moved: Any) -> tuple[Any, Any]:
    """With C = Qᴴ Ẋ R⁻¹ = Ω + Ṙ R⁻¹: Ω is skew-Hermitian and Ṙ R⁻¹ upper triangular with a real diagonal."""
    outside = linalg.triangular_solve(r, moved)
    inner = _mm(_h(q), outside)
    low = jnp.tril(inner, -1)
    skew = low - _h(low)
    if jnp.iscomplexobj(inner):
        skew = skew + _eye(inner, inner.shape[-1]) * (inner - jnp.real(inner))
    return outside + _mm(q, skew - inner), _mm(inner - skew, r)


def _complement(q: Any, dq: Any, n: int) -> Any:
    """Tangents of the columns that Householder reflections add: they depend on the first n columns of Q alone.

    With Z = Q₂₁ (Q₁₁ − 1)⁻¹ the reflections give the other columns as a function of these.
    """
    eye = _eye(q, n)
    z_h = jnp.linalg.solve(_h(q[..., :n, :n] - eye), _h(q[..., n:, :n]))
    z = _h(z_h)
    turned = dq[..., n:, :] - _mm(z, dq[..., :n, :])
    return _mm(dq, z_h) - _mm(q[..., :n] + _mm(q[..., n:], z), _h(turned))


# -- eigenvalues and singular values ----------------------------------------------------------------------------------


def _eigh_results(node: Node, primals: Sequence[Any]) -> list[Any]:
    """Of the Hermitian part, as JAX does where it differentiates, though only one triangle is read otherwise."""
    (a,) = primals
    return _jax.bind(node.primitive, [(a + _h(a)) / 2], dict(node.params))


def _eigh_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """A V = V W → ẇ = diag(Vᴴ Ȧ V), V̇ = V (F ∘ Vᴴ Ȧ V), Fᵢⱼ = 1 / (wⱼ − wᵢ)."""
    (a,), (v, w) = primals, outs
    n = a.shape[-1]
    if node.params.get("subset_by_index") not in (None, (0, n)):
        raise NotImplementedError(f"part of the eigenvalues (subset_by_index) have no derivative in JAX{place(node)}")
    inner = _mm(_h(v), tangents[0], v)
    gaps = (_rows(w) - _columns(w)).astype(a.dtype)
    return [_mm(v, _inverse_gaps(gaps) * inner), jnp.real(_diagonal(inner))]


def _inverse_gaps(gaps: Any) -> Any:
    """1 / gap off the diagonal, 0 on it."""
    eye = _eye(gaps, gaps.shape[-1])
    return 1 / (gaps + eye) - eye


def _eig_results(node: Node, primals: Sequence[Any]) -> list[Any]:
    """Right eigenvectors besides, where they are not asked for.

    They may have derivatives then: how they are scaled, which these depend on, cancels in those of the eigenvalues.
    """
    p = dict(node.params)
    if not (p["compute_left_eigenvectors"] or p["compute_right_eigenvectors"]) and "enable_eigvec_derivs" in p:
        p["enable_eigvec_derivs"] = True
    return _jax.bind(node.primitive, primals, {**p, "compute_right_eigenvectors": True})


def _eig_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """A v = w v → ẇ = diag(V⁻¹ Ȧ V); vectors are of unit length with their largest element real, as LAPACK has them."""
    p = node.params
    left, right = p["compute_left_eigenvectors"], p["compute_right_eigenvectors"]
    if (left or right) and not p.get("enable_eigvec_derivs"):
        raise NotImplementedError(
            "eigenvectors of matrices that are not symmetric have derivatives only where eigenvalues differ: ask for "
            f"them by jax.lax.linalg.eig(..., enable_eigvec_derivs=True){place(node)}"
        )
    results = outs if len(outs) > len(node.avals) or right else _eig_results(node, primals)
    w, vectors = results[0], results[-1]
    moved = tangents[0].astype(vectors.dtype)
    inverse = jnp.linalg.solve(vectors, moved)
    if not (left or right):
        return [jnp.sum(inverse * _t(vectors), -1)]
    found = [_diagonal(_mm(inverse, vectors))]
    if left:
        found.append(_vector_tangent(jnp.conj(w), results[1], _h(moved)))
    if right:
        found.append(_vector_tangent(w, vectors, moved))
    return found


def _vector_tangent(w: Any, v: Any, moved: Any) -> Any:
    """u = V (F ∘ V⁻¹ Ȧ V), plus the multiple of each vector that keeps its length and its phase."""
    inner = _mm(jnp.linalg.solve(v, moved), v)
    u = _mm(v, _inverse_gaps(_rows(w) - _columns(w)) * inner)
    largest = jax.nn.one_hot(jnp.argmax(jnp.abs(v), -2), v.shape[-2], axis=-2, dtype=v.dtype)
    length = -jnp.real(jnp.sum(jnp.conj(v) * u, -2))
    phase = -jnp.imag(jnp.sum(largest * u, -2)) / jnp.real(jnp.sum(largest * v, -2))
    return u + v * _rows(lax.complex(length, phase))


def _svd_results(node: Node, primals: Sequence[Any]) -> list[Any]:
    """Singular vectors besides, where they are not asked for."""
    if node.params["compute_uv"]:
        return _jax.bind(node.primitive, primals, dict(node.params))
    return _jax.bind(node.primitive, primals, {**node.params, "compute_uv": True, "full_matrices": False})


def _svd_tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """A = U S Vᴴ → with dS = Uᴴ Ȧ V: ṡ = Re diag(dS); U̇ and V̇ have skew-Hermitian parts by Fᵢⱼ = 1 / (sⱼ² − sᵢ²).

    Raises:
        NotImplementedError: for complements of the singular vectors, and for vectors of some of the values.
    """
    (a,), (moved,) = primals, tangents
    m, n = a.shape[-2:]
    p = node.params
    _refuse_svd(node, m, n)
    s, u, v_h = outs if len(outs) == 3 else _svd_results(node, primals)
    inner = _mm(_h(u), moved, _h(v_h))
    ds = jnp.real(_diagonal(inner))
    if not p["compute_uv"]:
        return [ds]
    v, row, column = _h(v_h), _rows(s).astype(a.dtype), _columns(s).astype(a.dtype)
    turns = _inverse_gaps((_rows(s) + _columns(s)) * (_rows(s) - _columns(s))).astype(a.dtype)
    right, left = row * inner, column * inner
    zero = (s == 0).astype(s.dtype)
    inverse = _rows(1 / (s + zero) - zero).astype(a.dtype)
    phases = _eye(inner, s.shape[-1]) * (inner - _h(inner)) * inverse / 2
    du = _mm(u, turns * (right + _h(right)) + phases)
    dv = _mm(v, turns * (left + _h(left)))
    if m > n:
        outside = _mm(moved, v)
        du = du + (outside - _mm(u, _mm(_h(u), outside))) / row
    if n > m:
        outside = _mm(_h(moved), u)
        dv = dv + (outside - _mm(v, _mm(v_h, outside))) / row
    return [ds, du, _h(dv)]


def _refuse_svd(node: Node, m: Any, n: Any) -> None:
    p = node.params
    what = None
    if p["compute_uv"] and p["full_matrices"] and m != n:
        what = "full matrices of singular vectors (full_matrices=True) of a matrix that is not square"
    elif p["compute_uv"] and p["subset_by_index"] not in (None, (0, min(m, n))):
        what = "singular vectors of some singular values (subset_by_index)"
    if what is not None:
        raise NotImplementedError(f"{what} have no derivative in JAX{place(node)}")


TANGENTS: Mapping[str, TangentRule] = {
    "cholesky": _cholesky_tangent,
    "eig": _eig_tangent,
    "eigh": _eigh_tangent,
    "lu": _lu_tangent,
    "qr": _qr_tangent,
    "svd": _svd_tangent,
    "triangular_solve": _solve_tangent,
    "tridiagonal_solve": _tridiagonal_tangent,
}
PULLBACKS: Mapping[str, PullbackRule] = {
    "triangular_solve": _solve_pullback,
    "tridiagonal_solve": _tridiagonal_pullback,
}
RESULTS: Mapping[str, ResultsRule] = {"eig": _eig_results, "eigh": _eigh_results, "svd": _svd_results}
