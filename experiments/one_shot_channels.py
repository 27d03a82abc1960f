"""What is lost when channels of a pretrained network are removed at once: EfficientNet-Lite0 on photographs.

Without training not much survives, and that is the point of the drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, speed_beside_itself, speed_cell
from jaxinfer.models import images
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself

_MODEL = "efficientnet_lite0"


def one_shot_channels(request: Request, shares: Sequence[float], seconds: float, plots: str | None) -> list[Row]:
    """Removes channels of least magnitude and shrinks, at every share; prints a table, writes rows and a drawing.

    Args:
        request: where to print and write; its models play no part.
        shares: of the dense network's multiply-accumulates.
        seconds: to spend on timing each pair of programs; 0 times nothing.
        plots: a folder for the drawing, None for none.

    Raises:
        MeasurementError: a measurement failed in its process.
    """
    options = {"tiny": request.tiny, "optimize": dict(request.optimize), "seconds": seconds}
    rows = []
    for share in (1.0, *shares):
        rows.append(fresh(measure, share=share, **options))
        append(request.output, rows[-1:])
    columns = ("MACs asked for", "left", "weights left", "as the dense network", "its probability", "speed")
    note = f"{rows[0]['views']} views of two photographs: the same likeliest class; the mean probability it is given"
    request.console.print(Sheet(f"{_MODEL}, no training", columns, tuple(map(_cells, rows)), (0, 1, 2, 3, 4, 5), note))
    if plots is not None and not request.tiny:
        draw(rows, Path(plots))
    return rows


def views(size: int) -> np.ndarray:
    """Windows onto the photographs, float32[18, size, size, 3]; the first and the tenth are whole photographs."""
    found = []
    for name in images.PHOTOGRAPHS:
        whole = images.photograph(name)
        height, width = whole.shape[:2]
        found.append(images.preprocess(whole, size))
        for top in (0, height - height * 3 // 4):
            for left in np.linspace(0, width - width // 2, 4).astype(int):
                window = whole[top : top + height * 3 // 4, left : left + width // 2]
                found.append(images.preprocess(window, size))
    return np.stack(found)


def measure(share: float, tiny: bool, optimize: Mapping[str, Any], seconds: float) -> Row:
    """One share, here and now; 1 is the dense network."""
    model = load(_MODEL, tiny=tiny)
    x = views(model.inputs[0].shape[1])
    groups = autoinfer.channel_groups(model.apply, model.variables, *model.inputs)
    dense = _probabilities(model.apply, model.variables, x)
    small, variables = model.apply, model.variables
    if share < 1:
        learned = autoinfer.learn_masks(
            lambda variables, batch: model.loss(variables, *batch),
            model.variables,
            [model.inputs],
            autoinfer.Target(flops=share),
            optax.sgd(0.0),
            method=autoinfer.Magnitude(),
            granularity="channel",
            groups=groups,
            steps=0,
            progress=False,
        )
        small, variables = autoinfer.shrink(model.apply, learned.params, learned.masks, *model.inputs)
    found = _probabilities(small, variables, x)
    best = dense.argmax(axis=1)
    whole = (0, len(x) // len(images.PHOTOGRAPHS))
    row: Row = {
        "task": "one_shot_channels",
        "model": _MODEL,
        "tiny": tiny,
        **environment(),
        "share": share,
        "macs": autoinfer.channel_groups(small, variables, *model.inputs).macs() / groups.macs(),
        "weights": _entries(variables) / _entries(model.variables),
        "views": len(x),
        "same_class": float(100 * (found.argmax(axis=1) == best).mean()),
        "probability": float(found[np.arange(len(x)), best].mean()),
        "photographs": [{"class": int(found[i].argmax()), "probability": float(found[i].max())} for i in whole],
    }
    if seconds and share < 1:
        before = autoinfer.optimize(model.apply, **optimize).freeze(model.variables)
        after = autoinfer.optimize(small, **optimize).freeze(variables)
        row |= speed_beside_itself(
            beside_itself(lambda: before(*model.inputs), lambda: after(*model.inputs), budget_s=seconds)
        )
    return row


def _probabilities(apply: Any, variables: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jax.jit(apply)(variables, x)), np.float64)


def _entries(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def draw(rows: Sequence[Row], folder: Path) -> Path:
    """Both photographs at every share, with the class that the network sees in them; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = images.class_names()
    pictures = [images.photograph(name) for name in images.PHOTOGRAPHS]
    size = (2.2 * len(rows), 2.2 * len(pictures))
    figure, grid = pyplot.subplots(len(pictures), len(rows), figsize=size, layout="constrained", squeeze=False)
    for column, row in enumerate(rows):
        for line, (picture, seen) in enumerate(zip(pictures, row["photographs"])):
            axes = grid[line][column]
            axes.imshow(picture)
            axes.set_axis_off()
            label = names[seen["class"]].split(",")[0]
            title = f"{row['macs']:.0%} of the work\n" if line == 0 else ""
            axes.set_title(f"{title}{label}, {seen['probability']:.0%}", fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "efficientnet_lite0_channels.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _cells(row: Row) -> tuple[Cell, ...]:
    return (
        Cell(f"{row['share']:.0%}"),
        Cell(f"{row['macs']:.1%}"),
        Cell(f"{row['weights']:.1%}"),
        Cell(f"{row['same_class']:.0f} %"),
        Cell(f"{row['probability']:.3f}"),
        speed_cell(row) if "speedup" in row else Cell(numbers.UNKNOWN),
    )
