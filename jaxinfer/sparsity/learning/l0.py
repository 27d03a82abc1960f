"""Masks learned by gradient descent: hard-concrete gates under a constraint on what is left.

The loss is minimized over weights and gates and maximized over the multiplier λ,

    loss(θ ⊙ z) + λ·(c − t) + ρ/2·(c − t)²,    λ ← λ + rate·(c − t),

where c is the expected cost of the gates that are not zero, beside the dense model's, and t falls linearly from 1 to
the target during the warm-up. Units are then ranked by their gates, and as many of the best as the target allows are
kept.

References: Louizos, Welling and Kingma, ICLR 2018 (gates); Wang, Wohlwend and Lei, "Structured pruning of large
language models", EMNLP 2020 (the constraint).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxinfer.sparsity.learning import gates
from jaxinfer.sparsity.learning.method import Method, Plan, State


@dataclass(frozen=True)
class L0(Method):
    """Hard-concrete gates with a Lagrangian constraint.

    Attributes:
        rate: learning rate of the gates (Adam).
        warmup: the share of the search during which the target falls from everything to what is asked for.
        search: the share of all steps in which masks are searched for; in the others what is left is trained on.
        open: the probability with which a gate is open at the start.
        multiplier_rate: how fast the multiplier grows with what is left too much.
        damping: ρ, how strongly that counts at once.

    Raises:
        ValueError: a share is not in [0, 1], or a rate is not positive.
    """

    rate: float = 0.05
    warmup: float = 0.6
    search: float = 0.7
    open: float = 0.95
    multiplier_rate: float = 1.0
    damping: float = 10.0

    learned: ClassVar[tuple[str, ...]] = ("log_alpha",)

    def __post_init__(self) -> None:
        if not (0 <= self.warmup <= 1 and 0 < self.search <= 1 and 0 < self.open < 1):
            raise ValueError("warmup, search and open are shares: they must lie in [0, 1], (0, 1] and (0, 1)")
        if min(self.rate, self.multiplier_rate) <= 0 or self.damping < 0:
            raise ValueError("rate and multiplier_rate must be positive, damping not negative")

    def settled_at(self, steps: int) -> int:
        return max(1, round(self.search * steps))

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.rate)

    def start(self, plan: Plan, trained: Any, key: jax.Array) -> State:
        noise = 0.01 * jax.random.normal(key, (plan.units.size,), jnp.float32)
        log_alpha = gates.location(self.open) + noise
        return {
            "log_alpha": log_alpha,
            "optimizer": self._optimizer().init(log_alpha),
            "multiplier": jnp.zeros((), jnp.float32),
        }

    def gates(self, plan: Plan, state: State, key: jax.Array) -> jax.Array:
        return gates.sample(state["log_alpha"], key)

    def _cost(self, plan: Plan, state: State) -> jax.Array:
        return plan.units.cost(gates.probability(state["log_alpha"]), plan.measure)

    def _wanted(self, plan: Plan, step: Any) -> jax.Array:
        """What is to be left by now."""
        end = max(self.warmup * self.settled_at(plan.steps), 1.0)
        done = jnp.clip(jnp.asarray(step, jnp.float32) / end, 0, 1)
        return 1 - (1 - plan.value) * done

    def penalty(self, plan: Plan, state: State, step: Any) -> jax.Array:
        excess = self._cost(plan, state) - self._wanted(plan, step)
        return state["multiplier"] * excess + self.damping / 2 * excess**2

    def learn(self, plan: Plan, state: State, gradients: State, entries: Any, step: Any) -> State:
        excess = self._cost(plan, state) - self._wanted(plan, step)
        updates, optimizer = self._optimizer().update(gradients["log_alpha"], state["optimizer"])
        return {
            "log_alpha": optax.apply_updates(state["log_alpha"], updates),
            "optimizer": optimizer,
            "multiplier": state["multiplier"] + self.multiplier_rate * excess,
        }

    def settle(self, plan: Plan, state: State, trained: Any) -> tuple[jax.Array, Any]:
        keep = plan.units.select(state["log_alpha"], plan.measure, plan.value)
        # A gate that stays open need not be one: its value moves into the weights. One that was shut and is kept
        # nevertheless, because the target has room for it, starts small.
        values = jnp.where(keep, jnp.maximum(gates.expected(state["log_alpha"]), 0.1), 0)
        return keep, plan.units.leaves.multiply(trained, plan.units.spread(values))

    def report(self, plan: Plan, state: State) -> dict[str, jax.Array]:
        return {"left": self._cost(plan, state), "multiplier": state["multiplier"]}
