"""Programs after the image examples and convolution test cases of jax2onnx."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from programs_base import Made, from_equinox, from_nnx, listed

SOURCE = "enpasos/jax2onnx jax2onnx/plugins/"


class _AttentiveBlock(nnx.Module):
    """A residual branch whose channels are weighted by their own means."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv0 = nnx.Conv(16, 24, (3, 3), rngs=rngs)
        self.conv1 = nnx.Conv(24, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 8, (1, 1), rngs=rngs)
        self.conv3 = nnx.Conv(8, 16, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.conv1(nnx.silu(self.conv0(x)))
        weights = jnp.mean(features, axis=(1, 2), keepdims=True)
        weights = nnx.sigmoid(self.conv3(nnx.silu(self.conv2(weights))))
        return weights * features + x


@listed(SOURCE + "examples/nnx/channel_attention_resblock.py", "conv", "residual", "squeeze and excite")
def jax2onnx_channel_attention(dtype: Any) -> Made:
    return from_nnx(_AttentiveBlock, lambda draw, batch: (draw.normal(batch, 8, 8, 16),), dtype)


def _conv(into: int, out: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(into, out, (3, 3), rngs=rngs)


class _ResBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs, scale: float = 1.0):
        self.conv0 = _conv(width, width, rngs)
        self.conv1 = _conv(width, width, rngs)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * self.conv1(nnx.silu(self.conv0(x))) + x


class _ResGroup(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.lead = _conv(width, width, rngs)
        self.blocks = nnx.List([_ResBlock(width, rngs) for _ in range(2)])
        self.last = _conv(width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.lead(x)
        for block in self.blocks:
            y = block(y)
        return self.last(y) + x


class _NestedGroups(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = _conv(3, 12, rngs)
        self.groups = nnx.List([_ResGroup(12, rngs) for _ in range(2)])
        self.tail = _conv(12, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for group in self.groups:
            x = group(x)
        return self.tail(x)


@listed(SOURCE + "examples/nnx/nested_residual_group.py", "conv", "residual")
def jax2onnx_nested_residual(dtype: Any) -> Made:
    return from_nnx(_NestedGroups, lambda draw, batch: (draw.normal(batch, 8, 8, 3),), dtype)


class _SuperResolution(nnx.Module):
    """A long skip over residual blocks, then four channels become 2×2 pixels."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv0 = _conv(1, 16, rngs)
        self.blocks = nnx.List([_ResBlock(16, rngs, 0.1) for _ in range(3)])
        self.conv1 = _conv(16, 16, rngs)
        self.conv2 = _conv(16, 4, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        first = x = self.conv0(x)
        for block in self.blocks:
            x = block(x)
        x = self.conv2(self.conv1(x) + first)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, 2 * height, 2 * width, 1)


@listed(SOURCE + "examples/nnx/depth_to_space.py", "conv", "residual", "transpose")
def jax2onnx_depth_to_space(dtype: Any) -> Made:
    return from_nnx(_SuperResolution, lambda draw, batch: (draw.normal(batch, 6, 6, 1),), dtype)


class _Grouped(nnx.Module):
    """A convolution in groups between two ordinary ones."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 16, (1, 1), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(16, 32, (3, 3), feature_group_count=4, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.last = nnx.Conv(32, 16, (1, 1), rngs=rngs)
        self.logits = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.first(x)))
        x = nnx.relu(self.norm2(self.grouped(x)))
        return self.logits(nnx.relu(self.last(x)).mean(axis=(1, 2)))


@listed(SOURCE + "flax/nnx/conv.py (conv_2d_group_conv)", "conv", "grouped", "norm")
def jax2onnx_grouped_conv(dtype: Any) -> Made:
    return from_nnx(_Grouped, lambda draw, batch: (draw.normal(batch, 7, 7, 3),), dtype)


class _GroupedSequence(nnx.Module):
    """Grouped and dilated convolutions in one dimension, reflected or causal at the ends."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(4, 12, (3,), padding="REFLECT", rngs=rngs)
        self.grouped = nnx.Conv(12, 24, (5,), feature_group_count=3, rngs=rngs)
        self.dilated = nnx.Conv(24, 16, (3,), kernel_dilation=(2,), padding="CAUSAL", rngs=rngs)
        self.last = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.grouped(nnx.relu(self.first(x))))
        return self.last(nnx.relu(self.dilated(x)))


@listed(
    SOURCE + "flax/nnx/conv.py (conv_1d_group_conv_more_dims, _dilation, _causal_padding, _reflect_padding)",
    *("conv", "grouped", "dilated", "padding"),
)
def jax2onnx_grouped_sequence(dtype: Any) -> Made:
    return from_nnx(_GroupedSequence, lambda draw, batch: (draw.normal(batch, 12, 4),), dtype)


class _InvertedResidual(nnx.Module):
    """Widen, filter every channel by itself, narrow, add."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = _conv(3, 8, rngs)
        self.widen = nnx.Conv(8, 24, (1, 1), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(24, 24, (3, 3), feature_group_count=24, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(24, use_running_average=True, rngs=rngs)
        self.narrow = nnx.Conv(24, 8, (1, 1), rngs=rngs)
        self.multiplied = nnx.Conv(8, 16, (3, 3), strides=(2, 2), feature_group_count=8, rngs=rngs)
        self.logits = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.stem(x))
        y = nnx.relu6(self.norm1(self.widen(x)))
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        x = nnx.relu6(self.multiplied(x + self.narrow(y)))
        return self.logits(x.mean(axis=(1, 2)))


@listed(SOURCE + "flax/nnx/conv.py (conv_2d_depthwise)", "conv", "depthwise", "residual", "norm")
def jax2onnx_depthwise_conv(dtype: Any) -> Made:
    return from_nnx(_InvertedResidual, lambda draw, batch: (draw.normal(batch, 8, 8, 3),), dtype)


class _TransformerBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.linear1 = nnx.Linear(width, 24, rngs=rngs)
        self.linear2 = nnx.Linear(24, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x)), approximate=False))


class _ConvViT(nnx.Module):
    """Three convolutions, normalized over pixels and channels at once, make the tokens."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(into, out, (3, 3), (stride, stride), rngs=rngs)
                for into, out, stride in ((1, 8, 1), (8, 12, 2), (12, 16, 2))
            ]
        )
        axes = (1, 2, 3)
        self.norm = nnx.LayerNorm(3 * 3 * 16, reduction_axes=axes, feature_axes=axes, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, 16)))
        self.position_embedding = nnx.Param(jnp.zeros((1, 10, 16)))
        self.blocks = nnx.List([_TransformerBlock(16, rngs) for _ in range(2)])
        self.last_norm = nnx.LayerNorm(16, rngs=rngs)
        self.logits = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = nnx.gelu(conv(x), approximate=False)
        x = self.norm(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height * width, channels)
        x = jnp.concatenate([jnp.tile(self.class_token[...], (batch, 1, 1)), x], axis=1)
        x = x + self.position_embedding[...]
        for block in self.blocks:
            x = block(x)
        return nnx.log_softmax(self.logits(self.last_norm(x[:, 0])))


@listed(SOURCE + "examples/nnx/vit.py", "conv", "attention", "residual", "norm", "concat")
def jax2onnx_conv_vit(dtype: Any) -> Made:
    return from_nnx(_ConvViT, lambda draw, batch: (draw.normal(batch, 12, 12, 1),), dtype)


def _rotated(x: jax.Array, prefix: int) -> jax.Array:
    """Rotary positions on a square grid for all but the first tokens; x is (tokens, heads, head width)."""
    tokens, _, width = x.shape
    side = int((tokens - prefix) ** 0.5)
    grid = 2 * (np.arange(side) + 0.5) / side - 1
    coordinates = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    periods = 100.0 ** (2 * np.arange(width // 4) / (width // 2))
    angles = (2 * np.pi * coordinates[:, :, None] / periods).reshape(side * side, width // 2)
    angles = np.tile(angles, (1, 2))[:, None]
    head, tail = jnp.split(x, [prefix], axis=0)
    first, second = jnp.split(tail, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    tail = tail * jnp.asarray(np.cos(angles), x.dtype) + turned * jnp.asarray(np.sin(angles), x.dtype)
    return jnp.concatenate([head, tail], axis=0)


class _DinoBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    scale1: jax.Array
    norm2: eqx.nn.LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    scale2: jax.Array

    def __init__(self, width: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.norm1 = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0], **bias)
        self.scale1 = jnp.ones(width)
        self.norm2 = eqx.nn.LayerNorm(width)
        self.linear1 = eqx.nn.Linear(width, 2 * width, key=keys[1])
        self.linear2 = eqx.nn.Linear(2 * width, width, key=keys[2])
        self.scale2 = jnp.ones(width)

    def __call__(self, x: jax.Array, prefix: int) -> jax.Array:
        def heads(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
            return _rotated(query, prefix), _rotated(key, prefix), value

        y = jax.vmap(self.norm1)(x)
        x = x + self.scale1 * self.attention(y, y, y, process_heads=heads)
        y = jax.nn.gelu(jax.vmap(self.linear1)(jax.vmap(self.norm2)(x)), approximate=False)
        return x + self.scale2 * jax.vmap(self.linear2)(y)


class _Dino(eqx.Module):
    """Class token, storage tokens, patches; the storage tokens are dropped at the end."""

    patches: eqx.nn.Conv2d
    class_token: jax.Array
    storage_tokens: jax.Array
    blocks: list[_DinoBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.patches = eqx.nn.Conv2d(3, 16, 4, stride=4, key=keys[0])
        self.class_token = jnp.zeros((1, 16))
        self.storage_tokens = jnp.zeros((2, 16))
        self.blocks = [_DinoBlock(16, 2, k) for k in keys[1:3]]
        self.norm = eqx.nn.LayerNorm(16)
        self.head = eqx.nn.Linear(16, 10, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = jnp.concatenate([self.class_token, self.storage_tokens, x.reshape(x.shape[0], -1).T])
        for block in self.blocks:
            x = block(x, 3)
        x = jax.vmap(self.norm)(x)
        x = jnp.concatenate([x[:1], x[3:]])
        return jax.vmap(self.head)(x)


@listed(
    SOURCE + "examples/eqx/dino.py",
    *("conv", "attention", "rotary", "layer scale", "residual", "norm", "concat", "vmap"),
)
def jax2onnx_dino(dtype: Any) -> Made:
    return from_equinox(_Dino, lambda draw, batch: (draw.normal(batch, 3, 12, 12),), dtype)


PROGRAMS = (
    jax2onnx_channel_attention,
    jax2onnx_nested_residual,
    jax2onnx_depth_to_space,
    jax2onnx_grouped_conv,
    jax2onnx_grouped_sequence,
    jax2onnx_depthwise_conv,
    jax2onnx_conv_vit,
    jax2onnx_dino,
)
