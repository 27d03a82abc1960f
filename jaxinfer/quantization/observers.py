"""From what values were in calibration to the range that numbers of few bits are to cover.

Whatever is outside of the range is clipped to its ends; the narrower it is, the finer the steps inside. All but
:class:`AbsMax` choose from a histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

# Bins of a histogram; each of them is finer than a step of eight bits.
BINS = 2048
_CANDIDATES = 100


@dataclass(frozen=True, eq=False)
class Seen:
    """What a value was over all calibration batches.

    Attributes:
        low, high: its least and greatest entry.
        counts: float64[BINS]: how many entries lay in each of as many equal parts of [-reach, reach]; None where no
            observer asks for it.
        reach: half of the width of the histogram, at least the greatest magnitude; 0 if all entries were 0.
    """

    low: float
    high: float
    counts: np.ndarray | None = None
    reach: float = 0.0

    def merged(self, other: Seen) -> Seen:
        """Both together. The narrower histogram is written into the bins of the wider one."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        if self.counts is None or other.counts is None:
            return Seen(low, high)
        wide, narrow = (self, other) if self.reach >= other.reach else (other, self)
        assert wide.counts is not None and narrow.counts is not None
        if not narrow.counts.sum() or wide.reach == 0:
            return Seen(low, high, wide.counts + narrow.counts, wide.reach)
        places = np.clip(((narrow.centres / wide.reach + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
        counts = wide.counts + np.bincount(places, narrow.counts, BINS)
        return Seen(low, high, counts, wide.reach)

    @property
    def centres(self) -> np.ndarray:
        """The middle of each bin."""
        return ((np.arange(BINS) + 0.5) / (BINS / 2) - 1) * self.reach

    def magnitudes(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts by magnitude: float64[BINS / 2], and the middle of each bin."""
        assert self.counts is not None
        half = BINS // 2
        return self.counts[half:] + self.counts[:half][::-1], self.centres[half:]


class Observer(Protocol):
    """A way to choose a range.

    Attributes:
        needs_counts: whether it reads histograms.
    """

    @property
    def needs_counts(self) -> bool: ...

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        """The range to cover.

        Args:
            seen: what the value was.
            levels: how many numbers there are to cover it with.
            affine: whether it may be other than symmetric about zero.

        Returns:
            Its ends. A symmetric one is (−a, a).
        """
        ...


@dataclass(frozen=True)
class AbsMax:
    """Everything that was seen: nothing is clipped."""

    needs_counts: ClassVar[bool] = False

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        return _whole(seen, affine)


@dataclass(frozen=True)
class Percentile:
    """All but the outermost entries.

    Attributes:
        percent: of the entries lie inside.
    """

    percent: float = 99.99
    needs_counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent}: it takes a number from 0 (exclusive) to 100")

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        if not affine:
            counts, centres = seen.magnitudes()
            edge = _quantile(counts, centres, self.percent / 100, seen.reach * 2 / BINS)
            return -min(edge, _whole(seen, False)[1]), min(edge, _whole(seen, False)[1])
        assert seen.counts is not None
        # Each tail is given half of what is left out.
        outside = (1 - self.percent / 100) / 2
        step = seen.reach * 2 / BINS
        high = _quantile(seen.counts, seen.centres, 1 - outside, step)
        low = -_quantile(seen.counts[::-1], seen.centres, 1 - outside, step)
        return max(low, seen.low), min(high, seen.high)


@dataclass(frozen=True)
class MSE:
    """The range that makes the mean square of rounding and clipping errors least, among narrower and narrower ones."""

    needs_counts: ClassVar[bool] = True

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        assert seen.counts is not None
        return _best(seen, affine, lambda low, high: _square_error(seen, low, high, levels))


@dataclass(frozen=True)
class KL:
    """The range at which the distribution of the numbers written is nearest the distribution of the values.

    The Kullback–Leibler divergence of the histogram, clipped, from what is left of it when it is merged into ``levels``
    numbers and spread out over those of its bins that were not empty.

    Reference: Migacz, "8-bit inference with TensorRT", GPU Technology Conference 2017.
    """

    needs_counts: ClassVar[bool] = True

    def range(self, seen: Seen, levels: int, affine: bool) -> tuple[float, float]:
        assert seen.counts is not None
        return _best(seen, affine, lambda low, high: _divergence(seen, low, high, levels))


def _whole(seen: Seen, affine: bool) -> tuple[float, float]:
    if affine:
        return seen.low, seen.high
    most = max(abs(seen.low), abs(seen.high))
    return -most, most


def _quantile(counts: np.ndarray, centres: np.ndarray, share: float, step: float) -> float:
    """The upper edge of the bin at which so much of the total is reached."""
    total = np.cumsum(counts)
    at = int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)))
    return float(centres[min(at, len(centres) - 1)] + step / 2)


def _best(seen: Seen, affine: bool, cost: Callable[[float, float], float]) -> tuple[float, float]:
    whole = _whole(seen, affine)
    if whole[0] == whole[1]:
        return whole
    shares = np.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES).tolist()
    ranges = [(whole[0] * s, whole[1] * s) for s in shares]
    # A range that is clipped on one side only, for what has a long tail there.
    if affine and whole[0] < 0 < whole[1]:
        ranges += [(whole[0], whole[1] * s) for s in shares] + [(whole[0] * s, whole[1]) for s in shares]
    return min(ranges, key=lambda r: cost(*r))


def _square_error(seen: Seen, low: float, high: float, levels: int) -> float:
    assert seen.counts is not None
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (levels - 1)
    x = seen.centres
    inside = np.clip(x, low, high)
    # What is inside is spread over the width of a step, whatever the bins are.
    clipped = (x - inside) ** 2
    return float(np.sum(seen.counts * np.where(clipped > 0, clipped, step**2 / 12)))


def _divergence(seen: Seen, low: float, high: float, levels: int) -> float:
    assert seen.counts is not None
    x, p = seen.centres, seen.counts.copy()
    # Zero has a code of its own in every range: a spike there (what a ReLU leaves) says nothing.
    middle = BINS // 2
    p[middle - 1 : middle + 1] = np.minimum(p[middle - 1 : middle + 1], max(p[middle - 2], p[middle + 1]))
    first, last = np.searchsorted(x, low), np.searchsorted(x, high) - 1
    if last - first + 1 < levels:
        return np.inf
    inside = p[first : last + 1].copy()
    reference = inside.copy()
    reference[0] += p[:first].sum()
    reference[-1] += p[last + 1 :].sum()
    merged = np.minimum((np.arange(len(inside)) * levels) // len(inside), levels - 1)
    nonzero = inside > 0
    sums = np.bincount(merged, inside, levels)
    bins = np.bincount(merged, nonzero, levels)
    q = np.where(nonzero, (sums / np.maximum(bins, 1))[merged], 0.0)
    reference, q = reference / reference.sum(), q / max(q.sum(), 1e-300)
    # Where the reference has mass and q has none, as at an end that only clipped values reach, a trace of mass is lent.
    return float(
        np.sum(np.where(reference > 0, reference * np.log(np.maximum(reference, 1e-30) / np.maximum(q, 1e-12)), 0.0))
    )
