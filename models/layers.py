"""The block that the convolutional families share: convolution, batch normalisation, activation."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import linen as nn


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, activation.

    y = activation(scale · (x ∗ kernel − mean) / sqrt(var + epsilon) + bias), in NHWC.

    Attributes:
        features: output channels.
        kernel: side of the square kernel.
        strides: stride in both directions.
        groups: feature groups; equal to the input channels for a depthwise convolution.
        padding: as `nn.Conv` takes it; "SAME" pads like TensorFlow, an int pads both sides alike.
        activation: applied last; None for a linear block.
        epsilon: added to the variance.
    """

    features: int
    kernel: int = 3
    strides: int = 1
    groups: int = 1
    padding: str | int = "SAME"
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] → [batch, height / strides, width / strides, features]."""
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=self.strides,
            padding=self.padding,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        x = nn.BatchNorm(use_running_average=not train, epsilon=self.epsilon, name="norm")(x)
        return x if self.activation is None else self.activation(x)


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise k×k, project 1×1 without activation; plus the input where the shapes agree.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
    """

    features: int
    expansion: int
    strides: int
    kernel: int = 3
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, height, width, channels] → [batch, height / strides, width / strides, features]."""
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = ConvNorm(hidden, 1, activation=nn.relu6, epsilon=self.epsilon, name="expand")(y, train)
        y = ConvNorm(
            hidden,
            self.kernel,
            self.strides,
            groups=hidden,
            activation=nn.relu6,
            epsilon=self.epsilon,
            name="depthwise",
        )(y, train)
        y = ConvNorm(self.features, 1, activation=None, epsilon=self.epsilon, name="project")(y, train)
        return x + y if x.shape == y.shape else y
