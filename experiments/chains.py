"""Matrix chains as people write them, against the best order written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed, speed_beside_itself, speed_cell
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import compare, not_slower

_TINY = 16


@dataclass(frozen=True)
class Chain:
    """A product as written and in its best order.

    Attributes:
        shapes: of the arguments; sizes are shares of the task's `size`.
    """

    written: Callable[..., jax.Array]
    best: Callable[..., jax.Array]
    shapes: tuple[tuple[float, ...], ...]


_SQUARE, _TALL, _WIDE, _VECTOR, _FEW = (1, 1), (1, 1 / 16), (1 / 16, 1), (1,), (1 / 16, 1)

CHAINS: dict[str, Chain] = {
    "A@B@C@x": Chain(
        lambda a, b, c, x: a @ b @ c @ x,
        lambda a, b, c, x: a @ (b @ (c @ x)),
        (_SQUARE, _SQUARE, _SQUARE, _VECTOR),
    ),
    "A@U@V@B": Chain(
        lambda a, u, v, b: a @ u @ v @ b,
        lambda a, u, v, b: (a @ u) @ (v @ b),
        (_SQUARE, _TALL, _WIDE, _SQUARE),
    ),
    "U@V@W@Z": Chain(
        lambda u, v, w, z: u @ v @ w @ z,
        lambda u, v, w, z: u @ ((v @ w) @ z),
        (_TALL, _WIDE, _TALL, _WIDE),
    ),
    "A.T@B@A.T@B@x": Chain(
        lambda a, b, x: a.T @ b @ a.T @ b @ x,
        lambda a, b, x: a.T @ (b @ (a.T @ (b @ x))),
        (_SQUARE, _SQUARE, _VECTOR),
    ),
    "vmap(A@B@v)": Chain(
        lambda a, b, vs: jax.vmap(lambda v: a @ b @ v)(vs),
        lambda a, b, vs: (vs @ b.T) @ a.T,
        (_SQUARE, _SQUARE, _FEW),
    ),
}


def chains(request: Request, size: int, seconds: float) -> list[Row]:
    """Times every chain as written, optimized and in its best order, prints a table and writes the rows.

    Args:
        request: where to print and write; its models play no part.
        size: side of the largest matrices.
        seconds: to spend on timing each chain.
    """
    size = _TINY if request.tiny else size
    options = {"size": size, "seconds": seconds, "optimize": dict(request.optimize)}
    rows = [fresh(measure, chain=name, **options) for name in CHAINS]
    append(request.output, rows)
    columns = ("chain", "as written", "speed (95 % bounds)", "best order", "optimized", "ratio", "FLOPs", "verdict")
    note = f"matrices of {size}×{size}; ratio, FLOPs and verdict: the optimized form beside the best order"
    cells = tuple(_cells(row) for row in rows)
    request.console.print(Sheet("Matrix chains", columns, cells, (1, 2, 3, 4, 5, 6), note))
    return rows


def measure(chain: str, size: int, seconds: float, optimize: Mapping[str, Any]) -> Row:
    """One chain, here and now: against jax.jit as written, and against jax.jit of the best order."""
    rng = np.random.default_rng(0)
    case = CHAINS[chain]
    shapes = [[max(1, round(size * share)) for share in shares] for shares in case.shapes]
    arguments = [jnp.asarray(rng.standard_normal(shape) / size**0.5, jnp.float32) for shape in shapes]
    written, best = jax.jit(case.written), jax.jit(case.best)
    fast = autoinfer.optimize(case.written, **optimize)
    # In NumPy and float64; the best orders are plain products, which NumPy understands.
    exact = case.best(*(np.asarray(a, np.float64) for a in arguments))
    against_written = compare(lambda: written(*arguments), lambda: fast(*arguments), budget_s=seconds / 2)
    against_best = not_slower(lambda: best(*arguments), lambda: fast(*arguments), budget_s=seconds / 2)
    explained = fast.explain(*arguments)
    by_hand = autoinfer.optimize(case.best, rules=(), tune="off").explain(*arguments)
    error = float(np.max(np.abs(np.asarray(fast(*arguments), np.float64) - exact)))
    return {
        "task": "chains",
        "chain": chain,
        "size": size,
        **environment(),
        "optimize": dict(optimize),
        **speed(against_written),
        "beside_best": speed_beside_itself(against_best),
        "flops": {
            "written": explained.before.flops,
            "optimized": explained.after.flops if explained.verdict == "optimized" else explained.before.flops,
            "best": by_hand.before.flops,
        },
        "max_error": error,
        "verdict": explained.verdict,
        "reason": explained.reason,
    }


def _cells(row: Row) -> tuple[Cell, ...]:
    best = row["beside_best"]
    return (
        Cell(row["chain"]),
        Cell(numbers.milliseconds(row["before_ms"])),
        speed_cell(row),
        Cell(numbers.milliseconds(best["before_ms"])),
        Cell(numbers.milliseconds(best["after_ms"])),
        Cell(f"{1 / best['speedup']:.2f}"),
        Cell(f"{row['flops']['optimized'] / row['flops']['best']:.2f}"),
        Cell("not slower" if best["not_slower"] else "SLOWER", "" if best["not_slower"] else "bad"),
    )
