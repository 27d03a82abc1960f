"""The demo's words on int8, and the task that times int8 programs, with the smallest sizes."""

import json
from importlib import resources

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from jaxinfer import autoinfer
from jaxinfer.experiments import quantize_speed, task
from jaxinfer.experiments.demo import Recognised
from jaxinfer.experiments.quantize_ways import made
from jaxinfer.report.output import plain


@pytest.mark.slow
def test_rows_of_networks_and_products(tmp_path):
    request = task.Request(
        {}, output=tmp_path / "rows.jsonl", optimize={"tune": "off"}, tiny=True, console=Console(quiet=True)
    )
    corrected = {"name": "BiasCorrected", "method": {"name": "GPTQ", "clip": False}}
    networks = [{"name": "cnn", "scheme": {"name": "Int8"}, "method": corrected, "batch": 2}]
    products = [{"shape": [2048, 1024], "scheme": {"name": "Int8Weights"}, "wanted": 1e9}]
    network, product = quantize_speed.quantize_speed(request, networks, products, seconds=0.1)
    assert [json.loads(line) for line in request.output.read_text().splitlines()] == [network, product]
    assert (network["model"], network["batch"], product["model"]) == ("cnn", 2, "1×32 · 32×16")
    assert (network["scheme"], network["method"]) == ("Int8", "BiasCorrected, GPTQ") and product["method"] == "nearest"
    # In int8 a quarter of the bytes, and a scale of four for each of 16 columns.
    assert product["bytes"] == {"before": 4 * 32 * 16, "after": 32 * 16 + 4 * 16}
    assert not product["holds"] and network["holds"] == network["not_slower"]
    for row in (network, product):
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["cosine"] > 0.99 and row["layers"]["quantized"] == sum(row["forms"].values()) == row["layers"]["all"]
    text = plain(quantize_speed.table([network, product]), 200)
    assert "cnn (tiny)" in text and "NO" in text


@pytest.mark.parametrize(
    ("int8", "words"),
    [
        ("abcde", "yes"),
        ("abdce", "yes, in another order"),
        ("bacde", "yes, with another first one"),
        ("abcdf", "4 of 5, the same first one"),
        ("fabcg", "3 of 5, another first one"),
    ],
)
def test_what_the_demo_says_of_labels_in_int8(int8, words):
    lists = [[(name, 0.2) for name in names] for names in ("abcde", "abcde", int8)]
    seen = Recognised("photograph", *lists, difference=0.0)
    assert seen.same and seen.same_in_int8 == words


def test_every_scheme_and_method_of_the_task_is_one():
    path = resources.files("jaxinfer.configs").joinpath("task/quantize_speed.yaml")
    settings = OmegaConf.to_container(OmegaConf.create(path.read_text()))
    for job in (*settings["networks"], *settings["products"]):
        assert isinstance(made(job["scheme"]), autoinfer.Scheme)
        if "method" in job:
            assert callable(made(job["method"]).write)
