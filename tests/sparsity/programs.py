"""The programs `shrink` is judged on, chosen before it was written.

Every entry names where its architecture was found. The code is this project's own, with the layers, their order
and their ties as in the original and with smaller widths, so that each runs in float64 in about a second.
"""

from __future__ import annotations

import programs_equinox
import programs_equinox_vision
import programs_flax_sequence
import programs_flax_transformers
import programs_flax_vision
import programs_haiku
import programs_jax
import programs_jax2onnx
import programs_jax2onnx_vision
import programs_mixture
from programs_base import Program

PROGRAMS: tuple[Program, ...] = (
    *programs_flax_vision.PROGRAMS,
    *programs_flax_sequence.PROGRAMS,
    *programs_flax_transformers.PROGRAMS,
    *programs_equinox_vision.PROGRAMS,
    *programs_equinox.PROGRAMS,
    *programs_jax.PROGRAMS,
    *programs_haiku.PROGRAMS,
    *programs_jax2onnx_vision.PROGRAMS,
    *programs_jax2onnx.PROGRAMS,
    *programs_mixture.PROGRAMS,
)
