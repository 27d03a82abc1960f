"""Transformer encoder and decoder language model, with normalisation before each branch.

Reference: Vaswani et al., "Attention Is All You Need", 2017; Radford et al., 2019 (normalisation first).
"""

from __future__ import annotations

import jax
from flax import linen as nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the hidden layer of the mlp four times as wide."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[batch, length, width] → the same; mask [batch, 1, length, length]: where attention may look."""
        width = x.shape[-1]
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * width, name="widen")(y))
        return x + nn.Dense(width, name="narrow")(y)


class Encoder(nn.Module):
    """Tokens to contextual vectors; every position sees every other.

    Attributes:
        vocabulary: number of token ids.
        length: longest sequence.
        layers: number of blocks.
        width: size of the vectors.
        heads: attention heads.
    """

    vocabulary: int = 4096
    length: int = 128
    layers: int = 6
    width: int = 384
    heads: int = 6

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[batch, length] → [batch, length, width]."""
        x = _embed(self, tokens)
        for index in range(self.layers):
            x = Block(self.heads, name=f"block{index}")(x)
        return nn.LayerNorm(name="norm")(x)


class Decoder(nn.Module):
    """Causal language model: at each position, logits of the next token.

    Attributes: as `Encoder`.
    """

    vocabulary: int = 4096
    length: int = 128
    layers: int = 6
    width: int = 384
    heads: int = 6

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int[batch, length] → logits [batch, length, vocabulary]."""
        x = _embed(self, tokens)
        mask = nn.make_causal_mask(tokens, dtype=bool)
        for index in range(self.layers):
            x = Block(self.heads, name=f"block{index}")(x, mask)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="logits")(x)


def _embed(module: Encoder | Decoder, tokens: jax.Array) -> jax.Array:
    position = module.param("position", nn.initializers.normal(0.02), (module.length, module.width))
    return nn.Embed(module.vocabulary, module.width, name="token")(tokens) + position[: tokens.shape[1]]
