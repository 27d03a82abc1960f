"""Time against n: sparse derivatives beside dense ones, Laplacians beside traces of Hessians, closed forms beside those
written by hand; as rows and as drawings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from jaxinfer.experiments import closed_forms, laplacian, sparse_derivative
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet

_TINY = (8, 16)
_INPUTS = 24


def scaling(
    request: Request, sizes: Mapping[str, Sequence[int]], batch: int, seconds: float, plots: str | None
) -> list[Row]:
    """Times every curve at every size, prints a table, writes the rows and draws them.

    Args:
        request: where to print and write; its models play no part.
        sizes: names of curves, each with the sizes to measure it at: cases of `sparse_derivative`, ``"laplacian"``
            (widths of a network), ``"closed_forms"`` (all its cases). None at all leaves a curve out.
        batch: examples of the Laplacian.
        seconds: to spend on each point.
        plots: a folder for one drawing a curve, None for no drawings.
    """
    points = [(curve, n) for name, chosen in sizes.items() for curve in _curves(name) for n in chosen]
    if request.tiny:
        points = [(curve, n) for curve in dict.fromkeys(curve for curve, _ in points) for n in _TINY]
    rows = [fresh(measure, curve=curve, n=n, batch=batch, seconds=seconds) for curve, n in points]
    append(request.output, rows)
    columns = ("curve", "n", "ours", "jax", "by hand", "error")
    note = "errors: relative, in float64"
    request.console.print(Sheet("Time against n", columns, tuple(map(_cells, rows)), (1, 2, 3, 4, 5), note))
    if plots is not None:
        draw(rows, Path(plots))
    return rows


def measure(curve: str, n: int, batch: int, seconds: float) -> Row:
    """One point, here and now: milliseconds of each way to compute the same derivative."""
    if curve in closed_forms.CASES:
        figures, kind = closed_forms.measure(curve, n, seconds), "closed_forms"
        ms = {"ours": figures["after_ms"], "jax": figures["jax"]["after_ms"], "by hand": figures["before_ms"]}
        error = figures["max_relative_error"]
    elif curve == "laplacian":
        figures, kind = laplacian.measured(laplacian.network(_INPUTS, n), batch, seconds, ()), "laplacian"
        ms = _pair(figures["beside_hessian"])
        error = figures["relative_error"]
    else:
        figures, kind = (
            sparse_derivative.measure(curve, {**sparse_derivative.TINY, curve: n}, True, seconds, None),
            "sparse",
        )
        ms = _pair(figures)
        error = figures["max_relative_error"]
    point = {"kind": kind, "curve": curve, "n": n, "ms": ms, "max_relative_error": error}
    return {"task": "scaling", **point, **environment()}


def _curves(name: str) -> Iterable[str]:
    return closed_forms.CASES if name == "closed_forms" else (name,)


def _pair(figures: Row) -> Mapping[str, float]:
    return {"ours": figures["after_ms"], "jax": figures["before_ms"]}


# -- drawing ----------------------------------------------------------------------------------------------------------

# What n is, for each kind of curve and for those that differ.
_AXES = {
    "burgers": "grid points",
    "brusselator": "grid points along each side",
    "rosenbrock": "variables",
    "image": "pixels along each side",
    "laplacian": f"width of three tanh layers on {_INPUTS} inputs",
}
_LABELS = {
    "sparse": {"ours": "sparse", "jax": "jax, dense"},
    "laplacian": {"ours": "forward Laplacian", "jax": "trace of jax.hessian"},
    "closed_forms": {"ours": "ours", "jax": "jax", "by hand": "by hand"},
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws milliseconds against n, both on logarithmic axes, one file a curve.

    Args:
        rows: of this task, the points of one curve one after the other.
        folder: where to; made if it is not there.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curve, points in groupby(rows, lambda row: row["curve"]):
        taken = sorted(points, key=lambda row: row["n"])
        figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
        for way, label in _LABELS[taken[0]["kind"]].items():
            axes.loglog([row["n"] for row in taken], [row["ms"][way] for row in taken], marker="o", label=label)
        axes.set(title=curve, xlabel=_AXES.get(curve, "n"), ylabel="milliseconds")
        axes.set_xticks([row["n"] for row in taken], [str(row["n"]) for row in taken])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"{_file_name(curve)}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths


def _file_name(curve: str) -> str:
    return re.sub(r"\W+", "_", curve, flags=re.ASCII).strip("_")


def _cells(row: Row) -> tuple[Cell, ...]:
    ms, error = row["ms"], row["max_relative_error"]
    times = (
        Cell(numbers.milliseconds(ms[way]) if way in ms else numbers.UNKNOWN) for way in ("ours", "jax", "by hand")
    )
    return (Cell(row["curve"]), Cell(str(row["n"])), *times, Cell(numbers.error(error), "" if error < 1e-9 else "bad"))
