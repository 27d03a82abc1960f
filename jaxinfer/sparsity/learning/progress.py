"""A progress bar for training, if one is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar over steps that shows the loss and what is left.

    Args:
        steps: how many there are.
        shown: whether to show anything.
    """

    def __init__(self, steps: int, shown: bool):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._bar = RichProgress(*columns, disable=not shown)
        self._task = self._bar.add_task("learning masks", total=steps, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: int, figures: Mapping[str, Any]) -> None:
        """Shows how far training is."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if name in ("loss", "left"))
        self._bar.update(self._task, completed=step, figures=text)
