"""MobileNetV2: inverted residuals with ReLU6.

Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from jaxinfer.models.layers import ConvNorm, InvertedResidual

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1×1 head, average pooling, dense classifier.

    Attributes:
        stages: (expansion, channels, repeats, stride of the first block) of each stage.
        stem: channels of the first convolution.
        head: channels of the last convolution.
        classes: number of classes.
    """

    stages: Sequence[tuple[int, int, int, int]] = STAGES
    stem: int = 32
    head: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, height, width, 3] → logits [batch, classes]."""
        x = ConvNorm(self.stem, 3, 2, activation=nn.relu6, name="stem")(x, train)
        for stage, (expansion, channels, repeats, strides) in enumerate(self.stages):
            for index in range(repeats):
                block = InvertedResidual(
                    channels, expansion, strides if index == 0 else 1, name=f"stage{stage}_block{index}"
                )
                x = block(x, train)
        x = ConvNorm(self.head, 1, activation=nn.relu6, name="head")(x, train)
        return nn.Dense(self.classes, name="classifier")(x.mean(axis=(1, 2)))
