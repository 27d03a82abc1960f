"""Groups of units that go together, as a table and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.report.numbers import UNKNOWN, count
from jaxinfer.report.sheet import Cell, Sheet

_COLORS = {"channel": "tab:blue", "head": "tab:orange", "input": "tab:green"}


class GroupRow(NamedTuple):
    """One group.

    Attributes:
        name: of the group.
        kind: what its units are.
        size: number of units.
        members: (parameter, axis) of what they own.
        macs: multiply-accumulates that go with all of its units.
        nbytes: bytes of parameters that go with all of its units.
    """

    name: str
    kind: str
    size: int
    members: tuple[tuple[str, int], ...]
    macs: float
    nbytes: int


def groups_sheet(rows: Sequence[GroupRow], macs: float, nbytes: int) -> Sheet:
    """A table of the groups.

    Args:
        rows: the groups.
        macs: multiply-accumulates of the whole program.
        nbytes: bytes of all parameters.
    """
    columns = ("group", "kind", "units", "MACs", "bytes", "tied along")
    cells = []
    for row in rows:
        shares = (_share(row.macs, macs), _share(row.nbytes, nbytes))
        tied = ", ".join(f"{name}:{axis}" for name, axis in row.members)
        texts = (row.name, row.kind, str(row.size), *shares, tied)
        cells.append(tuple(Cell(text, "dim" if i == len(texts) - 1 else "") for i, text in enumerate(texts)))
    note = f"{count(macs)} multiply-accumulates, {count(nbytes)} bytes; what goes of them with all units of a group"
    return Sheet("Units that can be removed", columns, tuple(cells), (2, 3, 4), note)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else UNKNOWN


def draw_groups(rows: Sequence[GroupRow], path: str) -> None:
    """Draws which parameters each group ties: a column for each group, a row for each parameter, axes in the cells.

    Args:
        rows: the groups.
        path: where the drawing goes; its ending says in which format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
    """
    from matplotlib.figure import Figure

    parameters = list(dict.fromkeys(name for row in rows for name, _ in row.members))
    place = {name: i for i, name in enumerate(parameters)}
    figure = Figure(figsize=(3 + 0.32 * max(len(rows), 6), 1.6 + 0.22 * max(len(parameters), 4)), layout="constrained")
    axes = figure.subplots()
    for column, row in enumerate(rows):
        axes_of: dict[str, list[int]] = {}
        for name, axis in row.members:
            axes_of.setdefault(name, []).append(axis)
        heights = [place[name] for name in axes_of]
        color = _COLORS.get(row.kind, "tab:gray")
        axes.plot([column] * len(heights), heights, color=color, linewidth=1, alpha=0.4, zorder=1)
        axes.scatter([column] * len(heights), heights, s=150, marker="s", color=color, zorder=2)
        for name, along in axes_of.items():
            text = ",".join(map(str, along))
            axes.text(column, place[name], text, ha="center", va="center", color="white", fontsize=7, zorder=3)
    axes.set_yticks(range(len(parameters)), parameters, fontsize=7)
    labels = [f"{row.name} × {row.size}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=7)
    axes.set(xlim=(-0.7, max(len(rows), 1) - 0.3), ylim=(max(len(parameters), 1) - 0.3, -0.7))
    axes.set_title("Groups, and the axes of parameters they tie", fontsize=9)
    axes.grid(color="0.92", zorder=0)
    axes.set_axisbelow(True)
    for kind in dict.fromkeys(row.kind for row in rows):
        axes.scatter([], [], marker="s", color=_COLORS.get(kind, "tab:gray"), label=kind)
    if rows:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=150)
