"""The Laplacian against closed forms, and against the trace of JAX's Hessian in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import laplacian_cases as cases
import numpy as np
import pytest
from jax import lax
from random_programs import random_program

from jaxinfer.differentiation.laplacian.transform import laplacian


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True):
        yield


def point(*shape: int, seed: int = 0) -> jax.Array:
    """Away from the kinks of the functions tested."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def trace_of_hessian(fun: Callable[..., Any], outer: Any = jax.jacfwd, inner: Any = jax.jacfwd) -> Callable[..., Any]:
    """Σᵢ ∂²f/∂xᵢ² of a function of one array, by JAX."""

    def lap(x: jax.Array) -> Any:
        hessian = outer(inner(fun))(x)
        shapes = jax.eval_shape(fun, x)
        square = jax.tree.map(lambda h, s: h.reshape(*s.shape, x.size, x.size), hessian, shapes)
        return jax.tree.map(lambda h: jnp.trace(h, axis1=-2, axis2=-1), square)

    return lap


def check(fun: Callable[..., Any], shape: tuple[int, ...], **how: Any) -> None:
    x = point(*shape)
    value, lap = jax.jit(laplacian(fun, has_value=True))(x)
    chex.assert_trees_all_close(value, jax.jit(fun)(x), rtol=1e-12)
    expected = jax.jit(trace_of_hessian(fun, **how))(x)
    chex.assert_trees_all_equal_shapes_and_dtypes(lap, expected)
    scale = max(float(jnp.max(jnp.abs(e))) for e in jax.tree.leaves(expected))
    chex.assert_trees_all_close(lap, expected, rtol=1e-9, atol=1e-10 * scale)


TABLE = {**cases.ELEMENTWISE, **cases.MOVES, **cases.PRODUCTS, **cases.CONTROL}
# These go through JAX's own derivatives: of the operation in question only.
MAY_FALL_BACK = {"scatter", "slogdet, sign", "slogdet, elements"}


@pytest.mark.parametrize("name", TABLE)
def test_rules_agree_with_the_trace_of_the_hessian(name: str) -> None:
    fun, shape = TABLE[name]
    check(fun, shape)
    if name not in MAY_FALL_BACK:
        assert not laplacian(fun).explain(point(*shape)).borrowed


@pytest.mark.parametrize("name", cases.FALLBACKS)
def test_operations_without_a_rule_are_counted(name: str) -> None:
    fun, shape = cases.FALLBACKS[name]
    check(fun, shape)
    report = laplacian(fun).explain(point(*shape))
    assert report.borrowed == {name: 1}
    assert name in str(report)


def test_pullbacks_of_the_user_are_kept() -> None:
    fun, shape = cases.PULLED
    check(fun, shape, outer=jax.jacrev, inner=jax.jacrev)
    ((op, count),) = laplacian(fun).explain(point(*shape)).borrowed.items()
    assert op.startswith("custom_vjp_call")
    assert count == 1


SIZE = 4
MATRIX = np.random.default_rng(1).normal(size=(SIZE, SIZE)) / SIZE


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 40))])
def test_random_programs(seed: int) -> None:
    source = random_program(seed)
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "A": MATRIX, "N": SIZE}
    exec(source, names)
    try:
        check(names["f"], (SIZE,))
    except AssertionError as error:
        raise AssertionError(f"{source}\n{error}") from error


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_quadratic_form_gives_twice_the_trace() -> None:
    a = point(5, 5)
    np.testing.assert_allclose(laplacian(lambda x: x @ a @ x)(point(5)), 2 * jnp.trace(a), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 4.5])
def test_power_of_the_norm(k: float) -> None:
    x = point(4)
    r = jnp.linalg.norm(x)
    lap = laplacian(lambda x: jnp.linalg.norm(x) ** k)(x)
    np.testing.assert_allclose(lap, k * (k + 4 - 2) * r ** (k - 2), rtol=1e-11)


def test_gaussian() -> None:
    x = point(6)
    squared = jnp.sum(x**2)
    lap = laplacian(lambda x: jnp.exp(-jnp.sum(x**2) / 2))(x)
    np.testing.assert_allclose(lap, (squared - 6) * jnp.exp(-squared / 2), rtol=1e-11)


def test_product_of_sines_is_an_eigenfunction() -> None:
    x, k = point(3), jnp.array([1.0, 2.0, 3.0])

    def wave(x: jax.Array) -> jax.Array:
        a, b, c = jnp.sin(k * x)
        return a * b * c

    np.testing.assert_allclose(laplacian(wave)(x), -14 * wave(x), rtol=1e-11)


def test_log_determinant_of_a_matrix() -> None:
    """∂²log|det A|/∂Aᵢⱼ² = −(A⁻¹)ⱼᵢ²."""
    a = point(4, 4)
    lap = laplacian(lambda a: jnp.linalg.slogdet(a)[1])(a)
    np.testing.assert_allclose(lap, -jnp.sum(jnp.linalg.inv(a) ** 2), rtol=1e-11)


def test_harmonic_function() -> None:
    lap = laplacian(lambda x: 1 / jnp.linalg.norm(x))(point(3))
    np.testing.assert_allclose(lap, 0.0, atol=1e-12)


# -- the public face --------------------------------------------------------------------------------------------------


def two(p: dict[str, jax.Array], scale: jax.Array, n: Any) -> dict[str, jax.Array]:
    return {"a": jnp.sin(p["u"]) * p["v"][0] ** n, "b": jnp.sum(p["u"]) ** 2 * scale * jnp.ones((2, 1))}


def test_pytrees_argnums_and_integers() -> None:
    p, scale = {"u": point(2), "v": point(3, 1)}, jnp.asarray(0.7)
    lap = laplacian(two, argnums=(0, 1))(p, scale, 3)

    def flat(x: jax.Array) -> Any:
        return two({"u": x[:2], "v": x[2:5].reshape(3, 1)}, x[5], 3)

    expected = jax.jit(trace_of_hessian(flat))(jnp.concatenate([p["u"], p["v"].ravel(), scale[None]]))
    chex.assert_trees_all_close(lap, expected, rtol=1e-10)
    only = laplacian(two, argnums=1)(p, scale, jnp.asarray(3))
    chex.assert_trees_all_close(only, jax.tree.map(jnp.zeros_like, lap), atol=0)
    last = laplacian(lambda n, x: x**n, argnums=-1)(3, jnp.asarray(2.0))
    np.testing.assert_allclose(last, 12.0)


def test_value_and_auxiliary_output() -> None:
    x = point(3)

    def fun(x: jax.Array, *, power: int) -> Any:
        return jnp.sum(x**power), {"count": 7, "x": x}

    (value, lap), aux = laplacian(fun, has_aux=True, has_value=True)(x, power=4)
    np.testing.assert_allclose(value, jnp.sum(x**4))
    np.testing.assert_allclose(lap, jnp.sum(12 * x**2), rtol=1e-12)
    assert aux["count"] == 7
    np.testing.assert_array_equal(aux["x"], x)
    lap, aux = laplacian(fun, has_aux=True)(x, power=2)
    np.testing.assert_allclose(lap, 6.0)


def test_methods_scalars_and_constants() -> None:
    class Model:
        k = 3.0

        def __call__(self, x: Any) -> Any:
            return self.k * x**2

        lap = laplacian(__call__, argnums=1)

    np.testing.assert_allclose(Model().lap(2.0), 6.0)
    np.testing.assert_allclose(laplacian(lambda x: 3.0)(1.0), 0.0)
    assert laplacian(lambda x: x)(jnp.zeros((0, 3))).shape == (0, 3)


def test_single_precision_stays_single() -> None:
    x, w = point(4, 3), point(3, 5, seed=1)

    def fun(x: jax.Array) -> jax.Array:
        y = jnp.tanh(x @ w.astype(x.dtype))
        return jnp.sum(jax.nn.softmax(y @ y.T) @ y, -1) / 3

    lap = laplacian(fun)(x.astype(jnp.float32))
    assert lap.dtype == jnp.float32
    np.testing.assert_allclose(lap, laplacian(fun)(x), rtol=1e-3, atol=1e-4)


def test_complex_values_in_between_and_as_results() -> None:
    x = point(4)
    check(lambda x: jnp.abs(jnp.fft.fft(x**2)) ** 2, (4,))
    check(lambda x: jnp.real(jnp.exp(1j * x) * x[0]), (4,))
    lap = laplacian(lambda x: jnp.exp(1j * x))(x)
    np.testing.assert_allclose(lap, -jnp.exp(1j * x), rtol=1e-12)


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(TypeError, match="but got int"):
        laplacian(lambda x: x * 1.0)(jnp.arange(3))
    with pytest.raises(TypeError, match="real-valued inputs, but got complex"):
        laplacian(lambda x, z: jnp.real(z), argnums=1)(1.0, 1j)
    with pytest.raises(TypeError, match="outputs, but got int"):
        laplacian(jnp.argmax)(point(3))
    with pytest.raises(ValueError, match="positional argument 2"):
        laplacian(lambda x: x, argnums=2)(1.0)


def test_steps_do_not_spread_infinities() -> None:
    """What `where` does not choose leaves no trace, as in JAX."""
    x = jnp.array([0.0, 4.0])
    lap = laplacian(lambda x: jnp.where(x > 0, jnp.log(x), 0.0))(x)
    np.testing.assert_allclose(lap, [0.0, -1 / 16])


# -- composition ------------------------------------------------------------------------------------------------------


def field(x: jax.Array) -> jax.Array:
    y = jnp.tanh(x @ cases.W3) @ cases.W4
    return jnp.sum(jax.nn.softmax(y) * y) + jnp.prod(x)


def test_under_vmap() -> None:
    xs = point(5, 3)
    found = jax.vmap(laplacian(field))(xs)
    expected = jax.jit(jax.vmap(trace_of_hessian(field)))(xs)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_of_vmap_keeps_examples_apart() -> None:
    xs = point(5, 3)
    lap = laplacian(jax.vmap(field))
    np.testing.assert_allclose(lap(xs), jax.vmap(laplacian(field))(xs), rtol=1e-10)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
def test_derivative_of_the_laplacian(transform: Any) -> None:
    x = point(3)
    expected = jax.jit(jax.jacfwd(trace_of_hessian(field)))(x)
    np.testing.assert_allclose(jax.jit(transform(laplacian(field)))(x), expected, rtol=1e-9)


def test_gradient_with_respect_to_parameters() -> None:
    """The loss of a network that is trained to solve Poisson's equation."""
    x, w = point(3, seed=1), point(3, 4)

    def residual(lap: Any, w: jax.Array) -> jax.Array:
        return (lap(lambda x: jnp.sum(jnp.tanh(x @ w) ** 2))(x) - 1) ** 2

    found = jax.jit(jax.grad(functools.partial(residual, laplacian)))(w)
    np.testing.assert_allclose(found, jax.jit(jax.grad(functools.partial(residual, trace_of_hessian)))(w), rtol=1e-9)


def test_biharmonic_operator() -> None:
    x = point(3)
    np.testing.assert_allclose(
        laplacian(laplacian(field))(x), jax.jit(trace_of_hessian(trace_of_hessian(field)))(x), rtol=1e-9
    )


def test_inside_loops_of_the_caller() -> None:
    xs = point(4, 3)
    found = jax.jit(lambda xs: lax.map(laplacian(field), xs))(xs)
    np.testing.assert_allclose(found, jax.vmap(laplacian(field))(xs), rtol=1e-12)


# -- what it costs ----------------------------------------------------------------------------------------------------


def multiplications(fun: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of all matrix products in a program."""
    total, stack = 0, [jax.make_jaxpr(fun)(*args).jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            if eqn.primitive.name == "dot_general":
                (contract, _), _ = eqn.params["dimension_numbers"]
                inner = [eqn.invars[0].aval.shape[a] for a in contract]
                total += int(np.prod([*inner, *eqn.outvars[0].aval.shape]))
            stack += [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
    return total


def test_a_dense_layer_multiplies_each_row_once() -> None:
    """n rows, the value and its Laplacian; the first layer's Jacobian is the matrix itself."""
    n, h = 6, 16
    a, b, c = point(n, h), point(h, h), point(h, 1)
    count = multiplications(laplacian(lambda x: (jnp.tanh(jnp.tanh(x @ a) @ b) @ c)[0]), point(n))
    assert count <= n * h + (n + 2) * h * h + (n + 2) * h


def test_rows_of_separate_particles_stay_separate() -> None:
    """An orbital depends on one electron: three rows, whatever the number of electrons."""
    electrons, width = 8, 16
    a, b, c = point(3, width), point(width, width), point(width, electrons)

    def logdet(x: jax.Array) -> jax.Array:
        return jnp.linalg.slogdet(jnp.tanh(jnp.tanh(x @ a) @ b) @ c)[1]

    count = multiplications(laplacian(logdet), point(electrons, 3))
    rows = 3 + 2
    assert count <= electrons * (3 * width + rows * width**2 + rows * width * electrons + electrons**2)
