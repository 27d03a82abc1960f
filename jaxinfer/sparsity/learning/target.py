"""What is asked for: how much of a model is to be left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["fraction", "flops", "bytes"]


class TargetError(ValueError):
    """A target that cannot be met."""


@dataclass(frozen=True)
class Target:
    """How much of a model is to be left, beside the dense model: exactly one of three measures, in (0, 1].

    Attributes:
        fraction: entries of the parameters that can be pruned.
        flops: multiply-accumulates of matrix products and convolutions. Those whose weight is masked count as gone,
            whether or not anything computes them.
        bytes: bytes of all parameters. Masked entries count as gone; what it takes to say where they were does not
            count.

    Raises:
        TargetError: none or several are given, or one that is not in (0, 1].
    """

    fraction: float | None = None
    flops: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        given = {name: x for name, x in vars(self).items() if x is not None}
        if len(given) != 1:
            raise TargetError(f"a target is one of fraction, flops and bytes; given: {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if not 0 < value <= 1:
            advice = "that prunes everything" if value <= 0 else "that is more than there is"
            raise TargetError(f"{name}={value} is not in (0, 1]: {advice}")

    @property
    def measure(self) -> Measure:
        """The measure that is given."""
        return "fraction" if self.fraction is not None else "flops" if self.flops is not None else "bytes"

    @property
    def value(self) -> float:
        """The share that is to be left."""
        return float(getattr(self, self.measure))


def as_target(target: Target | float) -> Target:
    """A target, or a number as the fraction of entries that is to be left."""
    return target if isinstance(target, Target) else Target(fraction=float(target))
