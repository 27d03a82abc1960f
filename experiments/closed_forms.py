"""Derivatives whose closed form people know, against that form written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed, speed_beside_itself
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself, compare

_TINY = 16


@dataclass(frozen=True)
class Case:
    """A derivative, and the closed form.

    Attributes:
        transform: name of the transformation in `autoinfer` and in `jax`.
        function: what is differentiated.
        by_hand: the closed form.
        shapes: of the arguments; whole numbers are lengths, others shares of the task's size n.
        argnums: arguments to differentiate.
    """

    transform: str
    function: Callable[..., Any]
    by_hand: Callable[..., Any]
    shapes: tuple[tuple[int | float, ...], ...]
    argnums: int | tuple[int, ...] = 0


def _logistic(w: Any, x: Any, y: Any) -> Any:
    z = x @ w
    return jnp.mean(jnp.logaddexp(0.0, z) - (y > 0) * z)


def _logistic_hessian(w: Any, x: Any, y: Any) -> Any:
    p = jax.nn.sigmoid(x @ w)
    return (x * (p * (1 - p))[:, None]).T @ x / len(y)


def _factor(u: Any, v: Any, t: Any) -> Any:
    return 0.5 * jnp.sum((t - u @ v.T) ** 2)


def _factor_gradient(u: Any, v: Any, t: Any) -> Any:
    residual = u @ v.T - t
    return residual @ v, residual.T @ u


CASES: dict[str, Case] = {
    "Hessian of logistic regression": Case("hessian", _logistic, _logistic_hessian, ((0.3,), (2.0, 0.3), (2.0,))),
    "Hessian of xᵀAx": Case("hessian", lambda x, a: x @ a @ x, lambda x, a: a + a.T, ((1.0,), (1.0, 1.0))),
    "gradient of xᵀAx": Case("grad", lambda x, a: x @ a @ x, lambda x, a: a @ x + x @ a, ((1.0,), (1.0, 1.0))),
    "Hessian of least squares": Case(
        "hessian",
        lambda x, a, b: 0.5 * jnp.sum((a @ x - b) ** 2),
        lambda x, a, b: a.T @ a,
        ((1.0,), (1.0, 1.0), (1.0,)),
    ),
    "gradient of least squares": Case(
        "grad",
        lambda x, a, b: 0.5 * jnp.sum((a @ x - b) ** 2),
        lambda x, a, b: (a @ x - b) @ a,
        ((1.0,), (1.0, 1.0), (1.0,)),
    ),
    "gradient of ½‖T−UVᵀ‖²": Case("grad", _factor, _factor_gradient, ((1.0, 50), (1.0, 50), (1.0, 1.0)), (0, 1)),
}


def closed_forms(request: Request, size: int, seconds: float) -> list[Row]:
    """Measures every case, prints a table and writes the rows.

    Args:
        request: where to print and write; its models play no part.
        size: the n of the shapes.
        seconds: to spend on timing each case.
    """
    size = _TINY if request.tiny else size
    rows = [fresh(measure, case=name, size=size, seconds=seconds) for name in CASES]
    append(request.output, rows)
    columns = ("derivative", "by hand", "ours / by hand", "jax / by hand", "error")
    cells = tuple(
        (
            Cell(row["case"]),
            Cell(numbers.milliseconds(row["before_ms"])),
            Cell(f"{1 / row['speedup']:.2f}"),
            Cell(f"{1 / row['jax']['speedup']:.2f}"),
            Cell(numbers.error(row["max_relative_error"])),
        )
        for row in rows
    )
    note = f"n = {size}; time ratios; errors against the closed form in float64"
    request.console.print(Sheet("Closed forms", columns, cells, (1, 2, 3, 4), note))
    return rows


def measure(case: str, size: int, seconds: float) -> Row:
    """One case, here and now."""
    chosen, rng = CASES[case], np.random.default_rng(0)
    args = [rng.standard_normal(shape) / size**0.5 for shape in shapes_of(chosen, size)]
    ours, theirs = (getattr(m, chosen.transform)(chosen.function, chosen.argnums) for m in (autoinfer, jax))
    by_hand, ours, theirs = (jax.jit(f) for f in (chosen.by_hand, ours, theirs))
    with jax.enable_x64(True):
        want, have = (jax.tree.leaves(f(*args)) for f in (by_hand, ours))
        error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(have, want, strict=True))
    args = [jnp.asarray(x, jnp.float32) for x in args]
    against_hand = beside_itself(lambda: by_hand(*args), lambda: ours(*args), budget_s=seconds / 2)
    return {
        "task": "closed_forms",
        "case": case,
        "size": size,
        **environment(),
        **speed_beside_itself(against_hand),
        "jax": speed(compare(lambda: by_hand(*args), lambda: theirs(*args), budget_s=seconds / 2)),
        "max_relative_error": error,
    }


def shapes_of(case: Case, size: int) -> list[tuple[int, ...]]:
    """Shapes of the arguments at a size."""
    return [tuple(round(size * d) if isinstance(d, float) else d for d in shape) for shape in case.shapes]
