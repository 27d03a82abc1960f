"""The tasks, end to end with the smallest sizes: their rows are whole and their figures make sense."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from jaxinfer.experiments import bench, chains, closed_forms, derivative, memory, overhead, task
from jaxinfer.experiments.process import MeasurementError, fresh
from jaxinfer.report.output import plain
from jaxinfer.search.measure import PairedRatio

OFF = {"tune": "off"}


def request_for(path, **options):
    return task.Request(output=path / "rows.jsonl", optimize=OFF, tiny=True, console=Console(quiet=True), **options)


def written(path):
    return [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]


def test_bench_measures_each_model_and_goes_on_after_a_failure(tmp_path):
    rows = bench.bench(request_for(tmp_path, models={"no_such_model": 0.1, "mlp": 0.5}, batches=[2]))
    assert written(tmp_path) == rows
    failed, row = rows
    assert "no model 'no_such_model' in the zoo" in failed["error"]
    assert (row["model"], row["batch"], row["tiny"]) == ("mlp", 2, True)
    assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert row["spread_low"] <= row["spread_high"]
    assert row["max_relative_error"] < 1e-5
    assert row["not_slower"] in (True, False)
    assert row["verdict"] in ("optimized", "original")
    assert min(row["before_ms"], row["after_ms"], *row["first_call_s"].values(), *row["compile_s"].values()) > 0
    assert set(row["temporary_bytes"]) == {"before", "after"}
    table = plain(bench.table(rows), 120)
    assert "mlp (tiny)" in table and "failed" in table


@pytest.mark.slow
def test_the_hydra_app_writes_rows_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "jaxinfer.experiments.run", "model=gcn", "optimize=off", "tiny=true"]
    done = subprocess.run(
        [*command, "models.gcn.seconds=0.2"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["outputs", "outputs/bench.jsonl"]
    assert "1 rows appended" in done.stdout


def test_a_fresh_process_is_another_one_and_carries_values():
    assert fresh(json.dumps, obj={"a": [1, 2]}) == '{"a": [1, 2]}'


def test_what_a_fresh_process_raises_is_told():
    with pytest.raises(MeasurementError, match=r"loads\(s='no json'\) ended with status 1(.|\n)*JSONDecodeError"):
        fresh(json.loads, s="no json")


@pytest.mark.parametrize("name", chains.CHAINS)
def test_best_orders_are_equal_to_what_is_written(name):
    chain, rng = chains.CHAINS[name], np.random.default_rng(1)
    arguments = [rng.standard_normal([round(32 * share) for share in shares]) for shares in chain.shapes]
    if name != "vmap(A@B@v)":
        np.testing.assert_allclose(chain.best(*arguments), chain.written(*arguments), rtol=1e-10, atol=1e-10)
    row = chains.measure(name, 32, 0.1, OFF)
    assert row["max_error"] < 1e-4
    assert row["flops"]["best"] < row["flops"]["written"]
    assert row["flops"]["optimized"] == row["flops"]["best"]


def test_overhead_of_calls_and_sizes():
    row = overhead.per_call(3)
    assert row["jit_us"] > 0 and math.isfinite(row["optimized_over_jit_us"])
    small, large = overhead.per_equation([22, 550], [22])
    assert small["compile_s"] > 0 and large["compile_s"] is None
    # Net of the trace, the small program's can be lost in the noise.
    assert small["optimize_s"] >= 0 and large["optimize_s"] > 0


@pytest.mark.slow
def test_overhead_task(tmp_path):
    request = request_for(tmp_path, models={"mlp": 1})
    rows = overhead.overhead(request, leaves=2, equations=[22], compiled=[22], processes=2)
    assert [row["what"] for row in rows] == ["per call", "per equation", "first call"]
    assert len(rows[-1]["rounds"]) == rows[-1]["processes"] == 2
    assert rows[-1]["warm_s"] == sum(r["warm_s"] for r in rows[-1]["rounds"]) / 2
    assert written(tmp_path) == rows


def test_memory_of_a_checkpointed_network():
    row = memory.checkpointed(True, 3, 8, 4, OFF)
    assert set(row["temporary_bytes"]) == {"original", "gradient of the optimized", "optimized gradient"}
    assert row["holds"]


def test_memory_of_a_program_counts_its_weights():
    row = memory.program("mlp", 1, True, OFF)
    weights = 4 * (8 * 16 + 16 + 16 * 12 + 12 + 12 * 5 + 5)
    assert row["before"]["arguments"] == weights + 4 * 8
    assert row["before"]["results"] == 4 * 5


def test_speed_is_the_inverse_of_the_ratio():
    row = task.speed(PairedRatio(ratio=0.5, low=0.25, high=0.8, rounds=9, before_ms=2.0, after_ms=1.0))
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == (2.0, 1.25, 4.0)
    assert task.speed_cell(row).text == "2.00× (1.25 to 4.00)"
    unbounded = task.speed(PairedRatio(ratio=0.5, low=0.0, high=math.inf, rounds=2, before_ms=2.0, after_ms=1.0))
    assert task.speed_cell(unbounded).text == "2.00× (from 0.00)"


def test_derivative_compares_both_gradients(tmp_path):
    rows = derivative.derivative(request_for(tmp_path, models={"mlp": 0.3}))
    assert written(tmp_path) == rows
    (row,) = rows
    assert row["max_relative_error"] < 1e-9
    assert min(row["before_ms"], row["after_ms"], *row["seconds"].values()) > 0
    assert row["not_slower"] in (True, False)


def test_closed_forms_are_those_of_the_derivatives():
    for name, case in closed_forms.CASES.items():
        row = closed_forms.measure(name, size=8, seconds=0.1)
        assert row["max_relative_error"] < 1e-12, name
        assert case.transform in ("grad", "hessian")
