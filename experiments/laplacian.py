"""Laplacians of a batch of examples: against folx, where it is installed, and against the trace of `jax.hessian`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed_beside_itself, speed_cell, verdict_cell
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself

Params = Mapping[str, Any]
_TINY_BATCH = 2


@dataclass(frozen=True)
class Problem:
    """A scalar function of one example.

    Attributes:
        fun: (parameters, example) -> scalar.
        weights: shapes of the parameters.
        inputs: number of inputs.
    """

    fun: Callable[[Params, jax.Array], jax.Array]
    weights: Mapping[str, tuple[int, ...]]
    inputs: int


def mlp(p: Params, x: jax.Array) -> jax.Array:
    """A network of tanh layers."""
    for layer in ("a", "b", "c"):
        x = jnp.tanh(x @ p[layer] + p[layer + "0"])
    return (x @ p["d"])[0]


def attention(p: Params, x: jax.Array) -> jax.Array:
    """Sixteen particles: an embedding of each, one attention block of four heads, a layer, and a sum."""
    h = jnp.tanh(x.reshape(-1, 3) @ p["embed"])
    q, k, v = ((h @ p[name]).reshape(len(h), 4, -1) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]).astype(x.dtype), -1)
    y = h + jnp.einsum("hts,shd->thd", weights, v).reshape(h.shape) @ p["out"]
    return jnp.sum((y + jnp.tanh(y @ p["layer"])) @ p["sum"])


def slater(p: Params, x: jax.Array) -> jax.Array:
    """Sixteen electrons: orbitals of each from a network, and the logarithm of their determinant."""
    h = jnp.tanh(x.reshape(-1, 3) @ p["a"])
    return jnp.linalg.slogdet(jnp.tanh(h @ p["b"]) @ p["c"])[1]


def network(inputs: int, width: int) -> Problem:
    """The network with three layers of the given width."""
    layers = {"a": (inputs, width), "b": (width, width), "c": (width, width), "d": (width, 1)}
    return Problem(mlp, {**layers, **dict.fromkeys(("a0", "b0", "c0"), (width,))}, inputs)


_SQUARE = dict.fromkeys(("query", "key", "value", "out", "layer"), (64, 64))

PROBLEMS: dict[str, Problem] = {
    "MLP 48→256→256→256→1": network(48, 256),
    "attention block, 16×64": Problem(attention, {"embed": (3, 64), **_SQUARE, "sum": (64,)}, 48),
    "Slater log-determinant, 16": Problem(slater, {"a": (3, 64), "b": (64, 64), "c": (64, 16)}, 48),
}


def laplacian(request: Request, batch: int, seconds: float, thresholds: Sequence[int]) -> list[Row]:
    """Times every problem against folx and the trace of the Hessian, prints a table and writes the rows.

    Args:
        request: where to print and write; its models play no part.
        batch: number of examples.
        seconds: to spend on each comparison.
        thresholds: of folx's sparsity; each is timed, the table shows the one that folx is fastest with.
    """
    batch = _TINY_BATCH if request.tiny else batch
    options = {"batch": batch, "seconds": seconds, "thresholds": list(thresholds)}
    rows = [fresh(measure, problem=name, **options) for name in PROBLEMS]
    append(request.output, rows)
    columns = (
        "problem",
        "jax.hessian",
        "speed (95 % bounds)",
        "folx",
        "ours",
        "speed (95 % bounds)",
        "not slower",
        "error",
    )
    note = f"batches of {batch}; error: relative, in float64, against the trace of jax.hessian"
    request.console.print(Sheet("Laplacians", columns, tuple(map(_cells, rows)), (1, 2, 3, 4, 5, 6, 7), note))
    return rows


def measure(problem: str, batch: int, seconds: float, thresholds: Sequence[int]) -> Row:
    """One problem, here and now."""
    figures = measured(PROBLEMS[problem], batch, seconds, thresholds)
    return {"task": "laplacian", "problem": problem, "batch": batch, **environment(), **figures}


def measured(case: Problem, batch: int, seconds: float, thresholds: Sequence[int]) -> Row:
    """The error in float64, and times in float32 beside the trace of the Hessian and beside folx."""
    with jax.enable_x64(True):
        params, x = _arguments(case, batch, jnp.float64)
        exact = _trace_of_hessian(case)(params, x)
        error = float(jnp.max(jnp.abs(_ours(case)(params, x) - exact)) / jnp.max(jnp.abs(exact)))
    params, x = _arguments(case, batch, jnp.float32)
    ours = _ours(case)
    hessian = _trace_of_hessian(case)
    others = {str(t): _folx(case, t) for t in thresholds} if importlib.util.find_spec("folx") else {}
    beside_folx = {t: _beside(other, ours, params, x, seconds) for t, other in others.items()}
    return {
        "relative_error": error,
        "beside_hessian": _beside(hessian, ours, params, x, seconds),
        "beside_folx": beside_folx,
    }


def _arguments(case: Problem, batch: int, dtype: Any) -> tuple[Params, jax.Array]:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal(s) / s[0] ** 0.5, dtype) for k, s in case.weights.items()}
    return params, jnp.asarray(rng.standard_normal((batch, case.inputs)), dtype)


def _beside(before: Callable[..., Any], after: Callable[..., Any], params: Params, x: Any, seconds: float) -> Row:
    return speed_beside_itself(beside_itself(lambda: before(params, x), lambda: after(params, x), budget_s=seconds))


def _batched(of: Callable[[Callable[..., Any]], Callable[..., Any]], case: Problem) -> Callable[..., Any]:
    """jax.jit of an operator on the function of one example, for all examples."""
    return jax.jit(lambda p, xs: jax.vmap(of(lambda x: case.fun(p, x)))(xs))


def _ours(case: Problem) -> Callable[..., Any]:
    return _batched(autoinfer.laplacian, case)


def _trace_of_hessian(case: Problem) -> Callable[..., Any]:
    return _batched(lambda f: lambda x: jnp.trace(jax.hessian(f)(x)), case)


def _folx(case: Problem, threshold: int) -> Callable[..., Any]:
    folx = importlib.import_module("folx")
    return _batched(lambda f: lambda x: folx.forward_laplacian(f, sparsity_threshold=threshold)(x).laplacian, case)


def _cells(row: Row) -> tuple[Cell, ...]:
    beside, folx = row["beside_hessian"], min(row["beside_folx"].values(), key=lambda r: r["before_ms"], default=None)
    first = (Cell(row["problem"]), Cell(numbers.milliseconds(beside["before_ms"])), speed_cell(beside))
    error = Cell(f"{row['relative_error']:.1e}", "" if row["relative_error"] < 1e-9 else "bad")
    if folx is None:
        ours, unknown = Cell(numbers.milliseconds(beside["after_ms"])), Cell(numbers.UNKNOWN)
        return (*first, unknown, ours, unknown, unknown, error)
    times = (Cell(numbers.milliseconds(folx["before_ms"])), Cell(numbers.milliseconds(folx["after_ms"])))
    return (*first, *times, speed_cell(folx), verdict_cell(folx["not_slower"]), error)
