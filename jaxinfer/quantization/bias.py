"""Bias correction: what rounding the weights changes of a product's mean result is added back.

Rounded weights Ŵ shift the mean result of a product by E[x] (Ŵ − W); with E[x] from calibration the shift is known.

Reference: Nagel, van Baalen, Blankevoort and Welling, "Data-free quantization through weight equalization and bias
correction", ICCV 2019 (section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxinfer.quantization.calibrate import Inputs, Wanted
from jaxinfer.quantization.layers import Layer
from jaxinfer.quantization.method import Method, Nearest, Written
from jaxinfer.quantization.scheme import Scheme


@dataclass(frozen=True)
class BiasCorrected:
    """Writes parameters as another method does and corrects the mean of each channel of the result.

    Parameters that several products read, which have different means, are written without correction.

    Attributes:
        method: how they are written.
    """

    method: Method = field(default_factory=Nearest)

    def wanted(self, layer: Layer, scheme: Scheme) -> Wanted | None:
        asked = self.method.wanted(layer, scheme)
        return (asked or Wanted())._replace(columns=True) if _applies(layer) else asked

    def write(self, layer: Layer, array: Any, scheme: Scheme, inputs: Inputs | None) -> Written:
        written = self.method.write(layer, array, scheme, inputs)
        if not _applies(layer):
            return written
        assert inputs is not None and inputs.sums is not None
        exact = np.asarray(layer.matrix(np.asarray(array)), np.float64)
        rounded = np.asarray(layer.matrix(np.asarray(written.quantized.dequantize())), np.float64)
        if written.smooth is not None:
            rounded = rounded / np.asarray(written.smooth, np.float64)[:, None]
        means = np.atleast_2d(inputs.sums / inputs.rows)
        shift = np.einsum("gk,gkn->gn", means, layer.by_group(exact - rounded))
        return replace(written, correction=shift.reshape(-1).astype(np.float32))


def _applies(layer: Layer) -> bool:
    return len(layer.reads) == 1
