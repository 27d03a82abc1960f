"""Sparse Jacobians and Hessians: passes, time to plan and time to evaluate, against dense ones and asdex's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.differentiation.sparse.transform import SparseDerivative, sparse_hessian, sparse_jacobian
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed, speed_cell
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import compare

# Sizes for trying things out.
TINY = {"burgers": 40, "brusselator": 6, "rosenbrock": 30, "image": 12}
# Rows and columns of a colouring that are drawn.
_CORNER = 48


class Case(NamedTuple):
    """A function of one array, and whether its Hessian is asked for."""

    fun: Callable[[jax.Array], jax.Array]
    shape: tuple[int, ...]
    hessian: bool = False


def burgers(u: jax.Array) -> jax.Array:
    """An explicit step of the periodic Burgers equation, central differences."""
    left, right, step = jnp.roll(u, 1), jnp.roll(u, -1), 1 / len(u)
    return u + 1e-3 * step * (0.01 * (right - 2 * u + left) / step**2 - u * (right - left) / (2 * step))


def brusselator(state: jax.Array) -> jax.Array:
    """Rates of the Brusselator with diffusion on a periodic square; both species one after the other."""
    side = round((len(state) / 2) ** 0.5)
    u, v = state[: side * side].reshape(side, side), state[side * side :].reshape(side, side)

    def laplacian(w: jax.Array) -> jax.Array:
        near = jnp.roll(w, 1, 0) + jnp.roll(w, -1, 0) + jnp.roll(w, 1, 1) + jnp.roll(w, -1, 1)
        return (near - 4 * w) * side**2

    du = 1 + u**2 * v - 4.4 * u + 10 * laplacian(u)
    return jnp.concatenate([du.ravel(), (3.4 * u - u**2 * v + 10 * laplacian(v)).ravel()])


def rosenbrock(x: jax.Array) -> jax.Array:
    """The chained Rosenbrock function."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def network(image: jax.Array) -> jax.Array:
    """Three 3×3 convolutions with stride 2."""
    rng, y = np.random.default_rng(0), image[None, None]
    for out, inner in ((8, 1), (8, 8), (4, 8)):
        kernel = jnp.asarray(rng.standard_normal((out, inner, 3, 3)) / (9 * inner) ** 0.5, image.dtype)
        y = jnp.tanh(lax.conv_general_dilated(y, kernel, (2, 2), "SAME"))
    return y.ravel()


def cases(sizes: dict[str, int]) -> dict[str, Case]:
    """The functions at the given sizes."""
    return {
        "burgers": Case(burgers, (sizes["burgers"],)),
        "brusselator": Case(brusselator, (2 * sizes["brusselator"] ** 2,)),
        "rosenbrock": Case(rosenbrock, (sizes["rosenbrock"],), hessian=True),
        "image": Case(network, (sizes["image"],) * 2),
    }


def sparse(
    request: Request,
    burgers: int,
    brusselator: int,
    rosenbrock: int,
    image: int,
    dense: bool,
    seconds: float,
    plots: str | None,
) -> list[Row]:
    """Times every case, prints a table and writes the rows.

    Args:
        request: where to print and write; its models play no part.
        burgers, brusselator, rosenbrock, image: sizes of the cases.
        dense: whether to time the dense derivative too.
        seconds: to spend on timing each pair.
        plots: a folder for drawings of the patterns and colourings, None for no drawings.
    """
    sizes = {"burgers": burgers, "brusselator": brusselator, "rosenbrock": rosenbrock, "image": image}
    sizes = TINY if request.tiny else sizes
    rows = [fresh(measure, name=n, sizes=sizes, dense=dense, seconds=seconds, plots=plots) for n in sizes]
    append(request.output, rows)
    columns = ("case", "entries", "passes", "used", "planned, s", "dense", "speed (95 % bounds)", "beside asdex")
    note = "beside asdex: passes of it, and speed"
    cells = tuple(_cells(row) for row in rows)
    request.console.print(Sheet("Sparse derivatives", columns, cells, (1, 2, 4, 5, 6, 7), note))
    return rows


def measure(name: str, sizes: dict[str, int], dense: bool, seconds: float, plots: str | None) -> Row:
    """One case, here and now, in float64."""
    with jax.enable_x64(True):
        case = cases(sizes)[name]
        x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, case.shape))
        ours = (sparse_hessian if case.hessian else sparse_jacobian)(case.fun)
        pattern, plan_s = _timed(lambda: ours.pattern(x))
        coloring, coloring_s = _timed(lambda: ours.coloring(x))
        compiled = jax.jit(ours)
        reference = jax.jit((jax.hessian if case.hessian else jax.jacobian)(case.fun))
        error = _error(compiled(x), reference(x))
        row: Row = {
            "task": "sparse_derivative",
            "case": name,
            "size": sizes[name],
            **environment(),
            "entries": pattern.nnz,
            "shape": list(pattern.shape),
            "unresolved": dict(pattern.coarse),
            "passes": coloring.passes,
            "method": ours.method(x),
            "plan_s": plan_s,
            "coloring_s": coloring_s,
            "max_relative_error": error,
        }
        if dense:
            row |= speed(compare(lambda: reference(x), lambda: compiled(x).data, budget_s=seconds))
        if (rival := _asdex(case, x)) is not None:
            figures, evaluate = rival
            against = compare(lambda: evaluate(x).data, lambda: compiled(x).data, budget_s=seconds)
            row["asdex"] = {**figures, **speed(against), "max_relative_error": _error(evaluate(x), reference(x))}
        if plots is not None:
            _draw(ours, x, f"{name}, n = {sizes[name]}", Path(plots) / f"{name}.png")
        return row


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _error(found: Any, expected: jax.Array) -> float:
    expected = np.asarray(expected)
    return float(np.max(np.abs(np.asarray(found.todense()) - expected)) / np.max(np.abs(expected)))


def _asdex(case: Case, x: jax.Array) -> tuple[Row, Callable[[jax.Array], Any]] | None:
    """Figures of asdex and its function, or None where it cannot be imported (0.5.2 needs JAX 0.10)."""
    try:
        import asdex
    except ImportError:
        return None
    kind = "hessian" if case.hessian else "jacobian"
    found, pattern_s = _timed(lambda: getattr(asdex, f"{kind}_sparsity")(case.fun, x))
    color = getattr(asdex, f"{kind}_coloring_from_sparsity")
    color(found)  # compiles
    coloring, coloring_s = _timed(lambda: color(found))
    figures = {
        "entries": found.nnz,
        "passes": coloring.num_colors,
        "pattern_s": pattern_s,
        "coloring_s": coloring_s,
    }
    return figures, jax.jit(getattr(asdex, f"{kind}_from_coloring")(case.fun, coloring))


def _draw(derivative: SparseDerivative, x: jax.Array, title: str, path: Path) -> None:
    """The whole pattern, and the colouring of a corner in which single columns can be told apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, corner) = pyplot.subplots(1, 2, figsize=(12, 6), layout="constrained")
    derivative.plot(x, axes=whole)
    derivative.plot_coloring(x, axes=corner, corner=_CORNER)
    whole.set(title="pattern")
    corner.set(title=f"which columns and rows share a pass (of the first {_CORNER})")
    figure.suptitle(f"{title}: {derivative.coloring(x)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cells(row: Row) -> tuple[Cell, ...]:
    rival = row.get("asdex")
    beside = "–" if rival is None else f"{rival['passes']}, {speed_cell(rival).text}"
    return (
        Cell(row["case"]),
        Cell(f"{row['entries']}"),
        Cell(f"{row['passes']}"),
        Cell(row["method"]),
        Cell(f"{row['plan_s']:.2f}"),
        Cell(numbers.milliseconds(row["before_ms"]) if "before_ms" in row else "–"),
        speed_cell(row) if "before_ms" in row else Cell("–"),
        Cell(beside),
    )
