"""Elementwise and special functions: derivatives against JAX's, special values, dtypes, and no work without need."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_jvp, our_vjp
from jax import lax
from jax.extend import core as jex

from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.reverse import vjp
from jaxinfer.differentiation.tables import elementwise, special_functions
from jaxinfer.graph import interpret, trace

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset({*elementwise.TANGENTS, *special_functions.TANGENTS})
NEW = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
_RNG = np.random.default_rng(0)
X = 2 * _RNG.standard_normal((3, 4))
Z = X[:2] + 1j * X[1:]
P = np.abs(X) + 0.1
SHAPES = [((3, 4), ()), ((), (3, 4)), ((3, 1), (1, 4)), ((0, 2), (1, 2)), ((1,), (1,))]


def together(*functions):
    """One function that applies each to the same arguments."""
    return lambda *args: [f(*args) for f in functions]


def test_functions_of_a_real_number():
    check(
        together(lax.asinh, lax.atan, lax.tan, lax.square, lax.abs, lax.sign, lax.log2 if NEW else lax.neg),
        X,
        ours=OURS,
    )
    check(together(lax.atanh, lax.asin, lax.acos, lax.erf_inv), np.tanh(X), ours=OURS)
    check(together(lambda x: lax.acosh(1 + x), lax.log, lax.log1p, lax.lgamma, lax.digamma), P, ours=OURS)
    check(together(*(lambda x, n=n: lax.integer_pow(x, n) for n in (-3, -2, -1, 0, 1, 2, 3, 4, 7))), X, ours=OURS)


def test_functions_of_a_complex_number():
    check(together(lax.asinh, lax.atanh, lax.square, lax.abs, lambda z: lax.integer_pow(z, -1)), Z / 3, ours=OURS)
    if NEW:  # JAX 0.10 has another sign on half of the plane, and none for directions
        check(together(lax.acosh, lax.sign), Z, ours=OURS)


def test_direction_of_a_complex_number():
    primal, tangent = np.array([3 + 4j, 0]), np.array([1 - 2j, 1])
    _, (turned,) = our_jvp(lambda z: (lax.sign(z),), [primal], [tangent], Counter())
    across = (primal[0].conjugate() * tangent[0]).imag / 5
    np.testing.assert_allclose(turned, [1j * primal[0] / 25 * across, 0], rtol=1e-12)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_functions_of_two_operands(shapes):
    x, y = (_RNG.standard_normal(shape) for shape in shapes)
    check(together(lax.add, lax.sub, lax.mul, lax.div, lax.max, lax.min, lax.atan2, lax.rem), x, y, ours=OURS)
    check(lax.pow, np.abs(x), y, ours=OURS)


def test_nextafter_moves_with_its_first_operand():
    _, (x, y) = our_vjp(lambda x, y: (lax.nextafter(x, y),), [X, X + 1], [X], Counter())
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, 0)


def test_gamma_and_beta_functions():
    check(together(lax.igamma, lax.igammac), P, P[::-1], order=1, ours=OURS)
    check(lambda x: lax.igamma(P[0], x), P[1], ours=OURS)
    check(lambda x: lax.betainc(jnp.full(x.shape, 1.5), jnp.full(x.shape, 2.5), x), np.tanh(P), ours=OURS)
    check(lambda x: lax.polygamma(jnp.full(x.shape, 2.0), x), P, ours=OURS)
    check(together(lax.bessel_i0e, lax.bessel_i1e, lax.erf, lax.erfc), np.append(X, [0.0, 1e-20]), ours=OURS)


def test_samples_of_the_gamma_distribution():
    key = jax.random.key(0)
    check(together(lambda a: jax.random.gamma(key, a), lambda a: jax.random.loggamma(key, a)), P[0], order=1, ours=OURS)


def test_zeta_by_differences():
    q, h = np.array([0.7, 2.5]), 1e-5
    s = np.array([3.0, 1.5])
    _, (got,) = our_jvp(lambda q: (lax.zeta(jnp.asarray(s), q),), [q], [np.ones(2)], Counter())
    np.testing.assert_allclose(got, (lax.zeta(s, q + h) - lax.zeta(s, q - h)) / (2 * h), rtol=1e-8)


@pytest.mark.parametrize("fun", [lax.polygamma, lax.zeta, lambda a, x: lax.betainc(a, a, x)])
def test_derivatives_that_do_not_exist_are_refused(fun):
    with pytest.raises(ValueError, match=r"has no derivative for .*constant.*test_elementwise"):
        our_jvp(lambda a, x: (fun(a, x),), [P, P], [X, X], Counter())


@pytest.mark.skipif(not NEW, reason="JAX 0.12 has polynomials")
def test_polynomials():
    a, b = X[0], X[1]
    check(lambda x, a, b: lax.polynomial(x, [a, 1.0, b, 2.0]), X[2], a, b[0], ours=OURS)
    check(lambda x: lax.polynomial(x, [3.0]), X, ours=OURS)
    check(lambda b: lax.polynomial(a, [1.0, b]), b[0], ours=OURS)


def test_clamp():
    low, high = X - 1, X[::-1] + 1
    check(lax.clamp, low, X[:, ::-1], high, ours=OURS)
    # JAX does not differentiate bounds that are scalars next to an array.
    args = [np.float64(-1), np.array([-2.0, -1.0, 0.5, 1.0, 3.0]), np.float64(1)]
    _, (low_ct, x_ct, high_ct) = our_vjp(lambda *args: (lax.clamp(*args),), args, [np.arange(1.0, 6.0)], Counter())
    np.testing.assert_array_equal(x_ct, [0, 0, 3, 0, 0])
    assert (float(low_ct), float(high_ct)) == (1.0, 5.0)


_POINTS = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, np.inf, -np.inf, np.nan])
_PLAIN = (
    "sin cos tan sinh cosh tanh asin acos atan exp exp2 expm1 log log1p logistic sqrt rsqrt cbrt square abs erf erfc"
).split()


def test_special_values_of_functions():
    """First derivatives at zeros, ends of domains, the largest and smallest numbers, infinities and NaN."""
    functions = together(*(getattr(lax, op) for op in _PLAIN))
    ones = np.ones_like(_POINTS)
    got = jax.jit(lambda x: our_jvp(lambda x: tuple(functions(x)), [x], [ones], Counter())[1])(_POINTS)
    want = jax.jit(lambda x: jax.jvp(functions, (x,), (ones,))[1])(_POINTS)
    for op, a, b in zip(_PLAIN, got, want):
        np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=op)


def test_asinh_does_not_overflow():
    for dtype, x in ((np.float16, 300), (np.float32, 1e30), (np.float64, 1e300), (np.float64, np.inf)):
        _, (got,) = our_jvp(lambda x: (lax.asinh(x),), [np.asarray(x, dtype)], [np.ones((), dtype)], Counter())
        np.testing.assert_allclose(got, 1 / np.float64(x), rtol=2e-3)
        assert got.dtype == dtype


def test_ties_and_powers_at_zero():
    zero, one = np.zeros(()), np.ones(())
    cases = [(lax.max, one, one), (lax.min, one, one), (lax.pow, zero, zero), (lax.pow, zero, 2 * one)]
    cases += [(lax.pow, 4 * one, zero), (lax.pow, -one, 2 * one), (lax.pow, -one, one / 2)]

    def fun(*args):
        return [f(*args[2 * i : 2 * i + 2]) for i, (f, _, _) in enumerate(cases)]

    check(fun, *(a for case in cases for a in case[1:]), ours=OURS)


def test_whole_powers_at_zero():
    n = jnp.asarray([0, 1, 2, -1], np.int32)

    def fun(x):
        return (lax.pow(x, n),)

    x, ones, borrowed = np.array([0.0, 0.0, 0.0, 2.0]), np.ones(4), Counter()
    check(fun, x, order=1, ours=OURS)

    def first(x):
        return tuple(our_jvp(fun, [x], [ones], borrowed)[1])

    # JAX's second derivative of x¹ is NaN at zero.
    _, (second,) = our_jvp(first, [x], [ones], borrowed)
    np.testing.assert_allclose(second, [0, 0, 2, 2 / 2.0**3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"])
def test_dtypes_are_kept(dtype):
    x = jnp.asarray([0.3, 0.6], dtype)
    functions = [
        lax.sin,
        lax.tanh,
        lax.sqrt,
        lax.rsqrt,
        lax.exp2,
        lax.log1p,
        lax.logistic,
        lax.atan,
        lax.asinh,
        lax.tan,
    ]
    functions += [lambda x: x * 2.5, lambda x: x**3]
    functions += [lambda x: x**-2, lambda x: 1 / x, lambda x: x**x, lax.atan, lax.asinh, lax.tan]
    if not jnp.iscomplexobj(x):
        functions += [lax.cbrt, lax.erf, lax.lgamma, abs, lambda x: lax.max(x, x[::-1]), lambda x: lax.clamp(x, x, x)]
    for mode in (our_jvp, our_vjp):
        directions = [x] * (1 if mode is our_jvp else len(functions))
        outs, found = jax.eval_shape(
            lambda x, *d, mode=mode: mode(lambda x: tuple(f(x) for f in functions), [x], d, Counter()), x, *directions
        )
        assert {a.dtype for a in (*outs, *found)} == {jnp.dtype(dtype)}


def _program(mode, fun, *args):
    """The operations of a derivative, by name."""
    graph = trace(jax.make_jaxpr(fun)(*args), keep_custom=True)

    def forward(x, t, *rest):
        found = interpret(graph, Forward({}, Counter()), Dual(x, t), *map(Dual, rest))
        return [d.tangent for d in found if d.tangent is not None]

    def reverse(x, ct, *rest):
        _, pull = vjp(graph, {}, [True] + [False] * len(rest), [True], x, *rest, borrowed=Counter())
        return [x for x in pull([ct]) if x is not None]

    closed = jax.make_jaxpr(forward if mode == "forward" else reverse)(args[0], args[0], *args[1:])
    assert isinstance(closed, jex.ClosedJaxpr)
    used, names = {v for v in closed.jaxpr.outvars if not isinstance(v, jex.Literal)}, []
    for eqn in reversed(closed.jaxpr.eqns):
        if used & set(eqn.outvars):
            used |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
            names.append(eqn.primitive.name)
    return sorted(names)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize(
    "fun, operations",
    [
        (lambda x: x + 1, []),
        (lambda x: 1 - x, ["neg"]),
        (lambda x: 2 * x, ["mul"]),
        (lambda x: x / 3, ["div"]),
        (lambda x: lax.exp(x), ["exp", "mul"]),
        (lambda x: lax.square(x), ["mul", "mul"]),
        (lambda x: lax.tanh(x), ["mul", "square", "sub", "tanh"]),
        (lambda x: lax.sign(x) + lax.floor(x), []),
        (lambda x: lax.stop_gradient(x) * 2, []),
    ],
)
def test_no_operation_too_many(mode, fun, operations):
    assert _program(mode, fun, X) == operations


def test_zeros_are_not_computed():
    graph = trace(jax.make_jaxpr(lambda x, y: (lax.sign(x) * 2, x + y, y))(X, X))
    first, second, third = interpret(graph, Forward({}, Counter()), Dual(X, X), Dual(X))
    assert first.tangent is None and third.tangent is None and second.tangent is X
    _, pull = vjp(graph, {}, [True, True], [True, True, True], X, X, borrowed=Counter())
    assert pull([X, None, None]) == [None, None]
