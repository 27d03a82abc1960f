"""Masks from scores: gradual magnitude pruning, straight-through magnitude, Taylor importance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxinfer.sparsity.learning.method import Method, Plan, State
from jaxinfer.sparsity.learning.schedule import Cubic

Scope = Literal["model", "layer"]


@dataclass(frozen=True)
class _Scored(Method):
    """Units with the best scores are kept, ever fewer of them."""

    schedule: Cubic = field(default_factory=Cubic)
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if self.scope not in ("model", "layer"):
            raise ValueError(f"scope is 'model' or 'layer', not {self.scope!r}")

    def settled_at(self, steps: int) -> int:
        return round(self.schedule.end * steps)

    def is_update(self, step: int, steps: int) -> bool:
        return bool(self.schedule.is_update(step, steps))

    def start(self, plan: Plan, trained: Any, key: jax.Array) -> State:
        return {"keep": jnp.ones(plan.units.size, bool)}

    def scores(self, plan: Plan, state: State, trained: Any) -> jax.Array:
        """How much each unit is worth, float32[units]."""
        return plan.units.strengths(trained)

    def gates(self, plan: Plan, state: State, key: jax.Array) -> jax.Array:
        return state["keep"].astype(jnp.float32)

    def _select(self, plan: Plan, state: State, trained: Any, left: Any) -> jax.Array:
        by_layer = self.scope == "layer"
        return plan.units.select(self.scores(plan, state, trained), plan.measure, left, by_layer)

    def update(self, plan: Plan, state: State, trained: Any, step: Any) -> State:
        left = self.schedule.left(step, plan.steps, plan.value)
        return {**state, "keep": self._select(plan, state, trained, left)}

    def settle(self, plan: Plan, state: State, trained: Any) -> tuple[jax.Array, Any]:
        return self._select(plan, state, trained, plan.value), trained

    def report(self, plan: Plan, state: State) -> dict[str, jax.Array]:
        return {"left": plan.units.cost(state["keep"].astype(jnp.float32), plan.measure)}


@dataclass(frozen=True)
class Magnitude(_Scored):
    """Gradual magnitude pruning: weights that are masked are not trained, and come back only if others shrink.

    Units of several entries are ranked by the root of the mean of squares; channels and heads by that beside the
    mean of their group.

    Attributes:
        schedule: how what is left falls to the target.
        scope: rank the units of the ``"model"`` as a whole, or each ``"layer"`` by itself.

    Reference: Zhu and Gupta, "To prune, or not to prune", 2017.
    """


@dataclass(frozen=True)
class StraightThrough(_Scored):
    """Magnitude pruning whose derivatives pass the masks: masked weights go on learning and may come back.

    Attributes:
        schedule: how what is left falls to the target.
        scope: rank the units of the ``"model"`` as a whole, or each ``"layer"`` by itself.
        decay: pulls masked weights to zero by this share of themselves at each step, so that the choice settles.

    Reference: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR 2021
    (equation 4), there with N:M.
    """

    decay: float = 2e-4
    straight: ClassVar[bool] = True

    def pull(self, plan: Plan, state: State, trained: Any) -> Any:
        factors = plan.units.spread(1 - self.decay * (~state["keep"]).astype(jnp.float32))
        return plan.units.leaves.multiply(trained, factors)


@dataclass(frozen=True)
class Taylor(_Scored):
    """First-order Taylor importance: what the loss would change if a unit were removed.

    The score of a unit is (Σ g·w)² over its entries, of each batch by itself, averaged over batches.

    Attributes:
        schedule: how what is left falls to the target.
        scope: rank the units of the ``"model"`` as a whole, or each ``"layer"`` by itself.
        memory: the weight of what was before in the running average, at each step.

    Reference: Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019 (equation 8).
    """

    memory: float = 0.98

    def start(self, plan: Plan, trained: Any, key: jax.Array) -> State:
        if self.settled_at(plan.steps) == 0:
            raise ValueError("Taylor scores come from training: the schedule must not end before the first step")
        return {**super().start(plan, trained, key), "scores": jnp.zeros(plan.units.size, jnp.float32)}

    def scores(self, plan: Plan, state: State, trained: Any) -> jax.Array:
        return state["scores"]

    def learn(self, plan: Plan, state: State, gradients: State, entries: Any, step: Any) -> State:
        changes = {i: w.astype(jnp.float32) * g.astype(jnp.float32) for i, (w, g) in entries.items()}
        now = jnp.square(plan.units.pool(changes))
        return {**state, "scores": self.memory * state["scores"] + (1 - self.memory) * now}
