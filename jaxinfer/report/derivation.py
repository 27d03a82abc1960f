"""What a derivative's program is made of, as a table and as data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType

from jaxinfer.report.sheet import Cell, Sheet


@dataclass(frozen=True)
class DerivationReport:
    """How a derivative was computed. Printing it gives tables.

    Attributes:
        name: the derivative and its function.
        original: operations of the function's program.
        derivative: operations of the derivative's program.
        borrowed: operations whose derivative was left to JAX's own rule, and how many of each.
        fired: rewriting rules that simplified the derivative, and how often each.
    """

    name: str
    original: int
    derivative: int
    borrowed: Mapping[str, int]
    fired: Mapping[str, int]

    @staticmethod
    def of(name: str, derivation: Any) -> DerivationReport:
        """The report of a derivation."""
        return DerivationReport(
            name,
            derivation.original.size,
            derivation.graph.size,
            dict(derivation.borrowed.most_common()),
            dict(derivation.fired.most_common()),
        )

    def __rich__(self) -> RenderableType:
        sizes = ((Cell("function"), Cell(str(self.original))), (Cell("derivative"), Cell(str(self.derivative))))
        parts = [
            Sheet(self.name, ("program", "operations"), sizes, (1,)),
            _counts("Left to JAX's own rules", "operation", self.borrowed, "Every rule was the project's own."),
            _counts("Simplified by", "rule", self.fired, "No rule fired."),
        ]
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, highlight=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def _counts(title: str, heading: str, counts: Mapping[str, int], none: str) -> Sheet:
    rows = tuple((Cell(name), Cell(str(count))) for name, count in counts.items())
    return Sheet(title, (heading, "times"), rows, (1,), "" if rows else none)
