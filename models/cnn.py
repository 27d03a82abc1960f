"""Small convolutional classifier: convolutions with biases, max pooling, two dense layers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn


class CNN(nn.Module):
    """3×3 convolution, ReLU and 2×2 max pooling per stage, then a dense classifier.

    Attributes:
        features: channels of each stage.
        hidden: width of the dense layer before the logits.
        classes: number of classes.
    """

    features: Sequence[int] = (32, 64)
    hidden: int = 128
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, height, width, channels] → logits [batch, classes]."""
        for channels in self.features:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.classes)(x)
