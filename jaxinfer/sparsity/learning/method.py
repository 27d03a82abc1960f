"""What a way of learning masks has to say; the training loop in ``learn`` says the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinfer.sparsity.learning.target import Measure, Target
from jaxinfer.sparsity.learning.unit_vector import Units

State = dict[str, Any]
"""Arrays by name, a pytree."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method works towards.

    Attributes:
        units: the units.
        target: how much is to be left; None where the granularity alone decides (N:M).
        steps: number of training steps altogether.
    """

    units: Units
    target: Target | None
    steps: int

    @property
    def measure(self) -> Measure:
        """What is counted."""
        return self.target.measure if self.target else "fraction"

    @property
    def value(self) -> float:
        """The share that is to be left; 0 leaves what must be kept anyway."""
        return self.target.value if self.target else 0.0


class Method(ABC):
    """A way of learning masks.

    Masks are searched for in the first steps; then they are settled, and what is left of the weights is trained on with
    the rest at zero. The methods below run under ``jit`` except where they say otherwise.
    """

    learned: ClassVar[tuple[str, ...]] = ()
    """The parts of the state that the loss is differentiated in."""
    default_steps: ClassVar[int | None] = None
    """The number of training steps if the user says none; None: one pass over the batches."""
    straight: ClassVar[bool] = False
    """Whether derivatives pass masks as if there were none."""

    @property
    def readable(self) -> frozenset[int] | None:
        """Positions of the leaves that the method can say anything about; None: of all."""
        return None

    def prepare(self, loss: Callable[..., Any], params: Any, batches: Any) -> Method:
        """The method to go on with, once it has seen what it must see before training (not under ``jit``)."""
        return self

    @abstractmethod
    def settled_at(self, steps: int) -> int:
        """The number of steps after which masks are settled (not under ``jit``)."""

    @abstractmethod
    def start(self, plan: Plan, trained: Any, key: jax.Array) -> State:
        """The state before the first step (not under ``jit``)."""

    def gates(self, plan: Plan, state: State, key: jax.Array) -> jax.Array:
        """What units are multiplied by in a step before masks are settled, float32[units]."""
        return jnp.ones(plan.units.size)

    def penalty(self, plan: Plan, state: State, step: Any) -> jax.Array:
        """What is added to the loss, a scalar."""
        return jnp.zeros(())

    def learn(self, plan: Plan, state: State, gradients: State, entries: Any, step: Any) -> State:
        """The state after a step.

        Args:
            plan: the plan.
            state: the state before it.
            gradients: of the parts of the state that are learned.
            entries: pairs (parameter, its gradient) by position of the leaf.
            step: number of steps before this one.
        """
        return state

    def pull(self, plan: Plan, state: State, trained: Any) -> Any:
        """The parameters after the optimizer's step, changed if the method wants them changed."""
        return trained

    def is_update(self, step: int, steps: int) -> bool:
        """Whether :meth:`update` is due after ``step`` steps (not under ``jit``)."""
        return False

    def update(self, plan: Plan, state: State, trained: Any, step: Any) -> State:
        """What is not done at every step because it takes longer."""
        return state

    @abstractmethod
    def settle(self, plan: Plan, state: State, trained: Any) -> tuple[jax.Array, Any]:
        """The units to keep for good, bool[units], and the parameters to go on with."""

    def report(self, plan: Plan, state: State) -> dict[str, jax.Array]:
        """Scalars for the history."""
        return {}
