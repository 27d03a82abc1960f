"""Programs after the sequence and differential-equation examples of Equinox, and its U-Net."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from programs_base import Draw, Made, from_equinox, listed

VOCABULARY = 18


class _GRU(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(2, 16, key=keys[0])
        self.linear = eqx.nn.Linear(16, 1, use_bias=False, key=keys[1])
        self.bias = jnp.zeros(1)

    def __call__(self, x: jax.Array) -> jax.Array:
        state = jnp.zeros(16, x.dtype)
        state, _ = jax.lax.scan(lambda state, step: (self.cell(step, state), None), state, x)
        return jax.nn.sigmoid(self.linear(state) + self.bias)


@listed("patrick-kidger/equinox docs/examples/train_rnn.ipynb", "recurrent", "scan", "vmap")
def equinox_gru(dtype: Any) -> Made:
    return from_equinox(_GRU, lambda draw, batch: (draw.normal(batch, 9, 2),), dtype)


class _BertLayer(eqx.Module):
    """Attention and MLP, each added and then normalized."""

    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm

    def __init__(self, width: int, hidden: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        bias = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0], **bias)
        self.norm1 = eqx.nn.LayerNorm(width)
        self.linear1 = eqx.nn.Linear(width, hidden, key=keys[1])
        self.linear2 = eqx.nn.Linear(hidden, width, key=keys[2])
        self.norm2 = eqx.nn.LayerNorm(width)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = jax.vmap(self.norm1)(x + self.attention(x, x, x, mask=mask))
        return jax.vmap(lambda one: self.norm2(one + self.linear2(jax.nn.gelu(self.linear1(one)))))(x)


class _Bert(eqx.Module):
    token: eqx.nn.Embedding
    segment: eqx.nn.Embedding
    position: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    layers: list[_BertLayer]
    pooler: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 7)
        self.token, self.segment, self.position = (
            eqx.nn.Embedding(size, 16, key=k) for size, k in zip((VOCABULARY, 2, 10), keys)
        )
        self.norm = eqx.nn.LayerNorm(16)
        self.layers = [_BertLayer(16, 24, 2, k) for k in keys[3:5]]
        self.pooler = eqx.nn.Linear(16, 16, key=keys[5])
        self.head = eqx.nn.Linear(16, 2, key=keys[6])

    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0])
        x = jax.vmap(self.token)(tokens) + jax.vmap(self.segment)(segments) + jax.vmap(self.position)(positions)
        x = jax.vmap(self.norm)(x)
        mask = (tokens != 0)[:, None] & (tokens != 0)
        for layer in self.layers:
            x = layer(x, jnp.repeat(mask[None], 2, axis=0))
        return self.head(jnp.tanh(self.pooler(x[0])))


@listed(
    "patrick-kidger/equinox docs/examples/bert.ipynb", "attention", "embedding", "residual", "norm", "gather", "vmap"
)
def equinox_bert(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, jax.Array]:
        lengths = draw.integers(3, 9, batch, 1)
        tokens = draw.integers(1, VOCABULARY, batch, 8) * (jnp.arange(8) < lengths)
        return tokens, draw.integers(0, 2, batch, 8)

    return from_equinox(_Bert, inputs, dtype)


def _groups(width: int) -> eqx.nn.GroupNorm:
    return eqx.nn.GroupNorm(width // 4, width)


class _LinearAttention(eqx.Module):
    """Attention linear in the number of pixels: keys × values first."""

    norm: eqx.nn.GroupNorm
    qkv: eqx.nn.Conv2d
    out: eqx.nn.Conv2d

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key)
        self.norm = _groups(width)
        self.qkv = eqx.nn.Conv2d(width, 3 * 2 * 6, 1, key=keys[0])
        self.out = eqx.nn.Conv2d(2 * 6, width, 1, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width = x.shape
        query, key, value = self.qkv(self.norm(x)).reshape(3, 2, 6, height * width)
        context = jnp.einsum("hdn,hen->hde", jax.nn.softmax(key, axis=-1), value)
        out = jnp.einsum("hde,hdn->hen", context, query)
        return x + self.out(out.reshape(12, height, width))


def _resize(x: jax.Array, scale: str) -> jax.Array:
    channels, height, width = x.shape
    if scale == "up":
        x = jnp.tile(x.reshape(channels, height, 1, width, 1), (1, 1, 2, 1, 2))
        return x.reshape(channels, 2 * height, 2 * width)
    return x.reshape(channels, height // 2, 2, width // 2, 2).mean(axis=(2, 4)) if scale == "down" else x


class _ResBlock(eqx.Module):
    """Normalize, rescale, convolve, add the time, normalize, convolve; the shortcut is a 1×1 convolution."""

    time: eqx.nn.Linear
    norm1: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    norm2: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    shortcut: eqx.nn.Conv2d | None
    attention: _LinearAttention | None
    scale: str

    def __init__(self, into: int, out: int, key: jax.Array, scale: str = "same", attention: bool = False):
        keys = jax.random.split(key, 5)
        self.time = eqx.nn.Linear(8, out, key=keys[0])
        self.norm1 = _groups(into)
        self.conv1 = eqx.nn.Conv2d(into, out, 3, padding=1, key=keys[1])
        self.norm2 = _groups(out)
        self.conv2 = eqx.nn.Conv2d(out, out, 3, padding=1, key=keys[2])
        self.shortcut = eqx.nn.Conv2d(into, out, 1, key=keys[3]) if into != out or scale != "same" else None
        self.attention = _LinearAttention(out, keys[4]) if attention else None
        self.scale = scale

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        y = _resize(jax.nn.silu(self.norm1(x)), self.scale)
        x = _resize(x, self.scale)
        y = self.conv1(y) + self.time(jax.nn.silu(t))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        x = (y + (x if self.shortcut is None else self.shortcut(x))) / jnp.sqrt(2).astype(x.dtype)
        return x if self.attention is None else self.attention(x)


class _UNet(eqx.Module):
    mlp: eqx.nn.MLP
    first: eqx.nn.Conv2d
    down: list[_ResBlock]
    middle: list[_ResBlock]
    up: list[_ResBlock]
    norm: eqx.nn.GroupNorm
    last: eqx.nn.Conv2d

    def __init__(self, key: jax.Array):
        keys = iter(jax.random.split(key, 11))
        self.mlp = eqx.nn.MLP(8, 8, 32, 1, activation=jax.nn.silu, key=next(keys))
        self.first = eqx.nn.Conv2d(1, 8, 3, padding=1, key=next(keys))
        self.down = [
            _ResBlock(8, 8, next(keys)),
            _ResBlock(8, 8, next(keys), "down"),
            _ResBlock(8, 16, next(keys), attention=True),
        ]
        self.middle = [_ResBlock(16, 16, next(keys), attention=True)]
        self.up = [
            _ResBlock(32, 16, next(keys), attention=True),
            _ResBlock(24, 8, next(keys)),
            _ResBlock(8, 8, next(keys), "up"),
            _ResBlock(16, 8, next(keys)),
        ]
        self.norm = _groups(8)
        self.last = eqx.nn.Conv2d(8, 1, 1, key=next(keys))

    def __call__(self, t: jax.Array, y: jax.Array) -> jax.Array:
        angle = t * np.exp(np.arange(4) * (-np.log(10000.0) / 3)).astype(t.dtype)
        t = self.mlp(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)]))
        y = self.first(y)
        skips = []
        for block in self.down:
            y = block(y, t)
            skips.append(y)
        for block in self.middle:
            y = block(y, t)
        for block in self.up:
            y = block(y if block.scale == "up" else jnp.concatenate([y, skips.pop()]), t)
        return self.last(jax.nn.silu(self.norm(y)))


@listed(
    "patrick-kidger/equinox docs/examples/unet.ipynb",
    *("conv", "residual", "concat", "norm", "attention", "vmap"),
)
def equinox_unet(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, jax.Array]:
        return draw.uniform(0, 10, batch), draw.normal(batch, 1, 8, 8)

    return from_equinox(_UNet, inputs, dtype)


class _Tied(eqx.Module):
    """An embedding whose table is also the weight of the output layer, around an MLP."""

    shared: eqx.nn.Shared
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        embedding = eqx.nn.Embedding(VOCABULARY, 12, key=keys[0])
        head = eqx.nn.Linear(12, VOCABULARY, key=keys[1])
        self.shared = eqx.nn.Shared((embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
        self.mlp = eqx.nn.MLP(12, 12, 24, depth=2, activation=jax.nn.tanh, key=keys[2])

    def __call__(self, token: jax.Array) -> jax.Array:
        embedding, head = self.shared()
        return head(self.mlp(embedding(token)))


@listed("patrick-kidger/equinox tests/test_shared.py", "dense", "embedding", "shared parameters", "vmap")
def equinox_shared(dtype: Any) -> Made:
    return from_equinox(_Tied, lambda draw, batch: (draw.integers(0, VOCABULARY, batch),), dtype)


class _NeuralODE(eqx.Module):
    """dy/dt by an MLP, integrated with Heun steps until the end time of each example."""

    encoder: eqx.nn.Linear
    field: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.encoder = eqx.nn.Linear(2, 8, key=keys[0])
        self.field = eqx.nn.MLP(8, 8, 24, 2, activation=jax.nn.softplus, final_activation=jnp.tanh, key=keys[1])
        self.readout = eqx.nn.Linear(8, 2, key=keys[2])

    def __call__(self, y: jax.Array, end: jax.Array) -> jax.Array:
        def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            t, y = state
            slope = self.field(y)
            slope = (slope + self.field(y + 0.25 * slope)) / 2
            return t + 0.25, y + 0.25 * slope

        start = (jnp.zeros((), y.dtype), self.encoder(y))
        _, y = jax.lax.while_loop(lambda state: state[0] < end, step, start)
        return self.readout(y)


@listed("patrick-kidger/diffrax docs/examples/{neural_ode,latent_ode}.ipynb", "dense", "while", "residual", "vmap")
def equinox_neural_ode(dtype: Any) -> Made:
    return from_equinox(_NeuralODE, lambda draw, batch: (draw.normal(batch, 2), draw.uniform(0.5, 2, batch)), dtype)


PROGRAMS = (equinox_gru, equinox_bert, equinox_unet, equinox_shared, equinox_neural_ode)
