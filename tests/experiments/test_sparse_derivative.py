"""The sparse derivative task, with the smallest sizes."""

import json

import pytest
from rich.console import Console

from jaxinfer.experiments import sparse_derivative, task

ENTRIES = {"burgers": 3 * 40, "brusselator": 6 * 72, "rosenbrock": 30 + 2 * 29}


@pytest.mark.slow
@pytest.mark.parametrize("name", sparse_derivative.cases(sparse_derivative.TINY))
def test_figures_of_a_case(name, tmp_path):
    row = sparse_derivative.measure(name, sparse_derivative.TINY, True, 0.1, str(tmp_path))
    assert row["entries"] == ENTRIES.get(name, row["entries"])
    assert row["max_relative_error"] < 1e-9
    assert not row["unresolved"]
    assert 0 < row["passes"] < min(row["shape"]) or name == "image"
    assert row["before_ms"] > 0 and row["plan_s"] > 0
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    json.dumps(row)


@pytest.mark.slow
def test_task(tmp_path):
    request = task.Request({}, output=tmp_path / "rows.jsonl", tiny=True, console=Console(quiet=True))
    sizes = sparse_derivative.TINY
    rows = sparse_derivative.sparse(request, **sizes, dense=False, seconds=0.1, plots=None)
    assert [row["case"] for row in rows] == list(sizes)
    assert len(request.output.read_text().splitlines()) == len(rows)
