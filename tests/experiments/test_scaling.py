"""Time against n: points of every kind, and their drawings."""

import json

import pytest
from rich.console import Console

from jaxinfer.experiments import closed_forms, scaling, task


@pytest.mark.parametrize(("curve", "ways"), [("burgers", 2), ("laplacian", 2), ("Hessian of xᵀAx", 3)])
def test_a_point(curve, ways):
    row = scaling.measure(curve, n=8, batch=2, seconds=0.1)
    assert (row["curve"], row["n"], len(row["ms"])) == (curve, 8, ways)
    assert min(row["ms"].values()) > 0
    assert row["max_relative_error"] < 1e-9
    json.dumps(row)


def test_curves_are_drawn_through_their_points(tmp_path):
    rows = [
        {"kind": kind, "curve": curve, "n": n, "ms": dict.fromkeys(("ours", "jax", "by hand"), n / 8)}
        for kind, curve in (("sparse", "burgers"), ("closed_forms", "Hessian of xᵀAx"))
        for n in (32, 8, 16)
    ]
    paths = scaling.draw(rows, tmp_path / "plots")
    assert [path.name for path in paths] == ["burgers.png", "Hessian_of_x_Ax.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_closed_forms_keep_the_sizes_they_are_known_by():
    shapes = closed_forms.shapes_of(closed_forms.CASES["Hessian of logistic regression"], 1000)
    assert shapes == [(300,), (2000, 300), (2000,)]
    assert closed_forms.shapes_of(closed_forms.CASES["gradient of ½‖T−UVᵀ‖²"], 1000)[0] == (1000, 50)


@pytest.mark.slow
def test_task(tmp_path):
    request = task.Request({}, output=tmp_path / "rows.jsonl", tiny=True, console=Console(quiet=True))
    sizes = {"rosenbrock": [1000]}
    rows = scaling.scaling(request, sizes, batch=2, seconds=0.1, plots=str(tmp_path))
    assert [(row["curve"], row["n"]) for row in rows] == [(c, n) for c in sizes for n in (8, 16)]
    assert [json.loads(line) for line in request.output.read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["rosenbrock.png"]
