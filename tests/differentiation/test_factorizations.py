"""Factorizations and linear systems, against JAX's derivatives."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import pytest
from derivatives_like_jax import check, our_jvp
from jax import lax
from jax.lax import linalg

from jaxinfer.differentiation.tables import factorizations

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset(factorizations.TANGENTS) | {"custom_linear_solve"}
check = functools.partial(check, ours=OURS, mixed=False)
RNG = np.random.default_rng(0)
SQUARE = RNG.normal(size=(2, 3, 3))
COMPLEX = SQUARE + 1j * RNG.normal(size=(2, 3, 3))
TALL = RNG.normal(size=(4, 2)) + 0.5j * RNG.normal(size=(4, 2))
KINDS = pytest.mark.parametrize("a", [SQUARE, COMPLEX[0]], ids=["real batch", "complex"])


def positive(a):
    """A positive definite matrix."""
    return a @ jnp.conj(jnp.swapaxes(a, -1, -2)) + jnp.eye(a.shape[-1], dtype=a.dtype)


@KINDS
def test_cholesky(a):
    check(lambda a: jnp.linalg.cholesky(positive(a)), a, mixed=True)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(("transpose", "conjugate"), [(False, False), (True, False), (True, True), (False, True)])
def test_triangular_systems(left, transpose, conjugate):
    a, lower = COMPLEX, left == conjugate
    options = {"left_side": left, "lower": lower, "transpose_a": transpose, "conjugate_a": conjugate}
    b = a[..., :2] if left else a[..., :2, :]
    unit = transpose

    def solve(a, b):
        return linalg.triangular_solve(a, b, unit_diagonal=unit, **options)

    check(solve, a, b, order=2 if conjugate else 1)


def test_triangular_systems_with_one_side_known():
    a, b = COMPLEX, COMPLEX[..., :1]
    check(lambda a: linalg.triangular_solve(a, b, left_side=True), a, order=1)
    check(lambda b: linalg.triangular_solve(a, b, left_side=True), b, order=1)


@KINDS
def test_tridiagonal_systems(a):
    diagonals = [a[..., 0], a[..., 1] + 5, a[..., 2]]
    check(linalg.tridiagonal_solve, *diagonals, a[..., :2])
    check(lambda d: linalg.tridiagonal_solve(diagonals[0], d, diagonals[2], a), diagonals[1], order=1)


@pytest.mark.parametrize("shape", [(2, 3, 3), (4, 2), (2, 4), (1, 1), (0, 0)], ids=str)
def test_lu(shape):
    a = np.resize(SQUARE, shape) * np.resize(np.arange(1, 8), shape)
    check(lambda a: linalg.lu(a)[0], a, order=2 if shape == (2, 4) else 1)


def test_lu_complex_with_pivots_and_permutation():
    check(linalg.lu, COMPLEX[0], order=1)
    check(lambda a: (jsp.linalg.lu(a)[1:], jnp.linalg.det(a), jnp.linalg.slogdet(a)), SQUARE[0], order=1)


@KINDS
def test_eigenvalues_of_symmetric_matrices(a):
    check(lambda a: jnp.linalg.eigh(positive(a)), a)
    check(lambda a: (linalg.eigh(a, symmetrize_input=False)[1] ** 2, jnp.linalg.eigvalsh(a)), positive(a))


def test_equal_eigenvalues_have_values_derivatives_only():
    a = jnp.diag(jnp.array([1.0, 1, 2]))
    # Of the vectors' derivatives where eigenvalues are equal nothing is finite, in JAX as here.
    check(lambda a: jnp.linalg.eigh(a), a, order=1)


def test_eigenvalues_of_any_matrix():
    check(jnp.linalg.eigvals, SQUARE[0] * 2 + np.diag([1.0, 3, -4]), order=1)
    check(jnp.linalg.eigvals, COMPLEX, order=1)
    # JAX has second derivatives only where those of vectors are allowed.
    check(lambda a: linalg.eig(a, enable_eigvec_derivs=True)[0], SQUARE[0])


def test_second_derivatives_of_eigenvalues():
    a, da = jnp.asarray(COMPLEX[0]), SQUARE[1].astype(complex)

    def moved(values):
        first = lambda a: our_jvp(lambda a: (values(a),), [a], [da], {})[1][0]  # noqa: E731
        return our_jvp(lambda a: (first(a),), [a], [da], {})[1][0]

    allowed = moved(lambda a: linalg.eig(a, enable_eigvec_derivs=True)[0])
    np.testing.assert_allclose(moved(jnp.linalg.eigvals), allowed, rtol=1e-9)


@pytest.mark.parametrize("left", [False, True], ids=["right", "both"])
def test_eigenvectors_of_any_matrix(left):
    def vectors(a):
        return linalg.eig(a, compute_left_eigenvectors=left, enable_eigvec_derivs=True)

    check(vectors, COMPLEX, order=1)
    with pytest.raises(NotImplementedError, match="enable_eigvec_derivs=True"):
        check(jnp.linalg.eig, COMPLEX)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("mode", ["reduced", pytest.param("complete", marks=pytest.mark.slow)])
def test_qr(shape, mode):
    a = RNG.normal(size=shape)
    check(lambda a: jnp.linalg.qr(a, mode), a, order=2 if shape == (4, 2) else 1)


@pytest.mark.parametrize("a", [COMPLEX[0], TALL, TALL.T], ids=["square", "tall", "wide"])
def test_qr_complex(a):
    check(jnp.linalg.qr, a, order=2 if a.shape == (4, 2) else 1)


@pytest.mark.parametrize("a", [SQUARE[0], TALL], ids=["square", "tall"])
def test_qr_with_pivots(a):
    check(lambda a: jsp.linalg.qr(a, pivoting=True, mode="economic"), a, order=1)


def test_qr_of_a_wide_matrix_with_pivots():
    """JAX takes the last columns in their old order there; without pivots a matrix in the new order gives the same."""
    a, da = TALL.T, TALL.T[:, ::-1] * 2
    *_, order = jsp.linalg.qr(a, pivoting=True)
    assert list(order) != sorted(order)
    _, found = our_jvp(lambda a: jsp.linalg.qr(a, pivoting=True)[:2], [jnp.asarray(a)], [da], {})
    _, want = jax.jvp(jnp.linalg.qr, (jnp.asarray(a[:, order]),), (jnp.asarray(da[:, order]),))
    for x, y in zip(found, want):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("a", [SQUARE, COMPLEX[0], TALL, TALL.T], ids=["batch", "complex", "tall", "wide"])
def test_svd(a):
    order = 2 if a.shape == (2, 4) else 1
    check(lambda a: jnp.linalg.svd(a, full_matrices=False), a, order=order)
    check(lambda a: jnp.linalg.svd(a, compute_uv=False), a, order=order)


@pytest.mark.slow
def test_svd_of_equal_and_zero_singular_values():
    check(lambda a: jnp.linalg.svd(a, compute_uv=False), np.diag([2.0, 2, 0]), order=1)
    check(lambda a: jnp.linalg.svd(a, full_matrices=False), np.diag([3.0, 1, 0]), order=1)


def test_svd_of_complements_is_refused():
    with pytest.raises(NotImplementedError, match="full_matrices=True"):
        check(jnp.linalg.svd, TALL)


def test_linear_systems():
    check(jnp.linalg.solve, SQUARE, SQUARE[0], order=1)
    check(jnp.linalg.solve, COMPLEX[0], COMPLEX[1, :, :1])
    check(lambda b: jnp.linalg.solve(SQUARE[0], b), SQUARE[1, 0], order=1)
    check(lambda a: (jnp.linalg.inv(a), jsp.linalg.solve(positive(a), a, assume_a="pos")), SQUARE[0], order=1)


@pytest.mark.slow
def test_least_squares_and_inverses():
    tall = TALL.real
    check(lambda a, b: jnp.linalg.lstsq(a, b)[0], tall, tall[:, 0], order=1)
    check(lambda a: jnp.linalg.pinv(a), tall, order=1)
    check(lambda a: jsp.linalg.expm(a), SQUARE[0] / 4, order=1)
    check(lambda a: jsp.linalg.cho_solve(jsp.linalg.cho_factor(positive(a)), a), SQUARE[0], order=1)


@pytest.mark.slow
def test_systems_solved_by_a_function():
    """Conjugate gradients with an auxiliary result; matrix and right-hand side are differentiated."""

    def solve(a, b):
        matrix = positive(a)
        return jsp.sparse.linalg.cg(lambda x: matrix @ x, b, tol=1e-14)[0]

    check(solve, SQUARE[0], SQUARE[1, 0], rtol=1e-8)

    def with_steps(a, b):
        solver = lambda matvec, b: (jnp.linalg.solve(lax.stop_gradient(a), b), jnp.float64(3))  # noqa: E731
        back = lambda matvec, b: (jnp.linalg.solve(lax.stop_gradient(a).T, b), jnp.float64(4))  # noqa: E731
        return lax.custom_linear_solve(lambda x: a @ x, b, solver, back, has_aux=True)

    check(with_steps, SQUARE[0], SQUARE[1, 0])


def test_systems_without_a_transposed_solver():
    def solve(a, b):
        return lax.custom_linear_solve(lambda x: a @ x, b, lambda f, b: jnp.linalg.solve(lax.stop_gradient(a), b))

    check(solve, SQUARE[0], SQUARE[1, 0], reverse=False)
    with pytest.raises(TypeError, match="transpose_solve"):
        check(solve, SQUARE[0], SQUARE[1, 0])


@pytest.mark.slow
def test_batched_by_vmap():
    check(jax.vmap(jnp.linalg.solve), SQUARE, SQUARE[..., 0], order=1)
    check(lambda a: jnp.linalg.matrix_rank(a) + jnp.linalg.norm(a, 2), SQUARE[0], order=1)
