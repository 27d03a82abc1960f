"""The task that times Laplacians: its figures make sense, and results are right."""

import pytest

from jaxinfer.experiments import laplacian


@pytest.mark.slow
@pytest.mark.parametrize("problem", laplacian.PROBLEMS)
def test_laplacians_of_the_problems_are_right(problem):
    row = laplacian.measure(problem, batch=2, seconds=0.1, thresholds=())
    assert row["relative_error"] < 1e-9
    assert row["beside_folx"] == {}
    assert row["beside_hessian"]["before_ms"] > 0
    cells = [cell.text for cell in laplacian._cells(row)]
    assert cells[0] == problem
