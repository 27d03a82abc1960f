"""The main job in one go: a pretrained network on real photographs, before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxinfer import autoinfer
from jaxinfer.experiments.task import speed, speed_cell
from jaxinfer.models import images
from jaxinfer.models.zoo import load
from jaxinfer.pipeline import Tune
from jaxinfer.report import numbers, output
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import AgainstItself, not_slower

MODEL = "efficientnet_lite0"
_TIMING_SECONDS = {False: 10.0, True: 1.0}  # by whether the network is tiny
_STEPS = 6


@dataclass(frozen=True)
class Recognised:
    """What the original and the optimized network see in one photograph.

    Attributes:
        photograph: its file name.
        before, after: the five likeliest classes with their probabilities, best first.
        difference: the largest difference between the two networks' logits.
    """

    photograph: str
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    difference: float

    @property
    def same(self) -> bool:
        """Whether both name the same classes in the same order."""
        return [name for name, _ in self.before] == [name for name, _ in self.after]

    def sheet(self) -> Sheet:
        """Both lists side by side."""
        rows = [
            (Cell(before), Cell(f"{p:.4%}"), Cell(f"{q:.4%}"), Cell(after, "" if before == after else "bad"))
            for (before, p), (after, q) in zip(self.before, self.after, strict=True)
        ]
        note = f"largest difference of the logits {numbers.error(self.difference)}"
        return Sheet(self.photograph, ("original", "", "", "optimized"), tuple(rows), (1, 2), note)


def demo(html: Path, tune: Tune | float = "auto", tiny: bool = False, console: Console | None = None) -> bool:
    """Optimizes a pretrained EfficientNet-Lite0, and shows what became of its answers and its speed.

    Args:
        html: where the comparison of the compiled programs is written.
        tune: as for `autoinfer.optimize`.
        tiny: a small network with random weights instead, which runs in seconds.
        console: where to print.

    Returns:
        Whether both networks name the same classes for every photograph.

    Raises:
        ModuleNotFoundError: a package of the extra "demo" is not installed.
        OSError: the comparison cannot be written.
    """
    console = console or output.console()
    with _Steps(console) as steps:
        with steps("load the pretrained weights and the photographs"):
            model = load(MODEL, tiny=tiny)
            batches = [model.inputs[0]] if tiny else [jax.numpy.asarray(p)[None] for p in images.photographs()]
            names = ["random values"] if tiny else list(images.PHOTOGRAPHS)
            first = batches[0]
        with steps("compile the original with jax.jit"):
            original = jax.jit(model.apply)
            jax.block_until_ready(original(model.variables, first))
        with steps("optimize: rewrite, choose forms by measuring them, verify"):
            fast = autoinfer.optimize(model.apply, tune=tune).freeze(*model.known)
            jax.block_until_ready(fast(first))
        with steps("recognise the photographs with both"):
            seen = [_recognise(n, original(model.variables, x), fast(x)) for n, x in zip(names, batches, strict=True)]
        with steps("time both in pairs"):
            timing = not_slower(
                lambda: original(model.variables, first), lambda: fast(first), budget_s=_TIMING_SECONDS[tiny]
            )
        with steps("compare what XLA makes of both"):
            fast.compare_hlo(first).to_html(html)
    console.print(fast.explain(first))
    for photograph in seen:
        console.print(photograph.sheet())
    console.print(_outcome(f"{model.name}{list(first.shape)}", seen, timing, html))
    return all(photograph.same for photograph in seen)


def _recognise(name: str, before: jax.Array, after: jax.Array) -> Recognised:
    old, new = np.asarray(before[0], np.float64), np.asarray(after[0], np.float64)
    return Recognised(name, images.top(old), images.top(new), float(np.max(np.abs(old - new))))


def _outcome(what: str, seen: list[Recognised], timing: AgainstItself, html: Path) -> Sheet:
    same, change = all(photograph.same for photograph in seen), timing.change
    rows = (
        (Cell("same five labels", "dim"), Cell("yes" if same else "NO", "good" if same else "bad")),
        (Cell("largest difference", "dim"), Cell(numbers.error(max(p.difference for p in seen)))),
        (Cell("original, jax.jit", "dim"), Cell(numbers.milliseconds(change.before_ms))),
        (Cell("optimized", "dim"), Cell(numbers.milliseconds(change.after_ms))),
        (Cell("speed (95 % bounds)", "dim"), speed_cell(speed(change))),
        (Cell("compiled programs compared in", "dim"), Cell(str(html.resolve()))),
    )
    return Sheet(f"{what} on {jax.devices()[0].device_kind}", (), rows)


class _Steps:
    """Steps of unknown length, each with a moving bar and its time; off a terminal, a line when it is done."""

    def __init__(self, console: Console):
        self._console = console
        self._count = 0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), console=console
        )

    def __enter__(self) -> _Steps:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._count += 1
        described = f"{self._count}/{_STEPS} {what}"
        started = time.perf_counter()
        task = self._progress.add_task(described, total=None)
        yield
        self._progress.update(task, total=1, completed=1)
        if not self._console.is_terminal:
            self._console.print(f"{described}: {time.perf_counter() - started:.1f} s")
