"""What optimizing costs besides: per call, per equation, and at the first call."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.pipeline import TUNING_SECONDS
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import interleaved

_WIDTH = 16


def overhead(
    request: Request, leaves: int, equations: Sequence[int], compiled: Sequence[int], processes: int
) -> list[Row]:
    """Measures all three costs, writes every row as it comes and prints tables.

    Args:
        request: where to print and write, and the models whose first call is timed.
        leaves: argument leaves of the call that is timed.
        equations: sizes of the programs that are optimized with ``tune="off"``.
        compiled: those of them that XLA compiles as well, to compare with.
        processes: how often each kind of first call is timed.
    """
    rows: list[Row] = []

    def add(found: list[Row]) -> list[Row]:
        new = [{"task": "overhead", **row} for row in found]
        append(request.output, new)
        rows.extend(new)
        return found

    request.console.print(_call_sheet(add([fresh(per_call, leaves=leaves)])))
    request.console.print(_size_sheet(add(fresh(per_equation, equations=list(equations), compiled=list(compiled)))))
    first = [add([first_calls(name, request.tiny, processes)])[0] for name in request.models]
    request.console.print(_first_sheet(first))
    return rows


def per_call(leaves: int) -> Row:
    """Microseconds that a call takes beyond the same program's under jax.jit, with many argument leaves."""
    params = {f"leaf{i}": jnp.full((), float(i)) for i in range(leaves)}

    def total(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        return x + jnp.stack(list(params.values())).sum()

    x = jnp.ones(())
    jitted = jax.jit(total)
    # Without rules all run the same program, and only the way to it differs.
    optimized = autoinfer.optimize(total, tune="off", rules=())
    frozen = optimized.freeze(params)
    samples = interleaved(
        [lambda: jitted(params, x), lambda: optimized(params, x), lambda: frozen(x)], budget_s=20, max_rounds=5000
    )
    base, *others = samples
    microseconds = [statistics.median(b - a for a, b in zip(base, other)) * 1e6 for other in others]
    return {
        **environment(),
        "what": "per call",
        "leaves": leaves,
        "jit_us": statistics.median(base) * 1e6,
        "optimized_over_jit_us": microseconds[0],
        "frozen_over_jit_us": microseconds[1],
    }


def per_equation(equations: Sequence[int], compiled: Sequence[int]) -> list[Row]:
    """Seconds that optimizing takes with ``tune="off"``, and XLA's compile of the original where asked for."""
    _optimize_seconds(50)  # loads the rules
    rows = []
    for count in equations:
        seconds = _optimize_seconds(count)
        row = {**environment(), "what": "per equation", "equations": count, "optimize_s": seconds, "compile_s": None}
        if count in compiled:
            lowered = jax.jit(_program(count)).lower(_argument())
            start = time.perf_counter()
            lowered.compile()
            row["compile_s"] = time.perf_counter() - start
        rows.append(row)
    return rows


def _optimize_seconds(count: int) -> float:
    """Of optimizing alone: without the trace, which jax.jit makes as well."""
    function = _program(count)
    start = time.perf_counter()
    jax.make_jaxpr(function)(_argument())
    traced = time.perf_counter()
    autoinfer.optimize(_program(count), tune="off").program(_argument())
    return max(time.perf_counter() - traced - (traced - start), 0.0)


def _argument() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.float32)


def _program(count: int) -> Callable[[jax.Array], jax.Array]:
    """A program of about `count` equations: elementwise ones, and a product to every hundred.

    Products are few because XLA's compile of them takes longest, and would hide what optimizing takes.
    """
    scales = np.random.default_rng(0).uniform(0.5, 1.5, (math.ceil(count / 11), 4)).astype(np.float32)

    def program(x: jax.Array) -> jax.Array:
        for layer, (a, b, c, d) in enumerate(scales.tolist()):
            x = jax.lax.max(x * a + b, c)
            x = jax.lax.min(jax.lax.abs(x - d) * c, a)
            x = jax.lax.tanh(-x if layer % 10 else jnp.dot(x, x)) * 0.5 + d
        return x

    return program


def first_calls(model: str, tiny: bool, processes: int) -> Row:
    """Seconds of the first call in fresh processes: jax.jit, optimized with an empty cache, and with a warm one.

    Every round starts with an empty cache, so that what one of them settles on does not decide for all. Medians count.
    """
    rounds = [_round(model, tiny) for _ in range(processes)]
    seconds = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    budget = TUNING_SECONDS["auto"]
    return {
        **fresh(environment),
        "what": "first call",
        "model": model,
        "tiny": tiny,
        "processes": processes,
        **seconds,
        "rounds": rounds,
        "budget_s": budget,
        "first_holds": seconds["first_s"] <= 3 * seconds["jit_s"] + budget,
        "warm_holds": seconds["warm_s"] <= 1.5 * seconds["jit_s"],
    }


def _round(model: str, tiny: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="jaxinfer-") as cache:
        environment_ = {"JAXINFER_CACHE_DIR": cache}
        ways = {"first_s": "optimized", "jit_s": "jit", "warm_s": "optimized"}
        return {key: fresh(first_call, environment_, model=model, tiny=tiny, way=way) for key, way in ways.items()}


def first_call(model: str, tiny: bool, way: str) -> float:
    """Seconds of the first call of one model in this process, from the plain function to its results."""
    loaded = load(model, tiny=tiny)
    jax.block_until_ready(jnp.ones(()) + 1)  # starts the backend
    start = time.perf_counter()
    if way == "jit":
        result = jax.jit(loaded.apply)(*loaded.known, *loaded.live)
    else:
        result = autoinfer.optimize(loaded.apply).freeze(*loaded.known)(*loaded.live)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _call_sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("argument leaves", "jax.jit", "optimized, more than that", "frozen, more than that")
    cells = tuple(
        (
            Cell(str(row["leaves"])),
            Cell(f"{row['jit_us']:.1f} µs"),
            Cell(f"{row['optimized_over_jit_us']:+.1f} µs"),
            Cell(f"{row['frozen_over_jit_us']:+.1f} µs"),
        )
        for row in rows
    )
    return Sheet("Per call", columns, cells, (0, 1, 2, 3))


def _size_sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("equations", "optimizing", "per equation", "XLA's compile", "ratio")
    cells = tuple(
        (
            Cell(numbers.count(row["equations"])),
            Cell(numbers.milliseconds(1e3 * row["optimize_s"])),
            Cell(numbers.milliseconds(1e3 * row["optimize_s"] / row["equations"])),
            Cell(numbers.milliseconds(row["compile_s"] and 1e3 * row["compile_s"])),
            Cell(f"{row['optimize_s'] / row['compile_s']:.2f}" if row["compile_s"] else numbers.UNKNOWN),
        )
        for row in rows
    )
    return Sheet('Optimizing with tune="off"', columns, cells, (0, 1, 2, 3, 4))


def _first_sheet(rows: Sequence[Row]) -> Sheet:
    columns = ("model", "jax.jit", "optimized", "≤ 3× and the budget", "warm cache", "ratio", "≤ 1.5×")
    cells = tuple(
        (
            Cell(row["model"]),
            Cell(f"{1e3 * row['jit_s']:,.0f} ms"),
            Cell(f"{1e3 * row['first_s']:,.0f} ms"),
            verdict_cell(row["first_holds"]),
            Cell(f"{1e3 * row['warm_s']:,.0f} ms"),
            Cell(f"{row['warm_s'] / row['jit_s']:.2f}"),
            verdict_cell(row["warm_holds"]),
        )
        for row in rows
    )
    return Sheet("First call in fresh processes, medians", columns, cells, (1, 2, 4, 5))
