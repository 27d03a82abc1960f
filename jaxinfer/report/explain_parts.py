"""The pieces of an explanation: sizes and costs, rules, choices, the comparison of speed and of results."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints


def check_literals(value: object) -> None:
    """Refuses a word that is not among those a field allows."""
    hints = get_type_hints(type(value))
    for field in fields(value):  # type: ignore[arg-type]
        allowed = get_args(hints[field.name]) if "Literal" in str(hints[field.name]) else ()
        word = getattr(value, field.name)
        if allowed and word not in allowed:
            raise ValueError(f"{field.name} is {word!r}; expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Program:
    """The size and cost of one form of the function; None where unknown.

    Args:
      equations: Primitive equations, inner programs included.
      flops: Floating-point operations of one call.
      bytes: Bytes read and written by one call.
      milliseconds: Median time of one call.
      temporary_bytes: Scratch memory of the compiled program.
      compile_seconds: Time XLA took to compile it.
    """

    equations: int | None = None
    flops: float | None = None
    bytes: float | None = None
    milliseconds: float | None = None
    temporary_bytes: int | None = None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class RuleCount:
    """What one registered rule did.

    Args:
      name: The rule.
      tier: Its numerics: "bitwise", "reassociate" or "lossy".
      fired: How often it replaced something.
      offered: How often it offered another form.
      chosen: How often the search took that form.
      declined_reason: Why it did nothing where it might have, if it said so.
    """

    name: str
    tier: str
    fired: int = 0
    offered: int = 0
    chosen: int = 0
    declined_reason: str | None = None

    @property
    def idle(self) -> bool:
        """Whether the rule never fired nor offered anything."""
        return not (self.fired or self.offered)


@dataclass(frozen=True)
class Candidate:
    """One form that could stand at a site.

    Args:
      form: Its name ("shifted multiply-adds").
      milliseconds: Its measured time, if it was measured.
      estimate: Its time by the analytic cost model in milliseconds, if it was asked.
    """

    form: str
    milliseconds: float | None = None
    estimate: float | None = None


@dataclass(frozen=True)
class Choice:
    """A decision of the search.

    Args:
      site: What stood there, readable ("conv 1x56x56x144 * 3x3x1x144").
      candidates: The forms compared, the original among them.
      chosen: The name of the form taken; one of the candidates.
      source: Where the decision comes from.
      sites: How many equal sites it was taken for.
    """

    site: str
    candidates: tuple[Candidate, ...]
    chosen: str
    source: Literal["measured", "cached", "analytic"]
    sites: int = 1

    def __post_init__(self) -> None:
        check_literals(self)
        if self.chosen not in {candidate.form for candidate in self.candidates}:
            raise ValueError(f"{self.chosen!r} was chosen at {self.site}, but is no candidate there")


@dataclass(frozen=True)
class Speedup:
    """Original time over optimized time, from paired runs.

    Args:
      ratio: The estimate; above 1 the optimized form is faster.
      low: The lower 95 % bound.
      high: The upper 95 % bound.
    """

    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Verification:
    """The comparison with the original's results.

    Args:
      passed: Whether it held; None if there was none.
      when: "now" in this call, "earlier" in a previous one, or "never".
      reason: Why not, or what the rule found guilty was.
      max_absolute_error: The largest deviation from the original.
      max_relative_error: The largest deviation relative to the original's magnitude.
    """

    passed: bool | None = None
    when: Literal["now", "earlier", "never"] = "never"
    reason: str | None = None
    max_absolute_error: float | None = None
    max_relative_error: float | None = None

    def __post_init__(self) -> None:
        check_literals(self)
        if (self.passed is None) != (self.when == "never"):
            raise ValueError(f"a verification that ran {self.when!r} cannot have the result {self.passed}")


@dataclass(frozen=True)
class Weights:
    """Known weights: what was computed from them once, and what stays in memory.

    Args:
      folded: How many arrays were computed ahead from known values.
      folded_bytes: Their size.
      resident_original_bytes: Originals still held by reference (0 once released).
      resident_folded_bytes: Folded arrays held, and what of them is written into the compiled program.
    """

    folded: int | None = None
    folded_bytes: int | None = None
    resident_original_bytes: int | None = None
    resident_folded_bytes: int | None = None
