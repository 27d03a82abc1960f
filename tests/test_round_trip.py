"""Function → graph → function on the primitive cases that ship with JAX, as they are and with every rule applied.

By default every eighth case runs; the complete sweeps are marked ``slow``. Each prints its figures.
"""

import pytest
from harness_cases import Report, all_harnesses, cases, improved, round_trip

SAMPLE = 8
# What plain jit itself refuses on the CPU: additions of booleans; in JAX 0.10, decompositions of 16-bit floats.
MOST_SKIPPED = 0.03


def sweep(step, examine):
    report = Report()
    for case in cases(step, report):
        examine(case, report)
    print(f"\n{report}")
    assert not report.failures, "\n".join(report.failures)
    assert report.ran + report.skipped.total() == len(all_harnesses[::step])
    assert report.skipped.total() <= MOST_SKIPPED * report.ran
    return report


def test_there_are_as_many_cases_as_expected():
    assert len(all_harnesses) > 5400


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)])
def test_round_trip_gives_equal_results_of_the_same_types(step):
    report = sweep(step, round_trip)
    assert report.counts["with the same HLO"] > 0.95 * report.ran


@pytest.mark.parametrize("step", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)])
def test_every_rule_together_agrees_within_rounding(step):
    sweep(step, improved)
