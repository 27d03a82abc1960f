"""Programs after the image examples of Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from programs_base import Draw, Made, from_equinox, given, listed, random_params


class _MnistCNN(eqx.Module):
    layers: list[Any]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 8, 4, key=keys[0]),
            eqx.nn.MaxPool2d(2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(8 * 8 * 8, 32, key=keys[1]),
            jax.nn.sigmoid,
            eqx.nn.Linear(32, 16, key=keys[2]),
            jax.nn.relu,
            eqx.nn.Linear(16, 10, key=keys[3]),
            jax.nn.log_softmax,
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@listed("patrick-kidger/equinox docs/examples/mnist.ipynb", "conv", "flatten", "vmap")
def equinox_mnist_cnn(dtype: Any) -> Made:
    return from_equinox(_MnistCNN, lambda draw, batch: (draw.normal(batch, 1, 12, 12),), dtype)


class _AttentionBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.norm1 = eqx.nn.LayerNorm(width)
        self.norm2 = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0])
        self.linear1 = eqx.nn.Linear(width, hidden, key=keys[1])
        self.linear2 = eqx.nn.Linear(hidden, width, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        y = jax.nn.gelu(jax.vmap(self.linear1)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.linear2)(y)


class _ViT(eqx.Module):
    """Patches by rearranging, a class token in front, learned positions."""

    embed: eqx.nn.Linear
    position_embedding: jax.Array
    class_token: jax.Array
    blocks: list[_AttentionBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 6)
        self.embed = eqx.nn.Linear(3 * 4 * 4, 16, key=keys[0])
        self.position_embedding = jax.random.normal(keys[1], (10, 16))
        self.class_token = jax.random.normal(keys[2], (1, 16))
        self.blocks = [_AttentionBlock(16, 24, 2, k) for k in keys[3:5]]
        self.norm = eqx.nn.LayerNorm(16)
        self.head = eqx.nn.Linear(16, 10, key=keys[5])

    def __call__(self, x: jax.Array) -> jax.Array:
        channels, height, width = x.shape
        x = x.reshape(channels, height // 4, 4, width // 4, 4).transpose(1, 3, 0, 2, 4)
        x = jax.vmap(self.embed)(x.reshape(height * width // 16, channels * 16))
        x = jnp.concatenate([self.class_token, x], axis=0)
        x = x + self.position_embedding[: x.shape[0]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


@listed(
    "patrick-kidger/equinox docs/examples/vision_transformer.ipynb", "attention", "residual", "norm", "concat", "vmap"
)
def equinox_vision_transformer(dtype: Any) -> Made:
    return from_equinox(_ViT, lambda draw, batch: (draw.normal(batch, 3, 12, 12),), dtype)


class _MixerBlock(eqx.Module):
    """Mixes patches, then channels; both norms run over the whole patch × channel array."""

    patches: eqx.nn.MLP
    channels: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self, patches: int, width: int, key: jax.Array):
        keys = jax.random.split(key)
        self.patches = eqx.nn.MLP(patches, patches, 20, depth=1, key=keys[0])
        self.channels = eqx.nn.MLP(width, width, 24, depth=1, key=keys[1])
        self.norm1 = eqx.nn.LayerNorm((width, patches))
        self.norm2 = eqx.nn.LayerNorm((patches, width))

    def __call__(self, y: jax.Array) -> jax.Array:
        y = (y + jax.vmap(self.patches)(self.norm1(y))).T
        return (y + jax.vmap(self.channels)(self.norm2(y))).T


class _ScoreMixer(eqx.Module):
    into: eqx.nn.Conv2d
    out: eqx.nn.ConvTranspose2d
    blocks: list[_MixerBlock]
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.into = eqx.nn.Conv2d(2, 12, 2, stride=2, key=keys[0])
        self.out = eqx.nn.ConvTranspose2d(12, 1, 2, stride=2, key=keys[1])
        self.blocks = [_MixerBlock(16, 12, k) for k in keys[2:]]
        self.norm = eqx.nn.LayerNorm((12, 16))

    def __call__(self, t: jax.Array, y: jax.Array) -> jax.Array:
        time = jnp.broadcast_to(t / 10.0, (1, *y.shape[1:]))
        y = self.into(jnp.concatenate([y, time]))
        channels, height, width = y.shape
        y = y.reshape(channels, height * width)
        for block in self.blocks:
            y = block(y)
        return self.out(self.norm(y).reshape(channels, height, width))


@listed(
    "patrick-kidger/equinox docs/examples/score_based_diffusion.ipynb", "dense", "residual", "norm", "transpose", "vmap"
)
def equinox_score_mixer(dtype: Any) -> Made:
    def inputs(draw: Draw, batch: int) -> tuple[jax.Array, jax.Array]:
        return draw.uniform(0, 10, batch), draw.normal(batch, 1, 8, 8)

    return from_equinox(_ScoreMixer, inputs, dtype)


class _Layers(eqx.Module):
    """Layers one after the other, batch normalization with its state among them."""

    layers: list[Any]

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        for layer in self.layers:
            x, state = layer(x, state) if isinstance(layer, eqx.nn.StatefulLayer) else (layer(x), state)
        return x, state


def _batch_norm(width: int) -> eqx.nn.BatchNorm:
    return eqx.nn.BatchNorm(width, axis_name="batch", mode="ema")


def _generator() -> _Layers:
    keys = jax.random.split(jax.random.key(0), 4)
    layers: list[Any] = []
    for key, (into, out, stride, padding) in zip(keys, ((10, 24, 1, 0), (24, 16, 2, 1), (16, 8, 2, 1), (8, 1, 2, 1))):
        conv = eqx.nn.ConvTranspose2d(into, out, 4, stride, padding=padding, use_bias=False, key=key)
        layers += [conv] + ([_batch_norm(out), jax.nn.relu] if out > 1 else [jax.nn.tanh])
    return _Layers(layers)


def _discriminator() -> _Layers:
    keys = jax.random.split(jax.random.key(0), 4)
    layers: list[Any] = []
    for key, (into, out, stride, padding) in zip(keys, ((1, 8, 2, 1), (8, 16, 2, 1), (16, 24, 2, 1), (24, 1, 4, 0))):
        layers.append(eqx.nn.Conv2d(into, out, 4, stride, padding=padding, use_bias=False, key=key))
        if into > 1 and out > 1:
            layers.append(_batch_norm(out))
        if out > 1:
            layers.append(eqx.nn.PReLU(0.2))
    return _Layers(layers)


def _stateful(build: Callable[[], _Layers], shape: tuple[int, ...], dtype: Any, least: float = 0.02) -> Made:
    """Model and state together, for inference: the running statistics are parameters too."""
    model, state = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(build)())
    arrays, static = eqx.partition((eqx.nn.inference_mode(model), state), _is_floating)
    model_params, statistics = (random_params(part, dtype, out_axis=0) for part in arrays)
    # Positive, because half of the statistics are variances.
    params = model_params, jax.tree.map(lambda x: least + jnp.abs(x) / 4, statistics)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        model, state = eqx.combine(params, static)
        return jax.vmap(lambda one: model(one, state)[0])(x)

    return Made(fun, params, given(lambda draw, batch: (draw.normal(batch, *shape),), dtype))


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)


@listed("patrick-kidger/equinox docs/examples/deep_convolutional_gan.ipynb", "transposed conv", "norm", "vmap")
def equinox_dcgan_generator(dtype: Any) -> Made:
    return _stateful(_generator, (10, 1, 1), dtype)


@listed("patrick-kidger/equinox docs/examples/deep_convolutional_gan.ipynb", "conv", "norm", "vmap")
def equinox_dcgan_discriminator(dtype: Any) -> Made:
    return _stateful(_discriminator, (1, 32, 32), dtype)


def _spectral() -> _Layers:
    keys = jax.random.split(jax.random.key(0), 4)
    spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(3, 24, key=keys[0]), "weight", key=keys[1])
    hidden, out = eqx.nn.Linear(24, 16, key=keys[2]), eqx.nn.Linear(16, 3, key=keys[3])
    return _Layers([_batch_norm(3), spectral, jax.nn.relu, _batch_norm(24), hidden, jax.nn.relu, out])


@listed("patrick-kidger/equinox docs/examples/stateful.ipynb", "dense", "norm", "spectral norm", "vmap")
def equinox_spectral_norm(dtype: Any) -> Made:
    made = _stateful(_spectral, (3,), dtype, least=0.3)
    # Positive like the vectors that estimate the norm, or the estimate could be near zero.
    params = eqx.tree_at(lambda params: params[0].layers[1].layer.weight, made.params, replace_fn=jnp.abs)
    return Made(made.fun, params, made.inputs)


PROGRAMS = (
    equinox_mnist_cnn,
    equinox_vision_transformer,
    equinox_score_mixer,
    equinox_dcgan_generator,
    equinox_dcgan_discriminator,
    equinox_spectral_norm,
)
