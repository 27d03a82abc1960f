"""Programs after the examples and documents of JAX."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.example_libraries import stax
from programs_base import Made, MakeInputs, given, listed, plain, random_params


def _stax(layers: tuple[Any, Any], shape: tuple[int, ...], inputs: MakeInputs, dtype: Any) -> Made:
    init, apply = layers
    params = jax.eval_shape(lambda key: init(key, shape)[1], jax.random.key(0))
    return Made(apply, random_params(params, dtype), given(inputs, dtype))


@listed("jax-ml/jax examples/mnist_classifier.py", "dense")
def jax_mnist_classifier(dtype: Any) -> Made:
    layers = stax.serial(
        *(stax.Dense(24), stax.Relu),
        *(stax.Dense(24), stax.Relu),
        *(stax.Dense(10), stax.LogSoftmax),
    )
    return _stax(layers, (-1, 36), lambda draw, batch: (draw.uniform(0, 1, batch, 36),), dtype)


@listed("jax-ml/jax examples/mnist_vae.py", "dense", "random")
def jax_mnist_vae(dtype: Any) -> Made:
    """Encoder and decoder; the parameters of one Gaussian come out of two parallel layers."""
    hidden = (stax.Dense(24), stax.Relu, stax.Dense(24), stax.Relu)
    spread = stax.serial(stax.Dense(6), stax.Softplus)
    encoder = stax.serial(*hidden, stax.FanOut(2), stax.parallel(stax.Dense(6), spread))
    decoder = stax.serial(*hidden, stax.Dense(36))
    parts = [
        _stax(layers, (-1, width), lambda draw, batch: (draw.uniform(0, 1, batch, 36),), dtype)
        for layers, width in ((encoder, 36), (decoder, 6))
    ]

    def fun(params: Any, images: jax.Array) -> jax.Array:
        mean, variance = parts[0].fun(params[0], images)
        noise = jax.random.normal(jax.random.key(1), mean.shape, mean.dtype)
        return parts[1].fun(params[1], mean + jnp.sqrt(variance) * noise)

    return Made(fun, (parts[0].params, parts[1].params), parts[0].inputs)


@listed("jax-ml/jax examples/differentially_private_sgd.py", "conv", "flatten")
def jax_private_convnet(dtype: Any) -> Made:
    layers = stax.serial(
        stax.Conv(8, (8, 8), padding="SAME", strides=(2, 2)),
        *(stax.Relu, stax.MaxPool((2, 2), (1, 1))),
        stax.Conv(16, (4, 4), padding="VALID", strides=(2, 2)),
        *(stax.Relu, stax.MaxPool((2, 2), (1, 1)), stax.Flatten),
        *(stax.Dense(16), stax.Relu, stax.Dense(10)),
    )
    return _stax(layers, (-1, 20, 20, 1), lambda draw, batch: (draw.uniform(0, 1, batch, 20, 20, 1),), dtype)


def _conv_block(filters: tuple[int, int, int], strides: tuple[int, int]) -> tuple[Any, Any]:
    main = stax.serial(
        *(stax.Conv(filters[0], (1, 1), strides), stax.BatchNorm(), stax.Relu),
        *(stax.Conv(filters[1], (3, 3), padding="SAME"), stax.BatchNorm(), stax.Relu),
        *(stax.Conv(filters[2], (1, 1)), stax.BatchNorm()),
    )
    shortcut = stax.serial(stax.Conv(filters[2], (1, 1), strides), stax.BatchNorm())
    return stax.serial(stax.FanOut(2), stax.parallel(main, shortcut), stax.FanInSum, stax.Relu)


def _identity_block(filters: tuple[int, int]) -> tuple[Any, Any]:
    def main(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return stax.serial(
            *(stax.Conv(filters[0], (1, 1)), stax.BatchNorm(), stax.Relu),
            *(stax.Conv(filters[1], (3, 3), padding="SAME"), stax.BatchNorm(), stax.Relu),
            *(stax.Conv(shape[3], (1, 1)), stax.BatchNorm()),
        )

    both = stax.parallel(stax.shape_dependent(main), stax.Identity)
    return stax.serial(stax.FanOut(2), both, stax.FanInSum, stax.Relu)


@listed("jax-ml/jax examples/resnet50.py (before e350894)", "conv", "residual", "batch statistics", "layout")
def jax_resnet50(dtype: Any) -> Made:
    """Normalizes with the statistics of the batch; images come with the batch last, the first kernel as OIHW."""
    layers = stax.serial(
        stax.GeneralConv(("HWCN", "OIHW", "NHWC"), 8, (7, 7), (2, 2), "SAME"),
        *(stax.BatchNorm(), stax.Relu, stax.MaxPool((3, 3), strides=(2, 2))),
        *(_conv_block((6, 6, 24), (1, 1)), _identity_block((6, 6))),
        *(_conv_block((8, 8, 32), (2, 2)), _identity_block((8, 8))),
        *(stax.AvgPool((3, 3)), stax.Flatten, stax.Dense(10), stax.LogSoftmax),
    )
    return _stax(layers, (24, 24, 3, 2), lambda draw, batch: (draw.normal(24, 24, 3, batch),), dtype)


@listed("jax-ml/jax examples/spmd_mnist_classifier_fromscratch.py", "dense")
def jax_spmd_classifier(dtype: Any) -> Made:
    widths = (36, 24, 24, 10)
    shapes = [((m, n), (n,)) for m, n in pairwise(widths)]

    def fun(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jnp.tanh(jnp.dot(x, w) + b)
        w, b = params[-1]
        logits = jnp.dot(x, w) + b
        return logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)

    return plain(fun, shapes, lambda draw, batch: (draw.uniform(0, 1, batch, 36),), dtype)


@listed("jax-ml/jax docs/notebooks/Neural_Network_and_Data_Loading.md", "dense", "vmap")
def jax_vmapped_predict(dtype: Any) -> Made:
    """Written for one image: matrix times vector, rows of the matrix are outputs; then mapped."""
    widths = (36, 24, 16, 10)
    shapes = [((n, m), (n,)) for m, n in pairwise(widths)]

    def predict(params: list[tuple[jax.Array, jax.Array]], image: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            image = jnp.maximum(0, jnp.dot(w, image) + b)
        w, b = params[-1]
        logits = jnp.dot(w, image) + b
        return logits - jax.scipy.special.logsumexp(logits)

    fun = jax.vmap(predict, in_axes=(None, 0))
    return plain(fun, shapes, lambda draw, batch: (draw.uniform(0, 1, batch, 36),), dtype)


@listed("jax-ml/jax docs/notebooks/autodiff_remat.md", "dense", "remat", "vmap")
def jax_remat(dtype: Any) -> Made:
    @jax.checkpoint
    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.dot(w, x))

    def chain(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in params:
            x = layer(w, x)
        return x

    shapes = [(16, 8), (24, 16), (16, 24), (5, 16)]
    return plain(jax.vmap(chain, (None, 0)), shapes, lambda draw, batch: (draw.normal(batch, 8),), dtype)


@listed("jax-ml/jax docs/the-training-cookbook.py", "attention", "residual", "norm", "embedding")
def jax_cookbook_transformer(dtype: Any) -> Made:
    """Queries, keys and values from one array; residual sums are divided by the root of their norm."""
    width, heads, head_width, hidden, vocabulary, length = 16, 4, 6, 24, 20, 8
    layer = {
        "qkv": (3, width, heads, head_width),
        "out": (heads, head_width, width),
        "mlp_in": (width, hidden),
        "mlp_out": (hidden, width),
    }
    shapes = {
        "embedding": (vocabulary, width),
        "position_embedding": (length, width),
        "layers": [layer, layer],
        "logits": (width, vocabulary),
    }

    def normalized(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)

    def fun(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"].at[tokens].get() + params["position_embedding"]
        for block in params["layers"]:
            qkv = jnp.einsum("bsd,3dkh->bs3kh", x, block["qkv"])
            y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
            x = normalized(x + jnp.einsum("bskh,khd->bsd", y, block["out"]))
            x = normalized(x + jax.nn.gelu(x @ block["mlp_in"]) @ block["mlp_out"])
        return x @ params["logits"]

    return plain(fun, shapes, lambda draw, batch: (draw.integers(0, vocabulary, batch, length),), dtype)


PROGRAMS = (
    jax_mnist_classifier,
    jax_mnist_vae,
    jax_private_convnet,
    jax_resnet50,
    jax_spmd_classifier,
    jax_vmapped_predict,
    jax_remat,
    jax_cookbook_transformer,
)
