"""What shrinking took away, what stayed, and why."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxinfer.sparsity.shrinking.plan import Parameter


@dataclass(frozen=True)
class AxisReport:
    """One axis of a parameter.

    Attributes:
        size: number of slices in the whole program.
        kept: number that are left.
        masked: number of slices that went because all their entries are masked.
        unused: number that went because nothing that is kept reads them.
        constant: number that went because masks cut what they are part of off from the inputs; what they add is a
            constant of the small program.
        zeros: number of slices that are masked altogether and stay all the same.
    """

    size: int
    kept: int
    masked: int
    unused: int
    constant: int
    zeros: int


@dataclass(frozen=True)
class LeafReport:
    """One parameter.

    Attributes:
        name: its key path.
        shape: in the whole program.
        small: in the small one.
        masked: masked entries of the whole parameter.
        masked_left: masked entries among those that are left.
        axes: for each axis what went.
    """

    name: str
    shape: tuple[int, ...]
    small: tuple[int, ...]
    masked: int
    masked_left: int
    axes: tuple[AxisReport, ...]


@dataclass(frozen=True)
class ShrinkReport:
    """What went and what stayed.

    Attributes:
        leaves: by parameter.
        rejoined: operations, with the user's source line, whose operands had to be put together again although parts of
            them were missing, and how often.
        constant_bytes: bytes of the removed slices that are kept as constants.
        multiple_of: what numbers of kept units were rounded up to.
        error: largest difference from the masked program, relative to its largest result; None where not verified.
        remarks: what did not go as the masks allow.
    """

    leaves: tuple[LeafReport, ...]
    rejoined: Mapping[str, int]
    constant_bytes: int
    multiple_of: int
    error: float | None
    remarks: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of entries of all parameters of the whole program."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves)

    @property
    def small(self) -> int:
        """Number of entries that are left."""
        return sum(int(np.prod(leaf.small)) for leaf in self.leaves)

    def table(self) -> Table:
        """The parameters of which something is masked or went, as a table."""
        table = Table(title=f"{self.small:,} of {self.size:,} entries are left")
        for heading in ("parameter", "whole", "small", "why slices went", "masked entries left"):
            table.add_column(heading, justify="left" if heading in ("parameter", "why slices went") else "right")
        for leaf in self.leaves:
            if leaf.small != leaf.shape or leaf.masked:
                table.add_row(
                    leaf.name, _shape(leaf.shape), _shape(leaf.small), _why(leaf.axes), f"{leaf.masked_left:,}"
                )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        lines = [line.rstrip() for line in console.file.getvalue().rstrip().splitlines()]  # type: ignore[attr-defined]
        if self.constant_bytes:
            lines.append(f"{self.constant_bytes:,} bytes of removed slices are kept as constants")
        if self.multiple_of > 1:
            lines.append(f"numbers of kept units are multiples of {self.multiple_of}")
        lines += [f"put together again at {place}: {count}×" for place, count in self.rejoined.items()]
        if self.error is not None:
            lines.append(f"largest difference from the masked program: {self.error:.2g} of its largest result")
        return "\n".join([*lines, *self.remarks])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "1"


def _why(axes: Sequence[AxisReport]) -> str:
    parts = []
    for i, a in enumerate(axes):
        counts = {
            "masked": a.masked,
            "unused": a.unused,
            "constant": a.constant,
            "masked but kept": a.zeros,
        }
        said = [f"{n} {what}" for what, n in counts.items() if n]
        if said:
            parts.append(f"axis {i}: {', '.join(said)}")
    return "; ".join(parts)


def leaf_report(p: Parameter, mask: np.ndarray | None) -> LeafReport:
    """The report of one parameter."""
    axes = []
    for axis, size in enumerate(p.shape):
        gone, void, frozen = p.removed[axis], p.void[axis], p.frozen[axis]
        others = tuple(a for a in range(len(p.shape)) if a != axis)
        empty = np.zeros(size, bool) if mask is None else ~mask.any(axis=others)
        unused = int((~empty[void]).sum())
        axes.append(
            AxisReport(
                size=size,
                kept=size - len(gone),
                masked=len(gone) - unused - len(frozen),
                unused=unused,
                constant=len(frozen),
                zeros=int(empty.sum() - empty[gone].sum()),
            )
        )
    left = 0 if mask is None else int((~p.taken(mask)).sum())
    return LeafReport(p.name, p.shape, p.small, p.masked, left, tuple(axes))
