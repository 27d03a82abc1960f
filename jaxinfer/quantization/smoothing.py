"""SmoothQuant: what makes activations hard to write in integers is handed over to the weights.

With s a positive scale for each input channel, X W = (X / s) (s W). A channel of X that is much larger than the others
takes all the steps of their common scale; with sᵢ = max|Xᵢ|^α / max|Wᵢ|^(1−α) what makes it large is shared between
both operands.

Reference: Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: accurate and efficient post-training quantization for
large language models", ICML 2023 (equation 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxinfer.quantization.calibrate import Inputs, Wanted
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.method import Method, Nearest, Written
from jaxinfer.quantization.rows import is_rows
from jaxinfer.quantization.scheme import Scheme
from jaxinfer.quantization.tensor import quantize_array, scale_of

# Shares that are tried where none is given.
_ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75)


@dataclass(frozen=True)
class SmoothQuant:
    """Divides what products are fed with by a scale for each channel, and multiplies their weights with it.

    It applies to matrix products (and 1×1 convolutions) whose activations are written in integers; of others the
    weights are written as ``method`` says.

    Attributes:
        alpha: how much of the difficulty goes to the weights, 0 to 1. None tries several on each layer, and no
            smoothing at all, which is best where channels are large only now and then, as behind a GELU. What errs
            least on the calibration data is taken, by an estimate: ‖X (W − Ŵ)‖², and for activations what uniform
            noise of the size of their steps makes of the weights.
        method: how the weights are written then.
    """

    alpha: float | None = None
    method: Method = field(default_factory=Nearest)

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: it takes a number from 0 to 1")

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        asked = self.method.wanted(layer, scheme)
        if not _applies(layer, scheme):
            return asked
        asked = (asked or Wanted())._replace(columns=True)
        return asked if self.alpha is not None else asked._replace(gram=True)

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        if not _applies(layer, scheme):
            return self.method.write(layer, array, scheme, inputs)
        assert inputs is not None and inputs.largest is not None
        matrix = np.asarray(layer.matrix(np.asarray(array)), np.float32)
        largest = np.abs(matrix).max(1)
        if self.alpha is not None:
            smooth = smoothing_scales(inputs.largest, largest, self.alpha)
        else:
            tried = [np.ones(len(matrix), np.float32)]
            tried += [smoothing_scales(inputs.largest, largest, alpha) for alpha in _ALPHAS]
            smooth = min(tried, key=lambda s: _estimated_error(layer, matrix, scheme, inputs, s))
            if smooth is tried[0]:
                return self.method.write(layer, array, scheme, inputs)
        scaled = layer.array(matrix * smooth[:, None]).astype(array.dtype)
        written = self.method.write(layer, scaled, scheme, _divided(inputs, smooth))
        assert written.smooth is None, "methods of which both smooth cannot be combined"
        return replace(written, smooth=smooth)


def smoothing_scales(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """The scale of each input channel, float32[k]; 1 for channels whose activations or weights are all zero.

    Args:
        activations: largest magnitude of each channel, [k].
        weights: largest magnitude of the weights that it is multiplied with, [k].
        alpha: how much goes to the weights.
    """
    activations, weights = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    used = (activations > 0) & (weights > 0)
    scales = np.where(used, activations, 1.0) ** alpha / np.where(used, weights, 1.0) ** (1 - alpha)
    return np.where(used, scales, 1.0).astype(np.float32)


def _estimated_error(layer: Layer, matrix: np.ndarray, scheme: Scheme, inputs: Inputs, smooth: np.ndarray) -> float:
    """‖X W − X̂ Ŵ‖² over the calibration data, by estimate."""
    assert scheme.weights is not None and scheme.activations is not None
    assert inputs.gram is not None and inputs.lows is not None and inputs.highs is not None
    s = smooth.astype(np.float64)[:, None]
    scaled = layer.array((matrix * s).astype(np.float32))
    written = quantize_array(scaled, scheme.weights, *layer.axes(scheme.weights)).dequantize()
    rounded = np.asarray(layer.matrix(np.asarray(written)), np.float64)
    difference = matrix - rounded / s
    low, high = np.min(inputs.lows / s[:, 0]), np.max(inputs.highs / s[:, 0])
    step = float(scale_of(low, high, scheme.activations)[0])
    noise = inputs.rows * step**2 / 12 * np.sum(rounded**2)
    return float(np.sum(difference * (inputs.gram @ difference)) + noise)


def _applies(layer: Layer, scheme: Scheme) -> bool:
    integers = scheme.activations is not None and scheme.activations.is_integer
    return integers and all(is_rows(read.node) for read in layer.reads)


def _divided(inputs: Inputs, smooth: np.ndarray) -> Inputs:
    """What is known of X, for X / s."""
    s = smooth.astype(np.float64)
    return replace(
        inputs,
        gram=None if inputs.gram is None else inputs.gram / np.outer(s, s),
        sums=None if inputs.sums is None else inputs.sums / s,
        lows=None if inputs.lows is None else inputs.lows / s,
        highs=None if inputs.highs is None else inputs.highs / s,
    )
