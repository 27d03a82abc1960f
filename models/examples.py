"""Example inputs for the models: each maker takes a seeded generator and a batch size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxinfer.models import g2p, images, minilm

Inputs = tuple[np.ndarray, ...]
MakeInputs = Callable[[np.random.Generator, int], Inputs]
"""(generator, batch) → inputs; the same generator state gives the same inputs."""

WORDS = (
    "activationist",
    "quantization",
    "jaxpr",
    "palimpsest",
    "rewriting",
    "photograph",
    "chrysanthemum",
    "ship",
)
SENTENCE = (
    "A compiler that knows the weights can do more than one that does not: what depends on them alone is "
    "computed once, products that share an input become one, and a chain of matrices is multiplied in the "
    "cheapest order. "
)


def normal(*shape: int) -> MakeInputs:
    """Standard normal float32[batch, *shape]."""

    def draw(rng: np.random.Generator, batch: int) -> Inputs:
        return (rng.standard_normal((batch, *shape)).astype(np.float32),)

    return draw


def tokens(vocabulary: int, length: int) -> MakeInputs:
    """Token ids int32[batch, length]."""

    def draw(rng: np.random.Generator, batch: int) -> Inputs:
        return (rng.integers(0, vocabulary, (batch, length), dtype=np.int32),)

    return draw


def masked_tokens(vocabulary: int, length: int) -> MakeInputs:
    """Token ids and mask, int32[batch, length]; the last eighth is padding."""

    def draw(rng: np.random.Generator, batch: int) -> Inputs:
        ids = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
        mask = (np.arange(length) < length - length // 8).astype(np.int32)
        return ids, np.broadcast_to(mask, ids.shape).copy()

    return draw


def network(nodes: int, features: int) -> MakeInputs:
    """A random graph with about 8 neighbours a node, [nodes, nodes], and signals [batch, nodes, features]."""

    def draw(rng: np.random.Generator, batch: int) -> Inputs:
        upper = np.triu(rng.random((nodes, nodes)) < 8 / nodes, 1)
        signals = rng.standard_normal((batch, nodes, features))
        return (upper | upper.T).astype(np.float32), signals.astype(np.float32)

    return draw


def catalogue(items: int, attributes: int, traits: int, seen: int) -> MakeInputs:
    """Ids and facts of all items, then history int32[batch, seen] and profile [batch, traits] of users."""

    def draw(rng: np.random.Generator, batch: int) -> Inputs:
        facts = rng.standard_normal((items, attributes)).astype(np.float32)
        history = rng.integers(0, items, (batch, seen), dtype=np.int32)
        profile = rng.standard_normal((batch, traits)).astype(np.float32)
        return np.arange(items, dtype=np.int32), facts, history, profile

    return draw


def words(rng: np.random.Generator, batch: int) -> Inputs:
    """Words that a pronouncing dictionary may lack, as letter ids int32[batch, 20]."""

    return (g2p.encode([WORDS[index % len(WORDS)] for index in range(batch)]),)


def sentences(rng: np.random.Generator, batch: int) -> Inputs:
    """English text as MiniLM's token ids and mask, int32[batch, 128]."""

    return minilm.tokenize([f"{index}. {SENTENCE * 3}" for index in range(batch)], 128)


def photographs(rng: np.random.Generator, batch: int) -> Inputs:
    """The photographs of `images`, in turn: float32[batch, 224, 224, 3]."""

    pictures = images.photographs()
    return (pictures[np.arange(batch) % len(pictures)],)
