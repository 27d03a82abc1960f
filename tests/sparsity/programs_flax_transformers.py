"""Programs after the transformers among the examples of Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from programs_base import Draw, Made, from_nnx, linen, listed

VOCABULARY = 20
LENGTH = 7
WIDTH = 16


def _sinusoids(length: int, width: int) -> jax.Array:
    angle = np.arange(length)[:, None] * np.exp(np.arange(0, width, 2) * (-np.log(10000.0) / width))
    return jnp.asarray(np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, width))


class _Feedforward(nn.Module):
    hidden: int
    elu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activation = nn.elu if self.elu else nn.relu
        return nn.Dense(x.shape[-1])(activation(nn.Dense(self.hidden)(x)))


def _attention() -> nn.Module:
    return nn.MultiHeadDotProductAttention(4, qkv_features=WIDTH, use_bias=False)


class _EncoderBlock(nn.Module):
    """Attention, then the MLP, each normalized before and added after."""

    elu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + _attention()(nn.LayerNorm()(x), mask=mask)
        return x + _Feedforward(24, self.elu)(nn.LayerNorm()(x))


class _DecoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, encoded: jax.Array, self_mask: jax.Array, cross_mask: jax.Array) -> jax.Array:
        x = x + _attention()(nn.LayerNorm()(x), mask=self_mask)
        x = x + _attention()(nn.LayerNorm()(x), encoded, mask=cross_mask)
        return x + _Feedforward(24)(nn.LayerNorm()(x))


class _Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = x + _sinusoids(tokens.shape[1], WIDTH).astype(x.dtype)
        for _ in range(2):
            x = _EncoderBlock(elu=True)(x)
        return nn.Dense(5)(nn.LayerNorm()(x))


def _tokens(draw: Draw, batch: int) -> tuple[jax.Array]:
    return (draw.integers(1, VOCABULARY, batch, LENGTH),)


@listed("google/flax examples/nlp_seq/models.py", "attention", "embedding", "residual", "norm")
def flax_nlp_seq(dtype: Any) -> Made:
    return linen(_Tagger(), _tokens, dtype)


class _LanguageModel(nn.Module):
    """Causal; the embedding is also the output layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, WIDTH)
        tokens = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        mask = nn.combine_masks(nn.make_attention_mask(tokens > 0, tokens > 0), nn.make_causal_mask(tokens))
        x = embed(tokens)
        x = x + _sinusoids(tokens.shape[1], WIDTH).astype(x.dtype)
        for _ in range(2):
            x = _EncoderBlock()(x, mask)
        return embed.attend(nn.LayerNorm()(x)) / jnp.sqrt(jnp.asarray(WIDTH, x.dtype))


@listed("google/flax examples/lm1b/models.py", "attention", "embedding", "residual", "norm", "shared parameters")
def flax_lm1b(dtype: Any) -> Made:
    return linen(_LanguageModel(), _tokens, dtype)


class _Translator(nn.Module):
    """Encoder and decoder with one embedding for inputs, targets and logits."""

    @nn.compact
    def __call__(self, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(inputs)
        x = x + _sinusoids(inputs.shape[1], WIDTH).astype(x.dtype)
        mask = nn.make_attention_mask(inputs > 0, inputs > 0)
        for _ in range(2):
            x = _EncoderBlock()(x, mask)
        encoded = nn.LayerNorm()(x)

        shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        y = embed(shifted)
        y = y + _sinusoids(targets.shape[1], WIDTH).astype(y.dtype)
        self_mask = nn.combine_masks(nn.make_attention_mask(targets > 0, targets > 0), nn.make_causal_mask(targets))
        cross_mask = nn.make_attention_mask(targets > 0, inputs > 0)
        for _ in range(2):
            y = _DecoderBlock()(y, encoded, self_mask, cross_mask)
        return embed.attend(nn.LayerNorm()(y)) / jnp.sqrt(jnp.asarray(WIDTH, y.dtype))


@listed("google/flax examples/wmt/models.py", "attention", "embedding", "residual", "norm", "shared parameters")
def flax_wmt(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, jax.Array]:
        lengths = draw.integers(2, LENGTH + 1, batch, 1)
        source = draw.integers(1, VOCABULARY, batch, LENGTH) * (jnp.arange(LENGTH) < lengths)
        return source, draw.integers(1, VOCABULARY, batch, LENGTH - 2)

    return linen(_Translator(), inputs, dtype)


class _RMSNorm(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return x * rms * (1 + self.scale[...])


def _rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate the halves of the last axis; x is (batch, time, heads, head width)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 10_000 ** (jnp.arange(half, dtype=x.dtype) / half)
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _GemmaAttention(nnx.Module):
    """Queries in groups that share a key and a value; a window; logits bounded by tanh."""

    def __init__(self, heads: int, kv_heads: int, head_width: int, window: int | None, rngs: nnx.Rngs):
        shape = (heads, WIDTH, head_width)
        self.q = nnx.Einsum("BTD,NDH->BTNH", shape, rngs=rngs)
        self.kv = nnx.Einsum("BTD,CKDH->CBTKH", (2, kv_heads, WIDTH, head_width), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (heads, head_width, WIDTH), rngs=rngs)
        self.norm_q = _RMSNorm(head_width, rngs)
        self.norm_k = _RMSNorm(head_width, rngs)
        self.kv_heads = kv_heads
        self.window = window

    def __call__(self, x: jax.Array) -> jax.Array:
        query, (key, value) = self.q(x), self.kv(x)
        positions = jnp.arange(x.shape[1], dtype=x.dtype)
        query = _rope(self.norm_q(query), positions) * query.shape[-1] ** -0.5
        key = _rope(self.norm_k(key), positions)
        batch, time, heads, width = query.shape
        query = query.reshape(batch, time, self.kv_heads, heads // self.kv_heads, width)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", query, key).reshape(batch, time, heads, time)
        logits = 50.0 * jnp.tanh(logits / 50.0)
        mask = jnp.tril(jnp.ones((time, time), bool))
        if self.window is not None:
            mask &= ~jnp.tril(mask, -self.window)
        probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, -2.3819763e38), axis=-1)
        probabilities = probabilities.reshape(batch, time, self.kv_heads, -1, time)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", probabilities, value)
        return self.out(mixed.reshape(batch, time, heads, width))


class _GemmaBlock(nnx.Module):
    """Attention and gated MLP, each normalized before and after."""

    def __init__(self, window: int | None, rngs: nnx.Rngs):
        self.norms = nnx.List([_RMSNorm(WIDTH, rngs) for _ in range(4)])
        self.attention = _GemmaAttention(4, 2, 8, window, rngs)
        self.gate = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 24, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(24, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        y = self.norms[2](x)
        return x + self.norms[3](self.down(nnx.gelu(self.gate(y)) * self.up(y)))


class _Gemma(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jnp.zeros((VOCABULARY, WIDTH)))
        self.blocks = nnx.List([_GemmaBlock(3, rngs), _GemmaBlock(None, rngs)])
        self.norm = _RMSNorm(WIDTH, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding[...]
        x = table[tokens] * jnp.sqrt(jnp.asarray(WIDTH, table.dtype))
        for block in self.blocks:
            x = block(x)
        return 30.0 * jnp.tanh(self.norm(x) @ table.T / 30.0)


@listed(
    "google/flax examples/gemma/{modules,transformer}.py",
    *("attention", "grouped queries", "rotary", "gated", "residual", "norm", "embedding", "shared parameters"),
)
def flax_gemma(dtype: Any) -> Made:
    return from_nnx(_Gemma, _tokens, dtype)


PROGRAMS = (flax_nlp_seq, flax_lm1b, flax_wmt, flax_gemma)
