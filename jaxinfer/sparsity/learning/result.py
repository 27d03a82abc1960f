"""What a run of mask learning brings, and how it ends early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Learned:
    """What a run of :func:`learn_masks` brought.

    Attributes:
        params: the parameters, zero where a mask is False.
        masks: a tree like them of bool arrays of their shapes, True where an entry is kept; None in place of leaves
            that are not pruned at all. None altogether if the run ended before masks were settled.
        history: rows with ``step``, ``loss`` and what the method reports: ``left``, ``multiplier``, ...
        left: what is left beside the dense model, in every measure that is known.
        kept: for each parameter or group that is pruned, how many of its units are kept, and how many there are.
        step: the number of training steps that were made.
    """

    params: Any
    masks: Any
    history: list[dict[str, Any]] = field(repr=False)
    left: dict[str, float]
    kept: dict[str, tuple[int, int]]
    step: int

    def __str__(self) -> str:
        what = {"fraction": "prunable entries", "flops": "multiply-accumulates", "bytes": "bytes"}
        shares = ", ".join(f"{value:.2%} of the {what[measure]}" for measure, value in self.left.items())
        lines = [f"{kept:>10,} of {size:>10,}  {name}" for name, (kept, size) in self.kept.items()]
        return "\n".join([f"after {self.step} steps {shares or 'everything'} left", *lines])


class Diverged(FloatingPointError):
    """The loss, or its gradient, was not finite.

    Attributes:
        step: the step (0, 1, ...) that it happened at.
        last: the state before that step.
    """

    def __init__(self, message: str, step: int, last: Learned):
        super().__init__(message)
        self.step, self.last = step, last
