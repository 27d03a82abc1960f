"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Dense layers with ReLU between them; the last has no activation.

    Attributes:
        features: width of each layer, the classes last.
    """

    features: Sequence[int] = (512, 512, 10)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, inputs] → logits [batch, classes]."""
        for width in self.features[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)
