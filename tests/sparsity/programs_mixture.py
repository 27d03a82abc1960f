"""Programs with experts, dense and parallel connections, shuffled channels and state-space layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from programs_base import OWN, Made, linen, listed, plain


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.BatchNorm(use_running_average=True)(x))


class _InceptionBlock(nn.Module):
    """1×1, 3×3, 5×5 and pooling side by side, joined along the channels."""

    reduced: tuple[int, int]
    out: tuple[int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _Norm()(nn.Conv(self.out[0], (1, 1), use_bias=False)(x))
        branches = [one]
        for size, reduced, out in zip((3, 5), self.reduced, self.out[1:]):
            y = _Norm()(nn.Conv(reduced, (1, 1), use_bias=False)(x))
            branches.append(_Norm()(nn.Conv(out, (size, size), use_bias=False)(y)))
        y = nn.max_pool(x, (3, 3), (1, 1), padding="SAME")
        branches.append(_Norm()(nn.Conv(self.out[3], (1, 1), use_bias=False)(y)))
        return jnp.concatenate(branches, axis=-1)


class _GoogleNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _Norm()(nn.Conv(12, (3, 3), use_bias=False)(x))
        x = _InceptionBlock((8, 4), (6, 10, 4, 4))(x)
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = _InceptionBlock((8, 6), (8, 12, 6, 6))(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@listed(
    "phlippe/uvadlc_notebooks docs/tutorial_notebooks/JAX/tutorial5/Inception_ResNet_DenseNet.ipynb",
    "conv",
    "concat",
    "norm",
)
def uvadlc_inception(dtype: Any) -> Made:
    return linen(_GoogleNet(), lambda draw, batch: (draw.normal(batch, 8, 8, 3),), dtype)


class _DenseLayer(nn.Module):
    """Its output is appended to its input."""

    growth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(2 * self.growth, (1, 1), use_bias=False)(_Norm()(x))
        y = nn.Conv(self.growth, (3, 3), use_bias=False)(_Norm()(y))
        return jnp.concatenate([y, x], axis=-1)


class _DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(12, (3, 3))(x)
        for block in range(2):
            for _ in range(3):
                x = _DenseLayer(6)(x)
            if block == 0:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(_Norm()(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(_Norm()(x).mean(axis=(1, 2)))


@listed(
    "phlippe/uvadlc_notebooks docs/tutorial_notebooks/JAX/tutorial5/Inception_ResNet_DenseNet.ipynb",
    "conv",
    "concat",
    "norm",
)
def uvadlc_densenet(dtype: Any) -> Made:
    return linen(_DenseNet(), lambda draw, batch: (draw.normal(batch, 8, 8, 3),), dtype)


def _rms(scale: jax.Array, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * scale


def _interleaved_swiglu(x: jax.Array, limit: float = 7.0) -> jax.Array:
    """Gates and values alternate along the last axis."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    gate, value = jnp.minimum(pairs[..., 0], limit), jnp.clip(pairs[..., 1], -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (value + 1)


@listed(
    "enpasos/jax2onnx jax2onnx/plugins/examples/eqx/gpt_oss.py",
    *("attention", "grouped queries", "experts", "top-k", "gated", "residual", "norm", "embedding", "gather"),
)
def jax2onnx_gpt_oss(dtype: Any) -> Made:
    """Attention with a sink per head, and two experts of four for every token, their weights gathered."""
    width, heads, kv_heads, head_width, hidden, experts, vocabulary, length = 16, 4, 2, 4, 12, 4, 20, 6
    block = {
        "norm1_scale": (width,),
        "qkv": (width, (heads + 2 * kv_heads) * head_width),
        "qkv_bias": ((heads + 2 * kv_heads) * head_width,),
        "sinks": (heads,),
        "out": (heads * head_width, width),
        "norm2_scale": (width,),
        "router": (width, experts),
        "mlp1": (experts, 2 * hidden, width),
        "mlp1_bias": (experts, 2 * hidden),
        "mlp2": (experts, width, hidden),
        "mlp2_bias": (experts, width),
    }
    shapes = {
        "embedding": (vocabulary, width),
        "blocks": [block, block],
        "norm_scale": (width,),
        "logits": (width, vocabulary),
    }
    causal = np.tril(np.ones((length, length), bool))

    def attention(p: Any, x: jax.Array, mask: np.ndarray) -> jax.Array:
        batch = x.shape[0]
        split = heads * head_width, (heads + kv_heads) * head_width
        query, key, value = jnp.split(x @ p["qkv"] + p["qkv_bias"], split, axis=-1)
        query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_width)
        key, value = (y.reshape(batch, length, kv_heads, 1, head_width) for y in (key, value))
        key, value = (jnp.broadcast_to(y, query.shape) for y in (key, value))
        logits = jnp.einsum("bqhmd,bkhmd->bhmqk", query, key) / np.sqrt(head_width)
        logits = jnp.where(mask, logits, -jnp.inf)
        sinks = p["sinks"].reshape(kv_heads, -1, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., :-1]
        y = jnp.einsum("bhmqk,bkhmd->bqhmd", weights, value)
        return y.reshape(batch, length, heads * head_width) @ p["out"]

    def mixture(p: Any, x: jax.Array) -> jax.Array:
        scores, chosen = jax.lax.top_k(x @ p["router"], 2)
        y = jnp.einsum("bskoh,bsh->bsko", jnp.take(p["mlp1"], chosen, axis=0), x)
        y = _interleaved_swiglu(y + jnp.take(p["mlp1_bias"], chosen, axis=0))
        y = jnp.einsum("bskhi,bski->bskh", jnp.take(p["mlp2"], chosen, axis=0), y)
        y = y + jnp.take(p["mlp2_bias"], chosen, axis=0)
        return jnp.einsum("bskh,bsk->bsh", y, jax.nn.softmax(scores, axis=-1))

    def fun(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens]
        for i, p in enumerate(params["blocks"]):
            mask = causal & ~np.tril(causal, -3) if i % 2 == 0 else causal
            x = x + attention(p, _rms(p["norm1_scale"], x), mask)
            x = x + mixture(p, _rms(p["norm2_scale"], x))
        return _rms(params["norm_scale"], x) @ params["logits"]

    return plain(fun, shapes, lambda draw, batch: (draw.integers(0, vocabulary, batch, length),), dtype)


@listed(OWN, "conv", "grouped", "depthwise", "shuffle", "residual", "split", "concat")
def own_shuffle(dtype: Any) -> Made:
    """Grouped 1×1 convolutions with channels shuffled in between; then halves, one passed by, one filtered."""
    dims = ("NHWC", "HWIO", "NHWC")

    def conv(kernel: jax.Array, x: jax.Array, groups: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    def shuffled(x: jax.Array, groups: int) -> jax.Array:
        *shape, channels = x.shape
        return x.reshape(*shape, groups, channels // groups).swapaxes(-1, -2).reshape(*shape, channels)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(params["stem"], x))
        y = shuffled(jax.nn.relu(conv(params["squeeze"], x, 4)), 4)
        y = conv(params["expand"], conv(params["depthwise"], y, 24), 4)
        x = jax.nn.relu(x + y)
        left, right = jnp.split(x, 2, axis=-1)
        right = jax.nn.relu(conv(params["right"], right))
        x = shuffled(jnp.concatenate([left, right], axis=-1), 2)
        return x.mean(axis=(1, 2)) @ params["logits"]

    shapes = {
        "stem": (3, 3, 3, 16),
        "squeeze": (1, 1, 4, 24),
        "depthwise": (3, 3, 1, 24),
        "expand": (1, 1, 6, 16),
        "right": (3, 3, 8, 8),
        "logits": (16, 10),
    }
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 7, 7, 3),), dtype)


@listed(OWN, "dense", "switch", "vmap", "experts")
def own_switch(dtype: Any) -> Made:
    """Every example names the one of three two-layer networks that handles it."""

    def one(params: Any, x: jax.Array, choice: jax.Array) -> jax.Array:
        def expert(p: Any, h: jax.Array) -> jax.Array:
            return jnp.tanh(h @ p["w1"]) @ p["w2"]

        hidden = jax.nn.relu(x @ params["into"])
        branches = [lambda h, p=p: expert(p, h) for p in params["experts"]]
        return (hidden + jax.lax.switch(choice, branches, hidden)) @ params["out"]

    shapes = {"into": (6, 16), "experts": [{"w1": (16, 24), "w2": (24, 16)}] * 3, "out": (16, 4)}
    fun = jax.vmap(one, (None, 0, 0))
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 6), draw.integers(0, 3, batch)), dtype)


@listed(OWN, "conv", "depthwise", "scan", "gated", "norm", "residual", "softplus")
def own_state_space(dtype: Any) -> Made:
    """A selective state-space block: causal depthwise convolution, input-dependent recurrence, gate."""
    width, inner, state = 12, 20, 4

    def fun(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["embed"]
        y, gate = jnp.split(_rms(params["norm_scale"], x) @ params["into"], 2, axis=-1)
        dims = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            y, params["conv"], (1,), [(2, 0)], dimension_numbers=dims, feature_group_count=inner
        )
        y = jax.nn.silu(y + params["conv_bias"])
        step = jax.nn.softplus(y @ params["step"] + params["step_bias"])
        write, read = jnp.split(y @ params["select"], 2, axis=-1)
        decay = jnp.exp(-step[..., None] * jnp.exp(params["decay"]))
        drive = (step * y)[..., None] * write[..., None, :]

        def advance(h: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            decay, drive, read = inputs
            h = decay * h + drive
            return h, jnp.einsum("bcn,bn->bc", h, read)

        start = jnp.zeros(decay.shape[:1] + decay.shape[2:], x.dtype)
        _, z = jax.lax.scan(advance, start, tuple(v.swapaxes(0, 1) for v in (decay, drive, read)))
        z = (z.swapaxes(0, 1) + params["skip"] * y) * jax.nn.silu(gate)
        return (x + z @ params["out"]) @ params["logits"]

    shapes = {
        "embed": (5, width),
        "norm_scale": (width,),
        "into": (width, 2 * inner),
        "conv": (3, 1, inner),
        "conv_bias": (inner,),
        "step": (inner, inner),
        "step_bias": (inner,),
        "select": (inner, 2 * state),
        "decay": (inner, state),
        "skip": (inner,),
        "out": (inner, width),
        "logits": (width, 3),
    }
    return plain(fun, shapes, lambda draw, batch: (draw.normal(batch, 7, 5),), dtype)


PROGRAMS = (uvadlc_inception, uvadlc_densenet, jax2onnx_gpt_oss, own_shuffle, own_switch, own_state_space)
