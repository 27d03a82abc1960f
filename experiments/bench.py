"""The zoo, original against optimized: one fresh process for each model, both timed in pairs within it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxinfer import autoinfer
from jaxinfer.experiments.process import MeasurementError, fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed_beside_itself, speed_cell, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself


def bench(request: Request) -> list[Row]:
    """Measures every requested model at every batch size, writes the rows and prints them as a table.

    A model that fails gives a row with "error" instead of figures, and the others are measured all the same.

    Raises:
        OSError: the rows cannot be written.
    """
    jobs = [(name, seconds, batch) for name, seconds in request.models.items() for batch in request.batches]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=request.console, disable=not request.console.is_terminal) as progress:
        task = progress.add_task("bench", total=len(jobs))
        for name, seconds, batch in jobs:
            progress.update(task, description=f"{name}, batch {batch}")
            job = {"model": name, "batch": batch, "tiny": request.tiny, "optimize": dict(request.optimize)}
            try:
                row = fresh(measure, seconds=seconds, **job)
            except MeasurementError as error:
                row = {"task": "bench", **job, "error": str(error)}
                request.console.print(f"[red]{name}, batch {batch}:[/red]", str(error))
            append(request.output, [row])
            rows.append(row)
            progress.advance(task)
    request.console.print(table(rows))
    return rows


def measure(model: str, batch: int, tiny: bool, optimize: Mapping[str, Any], seconds: float) -> Row:
    """One model at one batch size, here and now.

    The original is `jax.jit` with the weights as arguments; in the optimized form they are frozen.

    Args:
        model: its name in the zoo.
        batch: batch size.
        tiny: whether to take the small variant.
        optimize: options of `autoinfer.optimize`.
        seconds: to spend on timing pairs.
    """
    loaded = load(model, tiny=tiny)
    inputs = loaded.make_inputs(batch)
    known = (loaded.variables, *inputs[: loaded.frozen_inputs])
    live = inputs[loaded.frozen_inputs :]
    original = jax.jit(loaded.apply)
    fast = autoinfer.optimize(loaded.apply, **optimize).freeze(*known)

    original_s, reference = _first_call(original, *known, *live)
    optimized_s, result = _first_call(fast, *live)
    timing = beside_itself(lambda: original(*known, *live), lambda: fast(*live), budget_s=seconds)
    explained = fast.explain(*live)
    return {
        "task": "bench",
        "model": model,
        "batch": batch,
        "tiny": tiny,
        "pretrained": loaded.pretrained,
        **environment(),
        "optimize": dict(optimize),
        **speed_beside_itself(timing),
        **_errors(reference, result),
        "verdict": explained.verdict,
        "reason": explained.reason,
        "first_call_s": {"before": original_s, "after": optimized_s},
        "compile_s": {"before": explained.before.compile_seconds, "after": explained.after.compile_seconds},
        "temporary_bytes": {
            "before": temporary_bytes(original.lower(*known, *live)),
            "after": temporary_bytes(fast.lower(*live)),
        },
    }


def temporary_bytes(lowered: Any) -> int | None:
    """Memory that a program needs besides arguments and results; None where the backend does not say."""
    memory = lowered.compile().memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def _first_call(function: Any, *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def _errors(reference: Any, result: Any) -> Row:
    """Largest difference, and relative to the largest value of its array."""
    worst = relative = 0.0
    for want, have in zip(jax.tree.leaves(reference), jax.tree.leaves(result), strict=True):
        wide, other = np.asarray(want, np.float64), np.asarray(have, np.float64)
        error = float(np.max(np.abs(wide - other), initial=0.0))
        scale = float(np.max(np.abs(wide), initial=0.0))
        worst, relative = max(worst, error), max(relative, error / scale if scale else error)
    return {"max_error": worst, "max_relative_error": relative}


def table(rows: list[Row]) -> Sheet:
    """The rows as people read them."""
    columns = ("model", "batch", "original", "optimized", "speed (95 % bounds)", "not slower", "error", "runs")
    cells = tuple(_cells(row) for row in rows)
    measured = next((row for row in rows if "error" not in row), None)
    note = f"JAX {measured['jax']} on {measured['device']}, {measured['cores']} cores" if measured else ""
    return Sheet("Original (jax.jit) and optimized", columns, cells, (1, 2, 3, 4, 6), note)


def _cells(row: Row) -> tuple[Cell, ...]:
    name = Cell(row["model"] + (" (tiny)" if row["tiny"] else ""))
    if "error" in row:
        return (name, Cell(str(row["batch"])), *[Cell(numbers.UNKNOWN)] * 5, Cell("failed", "bad"))
    return (
        name,
        Cell(str(row["batch"])),
        Cell(numbers.milliseconds(row["before_ms"])),
        Cell(numbers.milliseconds(row["after_ms"])),
        speed_cell(row),
        verdict_cell(row["not_slower"]),
        Cell(numbers.error(row["max_error"])),
        Cell(row["verdict"], "dim"),
    )
