"""The task that quantizes, with the smallest sizes: figures follow from items, and rows from figures."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from jaxinfer import autoinfer
from jaxinfer.experiments import quantize, quantize_folds, quantize_pretrained, quantize_stored, task
from jaxinfer.experiments.quantize_plots import draw
from jaxinfer.experiments.quantize_ways import figure, made, quantized
from jaxinfer.models import g2p, images

DIGITS = pytest.mark.skipif(
    not importlib.util.find_spec("sklearn"), reason="needs the digits of scikit-learn: pip install scikit-learn"
)
TRAINING = {"steps": 30, "batch": 20, "rate": 0.01, "reach": 0}


def test_objects_are_named_with_their_fields():
    found = made({"name": "BiasCorrected", "method": {"name": "GPTQ", "clip": False}})
    assert found == autoinfer.BiasCorrected(autoinfer.GPTQ(clip=False))
    overrides = [{"name": "Override", "match": "*/kernel"}]
    scheme = made({"name": "Int8", "observer": {"name": "MSE"}, "overrides": overrides})
    assert scheme == autoinfer.Int8(observer=autoinfer.MSE(), overrides=[autoinfer.Override("*/kernel")])


def test_every_way_of_the_configuration_can_be_made():
    with initialize_config_module("jaxinfer.configs", version_base="1.3"):
        networks = OmegaConf.to_container(compose("config", overrides=["task=quantize"]).task.networks)
    assert set(networks) == set(quantize.SUBJECTS)
    for options in networks.values():
        for name, way in options["ways"].items():
            assert isinstance(made(way["scheme"]), autoinfer.Scheme), name
            for other in ("beside", "recovers"):
                assert way.get(other) is None or way[other] in options["ways"]
            if "method" in way:
                assert hasattr(made(way["method"]), "write")


@pytest.mark.parametrize(("value", "most", "holds"), [(0.1, True, True), (0.11, True, False), (0.11, False, True)])
def test_what_was_asked_for(value, most, holds):
    assert figure("", value, 0.1, most)["holds"] is holds
    assert figure("", value)["holds"] is None


def test_resemblance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 4))
    cosine, order = quantize_pretrained.resemblance(a, b)
    want = [np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)) for x, y in zip(a, b)]
    np.testing.assert_allclose(cosine, want, rtol=1e-12)

    def ranks(x):
        sims = [
            np.dot(x[i], x[j]) / np.sqrt(np.dot(x[i], x[i]) * np.dot(x[j], x[j])) for i in range(6) for j in range(i)
        ]
        return np.argsort(np.argsort(sims)).astype(float)

    # Without ties: 1 - 6 Σd² / (n (n² - 1)).
    difference = ranks(a) - ranks(b)
    n = len(difference)
    assert order == pytest.approx(1 - 6 * np.sum(difference**2) / (n * (n**2 - 1)), rel=1e-9)
    assert quantize_pretrained.resemblance(a, 3 * a)[1] == pytest.approx(1)


def test_sounds_count_up_to_the_first_wrong_one_and_the_end():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
    sounds = np.array([[4, 5, 6, g2p.END, g2p.END], [4, 4, g2p.END, g2p.END, g2p.END], [6, 5, 4, 5, 6]], np.int32)
    chosen = sounds.copy()
    chosen[0, 1] = 4  # wrong: the steps after it do not count
    losses = []
    for word, counted in enumerate([2, 3, 5]):
        for step in range(counted):
            x = logits[word, step].astype(np.float64)
            losses.append(np.log(np.exp(x).sum()) - x[sounds[word, step]])
    got = quantize_folds.spelling_loss(jnp.asarray(chosen), jnp.asarray(logits), jnp.asarray(sounds))
    assert float(got) == pytest.approx(np.mean(losses), rel=1e-5)


def _row(way, fold, wrong_before, wrong_after, **options):
    return {
        "way": way,
        "network": "cnn",
        "fold": fold,
        "items": 10,
        "wrong": {"before": wrong_before, "after": wrong_after},
        "options": {"scheme": {"name": "Int8"}, **options},
        "bytes": {"before": 100, "after": 25},
        "layers": {"quantized": 2, "all": 2},
        "file": {"before": 300 + fold, "after": 10},
    }


ROWS = [
    row
    for fold in range(2)
    for row in (
        _row("plain", fold, [0], [0, 1, 2, 3], goal=20),
        _row("trained", fold, [0], [0, 1], recovers="plain", goal=21.7, smaller=30.05),
    )
]


def test_all_folds_together():
    plain, trained = quantize_folds.summaries(ROWS)
    assert plain["items"] == 20 and plain["folds"] == 2
    lost, before, after = plain["figures"]
    assert (before["value"], after["value"]) == pytest.approx((90, 60))
    # 30 points are lost where 20 may be.
    assert lost["value"] == pytest.approx(30) and not lost["holds"]
    lost, *_, recovered = trained["figures"]
    assert lost["value"] == pytest.approx(10) and 21.7 < lost["bound"] <= 22 and lost["holds"]
    assert recovered["value"] == pytest.approx(100 * (1 - 10 / 30)) and recovered["holds"]


def test_a_loss_within_its_goal_is_not_enough_if_its_bound_is_not():
    (row,) = quantize_folds.summaries([_row("plain", fold, [], [fold], goal=10) for fold in range(2)])
    assert row["figures"][0]["value"] == pytest.approx(10) and not row["figures"][0]["holds"]


def test_files_are_judged_by_the_fold_where_least_was_gained():
    _, trained = quantize_stored.stored_summaries(ROWS)
    assert trained["figures"][-1]["value"] == pytest.approx(30.0) and not trained["figures"][-1]["holds"]


def test_drawings(tmp_path):
    speeds = tmp_path / "speeds.jsonl"
    row = {"tiny": False, "model": "cnn", "scheme": "Int8", "batch": 1, "speedup": 1.5}
    speeds.write_text(json.dumps(row) + "\n")
    rows = quantize_folds.summaries(ROWS)
    assert [path.name for path in draw(rows, tmp_path, tmp_path / "none.jsonl")] == ["accuracy_against_size.png"]
    both = draw(rows, tmp_path, speeds)
    assert [path.name for path in both] == ["accuracy_against_size.png", "accuracy_against_speed.png"]
    assert all(path.stat().st_size > 1000 for path in both)


def test_trees_are_made_once(tmp_path):
    tree, made_times = {"a": np.arange(3.0), "b": [np.ones((2, 2))]}, []

    def make():
        made_times.append(1)
        return tree

    for _ in range(2):
        found = quantize_folds.remembered(tmp_path / "x" / "tree.npz", make, jax.tree.map(np.zeros_like, tree))
        jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert len(made_times) == 1


@DIGITS
def test_crops_are_drawn_by_their_seed():
    first, again, other = (images.crops(images.PHOTOGRAPHS[0], 3, seed, 16) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 16, 16, 3) and first.dtype == np.float32 and np.abs(first).max() <= 1
    assert not np.array_equal(first, other) and not np.array_equal(first[0], first[1])


@DIGITS
@pytest.mark.slow
def test_training_with_rounding_recovers_what_four_bits_lose():
    options = {"training": {"steps": 200, "batch": 50, "rate": 0.01, "reach": 0}, "calibration": 200, "batch": 100}
    fold = quantize_folds.digits("mlp", options, 0, 5, None, False)
    x, labels = fold.lesson.batch(1_000, 200)

    def loss(logits):
        return float(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels).mean())

    exact = loss(fold.apply(fold.params, x))
    # Four bits that share one scale over the whole of each array.
    scheme = {"name": "Scheme", "weights": {"name": "Format", "number": "int4", "per": "tensor"}}
    scheme["activations"] = {"name": "Format", "number": "int4", "per": "tensor", "affine": True}
    way = {"scheme": scheme}
    nearest = loss(quantized(fold.apply, fold.params, way, fold.seen)(x))
    way = {**way, "training": {"steps": 100, "batch": 50, "rate": 1e-3}}
    trained = loss(quantized(fold.apply, fold.params, way, fold.seen, fold.lesson)(x))
    assert nearest > 1.2 * exact
    assert trained - exact < (nearest - exact) / 2
    with pytest.raises(ValueError, match="learn"):
        quantized(fold.apply, fold.params, way, fold.seen)


@DIGITS
@pytest.mark.slow
def test_a_pruned_network_is_judged_as_it_comes_from_its_file():
    options = {
        "pretraining": TRAINING,
        "training": TRAINING,
        "method": {"name": "Magnitude", "schedule": {"name": "Cubic", "begin": 0.1, "end": 0.5, "every": 2}},
        "fraction": 0.2,
        "teach": 0.5,
        "ways": {"int8": {"scheme": {"name": "Int8Weights"}}},
    }
    (row,) = quantize_stored.one_fold("mlp", options, 0, 2, None, True)
    assert row["layers"] == {"quantized": 3, "all": 3}
    assert row["left"]["fraction"] <= 0.2 * (1 + 1e-6)  # counted in float32
    assert row["file"]["after"] < row["file"]["before"]
    assert set(row["wrong"]["after"]) <= set(range(row["items"]))


@DIGITS
@pytest.mark.slow
def test_rows_and_table(tmp_path, monkeypatch):
    monkeypatch.setitem(
        quantize.SUBJECTS, "mlp", quantize.Subject("mlp", quantize_folds.one_fold, quantize_folds.summaries)
    )
    way = {"scheme": {"name": "Int8"}, "goal": 0.1}
    options = {"training": TRAINING, "calibration": 20, "batch": 10, "ways": {"int8": way}}
    request = task.Request({}, output=tmp_path / "rows.jsonl", tiny=True, console=Console(quiet=True))
    rows = quantize.quantize(request, {"mlp": options, "cnn": None}, 5, str(tmp_path), None, str(tmp_path / "plots"))
    assert [json.loads(line) for line in request.output.read_text().splitlines()] == rows
    *folds, summary = rows
    assert [row["fold"] for row in folds] == [0, 1] and summary["summary"]
    sheet = quantize.table([summary])
    assert len(sheet.rows) == len(summary["figures"]) and len(sheet.columns) == len(sheet.rows[0])
    assert (tmp_path / "plots" / "accuracy_against_size.png").exists()
