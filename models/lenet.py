"""LeNet-5 as the literature on pruning takes it; LeNet-300-100 is `MLP((300, 100, 10))`.

Reference: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998; widths, pooling and ReLU of
the version that Han et al. prune, "Learning both Weights and Connections", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn


class LeNet5(nn.Module):
    """Two 5×5 convolutions without padding, each followed by 2×2 max pooling, then two dense layers.

    Attributes:
        features: channels of the two convolutions.
        hidden: width of the first dense layer.
        classes: number of classes.
    """

    features: Sequence[int] = (20, 50)
    hidden: int = 500
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 28, 28, 1] → logits [batch, classes]."""
        for index, channels in enumerate(self.features):
            x = nn.Conv(channels, (5, 5), padding="VALID", name=f"conv{index}")(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.classes, name="classifier")(x)
