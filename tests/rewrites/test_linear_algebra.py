"""Linear algebra that a person would do by hand: operations before and after, and the results against float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from rewritten import compare, random, rewrite, total_flops

from jaxinfer.analysis.chains import Factor, best_order
from jaxinfer.graph import run, trace_function
from jaxinfer.rewrites import (
    affine,
    conversions,
    linear_algebra,
    movement,
    parallel_products,
    reductions,
    simplify,
    slicing,
    structured,
)
from jaxinfer.rewriting import Rewriter

RULES = (*simplify.RULES, *movement.RULES, *reductions.RULES, *slicing.RULES, *linear_algebra.RULES)
N = 48
A, B, C, H = (random(N, N, seed=i) for i in range(4))
X, Y = random(N, 1, seed=5), random(N, 1, seed=6)
T = jnp.transpose

PRODUCT, VECTOR = 2 * N**3, 2 * N**2


def _loop(a, b, v):
    return [a @ b + jnp.tensordot(v[i], v[i], axes=0) for i in range(3)]


def _shared(a, b, y):
    square = T(a) @ b
    return square @ square @ y


# What each takes when written with care: whole products and products with a vector, and elementwise operations aside.
LINEAR_ALGEBRA = {
    "A B": (lambda a, b: a @ b, (A, B), 1, 0),
    "A Aᵀ": (lambda a: a @ T(a), (A,), 1, 0),
    "Aᵀ B + Aᵀ B": (lambda a, b: T(a) @ b + T(a) @ b, (A, B), 1, 0),
    "(Aᵀ B)ᵀ (Aᵀ B)": (lambda a, b: T(T(a) @ b) @ (T(a) @ b), (A, B), 2, 0),
    "(Aᵀ B)ᵀ Aᵀ B": (lambda a, b: T(T(a) @ b) @ T(a) @ b, (A, B), 2, 0),
    "Aᵀ B Aᵀ B y": (lambda a, b, y: T(a) @ b @ T(a) @ b @ y, (A, B, Y), 0, 4),
    "S S y, S = Aᵀ B": (_shared, (A, B, Y), 0, 4),
    "yᵀ Hᵀ H": (lambda h, y: T(y) @ T(h) @ h, (H, Y), 0, 2),
    "Hᵀ H x": (lambda h, x: T(h) @ h @ x, (H, X), 0, 2),
    "Hᵀ y xᵀ H": (lambda h, x, y: T(h) @ y @ T(x) @ h, (H, X, Y), 0, 3),
    "A B + A C": (lambda a, b, c: a @ b + a @ c, (A, B, C), 1, 0),
    "A B + A C - A H": (lambda a, b, c, h: a @ b + a @ c - a @ h, (A, B, C, H), 1, 0),
    "(A - Hᵀ H) x": (lambda a, h, x: (a - T(h) @ h) @ x, (A, H, X), 0, 3),
    "(Aᵀ A + Bᵀ B) x": (lambda a, b, x: (T(a) @ a + T(b) @ b) @ x, (A, B, X), 0, 4),
    "Bᵀ A Aᵀ B": (lambda a, b: T(b) @ a @ T(a) @ b, (A, B), 2, 0),
    "A B + v vᵀ, three times": (_loop, (A, B, random(3, N)), 1, 3),
    "(A B)[2, 2]": (lambda a, b: (a @ b)[2, 2], (A, B), 0, 1 / N),
    "(A B)[:, 2]": (lambda a, b: (a @ b)[:, 2], (A, B), 0, 1),
    "(A + B)[2, 2]": (lambda a, b: (a + b)[2, 2], (A, B), 0, 0),
    "vmap A B v": (lambda a, b, v: jax.vmap(lambda x: a @ b @ x)(v), (A, B, random(3, N)), 0, 6),
    "Σ A B": (lambda a, b: jnp.sum(a @ b), (A, B), 0, 1 / N),
}


@pytest.mark.parametrize("name", LINEAR_ALGEBRA)
def test_takes_as_many_operations_as_by_hand(name):
    function, arguments, products, vectors = LINEAR_ALGEBRA[name]
    after = compare(function, arguments, RULES, tolerance=1e-4)
    by_hand = products * PRODUCT + vectors * VECTOR
    assert by_hand <= total_flops(after) <= by_hand + 5 * N**2


def test_count_of_cases_that_a_plain_trace_misses():
    better = [
        name
        for name, (function, arguments, *_) in LINEAR_ALGEBRA.items()
        if (graphs := rewrite(function, arguments, RULES)) and total_flops(graphs[1]) < 0.8 * total_flops(graphs[0])
    ]
    assert len(better) == 15, better


@pytest.mark.parametrize("dtype", ["complex64", "int32", "bfloat16"])
def test_chain_in_other_dtypes(dtype):
    rng = np.random.default_rng(0)
    imaginary = 1j if dtype == "complex64" else 0
    a, b, x = (
        jnp.asarray(rng.integers(-2, 3, shape) + imaginary * rng.integers(-2, 3, shape), dtype)
        for shape in ((9, 9), (9, 9), (9,))
    )

    def function(a, b, x):
        return jnp.conj(T(a)) @ b @ x

    before, after = rewrite(function, (a, b, x), RULES)
    assert total_flops(after) < total_flops(before) / 2
    # Small whole numbers: every dtype is exact.
    np.testing.assert_array_equal(*(np.asarray(run(g, {}, a, b, x)[0], "complex64") for g in (before, after)))


def test_leading_axes_are_rows():
    x, a, b = random(2, 3, 20), random(20, 2), random(2, 20)
    after = compare(lambda x, a, b: x @ (a @ b), (x, a, b), RULES)
    assert total_flops(after) == 2 * 6 * 20 * 2 * 2


def test_low_rank_factors_stay_apart():
    x, a, b = random(3, 40), random(40, 2), random(2, 40)
    after = compare(lambda x, a, b: x @ a @ b, (x, a, b), RULES, known=(1, 2))
    assert after.count("dot_general") == 2


def test_known_factors_become_one():
    x, a, b = random(3, 8), random(8, 30), random(30, 4)
    after = compare(lambda x, a, b: x @ a @ b, (x, a, b), RULES, known=(1, 2))
    assert after.count("dot_general") == 1


def test_product_used_elsewhere_is_kept():
    def function(a, b, x):
        product = a @ b
        return product @ x, product

    after = compare(function, (A, B, X), RULES, tolerance=1e-4)
    assert total_flops(after) == PRODUCT + VECTOR


def test_precision_must_agree():
    def function(a, b, x):
        return jnp.dot(jnp.dot(a, b, precision="highest"), x)

    _, after = rewrite(function, (A, B, X), RULES)
    assert total_flops(after) == PRODUCT + VECTOR


def test_symbolic_sizes_are_left_alone():
    n, m = export.symbolic_shape("n, m")
    avals = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, m), (m, n), (n, m))]
    graph = trace_function(lambda a, b, c: [((a @ b) @ c)[0], jnp.sum(a @ b), (a + a).T.reshape(-1)], *avals)
    assert Rewriter(RULES).fixpoint(graph).count("dot_general") == 2


def test_best_order_against_every_order():
    """Dynamic programming against trying all ways to place the brackets."""

    def cheapest(sizes):
        if len(sizes) == 2:
            return 0
        return min(
            cheapest(sizes[: k + 1]) + cheapest(sizes[k:]) + 2 * sizes[0] * sizes[k] * sizes[-1]
            for k in range(1, len(sizes) - 1)
        )

    rng = np.random.default_rng(1)
    for count in (3, 4, 5, 6):
        sizes = [int(d) for d in rng.integers(1, 20, count + 1)]
        avals = [jax.ShapeDtypeStruct(pair, jnp.float32) for pair in itertools.pairwise(sizes)]
        graph = trace_function(lambda *x: list(x), *avals)
        factors = tuple(Factor(value, (0,), (1,)) for value in graph.outputs)
        assert best_order(graph, factors)[0] == cheapest(sizes)


class TestParallelProducts:
    RULES = (*RULES, *parallel_products.RULES)

    def test_projections_with_biases(self):
        x, w, b = random(5, 8), [random(8, k) for k in (3, 4, 5)], [random(k) for k in (3, 4, 5)]
        after = compare(lambda x, w, b: [x @ v + c for v, c in zip(w, b)], (x, w, b), self.RULES, known=(1, 2))
        assert after.count("dot_general") == 1

    def test_heads(self):
        x, q, k = random(2, 5, 8), random(8, 2, 3), random(8, 2, 3, seed=1)
        after = compare(
            lambda x, q, k: jnp.einsum("btc,chd,bsc,che->bhts", x, q, x, k), (x, q, k), self.RULES, known=(1, 2)
        )
        assert after.count("dot_general") <= 3

    def test_unknown_weights_stay(self):
        x, a, b = random(5, 8), random(8, 3), random(8, 4)
        _, after = rewrite(lambda x, a, b: (x @ a, x @ b), (x, a, b), self.RULES)
        assert after.count("dot_general") == 2

    def test_branches_of_convolutions(self):
        x, a, b, c = random(1, 4, 7, 7), random(2, 4, 1, 1), random(3, 4, 1, 1), random(3, 4, 3, 3)

        def branches(x, a, b, c):
            conv = jax.lax.conv
            return conv(x, a, (1, 1), "VALID"), conv(x, c, (1, 1), "SAME"), conv(x, b, (1, 1), "VALID")

        after = compare(branches, (x, a, b, c), self.RULES, known=(1, 2, 3))
        assert after.count("conv_general_dilated") == 2

    @pytest.mark.parametrize("mode", ["clip", "fill"])
    def test_projected_embedding(self, mode):
        table, w, places = random(10, 6), random(6, 5), np.array([[0, 9, 3], [2, 2, -1]], np.int32)

        def function(table, w, i):
            return jnp.take(table, i, axis=0, mode=mode) @ w

        after = compare(function, (table, w, places), self.RULES, known=(0, 1))
        assert after.count("dot_general") == 0
        assert after.count("gather") == 1

    def test_out_of_bounds_stays_nan(self):
        table, w = random(10, 6), random(6, 5)
        _, after = rewrite(
            lambda t, w, i: jnp.take(t, i, axis=0) @ w, (table, w, np.array([3, 99])), self.RULES, (0, 1)
        )
        (found,) = run(after, {}, np.array([3, 99]))
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[0]).all()


class TestStructured:
    RULES = (*RULES, *conversions.RULES, *affine.RULES, *structured.RULES)

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_identity(self, n):
        def function(a):
            return jnp.eye(n) @ a, a.T @ jnp.eye(n)

        after = compare(function, (random(n, 4),), self.RULES)
        assert after.count("dot_general") == (2 if n == 1 else 0)

    def test_diagonal(self):
        def function(d, a):
            return jnp.diag(d) @ a, a.T @ jnp.diag(d)

        after = compare(function, (random(5), random(5, 4)), self.RULES)
        assert after.count("dot_general") == 0

    def test_other_diagonals_are_products(self):
        after = compare(lambda d, a: jnp.diag(d, k=1) @ a, (random(4), random(5, 4)), self.RULES)
        assert after.count("dot_general") == 1

    def test_trace(self):
        after = compare(lambda a, b: jnp.trace(a @ b), (random(30, 20), random(20, 30)), self.RULES, tolerance=1e-4)
        assert total_flops(after) == 2 * 30 * 20

    @pytest.mark.parametrize("rank", [2, 16])
    def test_low_rank_adaptation(self, rank):
        def function(x, w, a, b, c):
            return x @ w + (x @ a) @ b * 0.5 + c

        arguments = (random(4, 24), random(24, 24), random(24, rank), random(rank, 24), random(24))
        after = compare(function, arguments, self.RULES, known=(1, 2, 3, 4))
        assert after.count("dot_general") == 1
        assert after.count("add", "mul") == 1
