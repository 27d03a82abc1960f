"""Programs after the image examples of Flax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from programs_base import Made, from_nnx, linen, listed


class _MnistCNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.hidden = nnx.Linear(3 * 3 * 16, 24, rngs=rngs)
        self.logits = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.logits(nnx.relu(self.hidden(x)))


@listed("google/flax examples/mnist/train.py", "conv", "norm", "flatten")
def flax_mnist_cnn(dtype: Any) -> Made:
    return from_nnx(_MnistCNN, lambda draw, batch: (draw.normal(batch, 12, 12, 1),), dtype)


def _norm() -> nn.Module:
    return nn.BatchNorm(use_running_average=True)


class _Basic(nn.Module):
    """Two 3×3 convolutions; the shortcut is projected where the shape changes."""

    width: int
    stride: int
    expansion = 1

    def branch(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), (self.stride, self.stride), use_bias=False)(x)
        x = nn.relu(_norm()(x))
        return _norm()(nn.Conv(self.width, (3, 3), use_bias=False)(x))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.branch(x)
        if x.shape != y.shape:
            stride = (self.stride, self.stride)
            x = nn.Conv(self.width * self.expansion, (1, 1), stride, use_bias=False, name="conv_proj")(x)
            x = nn.BatchNorm(use_running_average=True, name="norm_proj")(x)
        return nn.relu(x + y)


class _Bottleneck(_Basic):
    """A 3×3 convolution between two 1×1 ones, four times wider outside."""

    expansion = 4

    def branch(self, x: jax.Array) -> jax.Array:
        x = nn.relu(_norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        x = nn.Conv(self.width, (3, 3), (self.stride, self.stride), use_bias=False)(x)
        x = nn.relu(_norm()(x))
        return _norm()(nn.Conv(4 * self.width, (1, 1), use_bias=False)(x))


class _ResNet(nn.Module):
    block: Callable[..., nn.Module]
    stages: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False)(x)
        x = nn.max_pool(nn.relu(_norm()(x)), (3, 3), (2, 2), padding="SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = self.block(self.width * 2**i, 2 if i > 0 and j == 0 else 1)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


@listed("google/flax examples/imagenet/models.py (ResNet18)", "conv", "norm", "residual")
def flax_resnet18(dtype: Any) -> Made:
    module = _ResNet(_Basic, (2, 2, 2, 2), 8)
    return linen(module, lambda draw, batch: (draw.normal(batch, 32, 32, 3),), dtype)


@listed("google/flax examples/imagenet/models.py (ResNet50)", "conv", "norm", "residual")
def flax_resnet50(dtype: Any) -> Made:
    module = _ResNet(_Bottleneck, (1, 2, 1), 8)
    return linen(module, lambda draw, batch: (draw.normal(batch, 24, 24, 3),), dtype)


class _VAE(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        hidden = nn.relu(nn.Dense(24, name="encoder")(x))
        mean = nn.Dense(6, name="mean")(hidden)
        logvar = nn.Dense(6, name="logvar")(hidden)
        noise = jax.random.normal(jax.random.key(0), logvar.shape, logvar.dtype)
        z = mean + noise * jnp.exp(0.5 * logvar)
        hidden = nn.relu(nn.Dense(24, name="decoder")(z))
        return nn.Dense(x.shape[-1], name="image")(hidden), mean, logvar


@listed("google/flax examples/vae/models.py", "dense", "random")
def flax_vae(dtype: Any) -> Made:
    return linen(_VAE(), lambda draw, batch: (draw.uniform(0, 1, batch, 30),), dtype)


class _ActorCritic(nn.Module):
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x / 255.0
        for features, kernel, stride in ((8, 8, 4), (16, 4, 2), (16, 3, 1)):
            x = nn.relu(nn.Conv(features, (kernel, kernel), (stride, stride))(x))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(self.actions)(x)), nn.Dense(1)(x)


@listed("google/flax examples/ppo/models.py", "conv", "flatten")
def flax_ppo_actor_critic(dtype: Any) -> Made:
    return linen(_ActorCritic(4), lambda draw, batch: (draw.uniform(0, 255, batch, 28, 28, 4),), dtype)


def _concat_elu(x: jax.Array) -> jax.Array:
    return nn.elu(jnp.concatenate([x, -x], axis=-1))


class _WeightNormConv(nn.Module):
    """A convolution that sees only rows above (and columns to the left); its kernel is direction × scale."""

    features: int
    kernel: tuple[int, int]
    padding: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, x.shape[-1], self.features)
        direction = self.param("direction", nn.initializers.normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = scale * direction * jax.lax.rsqrt(jnp.sum(direction**2, (0, 1, 2)) + 1e-12)
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=dims) + bias


_Down = partial(_WeightNormConv, kernel=(2, 3), padding=((1, 0), (1, 1)))
_DownRight = partial(_WeightNormConv, kernel=(2, 2), padding=((1, 0), (1, 0)))
_OneByOne = partial(_WeightNormConv, kernel=(1, 1), padding="SAME")


class _GatedResnet(nn.Module):
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, side: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        y = self.conv(width)(_concat_elu(x))
        if side is not None:
            y = y + _OneByOne(width)(_concat_elu(side))
        a, b = jnp.split(self.conv(2 * width)(_concat_elu(y)), 2, axis=-1)
        return x + a * nn.sigmoid(b)


class _PixelCNN(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        above = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        left = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        down = _Down(self.width)(above)
        right = _Down(self.width)(above) + _DownRight(self.width)(left)
        for _ in range(2):
            down = _GatedResnet(_Down)(down)
            right = _GatedResnet(_DownRight)(right, down)
        return _OneByOne(20)(nn.elu(right))


@listed(
    "google/flax v0.3.4 examples/pixelcnn/pixelcnn.py", "conv", "residual", "concat", "split", "weight norm", "gated"
)
def flax_pixelcnn(dtype: Any) -> Made:
    return linen(_PixelCNN(8), lambda draw, batch: (draw.uniform(-1, 1, batch, 8, 8, 3),), dtype)


class _MixerMLP(nnx.Module):
    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.into = nnx.Linear(width, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.into(x)))


class _MixerBlock(nnx.Module):
    def __init__(self, tokens: int, width: int, hidden: int, rngs: nnx.Rngs):
        self.tokens = _MixerMLP(tokens, hidden, rngs)
        self.channels = _MixerMLP(width, hidden, rngs)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.tokens(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norm2(x))


class _Mixer(nnx.Module):
    """Image and time in, image out: patches by a strided convolution, and back by a transposed one."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(2, 16, (2, 2), (2, 2), rngs=rngs)
        self.block1 = _MixerBlock(16, 16, 24, rngs)
        self.block2 = _MixerBlock(16, 16, 24, rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.head = nnx.ConvTranspose(16, 1, (2, 2), (2, 2), rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t[:, None, None, None], (*x.shape[:3], 1))
        x = self.stem(jnp.concatenate([x, t], axis=-1))
        batch, height, width, channels = x.shape
        x = self.block2(self.block1(x.reshape(batch, height * width, channels)))
        return self.head(self.norm(x).reshape(batch, height, width, channels))


@listed("google/flax benchmarks/nnx_mlpmixer_training.py", "dense", "residual", "norm", "transpose")
def flax_mlp_mixer(dtype: Any) -> Made:
    return from_nnx(_Mixer, lambda draw, batch: (draw.normal(batch, 8, 8, 1), draw.uniform(0, 1, batch)), dtype)


class _EnsembleMember(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (8, 16):
            x = nn.avg_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


@listed("google/flax docs/guides/parallel_training/ensembling.rst", "conv", "vmap", "flatten")
def flax_ensemble(dtype: Any) -> Made:
    """Three networks as one: parameters with a leading axis, probabilities averaged over it."""
    stacked = nn.vmap(
        _EnsembleMember, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    )
    members = linen(stacked(), lambda draw, batch: (draw.normal(batch, 8, 8, 1),), dtype)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softmax(members.fun(params, x)), axis=0)

    return Made(fun, members.params, members.inputs)


PROGRAMS = (
    flax_mnist_cnn,
    flax_resnet18,
    flax_resnet50,
    flax_vae,
    flax_ppo_actor_critic,
    flax_pixelcnn,
    flax_mlp_mixer,
    flax_ensemble,
)
