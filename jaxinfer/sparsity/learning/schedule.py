"""How what is left falls from everything to the target while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning, fast at first and slow at the end: at a share p of the way from ``begin`` to ``end``,
    target + (1 − target)·(1 − p)³ is left (Zhu and Gupta, "To prune, or not to prune", 2017, equation 1).

    Attributes:
        begin: where pruning begins, as a share of all steps.
        end: where the target is reached, as a share of all steps.
        every: steps between two updates of the masks.

    Raises:
        ValueError: not 0 ≤ begin ≤ end ≤ 1, or every < 1.
    """

    begin: float = 0.0
    end: float = 0.7
    every: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"a schedule needs 0 ≤ begin ≤ end ≤ 1, but begin={self.begin} and end={self.end}")
        if self.every < 1:
            raise ValueError(f"masks are updated every {self.every} steps: that must be 1 or more")

    def left(self, step: Any, steps: int, target: float) -> Any:
        """What is to be left once ``step`` of ``steps`` steps were made, a float32 array."""
        begin, end = self.begin * steps, self.end * steps
        done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1e-9), 0, 1)
        return target + (1 - target) * (1 - done) ** 3

    def is_update(self, step: Any, steps: int) -> Any:
        """Whether masks are updated after ``step`` steps: every so often, and for the last time at the end."""
        last = round(self.end * steps)
        return (step >= self.begin * steps) & (step <= last) & ((step % self.every == 0) | (step == last))
