"""What `optimize` did to a function and why, as data; printed, it is a set of tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from jaxinfer.report import html, numbers, output
from jaxinfer.report.explain_parts import (
    Candidate,
    Choice,
    Program,
    RuleCount,
    Speedup,
    Verification,
    Weights,
    check_literals,
)
from jaxinfer.report.sheet import Cell, Sheet, Tone

__all__ = [
    "Candidate",
    "Choice",
    "Explanation",
    "Program",
    "RuleCount",
    "Speedup",
    "Verification",
    "Weights",
]


_UNKNOWN_PROGRAM = Program()
_NOT_VERIFIED = Verification()


@dataclass(frozen=True)
class Explanation:
    """What was done to a function for one signature, and why.

    `str()`, rich and notebooks show it as tables; the fields are there to be computed with. What is not known
    is None.

    Args:
      function: The function's name.
      signature: The abstract arguments, readable ("f32[8,128], i32[8]").
      verdict: Which form runs.
      reason: Why, in a sentence ("1.8 times faster" or "not faster").
      backend: The platform and device.
      numerics: The tier allowed.
      tune: How choices were made: "off", "auto" or "full".
      rules: All registered rules, also those that never fired.
      choices: The decisions of the search.
      before: The original's size and cost.
      after: The optimized form's, also if it was not taken.
      speedup: The paired comparison of the two.
      verification: The comparison of their results.
      weights: What is known of frozen weights; None if nothing is frozen.
      notes: Further remarks, a sentence each.
    """

    function: str
    signature: str
    verdict: Literal["optimized", "original"]
    reason: str
    backend: str | None = None
    numerics: str | None = None
    tune: str | None = None
    rules: tuple[RuleCount, ...] = ()
    choices: tuple[Choice, ...] = ()
    before: Program = _UNKNOWN_PROGRAM
    after: Program = _UNKNOWN_PROGRAM
    speedup: Speedup | None = None
    verification: Verification = _NOT_VERIFIED
    weights: Weights | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_literals(self)

    @classmethod
    def from_json(cls, text: str) -> Explanation:
        """Reads back what `to_json` wrote.

        Raises:
          ValueError: The text is not such a document; the message names the field.
        """
        return output.from_json(cls, text)

    def to_json(self, path: output.PathLike | None = None) -> str:
        """All fields as strict JSON, which `from_json` reads back.

        Args:
          path: Where to write it as well; None writes nothing.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        text = output.to_json(self)
        if path is not None:
            output.write_file(path, text, "the explanation")
        return text

    def to_text(self, path: output.PathLike | None = None, width: int = 100) -> str:
        """The tables as plain text of bounded width.

        Args:
          path: Where to write it as well; None writes nothing.
          width: The longest line, in characters.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        text = output.plain(self, width)
        if path is not None:
            output.write_file(path, text + "\n", "the explanation")
        return text

    def to_html(self, path: output.PathLike) -> None:
        """Writes the tables as one self-contained page.

        Raises:
          OSError: The path cannot be written; the message says why and where.
        """
        output.write_file(path, html.page(f"{self.function}: explanation", self._html()), "the explanation")

    def __str__(self) -> str:
        return output.plain(self)

    def __rich__(self) -> RenderableType:
        return Group(_verdict_line(self), *_sheets(self))

    def _repr_html_(self) -> str:
        return html.fragment(self._html())

    def _html(self) -> str:
        return "".join(
            [
                html.heading(f"{self.function}({self.signature})", _verdict_line(self).plain.partition("\n")[2]),
                html.tiles(_tile_entries(self)),
                *(sheet.html() for sheet in _sheets(self)),
            ]
        )


_TILE_TONE: dict[str, Tone] = {"optimized": "good", "original": ""}


def _verdict_line(e: Explanation) -> Text:
    """The function with its signature, and below it which form runs and why."""
    runs = "the optimized form runs" if e.verdict == "optimized" else "the original runs"
    text = Text(f"{e.function}({e.signature})\n", style="bold")
    text.append(f"{runs}: {e.reason}", style="green" if e.verdict == "optimized" else "yellow")
    return text


def _tile_entries(e: Explanation) -> list[tuple[str, str, str]]:
    """The figures to be seen first: (figure, caption, tone)."""
    entries: list[tuple[str, str, str]] = [(e.verdict, "form that runs", _TILE_TONE[e.verdict])]
    if e.speedup is not None:
        low, high = e.speedup.low, e.speedup.high
        bounds = f" (95 %: {low:.2f}–{high:.2f})" if low is not None and high is not None else ""
        tone = "good" if low is not None and low > 1 else ""
        entries.append((f"{e.speedup.ratio:.2f}×", f"speedup{bounds}", tone))
    if e.after.milliseconds is not None:
        was = f", was {numbers.milliseconds(e.before.milliseconds)}" if e.before.milliseconds is not None else ""
        entries.append((numbers.milliseconds(e.after.milliseconds), f"optimized, median{was}", ""))
    if e.verification.max_absolute_error is not None:
        entries.append((numbers.error(e.verification.max_absolute_error), "largest absolute error", ""))
    return entries


def _sheets(e: Explanation) -> list[Sheet]:
    """The tables that have something to say, in the order of interest."""
    made = [_setting(e), _programs(e), _choices(e), _rules(e), _idle_rules(e), _weights(e), _notes(e)]
    return [sheet for sheet in made if sheet is not None]


def _setting(e: Explanation) -> Sheet:
    rows = [
        ("backend", Cell(e.backend or numbers.UNKNOWN)),
        ("numerics", Cell(e.numerics or numbers.UNKNOWN)),
        ("tune", Cell(e.tune or numbers.UNKNOWN)),
        ("verified", _verified(e)),
    ]
    v = e.verification
    if v.max_absolute_error is not None or v.max_relative_error is not None:
        errors = f"{numbers.error(v.max_absolute_error)} absolute, {numbers.error(v.max_relative_error)} relative"
        rows.append(("largest error", Cell(errors)))
    return Sheet("Setting", (), tuple((Cell(name, "dim"), cell) for name, cell in rows))


def _verified(e: Explanation) -> Cell:
    v = e.verification
    words = {None: "no", True: f"yes, {_WHEN[v.when]}", False: f"failed, {_WHEN[v.when]}"}
    tones: dict[bool | None, Tone] = {None: "", True: "good", False: "bad"}
    return Cell(words[v.passed] + (f": {v.reason}" if v.reason else ""), tones[v.passed])


_WHEN = {"now": "in this call", "earlier": "in an earlier call", "never": ""}


def _programs(e: Explanation) -> Sheet | None:
    figures = [
        ("equations", "equations", numbers.count),
        ("FLOPs", "flops", numbers.count),
        ("bytes moved", "bytes", numbers.size),
        ("time, median", "milliseconds", numbers.milliseconds),
        ("temporary memory", "temporary_bytes", numbers.size),
        ("compile time", "compile_seconds", _seconds),
    ]
    rows = []
    for name, key, show in figures:
        old, new = getattr(e.before, key), getattr(e.after, key)
        if old is None and new is None:
            continue
        tone: Tone = "dim"
        if old is not None and new is not None and old != new:
            # Only time decides: more of the rest may well be faster.
            tone = "good" if new < old else "bad" if key == "milliseconds" else ""
        rows.append((Cell(name), Cell(show(old)), Cell(show(new)), Cell(numbers.change(old, new), tone)))
    note = ""
    if e.speedup is not None:
        low, high = (f"{b:.3f}" if b is not None else numbers.UNKNOWN for b in (e.speedup.low, e.speedup.high))
        note = f"speedup {e.speedup.ratio:.3f}, 95 % bounds {low} to {high} (paired runs)"
    if not rows and not note:
        return None
    return Sheet("Before and after", ("", "original", "optimized", "change"), tuple(rows), (1, 2, 3), note)


def _seconds(value: float | None) -> str:
    return numbers.milliseconds(None if value is None else 1e3 * value)


def _choices(e: Explanation) -> Sheet | None:
    if not e.choices:
        return None
    return Sheet(
        "Choices",
        ("site", "form", "time", "estimate", "decided"),
        tuple(row for choice in e.choices for row in _choice_rows(choice)),
        (2, 3),
    )


def _choice_rows(choice: Choice) -> list[tuple[Cell, ...]]:
    """The form taken first, then the others from the fastest on."""

    def rank(candidate: Candidate) -> tuple[bool, float, float]:
        unknown = float("inf")
        time = candidate.milliseconds if candidate.milliseconds is not None else unknown
        estimate = candidate.estimate if candidate.estimate is not None else unknown
        return (candidate.form != choice.chosen, time, estimate)

    rows: list[tuple[Cell, ...]] = []
    for index, candidate in enumerate(sorted(choice.candidates, key=rank)):
        taken = candidate.form == choice.chosen
        site = (f"{choice.site}" + (f" ({choice.sites} sites)" if choice.sites > 1 else "")) if not index else ""
        rows.append(
            (
                Cell(site),
                Cell(f"{'→ ' if taken else '  '}{candidate.form}", "strong" if taken else ""),
                Cell(numbers.milliseconds(candidate.milliseconds)),
                Cell(numbers.milliseconds(candidate.estimate), "dim"),
                Cell(choice.source if taken else "", "dim"),
            )
        )
    return rows


def _rules(e: Explanation) -> Sheet | None:
    """Rules that did something, most active first, and idle ones that say why."""
    active = [rule for rule in e.rules if not rule.idle or rule.declined_reason]
    if not active:
        return None

    def rank(rule: RuleCount) -> tuple[bool, int, int, int, str]:
        return (rule.idle, -(rule.fired + rule.chosen), -rule.offered, -rule.fired, rule.name)

    rows = tuple(
        (
            Cell(rule.name, "dim" if rule.idle else ""),
            Cell(rule.tier, "dim"),
            _number(rule.fired),
            _number(rule.offered),
            _number(rule.chosen),
            Cell(rule.declined_reason or "", "dim"),
        )
        for rule in sorted(active, key=rank)
    )
    return Sheet("Rules", ("rule", "tier", "fired", "offered", "chosen", "declined"), rows, (2, 3, 4))


def _number(value: int) -> Cell:
    return Cell(f"{value:,}" if value else "·", "" if value else "dim")


def _idle_rules(e: Explanation) -> Sheet | None:
    idle = sorted(rule.name for rule in e.rules if rule.idle and not rule.declined_reason)
    if not idle:
        return None
    return Sheet(f"Rules that never fired: {len(idle)} of {len(e.rules)}", (), (), note=", ".join(idle))


def _weights(e: Explanation) -> Sheet | None:
    w = e.weights
    if w is None:
        return None
    resident = None
    if w.resident_original_bytes is not None and w.resident_folded_bytes is not None:
        resident = w.resident_original_bytes + w.resident_folded_bytes
    rows = (
        ("folded arrays", f"{numbers.count(w.folded)}, {numbers.size(w.folded_bytes)}"),
        ("resident originals", numbers.size(w.resident_original_bytes)),
        ("resident folded", numbers.size(w.resident_folded_bytes)),
        ("resident together", numbers.size(resident)),
    )
    return Sheet("Known weights", (), tuple((Cell(name, "dim"), Cell(value)) for name, value in rows))


def _notes(e: Explanation) -> Sheet | None:
    if not e.notes:
        return None
    return Sheet("Notes", (), tuple((Cell(f"• {note}"),) for note in e.notes))
