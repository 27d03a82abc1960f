"""Every configuration composes, and names a task that exists."""

import inspect
from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module

from jaxinfer import autoinfer
from jaxinfer.experiments.run import request_of
from jaxinfer.models.zoo import ZOO


def options(group: str) -> list[str]:
    folder = files("jaxinfer.configs") / group
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def composed(*overrides: str):
    with initialize_config_module("jaxinfer.configs", version_base="1.3"):
        return request_of(compose("config", overrides=list(overrides)))


def test_there_is_a_file_for_every_model():
    assert options("model") == sorted([*ZOO, "all"])


@pytest.mark.parametrize("words", [[], ["model=all"]])
def test_all_models_are_the_default(words):
    _, request, _ = composed(*words)
    assert list(request.models) == list(ZOO)


@pytest.mark.parametrize("name", options("model"))
def test_models(name):
    _, request, _ = composed(f"model={name}")
    assert set(request.models) == (set(ZOO) if name == "all" else {name})
    assert all(seconds > 0 for seconds in request.models.values())


def test_several_models_and_batch_sizes():
    _, request, _ = composed("model=[lstm,vit]", "batch=[1,8]", "tiny=true", "models.lstm.seconds=3")
    assert request.models == {"lstm": 3, "vit": 15}
    assert request.batches == [1, 8]
    assert request.tiny


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", {"numerics": "reassociate", "tune": "auto", "verify": True}),
        ("off", {"numerics": "reassociate", "tune": "off", "verify": True}),
        ("full", {"numerics": "reassociate", "tune": "full", "verify": True}),
        ("bitwise", {"numerics": "bitwise", "tune": "auto", "verify": True}),
    ],
)
def test_options_of_optimize(name, expected):
    _, request, _ = composed(f"optimize={name}")
    assert request.optimize == expected
    assert name in options("optimize")
    autoinfer.optimize(lambda x: x, **request.optimize)


def test_default_options_are_those_of_optimize():
    _, request, _ = composed()
    parameters = inspect.signature(autoinfer.optimize).parameters
    assert request.optimize == {name: parameters[name].default for name in request.optimize}


@pytest.mark.parametrize("name", options("task"))
def test_tasks_take_the_options_they_are_given(name):
    task, request, given = composed(f"task={name}")
    inspect.signature(task).bind(request, **given)
    assert str(request.output) == f"outputs/{name}.jsonl"
