"""Gradients of the zoo's losses: this project's differentiation against JAX's, everything else being equal.

Both gradients go through `autoinfer.optimize`, so that only the differentiation is compared; what differentiating and
compiling cost is compared under plain `jax.jit`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed_beside_itself, speed_cell, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself

_WAYS: Mapping[str, Callable[..., Any]] = {"jax": jax.value_and_grad, "ours": autoinfer.value_and_grad}
# How often differentiating and compiling is timed.
_ROUNDS = 3


def derivative(request: Request) -> list[Row]:
    """Measures every requested model in a fresh process, prints a table and writes the rows.

    Raises:
        MeasurementError: a measurement failed in its process.
    """
    rows = []
    for name, seconds in request.models.items():
        row = fresh(measure, model=name, tiny=request.tiny, optimize=dict(request.optimize), seconds=seconds)
        rows.append(row)
        append(request.output, [row])
    columns = ("model", "jax", "ours", "speed (95 % bounds)", "not slower", "diff. + compile", "error", "JAX's rules")
    mean = math.exp(sum(math.log(1 / row["speedup"]) for row in rows) / len(rows))
    note = f"geometric mean of the time ratios: {mean:.3f}; errors are relative, in float64"
    cells = tuple(_cells(row) for row in rows)
    request.console.print(Sheet("value_and_grad, both optimized", columns, cells, (1, 2, 3, 5, 6, 7), note))
    return rows


def measure(model: str, tiny: bool, optimize: Mapping[str, Any], seconds: float) -> Row:
    """One model, here and now.

    Args:
        model: its name in the zoo.
        tiny: whether to take the small variant.
        optimize: options of `autoinfer.optimize`.
        seconds: to spend on timing pairs.
    """
    loaded = load(model, tiny=tiny)
    args = (loaded.variables, *loaded.inputs)
    cost = _cost(loaded.loss, args)
    theirs, ours = (f(loaded.loss, allow_int=True) for f in _WAYS.values())
    before, after = (autoinfer.optimize(f, **optimize) for f in (theirs, ours))
    timing = beside_itself(lambda: before(*args), lambda: after(*args), budget_s=seconds)
    return {
        "task": "derivative",
        "model": model,
        "tiny": tiny,
        **environment(),
        "optimize": dict(optimize),
        **speed_beside_itself(timing),
        "seconds": cost,
        "max_relative_error": _error(model),
        "borrowed": dict(ours.explain(*args).borrowed),
    }


def _cost(loss: Callable[..., Any], args: Any) -> dict[str, float]:
    """Seconds to differentiate and compile, each way from nothing and in turn: medians."""
    seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(_ROUNDS):
        for way, gradient in _WAYS.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(gradient(loss, allow_int=True)).lower(*args).compile()
            seconds[way].append(time.perf_counter() - start)
    return {way: float(np.median(found)) for way, found in seconds.items()}


def _error(model: str) -> float:
    """Largest difference of both gradients relative to the largest entry, in float64, on the small variant."""
    with jax.enable_x64(True):
        loaded = load(model, tiny=True, dtype=jnp.float64)
        args = (loaded.variables, *loaded.inputs)
        found = [jax.jit(f(loaded.loss, allow_int=True))(*args) for f in _WAYS.values()]
        want, have = ([np.asarray(x) for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0] for tree in found)
    largest = max(float(np.max(np.abs(x), initial=0.0)) for x in want)
    return max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(have, want, strict=True)) / largest


def _cells(row: Row) -> tuple[Cell, ...]:
    return (
        Cell(row["model"] + (" (tiny)" if row["tiny"] else "")),
        Cell(numbers.milliseconds(row["before_ms"])),
        Cell(numbers.milliseconds(row["after_ms"])),
        speed_cell(row),
        verdict_cell(row["not_slower"]),
        Cell(f"{row['seconds']['ours'] / row['seconds']['jax']:.2f}×"),
        Cell(numbers.error(row["max_relative_error"])),
        Cell(str(sum(row["borrowed"].values()))),
    )
