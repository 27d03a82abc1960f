"""What shrinking does to attention, movement and control flow small enough to tell by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shrinking import check, columns, error, normal, random_tree, without

pytestmark = pytest.mark.usefixtures("double")

rng = np.random.default_rng(0)


# -- attention and movement -------------------------------------------------------------------------------------------


def attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) + p[n + "_bias"] for n in ("q", "k", "v"))
    scores = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshe,hed->btd", weights, v, p["out"])


ATTENTION = {
    **dict.fromkeys(("q", "k", "v"), (6, 3, 4)),
    **{n + "_bias": (3, 4) for n in ("q", "k", "v")},
    "out": (3, 4, 6),
}


def test_heads() -> None:
    masks = {
        **{n: columns((6, 3, 4), 1, axis=1) for n in ("q", "k", "v")},
        **{n + "_bias": columns((3, 4), 1, axis=0) for n in ("q", "k", "v")},
        "out": None,
    }
    small = {
        **dict.fromkeys(("q", "k", "v"), (6, 2, 4)),
        **{n + "_bias": (2, 4) for n in ("q", "k", "v")},
        "out": (2, 4, 6),
    }
    check(attention, random_tree(**ATTENTION), masks, normal(2, 5, 6), shapes=small)


def test_places_within_heads() -> None:
    masks = {
        "q": columns((6, 3, 4), 0, 3),
        "q_bias": columns((3, 4), 0, 3),
        "k": columns((6, 3, 4), 0, 3),
        "k_bias": columns((3, 4), 0, 3),
        "v": columns((6, 3, 4), 1),
        "v_bias": columns((3, 4), 1),
        "out": None,
    }
    small = {
        "q": (6, 3, 2),
        "q_bias": (3, 2),
        "k": (6, 3, 2),
        "k_bias": (3, 2),
        "v": (6, 3, 3),
        "v_bias": (3, 3),
        "out": (3, 3, 6),
    }
    check(attention, random_tree(**ATTENTION), masks, normal(2, 5, 6), shapes=small)


def test_movement_keeps_track() -> None:
    def fun(p: Any, x: Any) -> Any:
        h, g = x @ p["a"], x @ p["b"]
        h = jnp.concatenate([h, g[:, ::-1], jnp.pad(h, ((0, 0), (1, 2)))], axis=1)
        h = h.reshape(x.shape[0], 15, 1).transpose(2, 1, 0)[0].T
        left, right = jnp.split(h, [6], axis=1)
        return jnp.cumsum(left[:, ::2], axis=0) @ p["out"], jnp.max(right, axis=0), left.argmax(1)

    masks = {"a": columns((3, 4), 1, 2), "b": columns((3, 4), 0), "out": None}
    small, _ = check(fun, random_tree(a=(3, 4), b=(3, 4), out=(3, 2)), masks, normal(5, 3))
    assert small.report.leaves[0].small == (3, 2)


def test_embeddings_lose_features() -> None:
    def fun(p: Any, tokens: Any) -> Any:
        return jnp.tanh(p["table"][tokens] + p["place"][: tokens.shape[1]]) @ p["out"]

    masks = {"table": columns((9, 6), 1, 4), "place": columns((7, 6), 1, 4), "out": None}
    small = {"table": (9, 4), "place": (7, 4), "out": (4, 2)}
    tokens = jnp.asarray(rng.integers(0, 9, (3, 5)))
    fitted, small_params = check(fun, random_tree(table=(9, 6), place=(7, 6), out=(6, 2)), masks, tokens, shapes=small)
    # Rows of the table of places that the example did not reach are still there.
    longer = jnp.asarray(rng.integers(0, 9, (2, 7)))
    params = random_tree(table=(9, 6), place=(7, 6), out=(6, 2))
    assert error(fun, params, masks, fitted, small_params, longer) < 1e-12


# -- control flow -----------------------------------------------------------------------------------------------------


def recurrent(p: Any, x: Any) -> Any:
    def step(state: Any, now: Any) -> Any:
        h, count = state
        h = jnp.tanh(now @ p["w"] + h @ p["u"] + p["b"])
        return (h, count + 1), h

    start = (jnp.zeros((x.shape[1], 6)), 0)
    (h, count), hs = lax.scan(step, start, x)
    return (h + hs.mean(0)) @ p["out"] + count


def test_carries_that_start_known() -> None:
    masks = {
        "w": columns((3, 6), 0, 4),
        "u": columns((6, 6), 0, 4),
        "b": without(6, 0, 4),
        "out": None,
    }
    small = {"w": (3, 4), "u": (4, 4), "b": (4,), "out": (4, 2)}
    check(recurrent, random_tree(w=(3, 6), u=(6, 6), b=(6,), out=(6, 2)), masks, normal(5, 2, 3), shapes=small)


def test_carries_that_do_not_stay_what_they_were() -> None:
    # With the bias left, the first state differs from the later ones.
    masks = {"w": columns((3, 6), 0, 4), "u": columns((6, 6), 0, 4), "b": None, "out": None}
    check(recurrent, random_tree(w=(3, 6), u=(6, 6), b=(6,), out=(6, 2)), masks, normal(5, 2, 3))


def test_while_and_cond() -> None:
    def fun(p: Any, x: Any) -> Any:
        h = x @ p["a"]
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["u"]), h)
        h = lax.cond(x.sum() > 0, lambda h: h * 2, lambda h: jnp.sin(h), h)
        h = lax.while_loop(lambda s: (s**2).sum() > 1, lambda s: s / 2, h)
        return h @ p["out"]

    masks = {"a": columns((3, 5), 2, 3), "u": columns((5, 5), 2, 3), "out": None}
    small = {"a": (3, 3), "u": (3, 3), "out": (3, 2)}
    check(fun, random_tree(a=(3, 5), u=(5, 5), out=(5, 2)), masks, normal(4, 3), shapes=small)
