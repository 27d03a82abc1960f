"""Timing programs against each other on a machine that is never quiet.

Callables are timed in turn within one run, so that whatever slows the machine slows all of them, and
statements are made about ratios of neighbours, never about times taken apart. Bounds hold at 95 % also for a
run that stops early.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Clock = Callable[[], float]

# One sample lasts at least this long, far above the resolution of the clock and the cost of reading it.
_SAMPLE_S = 2e-4
# In steady use, beyond the time after which waiting threads fall asleep and have to be woken.
_STEADY_S = 2e-2
_MAX_REPEATS = 1000
_ERROR = 0.05
# Eight pairs are the fewest whose extremes bound the median at _ERROR shared between six looks.
_LOOKS = (8, 16, 32, 64, 128, 256)
# A difference within this share is not worth measuring on.
_INDIFFERENCE = 0.01
_FEWEST_PAIRS = 3
# After so many rounds a candidate that many times slower than the best is timed no more.
_DROP = {1: 4.0, 2: 2.0, 4: 1.5, 8: 1.2}
_CANDIDATE_ROUNDS = 16
# 97.5 % quantiles of Student's distribution for the few pairs whose extremes bound nothing at 95 %.
_STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """How long `after` takes relative to `before`, from pairs timed side by side.

    Attributes:
        ratio: median of after/before over the pairs; below 1 means faster.
        low, high: bounds that enclose the true median ratio with at least 95 % confidence.
        rounds: number of pairs.
        before_ms, after_ms: median milliseconds per call of each side.
    """

    ratio: float
    low: float
    high: float
    rounds: int
    before_ms: float
    after_ms: float

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], error: float = _ERROR) -> PairedRatio:
        """Summarises paired samples in seconds, with bounds that fail with probability at most `error`."""
        ratios = [late / early for early, late in zip(before, after, strict=True)]
        low, high = median_bounds(ratios, error)
        return cls(
            ratio=statistics.median(ratios),
            low=low,
            high=high,
            rounds=len(ratios),
            before_ms=statistics.median(before) * 1e3,
            after_ms=statistics.median(after) * 1e3,
        )

    @property
    def is_faster(self) -> bool:
        """Whether the upper 95 % bound says that `after` takes less time."""
        return self.high < 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the lower 95 % bound says that `after` takes more time."""
        return self.low > 1.0

    @property
    def is_settled(self) -> bool:
        """Whether more pairs would change nothing: one side is faster, or both are as good as equal."""
        equal = self.low > 1.0 - _INDIFFERENCE and self.high < 1.0 + _INDIFFERENCE
        return self.is_faster or self.is_slower or equal


@dataclass(frozen=True, slots=True)
class AgainstItself:
    """`after` against `before`, beside `before` against itself in the same run.

    Attributes:
        change: after/before.
        spread: before/before, a second timing of the same callable.
    """

    change: PairedRatio
    spread: PairedRatio

    @property
    def holds(self) -> bool:
        """Not slower: the bounds of the change do not lie wholly above those of the spread."""
        return self.change.low <= max(1.0, self.spread.high)


def median_bounds(values: Sequence[float], error: float = _ERROR) -> tuple[float, float]:
    """Confidence bounds of the median of independent positive values, whatever their distribution.

    The number of n values below the true median is binomial(n, 1/2). So the k-th smallest and the k-th
    largest enclose it except with probability 2 P(binomial(n, 1/2) < k). At three to five values no k reaches
    95 %, and the bounds are Student's for the logarithms; at fewer, or where `error` is less, they are (0, inf).

    Args:
        values: a sample.
        error: probability that the bounds may miss the median.
    """
    ordered, n = sorted(values), len(values)
    k, tail = 0, 0.0
    while True:
        tail += 2.0 * math.comb(n, k) / 2.0**n
        if tail > error or 2 * (k + 1) > n:
            break
        k += 1
    if k:
        return ordered[k - 1], ordered[n - k]
    if n in _STUDENT and error >= _ERROR:
        logs = [math.log(value) for value in values]
        centre, reach = statistics.fmean(logs), _STUDENT[n] * statistics.stdev(logs) / math.sqrt(n)
        return math.exp(centre - reach), math.exp(centre + reach)
    return 0.0, math.inf


def interleaved(
    fns: Sequence[Callable[[], Any]],
    *,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = _LOOKS[-1],
    sample_s: float = _SAMPLE_S,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Times callables in turn, waiting for their results, in an order that changes from round to round.

    Each is called once beforehand, to compile. Very short ones are called many times within one sample.

    Args:
        fns: the callables; what they return is waited for with `jax.block_until_ready`.
        budget_s: seconds for everything, first calls included; `min_rounds` are run even beyond it.
        min_rounds, max_rounds: how many samples each callable gets.
        sample_s: seconds that one sample takes at least, in as many calls as that needs.
        clock: seconds since some moment.

    Returns:
        For each callable its samples, in seconds per call; samples of one index belong to one round.
    """
    deadline = clock() + budget_s
    rounds = _Rounds(fns, clock, sample_s)
    while rounds.done < max_rounds and (rounds.done < min_rounds or clock() < deadline):
        rounds.run()
    return rounds.samples


def compare(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
) -> PairedRatio:
    """Times two callables in pairs until it is settled which is faster, or the budget is spent.

    Where the budget allows sixteen pairs, the verdict is looked at after 8, 16, … 256 of them, each look
    taking its share of the 5 % error, so that looking often does not make a difference appear. Otherwise it
    is looked at once, at the end. At least three pairs are timed, whatever the budget.

    Args:
        before, after: called without arguments; results are waited for.
        budget_s: seconds, first calls included.
        clock: seconds since some moment.
    """
    (early, late), error = _look_until([before, after], _settled_pair, budget_s, _FEWEST_PAIRS, clock)
    return PairedRatio.of(early, late, error)


def not_slower(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
) -> AgainstItself:
    """Tells whether `after` is not slower than `before`, beyond the spread of `before` against itself.

    Both are timed in turn with `before` once more. At least eight rounds are run, whatever the budget, since
    with fewer nothing could ever be found slower.

    Args:
        before, after: called without arguments; results are waited for.
        budget_s: seconds, first calls included.
        clock: seconds since some moment.
    """
    samples, error = _look_until([before, after, before], _settled_beside_itself, budget_s, _LOOKS[0], clock)
    return _beside_itself(samples, error)


def beside_itself(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
) -> AgainstItself:
    """As :func:`not_slower`, for a figure to be quoted: of steady use, and as precise as the budget allows.

    A sample is of calls one after another: a program that uses several threads would else be timed with the threads
    asleep. Timing goes on when it is settled which is faster.

    Args:
        before, after: called without arguments; results are waited for.
        budget_s: seconds, first calls included.
        clock: seconds since some moment.
    """
    samples = interleaved(
        [before, after, before], budget_s=budget_s, min_rounds=_LOOKS[0], sample_s=_STEADY_S, clock=clock
    )
    return _beside_itself(samples, _ERROR)


def time_candidates(
    fns: Sequence[Callable[[], Any]],
    *,
    budget_s: float,
    sample_s: float = _SAMPLE_S,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Times equivalent forms to choose between, leaving off those that are clearly slower.

    Args:
        fns: the forms, called without arguments; results are waited for.
        budget_s: seconds, first calls included; each form is timed once even beyond it.
        sample_s: seconds that one sample takes at least, in as many calls as that needs. Forms that use several
            threads and are timed after one that does not begin each sample with waking them up.
        clock: seconds since some moment.

    Returns:
        Seconds per call of each form: the lower quartile of its samples, as noise only ever adds time.
    """
    deadline = clock() + budget_s
    rounds = _Rounds(fns, clock, sample_s)
    while rounds.active and rounds.done < _CANDIDATE_ROUNDS:
        started = clock()
        rounds.run()
        now = clock()
        if factor := _DROP.get(rounds.done):
            # Noise only ever adds time, so the least of few samples is the fairest to compare by.
            least = {index: min(rounds.samples[index]) for index in rounds.active}
            limit = factor * min(least.values())
            rounds.active = [index for index in rounds.active if least[index] <= limit]
        if now + (now - started) > deadline or (len(rounds.active) == 1 and rounds.done >= _FEWEST_PAIRS):
            break
    return [float(np.quantile(samples, 0.25)) for samples in rounds.samples]


class _Rounds:
    """Callables that have been called once, and their samples so far."""

    def __init__(self, fns: Sequence[Callable[[], Any]], clock: Clock, sample_s: float = _SAMPLE_S) -> None:
        self.samples: list[list[float]] = [[] for _ in fns]
        self.active = list(range(len(fns)))
        self.done = 0
        self._fns = fns
        self._clock = clock
        self._sample_s = sample_s
        self._repeats = [1] * len(fns)
        for fn in fns:
            jax.block_until_ready(fn())

    def run(self) -> None:
        """Takes one sample of each active callable."""
        # Rotated, and backwards every other round: none always comes first, or after the same neighbour.
        shift = self.done // 2 % len(self.active)
        order = self.active[shift:] + self.active[:shift]
        for index in reversed(order) if self.done % 2 else order:
            self.samples[index].append(self._sample(index))
        self.done += 1

    def _sample(self, index: int) -> float:
        fn, clock = self._fns[index], self._clock
        while True:
            repeats = self._repeats[index]
            started = clock()
            for _ in range(repeats):
                jax.block_until_ready(fn())
            elapsed = clock() - started
            # Half of the wanted length is let pass, so that repeats settle instead of creeping up.
            if elapsed >= self._sample_s / 2 or repeats == _MAX_REPEATS:
                return max(elapsed, 1e-12) / repeats
            wanted = math.ceil(repeats * self._sample_s / max(elapsed, 1e-9))
            self._repeats[index] = min(max(wanted, 2 * repeats), _MAX_REPEATS)


def _look_until(
    fns: Sequence[Callable[[], Any]],
    settled: Callable[[list[list[float]], float], bool],
    budget_s: float,
    min_rounds: int,
    clock: Clock,
) -> tuple[list[list[float]], float]:
    """Runs rounds until `settled(samples, error)` at one of the looks, or the budget is spent.

    Returns:
        The samples, and the share of the error at which each look, and so the last, must be read.
    """
    deadline = clock() + budget_s
    rounds = _Rounds(fns, clock)
    started = clock()
    rounds.run()
    per_round = clock() - started
    # How often to look is settled before any ratio has been seen.
    several = deadline - clock() >= (_LOOKS[1] - 1) * per_round
    looks, error = (_LOOKS, _ERROR / len(_LOOKS)) if several else (_LOOKS[1:2], _ERROR)
    for look in looks:
        while rounds.done < look and (rounds.done < min_rounds or clock() < deadline):
            rounds.run()
        if rounds.done < look or settled(rounds.samples, error):
            break
    return rounds.samples, error


def _settled_pair(samples: list[list[float]], error: float) -> bool:
    return PairedRatio.of(samples[0], samples[1], error).is_settled


def _beside_itself(samples: list[list[float]], error: float) -> AgainstItself:
    before, after, again = samples
    return AgainstItself(PairedRatio.of(before, after, error), PairedRatio.of(before, again, error))


def _settled_beside_itself(samples: list[list[float]], error: float) -> bool:
    verdict = _beside_itself(samples, error)
    return not verdict.holds or verdict.change.is_faster or (verdict.change.is_settled and verdict.spread.is_settled)
