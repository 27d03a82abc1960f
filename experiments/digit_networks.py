"""Networks that learn digits: what they are, how they are trained, what they get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxinfer.models import digits
from jaxinfer.models.cnn import CNN
from jaxinfer.models.lenet import LeNet5
from jaxinfer.models.mlp import MLP
from jaxinfer.models.resnet import ResNet

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Network:
    """A network and the digits it learns.

    Attributes:
        module: a Flax module.
        data: gives images [items, height, width] and classes int[items].
        flat: whether it takes an image as one vector; else as one channel.
        normalized: whether it has batch normalization, and so a second argument that says whether it is trained.
    """

    module: nn.Module
    data: Callable[[], Batch]
    flat: bool = False
    normalized: bool = False

    def inputs(self, images: np.ndarray) -> np.ndarray:
        """Images [items, height, width] as the module takes them."""
        return images.reshape(len(images), -1) if self.flat else images[..., None]

    def start(self, images: np.ndarray, key: jax.Array) -> Any:
        """Untrained variables; of the images only the size matters."""
        return jax.jit(self.module.init)(key, self.inputs(images[:1]))

    def apply(self, variables: Any, x: jax.Array) -> jax.Array:
        """Logits [items, classes], in inference."""
        return self.module.apply(variables, x)  # type: ignore[return-value]

    def training(self, variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """Logits [items, classes] in training, and the collections that training changes."""
        if self.normalized:
            return self.module.apply(variables, batch[0], True, mutable=["batch_stats"])  # type: ignore[return-value]
        return self.apply(variables, batch[0]), {}

    def outputs(self, variables: Any, batch: Batch) -> jax.Array:
        """The logits of :meth:`training` alone."""
        return self.training(variables, batch)[0]

    def loss(self, variables: Any, batch: Batch) -> tuple[jax.Array, Any]:
        """Mean cross-entropy in training, and the collections that training changes."""
        logits, state = self.training(variables, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), state


NETWORKS = {
    "lenet300": Network(MLP((300, 100, 10)), digits.mnist, flat=True),
    "cnn": Network(CNN(), digits.mnist),
    "lenet5": Network(LeNet5(), digits.mnist),
    "resnet": Network(ResNet((1, 1, 1), width=24, classes=10, stem=3, pool=False), digits.mnist, normalized=True),
    "mlp": Network(MLP((100, 50, 10)), digits.small, flat=True),
}
"""By name: LeNet-300-100, the small CNN of the zoo, LeNet-5 and a residual network on MNIST; a perceptron on
scikit-learn's small digits."""


@dataclass(frozen=True)
class Training:
    """How a network is trained, pruned or not.

    Attributes:
        steps: number of steps.
        batch: images in each.
        rate: the highest learning rate, after a tenth of the steps; it falls to nothing with a cosine.
        decay: of the weights, relative to the learning rate (AdamW).
        reach: images are moved by up to so many pixels.
    """

    steps: int
    batch: int = 100
    rate: float = 2e-3
    decay: float = 1e-4
    reach: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with the schedule."""
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, max(self.steps // 10, 1), max(self.steps, 2))
        return optax.adamw(rate, weight_decay=self.decay)

    def batches(self, network: Network, images: np.ndarray, classes: np.ndarray, seed: int) -> Callable[[int], Batch]:
        """Step → batch; the same seed gives the same batches."""
        size = min(self.batch, len(images))

        def batch(step: int) -> Batch:
            rng = np.random.default_rng((seed, step))
            chosen = rng.choice(len(images), size, replace=False)
            return network.inputs(digits.shifted(images[chosen], rng, self.reach)), classes[chosen]

        return batch


def train(network: Network, variables: Any, batches: Callable[[int], Batch], training: Training) -> Any:
    """The variables after training, nothing pruned."""
    optimizer = training.optimizer()

    @jax.jit
    def step(variables: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            return network.loss({**variables, "params": params}, batch)

        gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state, variables["params"])
        return {**variables, **changed, "params": optax.apply_updates(variables["params"], updates)}, state

    state = optimizer.init(variables["params"])
    for index in range(training.steps):
        variables, state = step(variables, state, batches(index))
    return variables


def is_right(apply: Callable[..., Any], variables: Any, x: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """bool[items]: which items are classified rightly."""
    return np.asarray(jax.jit(apply)(variables, x).argmax(axis=-1) == classes)
