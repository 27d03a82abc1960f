"""A table as data, drawn once for the terminal and once for the browser."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Tone = Literal["", "good", "bad", "dim", "strong"]
_RICH_STYLE = {"": "", "good": "green", "bad": "red", "dim": "dim", "strong": "bold"}


class Cell(NamedTuple):
    """One entry of a table: its text and how it is to be taken."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Sheet:
    """A titled table.

    Args:
      title: Shown above the table.
      columns: The column headings; an empty tuple draws no head.
      rows: The entries, one tuple for each row, as long as `columns` (or as each other).
      right: The indices of the columns that hold numbers and are set flush right.
      note: A remark below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    right: tuple[int, ...] = ()
    note: str = ""

    def __rich__(self) -> RenderableType:
        # The box opens and closes with an empty line; what stands without one brings its own.
        parts: list[RenderableType] = [Text(self.title, style="bold")]
        if self.rows:
            table = Table(box=box.SIMPLE_HEAD, show_header=bool(self.columns), pad_edge=False, padding=(0, 1))
            for index in range(len(self.rows[0])):
                heading = self.columns[index] if self.columns else ""
                table.add_column(Text(heading), justify="right" if index in self.right else "left", overflow="fold")
            for row in self.rows:
                table.add_row(*(Text(cell.text, style=_RICH_STYLE[cell.tone]) for cell in row))
            parts.append(table)
        if self.note:
            parts.append(Text(f"{self.note}\n", style="dim"))
        return Group(*parts)

    def html(self) -> str:
        """The table as an HTML section; every text is escaped."""
        head = "".join(f"<th{self._align(i)}>{escape(text)}</th>" for i, text in enumerate(self.columns))
        body = "".join(
            "<tr>" + "".join(self._html_cell(i, cell) for i, cell in enumerate(row)) + "</tr>" for row in self.rows
        )
        table = f'<div class="scroll"><table>{f"<thead><tr>{head}</tr></thead>" if head else ""}'
        table += f"<tbody>{body}</tbody></table></div>"
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f"<section><h2>{escape(self.title)}</h2>{table if self.rows else ''}{note}</section>"

    def _align(self, index: int) -> str:
        return ' class="right"' if index in self.right else ""

    def _html_cell(self, index: int, cell: Cell) -> str:
        text = escape(cell.text)
        content = f'<span class="{cell.tone}">{text}</span>' if cell.tone else text
        return f"<td{self._align(index)}>{content}</td>"
