"""The command line, called as a function: what it prints, what it writes, and how it fails."""

import json
import sys

import pytest

from jaxinfer import cli, target
from jaxinfer.report.explain import Explanation
from jaxinfer.report.hlo import HloComparison

MODULE = """
import jax.numpy as jnp
from jaxinfer import autoinfer

def chain(a, b, x):
    return a @ b @ x

def matrices():
    return jnp.eye(8), jnp.eye(8), jnp.ones(8)

def vector():
    return jnp.ones(8)

def failing(x):
    return x @ jnp.ones(3)

def broken():
    raise RuntimeError("no data today")

decorated = autoinfer.optimize(chain, tune="off")
fixed = decorated.freeze(jnp.eye(8))
number = 3
"""
SHAPES = ["--shape", "f32[8,8]", "--shape", "f32[8,8]", "--shape", "f32[8]"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the current folder, with a name of its own so that no test sees another's."""
    name = f"user_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def run(*argv: str) -> int:
    return cli.main(argv)


def test_explain_prints_tables(module, capsys):
    assert run("explain", f"{module}:chain", *SHAPES, "--tune", "off") == 0
    printed = capsys.readouterr().out
    assert "chain(f32[8,8], f32[8,8], f32[8])" in printed
    assert "matrix-chain" in printed


def test_explain_takes_arguments_from_a_callable(module, capsys):
    assert run("explain", f"{module}:chain", "--args", f"{module}:matrices", "--tune", "off", "--json", "-") == 0
    explanation = Explanation.from_json(capsys.readouterr().out)
    assert explanation.signature == "f32[8,8], f32[8,8], f32[8]"
    assert explanation.tune == "off"


def test_a_callable_may_return_the_only_argument(module, capsys):
    assert run("explain", f"{module}:failing", "--args", f"{module}:vector") == 1
    assert "f32" not in capsys.readouterr().out


def test_leading_arguments_can_be_frozen(module, capsys):
    assert run("explain", f"{module}:chain", *SHAPES, "--freeze", "2", "--tune", "off", "--json", "-") == 0
    explanation = Explanation.from_json(capsys.readouterr().out)
    assert explanation.signature == "f32[8]"
    assert explanation.weights is not None and explanation.weights.resident_original_bytes == 2 * 4 * 8 * 8


def test_compare_hlo_writes_every_form(module, tmp_path, capsys):
    files = {kind: tmp_path / f"hlo.{kind}" for kind in ("text", "json", "html")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert run("compare-hlo", f"{module}:chain", *SHAPES, *options, "--tune", "off") == 0
    written = capsys.readouterr()
    assert not written.out
    assert all(str(path) in written.err for path in files.values())
    assert "Operations" in files["text"].read_text()
    assert HloComparison.from_json(files["json"].read_text()).title == "chain"
    assert files["html"].read_text().startswith("<!DOCTYPE html>")


def test_a_function_that_is_optimized_already_keeps_its_options(module, capsys):
    assert run("explain", f"{module}:decorated", *SHAPES, "--tune", "full", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["tune"] == "off"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["MODULE:failing", "--shape", "f32[4]"], 1, "MODULE:failing raised TypeError at PATH:15"),
        (["MODULE:chain"], 1, "give example arguments with --args or --shape"),
        (["MODULE:chain", "--args", "MODULE:broken"], 1, "MODULE:broken raised RuntimeError at PATH:18: no data today"),
        (["MODULE:missing"], 2, "has no 'missing'"),
        (["MODULE:number"], 2, "which cannot be called"),
        (["MODULE"], 2, "is not of the form"),
        (["no_such_module:f"], 2, "no module 'no_such_module'"),
        (["MODULE:chain", "--shape", "f32(8)"], 2, "'f32(8)' is no array type"),
        (["MODULE:chain", "--shape", "f31[8]"], 2, "there is no dtype 'f31'"),
        (["MODULE:chain", "--shape", "f64[8]"], 2, "set JAX_ENABLE_X64=1"),
        (["MODULE:chain", "--shape", "f32[8]", "--freeze", "2"], 2, "there are 1 example arguments"),
        (["MODULE:fixed", *SHAPES, "--freeze", "1"], 2, "frozen already"),
        (["MODULE:chain", *SHAPES, "--tune", "off", "--text", "no/such/folder"], 1, "no/such"),
    ],
)
def test_messages_say_what_and_where(module, tmp_path, capsys, words, status, message):
    def named(text):
        return text.replace("MODULE", module).replace("PATH", str(tmp_path / f"{module}.py"))

    assert run("explain", *map(named, words)) == status
    written = capsys.readouterr().err
    assert written.startswith("jaxinfer explain: error: ")
    assert named(message) in written
    assert "Traceback" not in written


def test_debug_raises(module):
    with pytest.raises(target.TargetError):
        run("explain", f"{module}:missing", "--debug")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["explain"],
        ["explain", "m:f", "--tune", "often"],
        ["explain", "m:f", "--tune", "-1"],
        ["explain", "m:f", "--tune", "nan"],
        ["explain", "m:f", "--args", "m:g", "--shape", "f32[1]"],
        ["explain", "m:f", "--html", "-"],
        ["explain", "m:f", "--freeze", "-1"],
        ["bench", "--batch", "0"],
    ],
)
def test_wrong_words_end_with_status_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert "usage: jaxinfer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "type_"),
    [
        ("f32[8,128]", "float32[8,128]"),
        ("bf16[3]", "bfloat16[3]"),
        ("i32[]", "int32[]"),
        ("s8[2]", "int8[2]"),
        ("u8[2, 2]", "uint8[2,2]"),
        ("c64[2]", "complex64[2]"),
        ("bool[4]", "bool[4]"),
        ("float16[1]", "float16[1]"),
    ],
)
def test_shapes_are_read_as_jax_prints_them(text, type_):
    (made,) = target.arguments(None, [text])
    assert made.aval.str_short() == type_


def test_integers_fit_any_axis():
    (made,) = target.arguments(None, ["i32[100]"])
    assert set(made.tolist()) == {0, 1}


def test_demo(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run("demo", "--tiny", "--tune", "off", "--html", str(page)) == 0
    printed = capsys.readouterr().out
    assert "same five labels" in printed
    assert "7/7" in printed
    assert "optimized, int8" in printed and "11 of 11 layers" in printed
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_bench_names_the_models_there_are(capsys):
    assert run("bench", "alexnet") == 2
    assert "no model alexnet in the zoo; there are mlp" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxinfer.experiments.demo", raising=False)
    monkeypatch.setitem(sys.modules, "jaxinfer.models.zoo", None)
    monkeypatch.setitem(sys.modules, "flax", None)
    for name in [name for name in sys.modules if name.startswith(("jaxinfer.models", "jaxinfer.experiments"))]:
        monkeypatch.delitem(sys.modules, name)
    assert run("demo", "--tiny") == 1
    assert "the package 'flax' is missing: pip install \"jaxinfer[demo]\"" in capsys.readouterr().err
