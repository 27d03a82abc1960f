"""Networks of sequences and graphs that `shrink` had not seen when it was finished; listed before it saw them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from programs_base import Made, listed, plain


def _rms(scale: jax.Array, x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of [batch, time, heads, features]: pairs of features half a head apart."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 100.0 ** (np.arange(half) / half)
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None, :] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@listed("meta-llama/llama llama/model.py", "attention", "grouped queries", "embedding", "norm", "gated", "residual")
def llama(dtype: Any) -> Made:
    """Rotary positions, keys and values shared by groups of queries, SwiGLU."""
    width, heads, shared, size, hidden, words = 16, 4, 2, 4, 24, 11
    block = {
        "norm_1_scale": (width,),
        "q": (width, heads * size),
        "k": (width, shared * size),
        "v": (width, shared * size),
        "o": (heads * size, width),
        "norm_2_scale": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }

    def fun(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        batch, time = tokens.shape
        mask = jnp.tril(jnp.ones((time, time), bool))
        for p in params["blocks"]:
            h = _rms(p["norm_1_scale"], x)
            q = _rotated((h @ p["q"]).reshape(batch, time, heads, size))
            k = _rotated((h @ p["k"]).reshape(batch, time, shared, size))
            v = (h @ p["v"]).reshape(batch, time, shared, size)
            k, v = (jnp.repeat(y, heads // shared, axis=2) for y in (k, v))
            scores = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(size)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
            x = x + jnp.einsum("bhts,bshe->bthe", weights, v).reshape(batch, time, -1) @ p["o"]
            h = _rms(p["norm_2_scale"], x)
            x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return _rms(params["norm_scale"], x) @ params["logits"]

    shapes = {"embed": (words, width), "blocks": [block] * 2, "norm_scale": (width,), "logits": (width, words)}
    return plain(fun, shapes, lambda draw, batch: (draw.integers(0, words, batch, 6),), dtype)


@listed("state-spaces/mamba mamba_ssm/modules/mamba_simple.py", "conv", "depthwise", "gated", "scan", "residual")
def mamba(dtype: Any) -> Made:
    """A selective state space whose recurrence is an associative scan; low-rank step sizes."""
    width, inner, state, rank = 10, 16, 4, 3

    def fun(params: Any, x: jax.Array) -> jax.Array:
        for p in params["blocks"]:
            h, gate = jnp.split(_rms(p["norm_scale"], x) @ p["into"], 2, -1)
            padded = jnp.pad(h, ((0, 0), (3, 0), (0, 0)))
            h = sum(padded[:, i : i + x.shape[1]] * p["conv"][i] for i in range(4)) + p["conv_bias"]
            h = jax.nn.silu(h)
            low, write, read = jnp.split(h @ p["select"], [rank, rank + state], -1)
            step = jax.nn.softplus(low @ p["step"] + p["step_bias"])
            decay = jnp.exp(-step[..., None] * jnp.exp(p["decay"]))
            drive = (step * h)[..., None] * write[:, :, None, :]

            def join(a: Any, b: Any) -> Any:
                return a[0] * b[0], b[0] * a[1] + b[1]

            _, states = lax.associative_scan(join, (decay, drive), axis=1)
            y = jnp.einsum("btcn,btn->btc", states, read) + p["skip"] * h
            x = x + (y * jax.nn.silu(gate)) @ p["out"]
        return x @ params["head"]

    block = {
        "norm_scale": (width,),
        "into": (width, 2 * inner),
        "conv": (4, inner),
        "conv_bias": (inner,),
        "select": (inner, rank + 2 * state),
        "step": (rank, inner),
        "step_bias": (inner,),
        "decay": (inner, state),
        "skip": (inner,),
        "out": (inner, width),
    }
    shapes = {"blocks": [block] * 2, "head": (width, 3)}
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 7, width),), dtype)


@listed("r9y9/wavenet_vocoder wavenet_vocoder/wavenet.py", "conv", "gated", "residual", "split")
def wavenet(dtype: Any) -> Made:
    """Dilated causal convolutions, gates, sums of what every layer puts aside."""
    width, gated, skip = 10, 12, 14

    def conv(x: jax.Array, w: jax.Array, dilation: int = 1) -> jax.Array:
        past = (w.shape[0] - 1) * dilation
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, w, (1,), [(past, 0)], rhs_dilation=(dilation,), dimension_numbers=dims)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        x, total = conv(x, params["first"]), 0.0
        for i, p in enumerate(params["layers"]):
            a, b = jnp.split(conv(x, p["w"], 2**i) + p["bias"], 2, -1)
            h = jnp.tanh(a) * jax.nn.sigmoid(b)
            total = total + conv(h, p["skip"])
            x = (x + conv(h, p["residual"])) * np.sqrt(0.5)
        return conv(jax.nn.relu(conv(jax.nn.relu(total), params["post"])), params["last"])

    layer = {"w": (2, width, 2 * gated), "bias": (2 * gated,), "skip": (1, gated, skip), "residual": (1, gated, width)}
    shapes = {"first": (1, 3, width), "layers": [layer] * 3, "post": (1, skip, skip), "last": (1, skip, 5)}
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 12, 3),), dtype)


@listed("google-deepmind/jraph jraph/_src/models.py", "graph", "scatter", "gather", "dense", "residual", "vmap")
def message_passing(dtype: Any) -> Made:
    """Messages along edges from both ends, summed at their targets; one graph an example."""
    nodes, edges, width, hidden = 5, 8, 12, 16

    def one(params: Any, x: jax.Array, senders: jax.Array, receivers: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ params["embed"])
        for p in params["rounds"]:
            ends = jnp.concatenate([h[senders], h[receivers]], -1)
            messages = jax.nn.relu(ends @ p["message"] + p["message_bias"])
            gathered = jax.ops.segment_sum(messages, receivers, nodes)
            h = h + jnp.tanh(jnp.concatenate([h, gathered], -1) @ p["update"] + p["update_bias"])
        return h.mean(0) @ params["out"]

    step = {
        "message": (2 * width, hidden),
        "message_bias": (hidden,),
        "update": (width + hidden, width),
        "update_bias": (width,),
    }
    shapes = {"embed": (6, width), "rounds": [step] * 2, "out": (width, 3)}
    return plain(
        jax.vmap(one, (None, 0, 0, 0)),
        shapes,
        lambda draw, batch: (
            draw.normal(batch, nodes, 6),
            draw.integers(0, nodes, batch, edges),
            draw.integers(0, nodes, batch, edges),
        ),
        dtype,
    )


@listed("BlinkDL/RWKV-LM RWKV-v4/src/model.py", "recurrent", "scan", "gated", "residual", "norm")
def rwkv(dtype: Any) -> Made:
    """Mixing with the step before, a running weighted mean kept stable by a running maximum, squared ReLU."""
    width, hidden = 12, 20

    def mixed(x: jax.Array, mix: jax.Array) -> jax.Array:
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return x * mix + before * (1 - mix)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        h = _rms(params["norm_1_scale"], x)
        k, v, r = (mixed(h, params[f"mix_{n}_scale"]) @ params[n] for n in ("key", "value", "receive"))
        decay, bonus = -jnp.exp(params["decay_bias"]), params["bonus_bias"]

        def step(carry: Any, now: Any) -> Any:
            a, b, top = carry
            k, v = now
            most = jnp.maximum(top, bonus + k)
            e1, e2 = jnp.exp(top - most), jnp.exp(bonus + k - most)
            out = (e1 * a + e2 * v) / (e1 * b + e2)
            most = jnp.maximum(top + decay, k)
            e1, e2 = jnp.exp(top + decay - most), jnp.exp(k - most)
            return (e1 * a + e2 * v, e1 * b + e2, most), out

        zeros = jnp.zeros((x.shape[0], width), x.dtype)
        _, y = lax.scan(step, (zeros, zeros, zeros - 1e30), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
        x = x + (jax.nn.sigmoid(r) * y.swapaxes(0, 1)) @ params["output"]
        h = mixed(_rms(params["norm_2_scale"], x), params["mix_ffn_scale"])
        return x + jnp.square(jax.nn.relu(h @ params["up"])) @ params["down"]

    names = ("key", "value", "receive", "output")
    vectors = ("norm_1_scale", "norm_2_scale", "mix_key_scale", "mix_value_scale", "mix_receive_scale")
    shapes = {
        **dict.fromkeys(names, (width, width)),
        **dict.fromkeys((*vectors, "mix_ffn_scale", "decay_bias", "bonus_bias"), (width,)),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 6, width),), dtype)


PROGRAMS = (llama, mamba, wavenet, message_passing, rwkv)
