"""Structural and other linear operations against JAX's derivatives, with odd, empty and size-1 axes."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives_like_jax import check, our_vjp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.tables import linear
from jaxinfer.graph import interpret, trace

pytestmark = pytest.mark.usefixtures("float64")
OURS = frozenset({*linear.TANGENTS, "add_any", "mul", "neg"})
_RNG = np.random.default_rng(0)


def draw(*shape):
    """A random array."""
    return _RNG.standard_normal(shape)


def squared(fun):
    """Results times themselves, so that second derivatives are not zero."""
    return lambda *args: [x * x for x in jax.tree.leaves(fun(*args))]


X, E = draw(3, 4), draw(0, 4)
Z = draw(3) + 1j * draw(3)

MOVES = {
    "reshape": lambda x: (lax.reshape(x, (2, 6)), lax.reshape(x, (2, 6), (1, 0)), x.ravel()),
    "transpose": lambda x: (x.T, lax.transpose(lax.reshape(x, (3, 2, 2)), (2, 0, 1))),
    "broadcast": lambda x: (
        lax.broadcast_in_dim(x, (2, 3, 1, 4), (1, 3)),
        lax.broadcast_in_dim(x[:, :1], (3, 5), (0, 1)),
        lax.broadcast_in_dim(x[0, 0], (2, 2), ()),
        lax.broadcast_in_dim(x[0], (0, 4), (1,)),
        lax.broadcast_in_dim(x[:1, 0], (1, 1), (1,)),
    ),
    "squeeze": lambda x: (lax.squeeze(x[:1], (0,)), lax.expand_dims(x, (0, 2))),
    "slice": lambda x: (
        lax.slice(x, (1, 0), (3, 4), (1, 3)),
        lax.slice(x, (1, 2), (1, 4)),
        lax.slice(x, (0, 1), (3, 2), (2, 2)),
    ),
    "concatenate": lambda x: (
        lax.concatenate([x, x[:, :1], x], 1),
        jnp.concatenate([x, jnp.ones((2, 4)), jnp.zeros((0, 4))]),
    ),
    "stack": lambda x: (lax.stack([x, 2 * x, x], axis=1), lax.stack([jnp.ones((3, 4)), x], axis=2)),
    "unstack": lambda x: (*lax.unstack(x, 1), lax.unstack(x, 0)[1]),
    "split": lambda x: (*lax.split(x, (1, 0, 3), 1), lax.split(x, (1, 2), 0)[1]),
    "tile": lambda x: (jnp.tile(x, (2, 3)), jnp.tile(x, (2, 1, 3))),
    "rev": lambda x: (lax.rev(x, (1,)), lax.rev(x, (0, 1))),
    "sum": lambda x: (x.sum(), x.sum(0), x.sum(1), x[:0].sum(0)),
    "cumsum": lambda x: (lax.cumsum(x, 0), lax.cumsum(x, 1, reverse=True)),
    "copy": lambda x: (jnp.array(x, copy=True), checkpoint_name(x, "name"), lax.stop_gradient(x)),
    "barrier": lambda x: lax.optimization_barrier((x, x[0], np.ones(2))),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    borrowed = check(squared(MOVES[name]), X, ours=OURS)
    assert not borrowed


def test_moves_of_empty_arrays():
    def fun(x):
        return [
            lax.reshape(x, (4, 0)),
            x.T,
            jnp.tile(x, (2, 2)),
            lax.rev(x, (1,)),
            lax.slice(x, (0, 1), (0, 3)),
            lax.pad(x, 0.0, ((1, 1, 1), (0, -1, 0))),
            lax.concatenate([x, x], 0),
            lax.cumsum(x, 1),
        ]

    assert not check(squared(fun), E)


@pytest.mark.parametrize(
    "config", [((1, 2, 1), (0, 1, 0)), ((-1, 0, 0), (-1, 0, 2)), ((0, -3, 2), (2, -2, 1))], ids=str
)
def test_pad(config):
    check(squared(lambda x, value: lax.pad(x, value, config)), X, draw(), ours=OURS)


def test_padding_value_gets_what_is_outside():
    """A cotangent that is infinite inside does not spoil the sum outside."""
    ct = np.array([1.0, np.inf, 2.0])
    _, (_, value) = our_vjp(lambda x, v: (lax.pad(x, v, ((1, 1, 0),)),), [np.ones(1), np.ones(())], [ct], Counter())
    assert float(value) == 3.0


def test_complex_parts():
    check(squared(lambda z: (lax.real(z), lax.imag(z), lax.conj(z))), Z, ours=OURS)
    check(
        squared(lambda x, y: (lax.complex(x, y), lax.conj(x), lax.complex(x, np.ones(())))), draw(3), draw(3), ours=OURS
    )
    check(squared(lax.complex), draw(3, 1), draw(1, 2), ours=OURS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64", "complex128"])
def test_conversions(dtype):
    to = lambda x: lax.convert_element_type(x, dtype)  # noqa: E731
    check(to, draw(3), order=1, ours=OURS)
    back = lax.real if dtype.startswith("complex") else lambda x: x
    check(lambda x: lax.convert_element_type(back(to(x)), "float64") * x, draw(3), ours=OURS)


@pytest.mark.parametrize("start", [1, 4, -8])
def test_dynamic_slices(start):
    """Starts are clamped; those out of range too."""
    check(squared(lambda x, i: lax.dynamic_slice(x, (i, 1), (2, 2))), X, start, ours=OURS)
    check(squared(lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 1))), X, draw(2, 2), start, ours=OURS)
    check(squared(lambda u, i: lax.dynamic_update_slice(jnp.ones((3, 4)), u, (i, 0))), draw(1, 4), start, ours=OURS)
    check(squared(lambda x, i: lax.dynamic_update_slice(x, jnp.ones((1, 4)), (i, 0))), X, start, ours=OURS)


def test_choices():
    x, y, z = draw(3), draw(3), draw(3)
    which = np.array([0, 2, 1], np.int32)
    check(squared(lax.select), which > 0, x, y, ours=OURS)
    check(squared(lambda p, x: lax.select(p, x, np.ones(3))), np.True_, x, ours=OURS)
    check(squared(lax.select_n), which, x, y, z, ours=OURS)
    check(squared(lambda i, x, z: lax.select_n(i, x, np.ones(3), z)), which[1], x, z, ours=OURS)


def test_one_choice():
    _, (back,) = our_vjp(lambda i, x: (lax.select_n(i, x),), [np.zeros(3, bool), draw(3)], [X[0, :3]], Counter())
    np.testing.assert_array_equal(back, X[0, :3])


def test_choice_out_of_range_is_the_nearest():
    which, x = np.array([5, -3], np.int32), np.ones(2)
    _, back = our_vjp(lambda i, *xs: (lax.select_n(i, *xs),), [which, x, x, x], [np.array([1.0, 2.0])], Counter())
    np.testing.assert_array_equal(back, [[0, 2], [0, 0], [1, 0]])


def test_zeros_stay_unknown():
    """What gets no cotangent, and results without tangents, are None and not zeros."""
    graph = trace(jax.make_jaxpr(lambda x, y: (*lax.optimization_barrier((x, y)), y.T, jnp.concatenate([x, y])))(X, X))
    found = interpret(graph, Forward({}, Counter()), Dual(X, X), Dual(X))
    assert [d.tangent is None for d in found] == [False, True, True, False]


def test_one_tangent_of_several_is_padded():
    graph = trace(jax.make_jaxpr(lambda x, y: jnp.concatenate([x, y]))(X, X))

    def forward(x, t, y):
        return interpret(graph, Forward({}, Counter()), Dual(x, t), Dual(y))[0].tangent

    assert [e.primitive.name for e in jax.make_jaxpr(forward)(X, X, X).eqns][-1] == "pad"
