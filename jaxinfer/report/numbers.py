"""Numbers as people read them; what is unknown is shown as a dash and never as a zero."""

from __future__ import annotations

import math

UNKNOWN = "–"


def count(value: float | None) -> str:
    """A whole number with separators, or with a metric suffix from ten million on (12.3 M)."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1e7:
        return f"{round(value):,}"
    for suffix in ("M", "G", "T"):
        value /= 1e6 if suffix == "M" else 1e3
        if abs(value) < 1e3:
            break
    else:
        return f"{value * 1e12:.3g}"
    return f"{value:.3g} {suffix}"


def size(value: float | None) -> str:
    """A number of bytes in binary units (1.5 MiB)."""
    if value is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{round(value):,} B" if unit == "B" else f"{value:,.4g} {unit}"


def milliseconds(value: float | None) -> str:
    """A time given in milliseconds, in the unit that suits it."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return f"{value} ms"
    if abs(value) >= 1000:
        return f"{value / 1e3:.3g} s"
    if 0 < abs(value) < 0.1:
        return f"{value * 1e3:.3g} µs"
    return f"{value:.4g} ms" if abs(value) >= 100 else f"{value:.3g} ms"


def error(value: float | None) -> str:
    """An error or tolerance in scientific notation; exact zero reads 0."""
    if value is None:
        return UNKNOWN
    return "0" if value == 0 else f"{value:.2e}"


def change(before: float | None, after: float | None) -> str:
    """What became of a number: "−40 %", "×3.2", "same", or a dash where one side is unknown."""
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return UNKNOWN
    if before == after:
        return "same"
    if before <= 0:
        return "new"
    ratio = after / before
    if ratio >= 2:
        return f"×{ratio:.3g}"
    percent = 100 * (ratio - 1)
    sign = "−" if percent < 0 else "+"
    return f"{sign}{abs(percent):.0f} %" if abs(percent) >= 10 else f"{sign}{abs(percent):.2g} %"
