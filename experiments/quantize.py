"""Accuracy in fewer bits, beside size and speed, of networks with real weights and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.experiments import quantize_folds, quantize_pretrained, quantize_stored
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.quantize_plots import draw
from jaxinfer.experiments.task import Request, Row, append, environment, verdict_cell
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet

_TINY_FOLDS = 2


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        network: its name in the zoo or among the networks for digits.
        measure: (network, options, and of folds also which one, how many and where weights are kept; tiny) → rows.
        summarize: rows of all folds → a row for each way; None where there are no folds.
    """

    network: str
    measure: Callable[..., list[Row]]
    summarize: Callable[[Sequence[Row]], list[Row]] | None = None


SUBJECTS = {
    "efficientnet_lite0": Subject("efficientnet_lite0", quantize_pretrained.crops),
    "minilm": Subject("minilm", quantize_pretrained.embeddings),
    "minilm_products": Subject("minilm", quantize_pretrained.products),
    "cnn": Subject("cnn", quantize_folds.one_fold, quantize_folds.summaries),
    "lenet300": Subject("lenet300", quantize_stored.one_fold, quantize_stored.stored_summaries),
    "g2p": Subject("g2p", quantize_folds.one_fold, quantize_folds.summaries),
}


def quantize(
    request: Request,
    networks: Mapping[str, Mapping[str, Any] | None],
    folds: int,
    weights: str | None,
    speeds: str | None,
    plots: str | None,
) -> list[Row]:
    """Quantizes every network in all of its ways, each network, and each of its folds, in a fresh process.

    All layers that a scheme applies to are quantized, whatever they measure: what `autoinfer.quantize` leaves in
    floating point for speed can only be nearer to float32.

    Args:
        request: where to print and write; its models and batch sizes play no part.
        networks: of `SUBJECTS`, each with its options and ``ways``; None leaves a network, or a way, out.
        folds: how many, of networks that are judged fold by fold.
        weights: a folder for networks that were trained, None to keep none.
        speeds: rows of the task quantize_speed, for the drawing of accuracy against speed; they need not be there.
        plots: a folder for drawings, None for none.

    Raises:
        MeasurementError: a measurement failed in its process.
    """
    folds = _TINY_FOLDS if request.tiny else folds
    kept = None if request.tiny else weights
    every: list[Row] = []
    for name, options in networks.items():
        if options is None:
            continue
        subject = SUBJECTS[name]
        ways = {way: how for way, how in options["ways"].items() if how is not None}
        common = {"name": subject.network, "options": {**options, "ways": ways}, "tiny": request.tiny}
        if subject.summarize is None:
            found = _rows(request, subject.measure, common)
            sums = found
        else:
            found = []
            for fold in range(folds):
                found += _rows(request, subject.measure, {**common, "fold": fold, "folds": folds, "kept": kept})
                request.console.print(f"{name}: fold {fold + 1} of {folds}")
            sums = subject.summarize(found)
            append(request.output, sums)
            found = found + sums
        request.console.print(table(sums))
        every += found
    if plots is not None:
        draw(every, Path(plots), None if speeds is None else Path(speeds))
    return every


def _rows(request: Request, measure: Callable[..., list[Row]], options: Mapping[str, Any]) -> list[Row]:
    rows = [{**row, **environment(), "tiny": request.tiny} for row in fresh(measure, **options)]
    append(request.output, rows)
    return rows


def table(rows: Sequence[Row]) -> Sheet:
    """Rows of one network as people read them, a line for each figure."""
    columns = ("quantized", "", "figure", "bound", "asked for", "holds", "layers", "size", "smaller")
    lines = [line for row in rows for line in _lines(row)]
    note = f"{rows[0]['items']} items; bound: one-sided, 95 %; size: of all parameters, or of the file"
    return Sheet(f"{rows[0]['network']} in fewer bits", columns, tuple(lines), (2, 3, 4, 6, 7, 8), note)


def _lines(row: Row) -> list[tuple[Cell, ...]]:
    layers, size = row["layers"], row["bytes"]
    lines = []
    for index, figure in enumerate(row["figures"]):
        asked = "" if figure["goal"] is None else f"{'≤' if figure['most'] else '≥'} {figure['goal']:g}"
        about = (
            f"{layers['quantized']} of {layers['all']}",
            f"{numbers.size(size['before'])} → {numbers.size(size['after'])}",
            f"{size['before'] / size['after']:.1f}×",
        )
        lines.append(
            (
                Cell(row["way"] if not index else "", "strong"),
                Cell(figure["what"]),
                Cell(f"{figure['value']:.4g}"),
                Cell(f"{figure['bound']:.2f}" if "bound" in figure else ""),
                Cell(asked),
                Cell("") if figure["holds"] is None else verdict_cell(figure["holds"]),
                *(Cell(text if not index else "") for text in about),
            )
        )
    return lines
