"""Which layers to quantize, from the times of their forms: all of them together are to take the least time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxinfer.quantization.forms import FLOAT
from jaxinfer.quantization.measure import BETWEEN

# Faster by less than this is within the noise.
_MARGIN = 0.95
# Seconds of what is not to be.
_NEVER = 1e9


@dataclass(frozen=True)
class Timed:
    """A layer with the fastest form of its scheme and all timings; without timings it stays in floating point."""

    leaf: int
    form: str
    seconds: Mapping[str, float]

    @property
    def now(self) -> float:
        """Seconds of the fastest form."""
        return self.seconds[self.form]

    @property
    def is_faster(self) -> bool:
        """Whether that is faster than in floating point among its like."""
        return bool(self.seconds) and self.now / _MARGIN <= self.seconds[FLOAT]

    @property
    def conversion(self) -> float:
        """Seconds that each neighbour which hands it codes, or takes them, adds to it in floating point."""
        return (self.seconds[BETWEEN] - self.seconds[FLOAT]) / 2 if BETWEEN in self.seconds else 0.0

    @property
    def why_not(self) -> str:
        """Why it stays in floating point."""
        if not self.is_faster:
            return f"{self.form} takes {self.now / self.seconds[FLOAT]:.2f} times as long"
        return "with the layers beside it, floating point takes no longer"


def fastest(layers: Sequence[Timed]) -> list[bool]:
    """Which of a chain of layers to quantize so that all of them together take the least time.

    Between a layer that takes codes and one in floating point, numbers are converted by the latter. A layer that is not
    faster than in floating point is quantized between two such layers only, where it is faster than with conversions.
    """
    edge = Timed(-1, FLOAT, {})
    # The least time of all layers so far, and which are quantized, if the last one is left and if it is quantized.
    best: list[tuple[float, list[bool]]] = [(0.0, []), (_NEVER, [])]
    for first, second in itertools.pairwise([edge, *layers, edge]):
        best = [
            min(
                (total + own + _between(first, bool(last), second, bool(state)), [*path, bool(state)])
                for last, (total, path) in enumerate(best)
            )
            for state, own in enumerate(_costs(second))
        ]
    return best[0][1][:-1]


def _costs(layer: Timed) -> tuple[float, float]:
    """Seconds in floating point, and quantized with the margin; of a layer that stays, what forbids the latter."""
    if not layer.seconds:
        return 0.0, _NEVER
    now = layer.now / _MARGIN
    return layer.seconds[FLOAT], now if now <= max(layer.seconds[FLOAT], layer.seconds.get(BETWEEN, 0.0)) else _NEVER


def _between(first: Timed, first_quantized: bool, second: Timed, second_quantized: bool) -> float:
    """What it takes that one of two neighbours is quantized and the other not."""
    if first_quantized == second_quantized:
        return 0.0
    floating, quantized = (second, first) if first_quantized else (first, second)
    return floating.conversion + (0.0 if quantized.is_faster else _NEVER)
