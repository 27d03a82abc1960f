"""Recurrent layers over a sequence: LSTM and GRU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def zero_carry(cell: nn.RNNCellBase, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """The zero state of `cell` for a batch, in the dtype of the inputs x: [batch, time, inputs].

    Flax makes it in the dtype of the parameters, which a scan over float64 inputs refuses.
    """
    carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    return jax.tree.map(lambda state: jnp.zeros(state.shape, x.dtype), carry)


class Recurrent(nn.Module):
    """One recurrent layer that returns its whole output sequence.

    Attributes:
        features: size of the hidden state.
        cell: `nn.LSTMCell` (each gate its own product), `nn.OptimizedLSTMCell` or `nn.GRUCell`.
    """

    features: int = 256
    cell: Callable[..., nn.RNNCellBase] = nn.LSTMCell

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, time, inputs] → [batch, time, features]."""
        cell: nn.RNNCellBase = self.cell(self.features, name="cell")
        rnn: Callable[..., Any] = nn.RNN(cell)
        return rnn(x, initial_carry=zero_carry(cell, x))
