"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from jaxinfer.report import numbers


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        (numbers.count, None, "–"),
        (numbers.count, 0, "0"),
        (numbers.count, 9_999_999, "9,999,999"),
        (numbers.count, 12_345_678, "12.3 M"),
        (numbers.count, 6.01e8, "601 M"),
        (numbers.count, 4.1e9, "4.1 G"),
        (numbers.count, 2e13, "20 T"),
        (numbers.count, 3e17, "3e+17"),
        (numbers.count, math.inf, "inf"),
        (numbers.size, None, "–"),
        (numbers.size, 1023, "1,023 B"),
        (numbers.size, 1536, "1.5 KiB"),
        (numbers.size, 3 << 40, "3 TiB"),
        (numbers.size, 3 << 50, "3,072 TiB"),
        (numbers.milliseconds, None, "–"),
        (numbers.milliseconds, 0.0, "0 ms"),
        (numbers.milliseconds, 0.012, "12 µs"),
        (numbers.milliseconds, 7.94, "7.94 ms"),
        (numbers.milliseconds, 387.4, "387.4 ms"),
        (numbers.milliseconds, 1400, "1.4 s"),
        (numbers.milliseconds, math.nan, "nan ms"),
        (numbers.error, None, "–"),
        (numbers.error, 0.0, "0"),
        (numbers.error, 3.3e-5, "3.30e-05"),
    ],
)
def test_shown(function, value, shown):
    assert function(value) == shown


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (None, 1, "–"),
        (1, None, "–"),
        (math.nan, 1, "–"),
        (2, 2, "same"),
        (0, 3, "new"),
        (100, 60, "−40 %"),
        (1000, 1005, "+0.5 %"),
        (1, 3.2, "×3.2"),
        (5, 0, "−100 %"),
    ],
)
def test_change(before, after, shown):
    assert numbers.change(before, after) == shown
