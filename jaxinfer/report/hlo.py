"""Comparing what XLA makes of two programs: operations, fusions, cost, memory, and the text itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from rich.console import Group, RenderableType
from rich.text import Text

from jaxinfer.report import html, numbers, output
from jaxinfer.report.hlo_diff import Section, difference
from jaxinfer.report.hlo_text import canonical, parse
from jaxinfer.report.sheet import Cell, Sheet

Compilation = jax.stages.Compiled | jax.stages.Lowered
Figures = dict[str, tuple[float | None, float | None]]

# Operations that move no data and compute nothing; they are shown after the others.
_BOOKKEEPING = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
_BYTES = {"bytes accessed", "argument bytes", "output bytes", "temporary bytes", "code bytes"}
_OPENED_LINES = 160


@dataclass(frozen=True)
class HloProgram:
    """One program as XLA sees it.

    Equal programs are equal here whatever lines, names or schedule they came with: the text is in canonical
    form. Numbers that the backend does not give are None.

    Args:
      text: HLO in canonical form: no metadata, source tables, module names or schedule; names count opcodes;
        computations in the order of their use.
      operations: How often each operation occurs, over all computations; custom calls count by target.
      flops: Floating-point operations of one run, by XLA's estimate (custom calls count as nothing).
      bytes_accessed: Bytes read and written in one run, by XLA's estimate.
      argument_bytes: Memory of the arguments.
      output_bytes: Memory of the results.
      temporary_bytes: Scratch memory while running.
      code_bytes: Size of the machine code.
    """

    text: str
    operations: Mapping[str, int] = field(hash=False)
    flops: float | None = None
    bytes_accessed: float | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temporary_bytes: int | None = None
    code_bytes: int | None = None

    @classmethod
    def of(cls, program: Compilation | str) -> HloProgram:
        """Reads a program.

        Args:
          program: A compiled function, a lowered one (then: before XLA's optimization), or HLO text (then
            without costs).

        Raises:
          ValueError: There is no HLO text, or it cannot be read.
        """
        text: str | None
        if isinstance(program, str):
            text = program
        elif isinstance(program, jax.stages.Lowered):
            text = program.as_text(dialect="hlo")
        else:
            text = program.as_text()
        if text is None:
            raise ValueError("the backend gives no HLO text for this program; pass HLO text instead")
        module = canonical(parse(text))
        operations = Counter(i.kind for c in module.computations for i in c.instructions)
        # A text has neither analysis, a lowered function no memory yet.
        cost = _best_effort(program, "cost_analysis")
        memory = _best_effort(program, "memory_analysis")
        return cls(
            text=str(module),
            operations=dict(sorted(operations.items())),
            flops=_known(cost, "flops"),
            bytes_accessed=_known(cost, "bytes accessed"),
            argument_bytes=_memory(memory, "argument_size_in_bytes"),
            output_bytes=_memory(memory, "output_size_in_bytes"),
            temporary_bytes=_memory(memory, "temp_size_in_bytes"),
            code_bytes=_memory(memory, "generated_code_size_in_bytes"),
        )

    @property
    def instructions(self) -> int:
        """How many instructions all computations hold."""
        return sum(self.operations.values())

    @property
    def fusions(self) -> int:
        """How many fused kernels the program calls."""
        return self.operations.get("fusion", 0)

    @property
    def elided_constants(self) -> int:
        """How many large constants XLA printed as {...}, so that their values are not compared."""
        return self.text.count(" constant({...})")


@dataclass(frozen=True)
class HloComparison:
    """Two programs side by side; `str()` gives the summary and the operations, `diff()` the difference.

    Args:
      before: The first program.
      after: The second program.
      title: What is compared, for headings.
    """

    before: HloProgram
    after: HloProgram
    title: str = "HLO before and after"

    @classmethod
    def of(
        cls,
        before: HloProgram | Compilation | str,
        after: HloProgram | Compilation | str,
        title: str = "HLO before and after",
    ) -> HloComparison:
        """Compares two compiled or lowered functions, texts or programs already read.

        Raises:
          ValueError: A side has no HLO text that can be read.
        """
        old, new = (side if isinstance(side, HloProgram) else HloProgram.of(side) for side in (before, after))
        return cls(old, new, title)

    @classmethod
    def from_json(cls, text: str) -> HloComparison:
        """Reads back what `to_json` wrote.

        Raises:
          ValueError: The text is not such a document.
        """
        return output.from_json(cls, text)

    @property
    def identical(self) -> bool:
        """Whether both texts are the same program; see `HloProgram.elided_constants` for what they omit."""
        return self.before.text == self.after.text

    def histogram(self) -> dict[str, tuple[int, int]]:
        """Counts of each operation, (before, after); what changed most comes first, bookkeeping last."""
        names = self.before.operations.keys() | self.after.operations.keys()
        counts = {name: (self.before.operations.get(name, 0), self.after.operations.get(name, 0)) for name in names}

        def rank(name: str) -> tuple[bool, int, int, str]:
            old, new = counts[name]
            return (name in _BOOKKEEPING, -abs(new - old), -max(old, new), name)

        return {name: counts[name] for name in sorted(counts, key=rank)}

    def summary(self) -> Figures:
        """The programs' figures by name, (before, after); None where unknown."""
        named = {
            "instructions": "instructions",
            "fusions": "fusions",
            "FLOPs": "flops",
            "bytes accessed": "bytes_accessed",
            "argument bytes": "argument_bytes",
            "output bytes": "output_bytes",
            "temporary bytes": "temporary_bytes",
            "code bytes": "code_bytes",
        }
        return {name: (getattr(self.before, key), getattr(self.after, key)) for name, key in named.items()}

    def diff(self, context: int = 3) -> str:
        """A unified diff of the canonical texts, empty for equal programs.

        Corresponding instructions have one name on both sides, so renumbering makes no difference.

        Args:
          context: Unchanged lines around each change.
        """
        sections = self._sections(context)
        if not sections:
            return ""
        lines = ["--- before", "+++ after", *(line for section in sections for line in section.lines)]
        return "\n".join(lines) + "\n"

    def to_text(self, path: output.PathLike | None = None, width: int = 100) -> str:
        """Summary, operations and difference as plain text.

        Args:
          path: Where to write it as well; None writes nothing.
          width: The longest line of the tables, in characters; lines of HLO keep their length.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        difference_text = self.diff() or f"{self._likeness()}\n"
        text = f"{output.plain(self, width)}\n\n{difference_text}"
        if path is not None:
            output.write_file(path, text, "the HLO comparison")
        return text

    def to_json(self, path: output.PathLike | None = None) -> str:
        """Both programs as strict JSON, which `from_json` reads back.

        Args:
          path: Where to write it as well; None writes nothing.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        text = output.to_json(self)
        if path is not None:
            output.write_file(path, text, "the HLO comparison")
        return text

    def to_html(self, path: output.PathLike) -> None:
        """Writes one self-contained page: figures, operations as bars, and the coloured difference.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        output.write_file(path, html.page(self.title, self._html()), "the HLO comparison")

    def __str__(self) -> str:
        return output.plain(self)

    def __rich__(self) -> RenderableType:
        return Group(Text(f"{self.title}\n", style="bold"), self._summary_sheet(), self._histogram_sheet())

    def _repr_html_(self) -> str:
        return html.fragment(self._html())

    def _likeness(self) -> str:
        if elided := self.before.elided_constants:
            return f"The programs differ at most in the values of large constants ({elided}), which XLA omits."
        return "The programs are identical."

    def _sections(self, context: int = 3) -> tuple[Section, ...]:
        if self.identical:
            return ()
        # Canonical once more costs little and keeps a program from a stored text on the same footing.
        before, after = (canonical(parse(side.text)) for side in (self.before, self.after))
        return difference(before, after, context)

    def _summary_sheet(self) -> Sheet:
        rows = []
        for name, (old, new) in self.summary().items():
            show = numbers.size if name in _BYTES else numbers.count
            rows.append((Cell(name), Cell(show(old)), Cell(show(new)), _change_cell(old, new)))
        unknown = any(value is None for pair in self.summary().values() for value in pair)
        note = f"{numbers.UNKNOWN}: not known for this program or backend" if unknown else ""
        return Sheet("Figures", ("", "before", "after", "change"), tuple(rows), (1, 2, 3), note)

    def _histogram_sheet(self) -> Sheet:
        counts = self.histogram()
        changed = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
        rows = tuple(
            (Cell(name), Cell(f"{old:,}"), Cell(f"{new:,}"), Cell(f"{new - old:+,}".replace("-", "−")))
            for name, (old, new) in changed.items()
        )
        same = [f"{name} {old:,}" for name, (old, new) in counts.items() if old == new]
        note = f"unchanged: {', '.join(same)}" if same else ""
        return Sheet("Operations", ("", "before", "after", "change"), rows, (1, 2, 3), note)

    def _html(self) -> str:
        tiles = []
        for name, (old, new) in self.summary().items():
            if name in ("instructions", "fusions", "FLOPs", "bytes accessed") and new is not None:
                show = numbers.size if name in _BYTES else numbers.count
                was = f", was {show(old)}" if old is not None and old != new else ""
                tiles.append((show(new), f"{name}{was}", ""))
        sections = self._sections()
        lead = self._likeness() if self.identical else "Instructions that correspond have one name."
        pieces = [
            html.heading(self.title, lead),
            html.tiles(tiles),
            self._summary_sheet().html(),
            html.bars("Operations", ("before", "after"), self.histogram(), "over all computations"),
        ]
        if sections:
            blocks = "".join(html.diff_block(s.title, s.lines, opened=len(s.lines) <= _OPENED_LINES) for s in sections)
            pieces.append(f"<section><h2>Difference</h2>{blocks}</section>")
        return "".join(pieces)


def _change_cell(old: float | None, new: float | None) -> Cell:
    if old is None or new is None or old == new:
        return Cell(numbers.change(old, new), "dim")
    # More work by XLA's estimate may still be faster: an increase is no verdict.
    return Cell(numbers.change(old, new), "good" if new < old else "")


def _best_effort(program: Compilation | str, method: str) -> object:
    """Asks for an analysis that a backend may not offer; what it does not know stays unknown."""
    try:
        return getattr(program, method, lambda: None)()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def _known(cost: object, key: str) -> float | None:
    # Some executables report one dictionary for each partition, all of the same program.
    if isinstance(cost, list | tuple):
        cost = cost[0] if cost else None
    value = cost.get(key) if isinstance(cost, Mapping) else None
    # XLA writes a negative number where it cannot tell.
    return float(value) if value is not None and math.isfinite(value) and value >= 0 else None


def _memory(analysis: object, name: str) -> int | None:
    value = getattr(analysis, name, None)
    return int(value) if value is not None and value >= 0 else None
