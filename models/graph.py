"""Graph convolutional network over a dense adjacency matrix.

Reference: Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


def normalise(adjacency: jax.Array) -> jax.Array:
    """D^(−1/2) (A + I) D^(−1/2), with D the degrees of A + I.

    Args:
        adjacency: [nodes, nodes], symmetric, not negative, without self-loops.

    Returns:
        [nodes, nodes], symmetric, with eigenvalues in (−1, 1].
    """
    looped = adjacency + jnp.eye(adjacency.shape[0], dtype=adjacency.dtype)
    root = jax.lax.rsqrt(looped.sum(axis=1))
    return root[:, None] * looped * root


class GCN(nn.Module):
    """Layers x ↦ relu(Â x W + b), Â the normalised adjacency; the last without activation.

    The graph comes first: it is usually known long before the signals on it (roads, sensor networks).

    Attributes:
        features: width of each layer, the classes last.
    """

    features: Sequence[int] = (64, 64, 8)

    @nn.compact
    def __call__(self, adjacency: jax.Array, x: jax.Array) -> jax.Array:
        """Adjacency [nodes, nodes] and signals [batch, nodes, inputs] → logits [batch, nodes, classes]."""
        spread = normalise(adjacency)
        for index, width in enumerate(self.features):
            x = nn.Dense(width)(spread @ x)
            if index + 1 < len(self.features):
                x = nn.relu(x)
        return x
