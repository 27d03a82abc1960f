"""All timings here are simulated: callables advance a clock of their own."""

import math
import random
import statistics

import pytest

from jaxinfer.search.measure import (
    PairedRatio,
    beside_itself,
    compare,
    interleaved,
    median_bounds,
    not_slower,
    time_candidates,
)


class Machine:
    """A simulated machine: programs take a stated time, noisy, under a load that drifts."""

    def __init__(self, seed: int = 0, noise: float = 0.0, drift: float = 0.0) -> None:
        self.now = 100.0
        self.calls: list[str] = []
        self._rng = random.Random(seed)
        self._noise, self._drift = noise, drift

    def clock(self) -> float:
        return self.now

    def program(self, name: str, seconds: float, first: float = 0.0):
        def run() -> None:
            load = 1.0 + self._drift * math.sin(self.now * 7.0)
            spike = self._rng.choice([0.0, 0.0, 0.0, self._rng.expovariate(1.0)]) * self._noise
            took = seconds * load * (1.0 + abs(self._rng.gauss(0.0, self._noise)) + spike)
            self.now += took + (first if name not in self.calls else 0.0)
            self.calls.append(name)

        return run


def binomial_miss(n: int, k: int) -> float:
    return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


@pytest.mark.parametrize("n", [6, 7, 8, 9, 20, 64, 256])
@pytest.mark.parametrize("error", [0.05, 0.05 / 6])
def test_bounds_are_the_tightest_order_statistics(n, error):
    values = random.Random(n).sample(range(1, 10_000), n)
    low, high = median_bounds(values, error)
    if binomial_miss(n, 1) > error:
        assert (low, high) == (0.0, math.inf)
        return
    k = sorted(values).index(low) + 1
    assert high == sorted(values)[n - k]
    assert binomial_miss(n, k) <= error < binomial_miss(n, k + 1)


@pytest.mark.parametrize("n", [3, 4, 5, 6, 12, 33])
def test_bounds_cover_the_median(n):
    """The share of misses over many samples of a skewed distribution stays within 5 % and sampling error."""
    rng = random.Random(n)
    trials = 4000
    misses = 0
    for _ in range(trials):
        low, high = median_bounds([rng.lognormvariate(0.3, 0.5) for _ in range(n)])
        misses += not low <= math.exp(0.3) <= high
    assert misses / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_student_bounds_of_few_values():
    logs = [0.0, 0.1, 0.2]
    low, high = median_bounds([math.exp(x) for x in logs])
    # t(0.975, 2 degrees) = 4.3027; deviation 0.1; centre 0.1.
    assert math.log(low) == pytest.approx(0.1 - 4.3027 * 0.1 / math.sqrt(3), rel=1e-3)
    assert math.log(high) == pytest.approx(0.1 + 4.3027 * 0.1 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5]])
def test_too_few_values_bound_nothing(values):
    assert median_bounds(values) == (0.0, math.inf)
    ratio = PairedRatio.of([1.0] * len(values), values)
    assert ratio.ratio == 0.5 and not ratio.is_faster and not ratio.is_slower


def test_paired_ratio_is_of_pairs():
    """Halving each pair is seen exactly although the pairs differ tenfold."""
    before = [0.001 * 1.5**i for i in range(9)]
    ratio = PairedRatio.of(before, [time / 2 for time in before])
    assert (ratio.ratio, ratio.low, ratio.high, ratio.rounds) == (0.5, 0.5, 0.5, 9)
    assert ratio.before_ms == pytest.approx(1.5**4) and ratio.after_ms == pytest.approx(1.5**4 / 2)
    with pytest.raises(ValueError):
        PairedRatio.of([1.0, 2.0], [1.0])


def test_interleaved_takes_all_orders_in_turn():
    machine = Machine()
    fns = [machine.program(name, 0.001) for name in "abc"]
    samples = interleaved(fns, budget_s=0.0, min_rounds=6, clock=machine.clock)
    assert "".join(machine.calls[:3]) == "abc"
    orders = ["".join(machine.calls[i : i + 3]) for i in range(3, 21, 3)]
    assert sorted(orders) == ["abc", "acb", "bac", "bca", "cab", "cba"]
    assert [len(s) for s in samples] == [6, 6, 6]
    assert all(t == pytest.approx(0.001) for s in samples for t in s)


def test_interleaved_minds_budget_and_limits():
    machine = Machine()
    fns = [machine.program("a", 0.01), machine.program("b", 0.03, first=1.0)]
    started = machine.now
    samples = interleaved(fns, budget_s=2.0, clock=machine.clock)
    assert machine.now - started == pytest.approx(2.0, abs=0.05)
    assert len(samples[0]) == len(samples[1]) == pytest.approx((2.0 - 1.04) / 0.04, abs=2)
    assert max(samples[1]) < 0.031  # the first call's second is in no sample
    assert len(interleaved(fns, budget_s=100.0, max_rounds=5, clock=machine.clock)[0]) == 5


def test_short_functions_are_repeated_within_a_sample():
    machine = Machine()
    ticks = 1e-6

    def coarse() -> float:
        return math.floor(machine.now / ticks) * ticks

    tiny, long = machine.program("tiny", 1.7e-6), machine.program("long", 5e-3)
    samples = interleaved([tiny, long], budget_s=0.0, min_rounds=5, clock=coarse)
    assert all(t == pytest.approx(1.7e-6, rel=0.02) for t in samples[0])
    assert machine.calls.count("long") == 6
    assert machine.calls.count("tiny") < 5000


@pytest.mark.parametrize("after, faster, slower", [(0.5, True, False), (0.97, True, False), (1.5, False, True)])
def test_compare_sees_through_drift_and_noise(after, faster, slower):
    for seed in range(20):
        machine = Machine(seed, noise=0.03, drift=0.5)
        before_, after_ = machine.program("before", 0.004), machine.program("after", 0.004 * after)
        ratio = compare(before_, after_, budget_s=2.5, clock=machine.clock)
        assert (ratio.is_faster, ratio.is_slower) == (faster, slower), (seed, ratio)
        assert ratio.low <= ratio.ratio <= ratio.high
        assert ratio.ratio == pytest.approx(after, rel=0.05)


def test_compare_stops_when_the_verdict_is_clear():
    machine = Machine(noise=0.02)
    ratio = compare(
        machine.program("before", 0.01), machine.program("after", 0.005), budget_s=60.0, clock=machine.clock
    )
    assert ratio.rounds == 8 and ratio.is_faster
    equal = Machine()
    ratio = compare(equal.program("a", 0.01), equal.program("b", 0.01), budget_s=60.0, clock=equal.clock)
    assert ratio.rounds == 8 and not ratio.is_faster and not ratio.is_slower


def test_looking_often_does_not_make_a_difference_appear():
    """Equal programs are called different in at most 5 % of runs, although each run looks up to six times."""
    runs, wrong = 400, 0
    for seed in range(runs):
        machine = Machine(seed, noise=0.1, drift=0.3)
        a, b = machine.program("a", 0.001), machine.program("b", 0.001)
        ratio = compare(a, b, budget_s=0.3, clock=machine.clock)
        wrong += ratio.is_faster or ratio.is_slower
    assert wrong / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("budget, rounds", [(0.0, 3), (9.0, 3), (14.0, 5), (40.0, 8)])
def test_compare_of_slow_programs_spends_little_more_than_its_budget(budget, rounds):
    machine = Machine(noise=0.01)
    started = machine.now
    before, after = machine.program("before", 1.5), machine.program("after", 0.6)
    ratio = compare(before, after, budget_s=budget, clock=machine.clock)
    assert ratio.rounds == pytest.approx(rounds, abs=1)
    assert ratio.is_faster
    assert machine.now - started <= max(budget, 4 * 2.1) + 2.4


def test_not_slower_tells_slower_programs_from_equal_ones():
    held = {1.0: 0, 0.9: 0, 1.1: 0}
    for factor in held:
        for seed in range(50):
            machine = Machine(seed, noise=0.05, drift=0.3)
            before, after = machine.program("before", 0.002), machine.program("after", 0.002 * factor)
            verdict = not_slower(before, after, budget_s=1.5, clock=machine.clock)
            held[factor] += verdict.holds
            assert verdict.change.rounds == verdict.spread.rounds >= 8
    assert held == {1.0: 50, 0.9: 50, 1.1: 0}


def test_not_slower_times_enough_even_without_budget():
    machine = Machine(noise=0.01)
    before, after = machine.program("before", 0.5), machine.program("after", 1.0)
    verdict = not_slower(before, after, budget_s=0.0, clock=machine.clock)
    assert verdict.change.rounds == 8 and not verdict.holds


def test_a_figure_to_be_quoted_is_timed_for_as_long_as_there_is_time():
    machine = Machine(noise=0.01)
    before, after = machine.program("before", 0.02), machine.program("after", 0.01)
    verdict = beside_itself(before, after, budget_s=3.0, clock=machine.clock)
    assert verdict.holds and 30 <= verdict.change.rounds <= 60
    assert verdict.change.low < 0.5 < verdict.change.high < 0.52


def test_candidates_that_are_clearly_slower_are_left_off():
    machine = Machine(noise=0.02)
    times = {"best": 0.001, "near": 0.00105, "double": 0.0023, "awful": 0.05}
    fns = [machine.program(name, seconds) for name, seconds in times.items()]
    medians = time_candidates(fns, budget_s=10.0, clock=machine.clock)
    assert [machine.calls.count(name) for name in times] == [17, 17, 3, 2]
    for median, seconds in zip(medians, times.values(), strict=True):
        assert median == pytest.approx(seconds, rel=0.1)
    assert statistics.median(medians[:2]) < min(medians[2:])


def test_candidates_mind_the_budget():
    machine = Machine()
    fns = [machine.program(name, 0.1) for name in "abc"]
    started = machine.now
    assert time_candidates(fns, budget_s=1.0, clock=machine.clock) == pytest.approx([0.1] * 3)
    assert machine.now - started <= 1.0 + 1e-9
    assert len(time_candidates(fns, budget_s=0.0, clock=machine.clock)) == 3
    assert time_candidates([], budget_s=1.0, clock=machine.clock) == []


def test_results_are_waited_for():
    waited = []

    class Pending:
        def block_until_ready(self) -> "Pending":
            waited.append(self)
            return self

    machine = Machine()

    def fn() -> Pending:
        machine.now += 0.01
        return Pending()

    interleaved([fn], budget_s=0.0, min_rounds=3, clock=machine.clock)
    assert len(waited) == 4
