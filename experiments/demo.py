"""The main job in one go: a pretrained network on real photographs: as it is, optimized, and in int8."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from jaxinfer.quantization.report import QuantizationReport
from jaxinfer.report import numbers, output
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import PairedRatio, interleaved

MODEL = "efficientnet_lite0"
_TIMING_SECONDS = {False: 12.0, True: 1.0}  # by whether the network is tiny
_FEWEST_ROUNDS = 8
_STEPS = 7


@dataclass(frozen=True)
class Recognised:
    """What the networks see in one photograph.

    Attributes:
        photograph: its file name.
        before, after, int8: the five likeliest classes with their probabilities, best first, of the original, the
            optimized network and that in int8.
        difference: the largest difference between the logits of the first two.
    """

    photograph: str
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    int8: list[tuple[str, float]]
    difference: float

    @property
    def same(self) -> bool:
        """Whether the first two name the same classes in the same order."""
        return self._names(self.before) == self._names(self.after)

    @property
    def same_in_int8(self) -> str:
        """How much of the original's list is left in int8, in words."""
        before, after = self._names(self.before), self._names(self.int8)
        if before == after:
            return "yes"
        if set(before) == set(after):
            return "yes, in another order" if before[0] == after[0] else "yes, with another first one"
        shared = f"{len(set(before) & set(after))} of {len(before)}"
        return f"{shared}, the same first one" if before[0] == after[0] else f"{shared}, another first one"

    @staticmethod
    def _names(seen: list[tuple[str, float]]) -> list[str]:
        return [name for name, _ in seen]

    def sheet(self) -> Sheet:
        """The lists side by side."""
        rows = []
        for (before, p), (after, q), (int8, r) in zip(self.before, self.after, self.int8, strict=True):
            different = "" if before == after else "bad"
            rows.append(
                (
                    *(Cell(before), Cell(f"{p:.4%}")),
                    *(Cell(after, different), Cell(f"{q:.4%}")),
                    *(Cell(int8), Cell(f"{r:.4%}")),
                )
            )
        note = f"largest difference of the logits {numbers.error(self.difference)} (optimized)"
        return Sheet(self.photograph, ("original", "", "optimized", "", "int8", ""), tuple(rows), (1, 3, 5), note)


def demo(html: Path, tune: Tune | float = "auto", tiny: bool = False, console: Console | None = None) -> bool:
    """Optimizes a pretrained EfficientNet-Lite0, in float32 and in int8, and shows its answers and its speed.

    Ranges for int8 come from the photographs themselves: there are no others here.

    Args:
        html: where the comparison of the compiled programs is written.
        tune: as for `autoinfer.optimize`.
        tiny: a small network with random weights instead, which runs in seconds.
        console: where to print.

    Returns:
        Whether the original and the optimized network name the same classes for every photograph.

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
        with steps("quantize: find ranges on the photographs, choose what is faster in int8 layer by layer, optimize"):
            off = "off" if tune == "off" else "auto"
            quantized, weights = autoinfer.quantize(model.apply, model.variables, autoinfer.Int8(), batches, tune=off)
            small = autoinfer.optimize(quantized, tune=tune).freeze(weights)
            jax.block_until_ready(small(first))
        with steps("recognise the photographs with all three"):
            seen = [
                _recognise(n, original(model.variables, x), fast(x), small(x))
                for n, x in zip(names, batches, strict=True)
            ]
        with steps("time all three in turn"):
            calls = [lambda: original(model.variables, first), lambda: fast(first), lambda: small(first)]
            times = interleaved(calls, budget_s=_TIMING_SECONDS[tiny], min_rounds=_FEWEST_ROUNDS)
        with steps("compare what XLA makes of the first two"):
            fast.compare_hlo(first).to_html(html)
    console.print(fast.explain(first))
    for photograph in seen:
        console.print(photograph.sheet())
    console.print(_outcome(f"{model.name}{list(first.shape)}", seen, times, quantized.explain(), html))
    return all(photograph.same for photograph in seen)


def _recognise(name: str, before: jax.Array, after: jax.Array, int8: jax.Array) -> Recognised:
    old, new, small = (np.asarray(logits[0], np.float64) for logits in (before, after, int8))
    difference = float(np.max(np.abs(old - new)))
    return Recognised(name, images.top(old), images.top(new), images.top(small), difference)


def _outcome(
    what: str,
    seen: Sequence[Recognised],
    times: Sequence[Sequence[float]],
    report: QuantizationReport,
    html: Path,
) -> Sheet:
    original, optimized, int8 = times
    faster, small, beside = (
        PairedRatio.of(*pair) for pair in ((original, optimized), (original, int8), (optimized, int8))
    )
    same = all(photograph.same for photograph in seen)
    words = list(dict.fromkeys(photograph.same_in_int8 for photograph in seen))
    in_int8 = words[0] if len(words) == 1 else "; ".join(f"{p.photograph}: {p.same_in_int8}" for p in seen)
    layers = [layer for layer in report.layers if layer.position is not None]
    count = f"{sum(layer.is_quantized for layer in layers)} of {len(layers)} layers"
    empty = Cell("")
    rows = (
        (
            Cell("time", "dim"),
            *(Cell(numbers.milliseconds(ms)) for ms in (faster.before_ms, faster.after_ms, small.after_ms)),
        ),
        (Cell("speed (95 % bounds)", "dim"), empty, speed_cell(speed(faster)), speed_cell(speed(small))),
        (Cell("speed beside optimized", "dim"), empty, empty, speed_cell(speed(beside))),
        (
            Cell("same five labels", "dim"),
            empty,
            Cell("yes" if same else "NO", "good" if same else "bad"),
            Cell(in_int8),
        ),
        (
            Cell("parameters", "dim"),
            *[Cell(numbers.size(report.before))] * 2,
            Cell(f"{numbers.size(report.after)}, {count}"),
        ),
    )
    difference = numbers.error(max(p.difference for p in seen))
    note = f"largest difference of the logits {difference} (optimized); compiled programs compared in {html.resolve()}"
    title = f"{what} on {jax.devices()[0].device_kind}"
    return Sheet(title, ("", "original, jax.jit", "optimized, float32", "optimized, int8"), rows, (), note)


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
