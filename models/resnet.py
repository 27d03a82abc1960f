"""Residual networks, version 1.5: the bottleneck strides in its 3×3 convolution.

Reference: He et al., "Deep Residual Learning for Image Recognition", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from jaxinfer.models.layers import ConvNorm


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, h, w, channels] → [batch, h / strides, w / strides, features]."""
        y = ConvNorm(self.features, 3, self.strides, padding=1, name="spatial")(x, train)
        y = ConvNorm(self.features, 3, padding=1, activation=None, name="project")(y, train)
        return nn.relu(y + _shortcut(x, y.shape[-1], self.strides, train))


class Bottleneck(nn.Module):
    """1×1 reduce, 3×3 with the stride, 1×1 back to 4 × features channels, around a shortcut."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, h, w, channels] → [batch, h / strides, w / strides, 4 · features]."""
        y = ConvNorm(self.features, 1, name="reduce")(x, train)
        y = ConvNorm(self.features, 3, self.strides, padding=1, name="spatial")(y, train)
        y = ConvNorm(4 * self.features, 1, activation=None, name="project")(y, train)
        return nn.relu(y + _shortcut(x, y.shape[-1], self.strides, train))


def _shortcut(x: jax.Array, features: int, strides: int, train: bool) -> jax.Array:
    if x.shape[-1] == features and strides == 1:
        return x
    return ConvNorm(features, 1, strides, activation=None, name="shortcut")(x, train)


class ResNet(nn.Module):
    """Stem, stages of residual blocks that halve the image, average pooling, dense classifier.

    Attributes:
        blocks: number of blocks in each stage.
        block: `BasicBlock` (ResNet-18, -34) or `Bottleneck` (ResNet-50 and deeper).
        width: channels of the stem; doubled by every stage after the first.
        classes: number of classes.
        stem: side of the stem's kernel, whose stride is 2.
        pool: whether 3×3 max pooling with stride 2 follows the stem, as photographs want and digits do not.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    block: type[nn.Module] = BasicBlock
    width: int = 64
    classes: int = 1000
    stem: int = 7
    pool: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, height, width, colours] → logits [batch, classes]."""
        x = ConvNorm(self.width, self.stem, 2, padding=self.stem // 2, name="stem")(x, train)
        if self.pool:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, repeats in enumerate(self.blocks):
            for index in range(repeats):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                x = self.block(self.width * 2**stage, strides, name=name)(x, train)
        return nn.Dense(self.classes, name="classifier")(x.mean(axis=(1, 2)))
