"""Sparse Jacobians and Hessians against JAX's dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.sparse import BCOO
from sparse_programs import RandomProgram

from jaxinfer.differentiation.sparse.transform import sparse_hessian, sparse_jacobian

pytestmark = pytest.mark.usefixtures("float64")

METHODS = ("auto", "direct", "forward", "reverse", "passes")


def burgers(u):
    """An explicit step of the periodic Burgers equation."""
    left, right = jnp.roll(u, 1), jnp.roll(u, -1)
    return u + 0.1 * (0.5 * (right - 2 * u + left) - u * (right - left) / 2)


def brusselator(state):
    u, v = state

    def laplacian(w):
        return sum(jnp.roll(w, step, axis) for step in (1, -1) for axis in (0, 1)) - 4 * w

    return jnp.stack([1 + u**2 * v - 4.4 * u + 10 * laplacian(u), 3.4 * u - u**2 * v + 10 * laplacian(v)])


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def tree(x, y):
    return {"a": jnp.sin(x) * y, "b": (x.sum(0), y[1:] ** 2 * y[0])}


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))


def dense(found):
    return jax.tree.map(lambda b: b.todense(), found, is_leaf=lambda x: isinstance(x, BCOO))


def assert_equal(found, expected):
    found = dense(found)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("fun", "shape"), [(burgers, (20,)), (brusselator, (2, 5, 4))])
def test_jacobians_of_stencils(fun, shape, method):
    x = random(*shape)
    found = sparse_jacobian(fun, method=method)(x)
    assert_equal(found, jax.jacobian(fun)(x))
    assert found.nse == {1: 60, 3: 240}[x.ndim]
    assert (found.n_batch, found.unique_indices, found.indices_sorted) == (0, True, True)
    flat = np.ravel_multi_index(np.asarray(found.indices).T, found.shape)
    assert (np.diff(flat) > 0).all()


@pytest.mark.parametrize("method", ["auto", "direct", "passes"])
def test_hessian_of_a_chain(method):
    x = random(30)
    found = sparse_hessian(rosenbrock, method=method)
    assert_equal(found(x), jax.hessian(rosenbrock)(x))
    assert found.pattern(x).nnz == 88
    assert found.coloring(x).passes == 3


def test_what_is_chosen():
    x = random(12)
    assert sparse_jacobian(burgers).method(x) == "direct"
    assert sparse_jacobian(lambda x: jnp.ones(3)).method(x) == "empty"
    weights = np.random.default_rng(0).standard_normal((2, 12))
    assert sparse_jacobian(lambda x: jnp.tanh(weights @ x)).method(x) == "reverse"
    assert sparse_jacobian(lambda x: jnp.tanh(weights.T @ x)).method(x[:2]) == "forward"
    arrow = sparse_jacobian(lambda x: jnp.cumsum(x)[-1:] * jnp.ones(1), method="passes")
    assert arrow.method(x) == "reverse"


def test_long_rows_and_columns_take_both_modes():
    def arrow(x):
        return jnp.tanh(x).at[0].set(jnp.prod(jnp.cos(x))) * x[0]

    x = random(15)
    found = sparse_jacobian(arrow, method="passes")
    assert found.method(x) == "both"
    assert found.coloring(x).passes == 3
    assert_equal(found(x), jax.jacobian(arrow)(x))


def test_known_coefficients_are_not_computed():
    """The derivative of a linear function is written down, not computed."""
    graph = sparse_jacobian(lambda x: x[1:] - 3 * x[:-1]).graph(random(50))
    assert graph.count("mul", "sub", "add", "neg", "concatenate") <= 1


@pytest.mark.parametrize("method", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0), -1])
def test_pytrees(method, argnums):
    x, y = random(3, 4), random(4)
    assert_equal(sparse_jacobian(tree, argnums, method=method)(x, y), jax.jacobian(tree, argnums)(x, y))


@pytest.mark.parametrize("method", ["auto", "passes"])
def test_hessians_of_pytrees(method):
    def fun(p, y):
        return jnp.sum(p["u"] ** 2 * p["v"]) + jnp.sum(p["u"][1:] * p["u"][:-1] * y)

    p, y = {"u": random(4), "v": random(4) + 1}, random(3)
    assert_equal(sparse_hessian(fun, method=method)(p, y), jax.hessian(fun)(p, y))
    assert_equal(sparse_hessian(fun, (0, 1), method=method)(p, y), jax.hessian(fun, (0, 1))(p, y))


def test_scalars_and_empty_arrays():
    y = random(3)
    assert_equal(sparse_jacobian(lambda s: s * y)(2.0), jax.jacobian(lambda s: s * y)(2.0))
    assert_equal(sparse_jacobian(lambda x: x[0] * x[1])(y), jax.jacobian(lambda x: x[0] * x[1])(y))
    assert_equal(sparse_jacobian(lambda x: 2 * x)(y[:0]), jnp.zeros((0, 0)))


@pytest.mark.parametrize("method", ["auto", "passes"])
def test_composes_with_transformations(method):
    x = random(3, 8)
    found = sparse_jacobian(burgers, method=method)
    assert_equal(jax.jit(found)(x[0]), jax.jacobian(burgers)(x[0]))
    assert_equal(jax.vmap(found)(x), jax.vmap(jax.jacobian(burgers))(x))
    slope = jax.grad(lambda x: jnp.sum(found(x).data ** 2))(x[0])
    expected = jax.grad(lambda x: jnp.sum(jax.jacobian(burgers)(x) ** 2))(x[0])
    np.testing.assert_allclose(slope, expected, rtol=1e-9)


def test_captured_tracers_leave_no_trace():
    x = random(6)

    @jax.jit
    def outer(z):
        return sparse_jacobian(inner := lambda x: x[1:] * z * x[:-1])(x), jax.jacobian(inner)(x)

    for z in (2.0, 3.0):
        found, expected = outer(z)
        assert_equal(found, expected)


def test_traced_once_for_each_kind_of_arguments():
    traces = []

    def fun(x, scale=1.0):
        traces.append(x.shape)
        return scale * x**2

    found = sparse_jacobian(fun)
    for _ in range(3):
        found(random(4))
        found.pattern(random(4))
    assert len(traces) == 1
    assert_equal(found(random(4), scale=2.0), jnp.diag(4 * random(4)))
    assert_equal(found(random(4), scale=3.0), jnp.diag(6 * random(4)))
    assert len(traces) == 3


def test_auxiliary_data_and_keywords():
    found, aux = sparse_jacobian(lambda x, w=None: (x * w, {"sum": x.sum(), "name": "n"}), has_aux=True)(
        random(3), w=2 * random(3)
    )
    assert_equal(found, jnp.diag(2 * random(3)))
    np.testing.assert_allclose(aux["sum"], random(3).sum())
    assert aux["name"] == "n"


def test_complex_and_small_dtypes():
    z = random(4) + 1j

    def fun(z):
        return z[1:] * z[:-1] ** 2

    assert_equal(sparse_jacobian(fun, holomorphic=True)(z), jax.jacobian(fun, holomorphic=True)(z))
    assert sparse_jacobian(fun)(jnp.ones(4, jnp.float32)).data.dtype == jnp.float32


def test_rules_for_one_mode_only():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, ct: (3 * x * ct,))
    x = random(5)
    assert_equal(sparse_jacobian(lambda x: square(x)[1:])(x), jax.jacobian(lambda x: square(x)[1:])(x))

    def loop(x):
        return lax.while_loop(lambda c: c[0] < 2 + (x[0] > 9), lambda c: (c[0] + 1, c[1] * x), (0, x))[1]

    assert_equal(sparse_jacobian(loop)(x), jax.jacfwd(loop)(x))


def test_a_convolutional_network():
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.standard_normal(s) / 9) for s in ((4, 1, 3, 3), (4, 4, 3, 3), (2, 4, 3, 3))]

    def network(image):
        y = image[None, None]
        for kernel in kernels:
            y = jnp.tanh(lax.conv_general_dilated(y, kernel, (2, 2), "SAME"))
        return y

    x = random(16, 16)
    found = sparse_jacobian(network)
    # Three layers of 3×3 with stride 2 see 15×15 elements.
    assert np.bincount(found.pattern(x).rows).max() <= 15 * 15
    assert_equal(found(x), jax.jacobian(network)(x))


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed):
    program = RandomProgram.draw(5000 + seed)
    assert_equal(sparse_jacobian(program)(program.argument()), jax.jacfwd(program)(program.argument()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("method", ["auto", "passes"])
def test_more_random_programs(seed, method):
    program = RandomProgram.draw(6000 + seed)
    x = program.argument()
    assert_equal(sparse_jacobian(program, method=method)(x), jax.jacfwd(program)(x))
    if seed % 4 == 0:

        def fun(x):
            return jnp.sum(program(x) ** 2)

        assert_equal(sparse_hessian(fun, method=method)(x), jax.hessian(fun)(x))


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = sparse_jacobian(burgers).plot(random(12))
    assert axes.get_title() == repr(sparse_jacobian(burgers).coloring(random(12)))
    (points,) = axes.collections
    assert len(points.get_offsets()) == 36


def stripes(axes):
    """The colour of each stripe by its place, without what makes it transparent."""
    return {round(patch.get_x() + 0.5): tuple(patch.get_facecolor()[:3]) for patch in axes.patches}


def test_plot_of_a_coloring():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    derivative, x = sparse_jacobian(burgers), random(12)
    coloring = derivative.coloring(x)
    colors = stripes(derivative.plot_coloring(x))
    assert set(colors) == set(range(12)) and len(set(colors.values())) == coloring.forward == 3
    # Columns have one colour exactly where they share a pass.
    same = np.equal.outer(coloring.columns, coloring.columns)
    np.testing.assert_array_equal([[colors[i] == colors[j] for j in range(12)] for i in range(12)], same)
    corner = derivative.plot_coloring(x, corner=4)
    assert stripes(corner) == {i: colors[i] for i in range(4)}
    (points,) = corner.collections
    # Three diagonals of a 4×4 corner.
    assert len(points.get_offsets()) == 4 + 2 * 3
    # Every entry has the colour of the column it is read off.
    for (column, _), color in zip(points.get_offsets(), points.get_facecolors()):
        assert tuple(color[:3]) == colors[column]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sparse_jacobian(lambda i: i * 2.0)(jnp.arange(3)), TypeError, "real- or complex-valued inputs"),
        (lambda x: sparse_jacobian(jnp.argsort)(x), TypeError, "has_aux=True"),
        (lambda x: sparse_jacobian(lambda z: z)(x + 1j), TypeError, "holomorphic=True"),
        (lambda x: sparse_hessian(lambda x: x)(x), TypeError, "scalar-output"),
        (lambda x: sparse_jacobian(burgers, 3)(x), ValueError, "positional argument 3"),
        (lambda x: sparse_jacobian(burgers, method="best"), ValueError, "'direct'"),
        (lambda x: sparse_jacobian(jnp.cumsum, method="direct")(x), ValueError, "use passes"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(random(4))
