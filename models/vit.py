"""Vision Transformer: an image as a sequence of patches.

Reference: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020; Touvron et al., 2020 (the small size).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxinfer.models.transformer import Block


class ViT(nn.Module):
    """Patch embedding, class token, transformer blocks, classifier on the class token. Defaults: ViT-S/16.

    Attributes:
        patch: side of a patch, in pixels.
        layers: number of blocks.
        width: size of the vectors.
        heads: attention heads.
        classes: number of classes.
    """

    patch: int = 16
    layers: int = 12
    width: int = 384
    heads: int = 6
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, height, width, 3] → logits [batch, classes]."""
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for index in range(self.layers):
            x = Block(self.heads, name=f"block{index}")(x)
        return nn.Dense(self.classes, name="classifier")(nn.LayerNorm(name="norm")(x[:, 0]))
