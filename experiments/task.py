"""What every task is given, and what it leaves behind: rows of figures, one JSON object to a line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jaxlib
from rich.console import Console

from jaxinfer.report.output import console
from jaxinfer.report.sheet import Cell
from jaxinfer.search.measure import AgainstItself, PairedRatio

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to measure, and where the figures go.

    Attributes:
        models: names in `jaxinfer.models.zoo.ZOO`, each with seconds to spend on timing it.
        batches: batch sizes.
        optimize: options of `autoinfer.optimize`.
        tiny: whether to take the small variants of the models.
        output: a file of JSON lines, to which rows are appended.
        console: where tables are printed.
    """

    models: Mapping[str, float]
    batches: Sequence[int] = (1,)
    optimize: Mapping[str, Any] = field(default_factory=dict)
    tiny: bool = False
    output: Path = Path("outputs/figures.jsonl")
    console: Console = field(default_factory=console)


def environment() -> Row:
    """The machine and the versions that a figure was measured with."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file of JSON lines, making its folder where there is none.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def speed(ratio: PairedRatio) -> Row:
    """How many times faster the second of a pair is, with 95 % bounds, and milliseconds of both."""
    return {
        "speedup": 1 / ratio.ratio,
        "speedup_low": 1 / ratio.high,
        "speedup_high": 1 / ratio.low if ratio.low else None,
        "before_ms": ratio.before_ms,
        "after_ms": ratio.after_ms,
        "pairs": ratio.rounds,
    }


def speed_beside_itself(timing: AgainstItself) -> Row:
    """The same, with the verdict "not slower", and the spread of the first against itself that it rests on."""
    return {
        **speed(timing.change),
        "not_slower": timing.holds,
        "spread_low": timing.spread.low,
        "spread_high": timing.spread.high,
    }


def speed_cell(row: Row) -> Cell:
    """What `speed` wrote into a row: "1.83× (1.79 to 1.88)"."""
    low, high = row["speedup_low"], row["speedup_high"]
    bounds = f"{low:.2f} to {high:.2f}" if high is not None else f"from {low:.2f}"
    return Cell(f"{row['speedup']:.2f}× ({bounds})", "good" if low > 1 else "")


def verdict_cell(holds: bool) -> Cell:
    """Whether what was asked for holds."""
    return Cell("yes" if holds else "NO", "" if holds else "bad")
