"""Speed of int8 programs: jax.jit of the original, the float32 program optimized, the int8 program optimized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.quantize_ways import made
from jaxinfer.experiments.task import Request, Row, append, environment, speed, speed_cell, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import AgainstItself, PairedRatio, interleaved

# One sample of a side lasts so long: calls one after another, as in steady use.
_SAMPLE_S = 2e-2
_FEWEST_ROUNDS = 8


def quantize_speed(
    request: Request,
    networks: Sequence[Mapping[str, Any]],
    products: Sequence[Mapping[str, Any]],
    seconds: float,
) -> list[Row]:
    """Times every network and every product of one row with a matrix, each in a fresh process.

    Args:
        request: where to print and write; its models and batch sizes play no part.
        networks: each the ``name`` in the zoo, the ``scheme`` and, if it is another than the nearest values, the
            ``method`` (see `made`), the ``batch`` size and, where something is asked for, ``wanted``: how many times as
            fast as float32.
        products: each the ``shape`` of the matrix, and ``scheme``, ``method`` and ``wanted`` as above.
        seconds: to spend on timing each.

    Raises:
        MeasurementError: a measurement failed in its process.
    """
    options = {"tiny": request.tiny, "optimize": dict(request.optimize), "seconds": seconds}
    rows = []
    for function, jobs in ((network, networks), (product, products)):
        for job in jobs:
            rows.append(fresh(function, **job, **options))
            append(request.output, rows[-1:])
    request.console.print(table(rows))
    return rows


def network(name: str, batch: int, tiny: bool, **options: Any) -> Row:
    """One network at one batch size, here and now; calibrated on the inputs that it is timed with."""
    model = load(name, tiny=tiny)
    inputs = model.make_inputs(batch)
    what = {"model": name, "batch": batch, "tiny": tiny, "pretrained": model.pretrained}
    return {**what, **_measured(model.apply, model.variables, inputs, **options)}


def product(shape: Sequence[int], tiny: bool, **options: Any) -> Row:
    """One row times a matrix; where ``tiny``, one of a sixty-fourth of the size along each axis."""
    k, n = (max(1, s // 64) if tiny else s for s in shape)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(k, n)) / np.sqrt(k), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, k)), jnp.float32)
    what = {"model": f"1×{k} · {k}×{n}", "batch": 1, "tiny": tiny, "pretrained": False}
    return {**what, **_measured(_product, {"w": w}, (x,), **options)}


def _product(params: Mapping[str, Any], x: Any) -> Any:
    return x @ params["w"]


def _measured(
    fun: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    scheme: Mapping[str, Any],
    optimize: Mapping[str, Any],
    seconds: float,
    method: Mapping[str, Any] | None = None,
    wanted: float = 1.0,
) -> Row:
    tune: Literal["auto", "off"] = "off" if optimize.get("tune") == "off" else "auto"
    how = made(method) if method else None
    small, small_params = autoinfer.quantize(fun, params, made(scheme), [tuple(inputs)], method=how, tune=tune)
    plain = jax.jit(fun)
    before = autoinfer.optimize(fun, **optimize).freeze(params)
    after = autoinfer.optimize(small, **optimize).freeze(small_params)
    want, have = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(f(*inputs))]) for f in (before, after))
    calls = [lambda: plain(params, *inputs), lambda: before(*inputs), lambda: after(*inputs), lambda: before(*inputs)]
    original, first, last, again = interleaved(calls, budget_s=seconds, min_rounds=_FEWEST_ROUNDS, sample_s=_SAMPLE_S)
    change, spread = PairedRatio.of(first, last), PairedRatio.of(first, again)
    against = speed(change)
    report = small.explain()
    return {
        "task": "quantize_speed",
        "scheme": _names(scheme),
        "method": _names(method) if method else "nearest",
        **environment(),
        "optimize": dict(optimize),
        "wanted": wanted,
        **against,
        "original_ms": PairedRatio.of(original, last).before_ms,
        "over_original": speed(PairedRatio.of(original, last)),
        "spread_low": spread.low,
        "spread_high": spread.high,
        "not_slower": AgainstItself(change, spread).holds,
        "holds": against["speedup"] >= wanted if wanted > 1 else AgainstItself(change, spread).holds,
        "verdicts": [f.explain(*inputs).verdict for f in (before, after)],
        "bytes": {"before": report.before, "after": report.after},
        "layers": {"quantized": sum(x.is_quantized for x in report.layers), "all": len(report.layers)},
        "forms": _counts(x.form for x in report.layers),
        "cosine": float(want @ have / max(float(np.linalg.norm(want) * np.linalg.norm(have)), 1e-30)),
    }


def _names(options: Any) -> str:
    """The names in a description of an object, from the outermost in."""
    if not isinstance(options, Mapping):
        return ""
    inner = [_names(value) for value in options.values()]
    return ", ".join(filter(None, [options.get("name", ""), *inner]))


def _counts(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def table(rows: Sequence[Row]) -> Sheet:
    """The rows as people read them."""
    columns = (
        "program",
        "batch",
        "scheme",
        "method",
        "float32, jax.jit",
        "float32, optimized",
        "int8, optimized",
        "int8 over float32 (95 % bounds)",
        "wanted",
        "holds",
        "parameters",
        "quantized",
    )
    note = f"wanted: times as fast as float32 optimized; {numbers.UNKNOWN}: not slower beyond its spread against itself"
    return Sheet("Speed of int8 programs", columns, tuple(map(_cells, rows)), (1, 4, 5, 6, 7, 8, 10, 11), note)


def _cells(row: Row) -> tuple[Cell, ...]:
    size, layers = row["bytes"], row["layers"]
    return (
        Cell(row["model"] + (" (tiny)" if row["tiny"] else "")),
        Cell(str(row["batch"])),
        Cell(row["scheme"]),
        Cell(row["method"]),
        Cell(numbers.milliseconds(row["original_ms"])),
        Cell(numbers.milliseconds(row["before_ms"])),
        Cell(numbers.milliseconds(row["after_ms"])),
        speed_cell(row),
        Cell(f"{row['wanted']:.2f}×" if row["wanted"] > 1 else numbers.UNKNOWN),
        verdict_cell(row["holds"]),
        Cell(f"{size['before'] / 2**20:.2f} → {size['after'] / 2**20:.2f} MiB"),
        Cell(f"{layers['quantized']} of {layers['all']}"),
    )
