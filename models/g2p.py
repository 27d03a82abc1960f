"""Pronunciation of English words: a GRU encoder-decoder over letters, with its published weights.

Reference: Park and Kim, "g2pE", 2019. Weights: the PyPI package `g2p-en` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxinfer.models.recurrent import zero_carry
from jaxinfer.models.weights import check_consumed, nest, package_file

GRAPHEMES = ("<pad>", "<unk>", "</s>", *ascii_lowercase)
# ARPAbet, vowels with their stress (0 none, 1 primary, 2 secondary); the training data also had a bare UW.
_CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_STRESSED = (vowel + stress for vowel in _VOWELS.split() for stress in "012")
_SOUNDS = sorted([*_CONSONANTS.split(), "UW", *_STRESSED])
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *_SOUNDS)
PAD, UNKNOWN, WORD_END = 0, 1, 2
START, END = 2, 3


class Step(nn.Module):
    """One step of greedy decoding: feed the last phoneme, take the likeliest next one."""

    phonemes: int
    hidden: int

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Carry (state [batch, hidden], phoneme int[batch], ended bool[batch]) → carry, (phoneme, logits)."""
        state, phoneme, ended = carry
        x = nn.Embed(self.phonemes, self.hidden, name="embedding")(phoneme)
        state, _ = nn.GRUCell(self.hidden, name="cell")(state, x)
        logits = nn.Dense(self.phonemes, name="logits")(state)
        phoneme = jnp.where(ended, END, logits.argmax(axis=-1).astype(phoneme.dtype))
        return (state, phoneme, ended | (phoneme == END)), (phoneme, logits)


class G2P(nn.Module):
    """Letters to phonemes: a GRU reads the word, another spells its sounds, greedily.

    Attributes:
        graphemes: number of letter ids.
        phonemes: number of phoneme ids.
        hidden: size of embeddings and states.
        steps: longest pronunciation.
    """

    graphemes: int = len(GRAPHEMES)
    phonemes: int = len(PHONEMES)
    hidden: int = 256
    steps: int = 20

    @nn.compact
    def __call__(self, word: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pronounces a batch of words.

        Args:
            word: int[batch, letters], each ended by WORD_END and padded with PAD.

        Returns:
            Phonemes int[batch, steps], END from the first END on, and the logits [batch, steps, phonemes] behind
            them; these mean nothing after an END.
        """
        letters = nn.Embed(self.graphemes, self.hidden, name="embedding")(word)
        cell = nn.GRUCell(self.hidden, name="encoder")
        lengths = jnp.sum(word != PAD, axis=1)
        read = nn.RNN(cell, return_carry=True)
        state, _ = read(letters, seq_lengths=lengths, initial_carry=zero_carry(cell, letters))
        spell = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=self.steps, out_axes=1)
        start = jnp.full(word.shape[:1], START, word.dtype)
        carry = (state, start, jnp.zeros(word.shape[:1], bool))
        return spell(self.phonemes, self.hidden, name="decoder")(carry, None)[1]


def encode(words: Sequence[str], length: int = 20) -> np.ndarray:
    """Letter ids int32[words, length]; letters other than a–z are unknown.

    Raises:
        ValueError: a word has no room for its end mark.
    """
    ids = {letter: index for index, letter in enumerate(GRAPHEMES)}
    encoded = np.full((len(words), length), PAD, np.int32)
    for row, word in zip(encoded, words):
        if len(word) >= length:
            raise ValueError(f"{word!r} has {len(word)} letters; with its end mark it needs length > {len(word)}")
        row[: len(word) + 1] = [*(ids.get(letter, UNKNOWN) for letter in word), WORD_END]
    return encoded


def decode(phonemes: np.ndarray) -> list[list[str]]:
    """Names of the phonemes int[words, steps], up to the first END."""
    return [[PHONEMES[index] for index in row[: np.argmax([*row, END] == np.int64(END))]] for row in phonemes]


def published_weights() -> dict[str, Any]:
    """The variables of `G2P()` as trained on the CMU Pronouncing Dictionary, as float32 NumPy arrays.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    with np.load(package_file("g2p_en", "g2p-en", "checkpoint20.npz"), allow_pickle=False) as state:
        return from_arrays(dict(state))


def from_arrays(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `G2P` from the published arrays.

    There each GRU holds its gates stacked as reset, update, candidate: w_ih [3h, inputs], w_hh [3h, h] and a
    bias for each. Reset and update add both biases at one place: these become one; the candidate keeps both.

    Raises:
        ValueError: an array is missing, or one is left over.
    """
    used: set[str] = set()
    leaves: dict[tuple[str, ...], np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        if name not in state:
            raise ValueError(f"the G2P checkpoint has no array {name!r}")
        used.add(name)
        return state[name]

    def gru(target: tuple[str, ...], source: str) -> None:
        parts = [np.split(take(f"{source}_{part}"), 3) for part in ("w_ih", "w_hh", "b_ih", "b_hh")]
        for gate, w_input, w_hidden, b_input, b_hidden in zip("rzn", *parts):
            leaves[*target, f"i{gate}", "kernel"] = w_input.T
            leaves[*target, f"h{gate}", "kernel"] = w_hidden.T
            leaves[*target, f"i{gate}", "bias"] = b_input if gate == "n" else b_input + b_hidden
            if gate == "n":
                leaves[*target, "hn", "bias"] = b_hidden

    leaves["embedding", "embedding"] = take("enc_emb")
    gru(("encoder",), "enc")
    leaves["decoder", "embedding", "embedding"] = take("dec_emb")
    gru(("decoder", "cell"), "dec")
    leaves["decoder", "logits", "kernel"] = take("fc_w").T
    leaves["decoder", "logits", "bias"] = take("fc_b")
    check_consumed("G2P", state, used)
    return {"params": nest(leaves)}
