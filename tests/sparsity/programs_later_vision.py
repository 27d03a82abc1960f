"""Image networks that `shrink` had not seen when it was finished; listed before it was tried on them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from programs_base import Made, linen, listed


class _ConvNeXt(nn.Module):
    """Depthwise 7×7, layer norm, inverted bottleneck with GELU, a scale for each channel, residual; in two stages."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(nn.Conv(12, (4, 4), (4, 4))(x))
        for stage, width in enumerate((12, 20)):
            if stage:
                x = nn.Conv(width, (2, 2), (2, 2))(nn.LayerNorm()(x))
            for block in range(2):
                y = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
                y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
                x = x + y * self.param(f"layer_scale_{stage}_{block}", nn.initializers.ones, (width,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


@listed("facebookresearch/ConvNeXt models/convnext.py", "conv", "depthwise", "residual", "norm")
def convnext(dtype: Any) -> Made:
    return linen(_ConvNeXt(), lambda draw, batch: (draw.normal(batch, 32, 32, 3),), dtype)


class _DoubleConv(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        return x


class _UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, what went down beside what comes up."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skips = []
        for width in (6, 10):
            skips.append(_DoubleConv(width)(x))
            x = nn.max_pool(skips[-1], (2, 2), (2, 2))
        x = _DoubleConv(16)(x)
        for width, skip in zip((10, 6), reversed(skips)):
            x = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = _DoubleConv(width)(jnp.concatenate([skip, x], -1))
        return nn.Conv(2, (1, 1))(x)


@listed("milesial/Pytorch-UNet unet/unet_model.py", "conv", "transposed conv", "concat", "norm")
def unet(dtype: Any) -> Made:
    return linen(_UNet(), lambda draw, batch: (draw.normal(batch, 16, 16, 3),), dtype)


class _MobileNetV3(nn.Module):
    """Expand, depthwise, squeeze and excite with hard sigmoid, project; hard swish."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.hard_swish(norm(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        for expanded, width, stride in ((16, 8, 1), (24, 12, 2), (32, 12, 1)):
            y = nn.hard_swish(norm(nn.Conv(expanded, (1, 1), use_bias=False)(x)))
            kernel, steps = (5, 5), (stride, stride)
            y = nn.hard_swish(norm(nn.Conv(expanded, kernel, steps, use_bias=False, feature_group_count=expanded)(y)))
            gate = nn.relu(nn.Conv(expanded // 4, (1, 1))(y.mean((1, 2), keepdims=True)))
            y = y * nn.hard_sigmoid(nn.Conv(expanded, (1, 1))(gate))
            y = norm(nn.Conv(width, (1, 1), use_bias=False)(y))
            x = x + y if x.shape == y.shape else y
        x = nn.hard_swish(norm(nn.Conv(40, (1, 1), use_bias=False)(x))).mean((1, 2))
        return nn.Dense(10)(nn.hard_swish(nn.Dense(24)(x)))


@listed("pytorch/vision torchvision/models/mobilenetv3.py", "conv", "depthwise", "squeeze and excite", "residual")
def mobilenet_v3(dtype: Any) -> Made:
    return linen(_MobileNetV3(), lambda draw, batch: (draw.normal(batch, 24, 24, 3),), dtype)


class _ConvVAE(nn.Module):
    """Strided convolutions to a mean and a log variance, transposed ones back; a sample that comes as an input."""

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = x
        for width in (8, 12):
            h = nn.leaky_relu(nn.Conv(width, (3, 3), (2, 2))(h))
        h = h.reshape(h.shape[0], -1)
        mean, log_variance = nn.Dense(6)(h), nn.Dense(6)(h)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        h = nn.relu(nn.Dense(4 * 4 * 12)(z)).reshape(-1, 4, 4, 12)
        for width in (12, 8):
            h = nn.leaky_relu(nn.ConvTranspose(width, (3, 3), (2, 2))(h))
        return nn.sigmoid(nn.Conv(1, (3, 3))(h)), mean, log_variance


@listed("AntixK/PyTorch-VAE models/vanilla_vae.py", "conv", "transposed conv", "flatten", "dense")
def conv_vae(dtype: Any) -> Made:
    return linen(_ConvVAE(), lambda draw, batch: (draw.normal(batch, 16, 16, 1), draw.normal(batch, 6)), dtype)


class _PixelShuffle(nn.Module):
    """Super-resolution: residual blocks, then channels become places."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = first = nn.Conv(10, (3, 3))(x)
        for _ in range(2):
            h = h + 0.1 * nn.Conv(10, (3, 3))(nn.relu(nn.Conv(10, (3, 3))(h)))
        h = nn.Conv(40, (3, 3))(h + first)
        batch, height, width, channels = h.shape
        h = h.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
        return nn.Conv(3, (3, 3))(h.reshape(batch, 2 * height, 2 * width, channels // 4))


@listed("sanghyun-son/EDSR-PyTorch src/model/edsr.py", "conv", "residual", "transpose")
def edsr(dtype: Any) -> Made:
    return linen(_PixelShuffle(), lambda draw, batch: (draw.normal(batch, 6, 6, 3),), dtype)


PROGRAMS = (convnext, unet, mobilenet_v3, conv_vae, edsr)
