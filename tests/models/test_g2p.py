"""The pronunciation model against its recurrence written out in NumPy, and against its published output."""

import jax
import numpy as np
import pytest

from jaxinfer.models import g2p
from jaxinfer.models.weights import package_file
from jaxinfer.models.zoo import load

# From the README of g2p-en: the one word of its examples that is in no dictionary, so the network spells it.
PUBLISHED = ("activationist", "AE2 K T IH0 V EY1 SH AH0 N IH0 S T")
WORDS = ["refuse", "pets", "quantization", "photograph", "jaxpr", "a", "don't", "antidisestablishment", "zzyzx"]


@pytest.fixture(scope="module")
def arrays():
    with np.load(package_file("g2p_en", "g2p-en", "checkpoint20.npz")) as file:
        return {name: file[name].astype(np.float64) for name in file.files}


@pytest.fixture(scope="module")
def model():
    return load("g2p")


def pronounce(arrays, word):
    """Phoneme ids and logits of each step, END included, one word at a time."""

    def gru(side, x, h):
        inputs = arrays[f"{side}_w_ih"] @ x + arrays[f"{side}_b_ih"]
        states = arrays[f"{side}_w_hh"] @ h + arrays[f"{side}_b_hh"]
        (r, z, n), (hr, hz, hn) = np.split(inputs, 3), np.split(states, 3)
        reset, update = 1 / (1 + np.exp(-r - hr)), 1 / (1 + np.exp(-z - hz))
        candidate = np.tanh(n + reset * hn)
        return candidate + update * (h - candidate)

    h = np.zeros(256)
    for letter in word:
        h = gru("enc", arrays["enc_emb"][3 + ord(letter) - ord("a") if letter.isalpha() else 1], h)
    h = gru("enc", arrays["enc_emb"][2], h)
    phoneme, phonemes, logits = 2, [], []
    while phoneme != 3 and len(phonemes) < 20:
        h = gru("dec", arrays["dec_emb"][phoneme], h)
        logits.append(arrays["fc_w"] @ h + arrays["fc_b"])
        phoneme = int(np.argmax(logits[-1]))
        phonemes.append(phoneme)
    return phonemes, np.stack(logits)


def test_pronunciations_and_logits(arrays, model):
    assert model.pretrained
    words = [*WORDS, PUBLISHED[0]]
    phonemes, logits = jax.jit(model.apply)(model.variables, g2p.encode(words, 24))
    assert phonemes.shape == (10, 20) and logits.shape == (10, 20, 74)
    for word, ids, scores in zip(words, np.asarray(phonemes), np.asarray(logits)):
        expected, reference = pronounce(arrays, word)
        assert ids.tolist() == expected + [g2p.END] * (20 - len(expected)), word
        np.testing.assert_allclose(scores[: len(expected)], reference, atol=1e-4)
    assert " ".join(g2p.decode(np.asarray(phonemes))[-1]) == PUBLISHED[1]


def test_letters_and_phonemes_have_a_vector_each(arrays):
    assert len(g2p.GRAPHEMES) == len(arrays["enc_emb"]) and len(g2p.PHONEMES) == len(arrays["dec_emb"])
    assert len(set(g2p.PHONEMES)) == 74


def test_encode_ends_pads_and_refuses():
    assert g2p.encode(["ab", "é"], 4).tolist() == [[3, 4, 2, 0], [1, 2, 0, 0]]
    with pytest.raises(ValueError, match="'abcd'"):
        g2p.encode(["abcd"], 4)


def test_decode_stops_at_the_end():
    hello = [g2p.PHONEMES.index(name) for name in ("HH", "EH1", "L", "OW0")]
    rows = np.array([[*hello, g2p.END, 7], [*hello, *hello[:2]]], np.int32)
    assert g2p.decode(rows) == [["HH", "EH1", "L", "OW0"], ["HH", "EH1", "L", "OW0", "HH", "EH1"]]


def test_checkpoint_must_match_the_model(arrays):
    with pytest.raises(ValueError, match="no array 'fc_b'"):
        g2p.from_arrays({name: value for name, value in arrays.items() if name != "fc_b"})
    with pytest.raises(ValueError, match="without a place in the model: extra"):
        g2p.from_arrays({**arrays, "extra": np.zeros(1)})
