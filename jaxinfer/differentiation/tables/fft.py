"""Discrete Fourier transforms, of complex and of real arrays.

All are linear. With F the matrix of the transform over the last axes (symmetric, since its entries are powers of one
root of unity in a product of indices), the transpose of a complex transform is itself. Of a real array only half of the
spectrum is kept, the other half being its conjugate: an entry that stands for two counts twice in the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import FftType

from jaxinfer import _jax
from jaxinfer.differentiation.rules import PullbackRule, TangentRule
from jaxinfer.graph import Node


def _tangent(node: Node, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return _jax.bind(node.primitive, tangents, dict(node.params))


def _pullback(
    node: Node, primals: Sequence[Any], outs: Sequence[Any], active: Sequence[bool], cotangents: Sequence[Any]
) -> list[Any]:
    kind, lengths, ct = node.params["fft_type"], node.params["fft_lengths"], cotangents[0]
    if kind in (FftType.FFT, FftType.IFFT):
        return _jax.bind(node.primitive, [ct], dict(node.params))
    size = math.prod(lengths)
    if kind == FftType.RFFT:
        # Re Σₖ ctₖ Fₖⱼ, which the inverse transform gives of half of each entry that it counts twice.
        half = _weighted(lax.conj(ct), size / _multiplicity(ct.shape[-1], lengths[-1]))
        return [lax.fft(half, FftType.IRFFT, lengths)]
    spectrum = lax.conj(lax.fft(ct, FftType.RFFT, lengths))
    return [_weighted(spectrum, _multiplicity(spectrum.shape[-1], lengths[-1]) / size)]


def _multiplicity(kept: int, length: int) -> np.ndarray:
    """How many entries of the whole spectrum each kept one stands for."""
    counts = np.full(kept, 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[length // 2 :] = 1
    return counts


def _weighted(spectrum: Any, weights: np.ndarray) -> Any:
    """A spectrum times one number for each entry of its last axis."""
    rows = lax.broadcast_in_dim(jnp.asarray(weights, spectrum.dtype), spectrum.shape, (spectrum.ndim - 1,))
    return lax.mul(spectrum, rows)


TANGENTS: Mapping[str, TangentRule] = {"fft": _tangent}
PULLBACKS: Mapping[str, PullbackRule] = {"fft": _pullback}
