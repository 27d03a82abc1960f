"""Convolutional-recurrent speech model with a CTC output.

Reference: Amodei et al., "Deep Speech 2", 2015; Graves et al., "Connectionist Temporal Classification", 2006.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxinfer.models.layers import ConvNorm
from jaxinfer.models.recurrent import zero_carry


class SpeechCTC(nn.Module):
    """Strided convolutions over a spectrogram, bidirectional GRUs, log-probabilities of symbols per frame.

    Attributes:
        channels: channels of each convolution; each halves time and frequency.
        hidden: size of the state in each direction.
        layers: number of bidirectional layers.
        symbols: output symbols; 0 is the blank.
    """

    channels: Sequence[int] = (32, 32)
    hidden: int = 128
    layers: int = 2
    symbols: int = 29

    @nn.compact
    def __call__(self, spectrogram: jax.Array, train: bool = False) -> jax.Array:
        """[batch, time, bands] → log-probabilities [batch, time / 2^convolutions, symbols]."""
        x = spectrogram[..., None]
        for index, channels in enumerate(self.channels):
            x = ConvNorm(channels, 5, 2, name=f"conv{index}")(x, train)
        x = x.reshape(*x.shape[:2], -1)
        for index in range(self.layers):
            forward = nn.GRUCell(self.hidden, name=f"forward{index}")
            backward = nn.GRUCell(self.hidden, name=f"backward{index}")
            both: Callable[..., Any] = nn.Bidirectional(nn.RNN(forward), nn.RNN(backward))
            x = both(x, initial_carry=(zero_carry(forward, x), zero_carry(backward, x)))
        return nn.log_softmax(nn.Dense(self.symbols, name="symbols")(x))
