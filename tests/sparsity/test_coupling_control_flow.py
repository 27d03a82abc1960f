"""Which axes move together through loops, branches, mapped and rematerialised functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from test_coupling import array, shaped, tied

from jaxinfer import autoinfer


def test_lstm_with_its_gates_in_one_kernel() -> None:
    def fun(p: Any, x: Any) -> Any:
        def step(carry: Any, row: Any) -> Any:
            h, c = carry
            i, f, g, o = jnp.split(row @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x.shape[1], 5))
        (h, _), rows = lax.scan(step, (zero, zero), x)
        return h @ p["last"], rows @ p["every"]

    params = shaped(wx=(3, 20), wh=(5, 20), b=(20,), last=(5, 2), every=(5, 4))
    found = tied(fun, params, array(6, 7, 3))
    assert found == {"5 channel: b.0*4 every.0 last.0 wh.0 wh.1*4 wx.1*4", "3 input: wx.0"}


def test_gru_with_gates_apart_and_a_given_state() -> None:
    def fun(p: Any, x: Any, h: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            z = jax.nn.sigmoid(row @ p["xz"] + h @ p["hz"])
            r = jax.nn.sigmoid(row @ p["xr"] + h @ p["hr"])
            n = jnp.tanh(row @ p["xn"] + r * (h @ p["hn"]))
            return (1 - z) * n + z * h, None

        return lax.scan(step, h, x)[0] @ p["out"]

    names = ("xz", "xr", "xn")
    params = shaped(**dict.fromkeys(names, (3, 5)), **{n.replace("x", "h"): (5, 5) for n in names}, out=(5, 2))
    found = tied(fun, params, array(6, 7, 3), array(7, 5))
    assert found == {"5 channel: hn.0 hn.1 hr.0 hr.1 hz.0 hz.1 out.0 xn.1 xr.1 xz.1", "3 input: xn.0 xr.0 xz.0"}


def test_layers_stacked_for_a_scan_lose_the_same_channels() -> None:
    def fun(p: Any, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return h + jnp.tanh(h @ w["a"]) @ w["b"], None

        return lax.scan(layer, x @ p["stem"], {"a": p["a"], "b": p["b"]})[0] @ p["out"]

    params = shaped(stem=(3, 4), a=(9, 4, 6), b=(9, 6, 4), out=(4, 2))
    groups = autoinfer.channel_groups(fun, params, array(7, 3))
    assert tied(fun, params, array(7, 3)) == {
        "4 channel: a.1 b.2 out.0 stem.1",
        "6 channel: a.2 b.1",
        "3 input: stem.0",
    }
    assert groups.locked[("a", 0)] == "the axis that a loop runs over"


def test_mapped_models_lose_members_or_channels() -> None:
    def fun(p: Any, x: Any) -> Any:
        return jax.vmap(lambda a, b: jnp.tanh(x @ a) @ b)(p["a"], p["b"]).sum(0)

    found = tied(fun, shaped(a=(5, 3, 4), b=(5, 4, 2)), array(7, 3))
    assert found == {"5 channel: a.0 b.0", "4 channel: a.2 b.1", "3 input: a.1"}


def test_branches_that_meet_are_tied() -> None:
    def fun(p: Any, x: Any, flag: Any) -> Any:
        h = lax.cond(flag, lambda: x @ p["a"], lambda: jnp.tanh(x @ p["b"]))
        return h @ p["c"]

    found = tied(fun, shaped(a=(3, 4), b=(3, 4), c=(4, 2)), array(7, 3), array(dtype=bool))
    assert "4 channel: a.1 b.1 c.0" in found


def test_a_loop_until_a_norm_is_small() -> None:
    def fun(p: Any, x: Any) -> Any:
        def goes_on(h: Any) -> Any:
            return (h * h).sum() > 1.0

        return lax.while_loop(goes_on, lambda h: 0.5 * jnp.tanh(h @ p["w"]), x @ p["stem"]) @ p["out"]

    found = tied(fun, shaped(stem=(3, 4), w=(4, 4), out=(4, 2)), array(7, 3))
    assert found == {"4 channel: out.0 stem.1 w.0 w.1", "3 input: stem.0"}


def test_rematerialised_and_custom_functions_are_looked_into() -> None:
    @jax.custom_vjp
    def double(h: Any) -> Any:
        return 2 * h

    double.defvjp(lambda h: (2 * h, None), lambda _, g: (2 * g,))

    @jax.checkpoint
    def layer(h: Any, w: Any) -> Any:
        return jax.nn.silu(double(h @ w))

    found = tied(lambda p, x: layer(x, p["a"]) @ p["b"], shaped(a=(3, 4), b=(4, 2)), array(7, 3))
    assert found == {"4 channel: a.1 b.0", "3 input: a.0"}


def test_a_loop_with_a_cache_written_step_by_step() -> None:
    def fun(p: Any, x: Any) -> Any:
        def step(i: Any, cache: Any) -> Any:
            row = lax.dynamic_slice_in_dim(x, i, 1, 1) @ p["k"]
            return lax.dynamic_update_slice_in_dim(cache, row, i, 1)

        cache = lax.fori_loop(0, x.shape[1], step, jnp.zeros((x.shape[0], x.shape[1], 4)))
        return jnp.einsum("btd,d->bt", cache, p["q"])

    found = tied(fun, shaped(k=(3, 4), q=(4,)), array(7, 6, 3))
    assert found == {"4 channel: k.1 q.0", "3 input: k.0"}


def test_nodes_of_a_graph_keep_their_features() -> None:
    def fun(p: Any, nodes: Any, sender: Any, receiver: Any) -> Any:
        h = nodes @ p["embed"]
        message = jnp.concatenate([h[sender], h[receiver]], -1) @ p["edge"]
        h = h + jax.ops.segment_sum(message, receiver, h.shape[0])
        return h @ p["out"]

    edges = array(12, dtype=np.int32)
    found = tied(fun, shaped(embed=(3, 4), edge=(8, 4), out=(4, 2)), array(6, 3), edges, edges)
    assert found == {"4 channel: edge.0*2 edge.1 embed.1 out.0", "3 input: embed.0"}
