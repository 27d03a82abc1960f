"""How a parameter is written in a format once it is settled that it is.

A method may look at what the product is fed with, and may ask for its other operand to be scaled or its result to be
corrected; the program does both where the product is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxinfer.quantization.calibrate import Inputs, Wanted
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.scheme import Scheme
from jaxinfer.quantization.tensor import Quantized, quantize_array


@dataclass(frozen=True, eq=False)
class Written:
    """A parameter written in a format.

    Attributes:
        quantized: the parameter (of weights multiplied with ``smooth``, if that is given).
        smooth: float32[k]: what the columns of the other operand are divided by before they are written, or None. Only
            for layers whose product is one of rows and columns.
        correction: float32[n]: what is added to each channel of the result, or None.
    """

    quantized: Quantized
    smooth: np.ndarray | None = None
    correction: np.ndarray | None = None


class Method(Protocol):
    """A way to write parameters."""

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        """What it has to know of the inputs of a layer; None if nothing."""
        ...

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        """Writes a parameter in the format ``scheme.weights``.

        Args:
            layer: the parameter and its products.
            array: its values.
            scheme: what holds for it.
            inputs: what its first product was fed with, as :meth:`wanted` asks; None without calibration data.
        """
        ...


@dataclass(frozen=True)
class Nearest:
    """Each entry goes to the nearest value; scales cover all entries."""

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        return None

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        assert scheme.weights is not None
        return Written(quantize_array(array, scheme.weights, *layer.axes(scheme.weights)))


def wanted_by(method: Method, layers: Mapping[int, tuple[Layer, Scheme]]) -> dict[int, Wanted]:
    """What is to be known of products, by number: for static ranges, and what a method asks for."""
    found: dict[int, Wanted] = {}
    for layer, scheme in layers.values():
        asked = method.wanted(layer, scheme)
        ranged = scheme.activations is not None and scheme.activations.has_scale and not scheme.dynamic
        if ranged:
            for read in layer.reads:
                found[read.position] = Wanted(counts=scheme.observer.needs_counts)
        if asked is not None:
            old = found.get(layer.position, Wanted())
            found[layer.position] = Wanted(*(a or b for a, b in zip(old, asked)))
    return found
