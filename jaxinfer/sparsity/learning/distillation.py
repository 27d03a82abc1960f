"""Learning from the dense model while it is pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Distillation:
    """The loss becomes (1 − weight)·loss + weight·(distance from the teacher's outputs).

    Attributes:
        outputs: ``outputs(params, batch)``, the model's outputs: an array, or a pytree of arrays whose distances are
            added up. What it shares with the loss is computed once.
        teacher: the teacher's parameters, of the same structure; by default those that training starts from.
        weight: between 0 and 1.
        distance: ``"kl"``: the Kullback-Leibler divergence of the softmax over the last axis, both sides divided by the
            temperature T, times T²; ``"mse"``: the mean of squared differences.
        temperature: T.

    Raises:
        ValueError: a weight that is not in [0, 1], a temperature that is not positive, an unknown distance.

    Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """

    outputs: Callable[[Any, Any], Any]
    teacher: Any = None
    weight: float = 0.5
    distance: Literal["kl", "mse"] = "kl"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"the weight of distillation is {self.weight}: it must lie in [0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"the temperature of distillation is {self.temperature}: it must be positive")
        if self.distance not in ("kl", "mse"):
            raise ValueError(f"the distance is 'kl' or 'mse', not {self.distance!r}")

    def loss(self, params: Any, teacher: Any, batch: Any) -> jax.Array:
        """The distance of the outputs from the teacher's, a scalar; not differentiated in the teacher."""
        taught = jax.lax.stop_gradient(self.outputs(teacher, batch))
        distances = jax.tree.map(self._distance, self.outputs(params, batch), taught)
        return sum(jax.tree.leaves(distances), jnp.zeros(()))

    def _distance(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        a, b = student.astype(jnp.float32), teacher.astype(jnp.float32)
        if self.distance == "mse":
            return jnp.mean(jnp.square(a - b))
        log_a, log_b = (jax.nn.log_softmax(x / self.temperature) for x in (a, b))
        return self.temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_b) * (log_b - log_a), axis=-1))
