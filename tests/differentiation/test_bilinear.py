"""Products and convolutions against JAX's derivatives."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_vjp
from jax import lax

from jaxinfer.differentiation.tables import bilinear, convolution

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset(bilinear.TANGENTS) | frozenset(convolution.TANGENTS)
_RNG = np.random.default_rng(0)


def draw(*shape):
    """A random array."""
    return _RNG.standard_normal(shape)


PRODUCTS = [
    ((3, 2), (2, 4), (([1], [0]), ([], []))),
    ((3, 5), (2, 5), (([1], [1]), ([], []))),
    ((5, 3), (5, 2), (([0], [0]), ([], []))),
    ((3, 3, 2), (3, 2, 4), (([2], [1]), ([0], [0]))),
    ((3, 5, 2), (2, 4, 5), (([2], [0]), ([1], [2]))),
    ((7, 3, 5, 2), (2, 2, 4, 5), (([3], [0]), ([2], [3]))),
    ((2, 3, 4), (4, 5, 3), (([2, 1], [0, 2]), ([], []))),
    ((2,), (2,), (([0], [0]), ([], []))),
    ((2,), (3,), (([], []), ([], []))),
    ((), (), (([], []), ([], []))),
    ((0, 2), (2, 3), (([1], [0]), ([], []))),
    ((3, 0), (0, 1), (([1], [0]), ([], []))),
]


def test_products():
    def fun(*args):
        pairs = zip(args[::2], args[1::2], PRODUCTS)
        return [lax.dot_general(x, y, numbers) ** 2 for x, y, (_, _, numbers) in pairs]

    check(fun, *(draw(*shape) for p in PRODUCTS for shape in p[:2]), ours=OURS)


def test_complex_products():
    check(lambda x, y: (x @ y) ** 2, draw(3, 2) + 1j * draw(3, 2), draw(2, 4) + 1j * draw(2, 4), ours=OURS)


def _products_of(fun, x, y):
    """The operations of the pullback of a product."""
    out = jax.eval_shape(fun, x, y)
    closed = jax.make_jaxpr(lambda x, y, ct: our_vjp(lambda *a: (fun(*a),), [x, y], [ct], Counter())[1])(x, y, out)
    return [e for e in closed.jaxpr.eqns if e.primitive.name in ("dot_general", "transpose")]


@pytest.mark.parametrize("x, y, numbers", PRODUCTS[:4], ids=str)
def test_no_result_is_transposed(x, y, numbers):
    found = _products_of(lambda x, y: lax.dot_general(x, y, numbers), draw(*x), draw(*y))
    assert [e.primitive.name for e in found] == ["dot_general"] * 3


def test_precision_and_element_type_are_kept():
    def fun(x, y):
        numbers = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, y, numbers, precision=("highest", "default"), preferred_element_type=np.float32)

    x, y = jnp.asarray(draw(3, 2), jnp.bfloat16), jnp.asarray(draw(2, 4), jnp.bfloat16)
    check(fun, x, y, ours=OURS, order=1, rtol=2e-2)
    first, of_x, of_y = (e.params for e in _products_of(fun, x, y))
    high, low = lax.Precision.HIGHEST, lax.Precision.DEFAULT
    assert [p["precision"] for p in (first, of_x, of_y)] == [(high, low), (high, low), (high, low)]
    assert {p["preferred_element_type"] for p in (first, of_x, of_y)} == {jnp.dtype("float32")}
    _, back = our_vjp(lambda x, y: (fun(x, y),), [x, y], [np.ones((3, 4), np.float32)], Counter())
    assert {ct.dtype for ct in back} == {jnp.dtype("bfloat16")}


# lhs and rhs in NCHW and OIHW, strides, padding, dilations of both.
WINDOWS = [
    ((2, 3, 6, 7), (4, 3, 1, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    ((1, 1, 6, 7), (1, 1, 1, 2), (1, 2), ((1, 0), (0, 1)), (2, 1), (1, 1)),
    ((2, 1, 6, 7), (2, 1, 3, 2), (2, 1), ((0, -1), (2, 3)), (1, 1), (2, 2)),
    ((1, 2, 6, 7), (2, 2, 5, 3), (3, 2), ((-1, 5), (4, -2)), (2, 3), (2, 1)),
    ((1, 2, 0, 4), (1, 2, 1, 2), (1, 1), ((1, 0), (0, 1)), (1, 1), (1, 1)),
    ((2, 1, 3, 4), (1, 1, 4, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
]
LAYOUTS = {
    "NCHW": (("NCHW", "OIHW", "NCHW"), (0, 1, 2, 3), (0, 1, 2, 3)),
    "NHWC": (("NHWC", "HWIO", "NHWC"), (0, 2, 3, 1), (2, 3, 1, 0)),
    "mixed": (("NHWC", "OIHW", "NCHW"), (0, 2, 3, 1), (0, 1, 2, 3)),
}


@pytest.mark.parametrize(
    "layout, batches, features, order",
    [
        ("NHWC", 1, 1, 2),
        ("mixed", 1, 1, 1),
        ("NHWC", 2, 1, 1),
        ("NCHW", 2, 1, 1),
        ("NCHW", 1, 3, 1),
        ("mixed", 1, 3, 1),
    ],
)
def test_convolutions(layout, batches, features, order):
    numbers, lhs_order, rhs_order = LAYOUTS[layout]
    args = []
    for (b, i, *image), (o, _, *window), *_ in WINDOWS:
        args.append(draw(b * batches, i * features, *image).transpose(lhs_order))
        args.append(draw(o * batches * features, i, *window).transpose(rhs_order))

    def fun(*args):
        pairs = zip(args[::2], args[1::2], WINDOWS)
        return [
            lax.conv_general_dilated(x, k, strides, padding, dilation, gaps, numbers, features, batches)
            for x, k, (_, _, strides, padding, dilation, gaps) in pairs
        ]

    check(fun, *args, ours=OURS, order=order)


def test_other_convolutions():
    def fun(x, k, y, n):
        no_window = lax.ConvDimensionNumbers((0, 1), (0, 1), (0, 1))
        return lax.conv(x, k, (1,), "SAME"), lax.conv_general_dilated(y, n, (), (), dimension_numbers=no_window)

    check(
        fun, draw(2, 3, 5) + 1j * draw(2, 3, 5), draw(4, 3, 3) + 1j * draw(4, 3, 3), draw(3, 2), draw(4, 2), ours=OURS
    )

    def mixed(x, k):
        return lax.conv_general_dilated(x, k, (1,), "SAME", preferred_element_type=np.float32)

    x, k = jnp.asarray(draw(2, 3, 5), jnp.bfloat16), jnp.asarray(draw(4, 3, 3), jnp.bfloat16)
    check(mixed, x, k, ours=OURS, order=1, rtol=3e-2)
