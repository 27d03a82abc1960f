"""Two-tower recommender: users and items embedded apart, scored by inner products.

Reference: Covington et al., "Deep Neural Networks for YouTube Recommendations", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class TwoTower(nn.Module):
    """scores = users · itemsᵀ, both of unit length, over the whole catalogue.

    The item side comes first: in service it changes with the catalogue, not with the request.

    Attributes:
        catalogue: number of items.
        embedding: size of an item's learned vector.
        towers: widths of the dense layers of both towers; the last is the size of the common space.
    """

    catalogue: int = 2000
    embedding: int = 64
    towers: Sequence[int] = (256, 128)

    @nn.compact
    def __call__(self, ids: jax.Array, facts: jax.Array, history: jax.Array, profile: jax.Array) -> jax.Array:
        """Scores of every item for every user.

        Args:
            ids: int[items], the catalogue.
            facts: [items, attributes], what is known of each item.
            history: int[batch, seen], the items that each user saw.
            profile: [batch, traits], what is known of each user.

        Returns:
            [batch, items], cosines in [−1, 1].
        """
        embed = nn.Embed(self.catalogue, self.embedding, name="embedding")
        items = self._tower("item", jnp.concatenate([embed(ids), facts], axis=-1))
        users = self._tower("user", jnp.concatenate([embed(history).mean(axis=1), profile], axis=-1))
        return users @ items.T

    def _tower(self, name: str, x: jax.Array) -> jax.Array:
        for index, width in enumerate(self.towers):
            x = nn.Dense(width, name=f"{name}{index}")(x)
            if index + 1 < len(self.towers):
                x = nn.relu(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
