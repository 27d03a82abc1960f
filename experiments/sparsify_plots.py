"""Drawings of what pruning costs: accuracy against weights, work and time that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinfer.experiments.task import Row

_LEFT: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "sparsity": ("weights that are not zero, share of the dense network's", lambda row: row["nonzero"]),
    "macs": ("multiply-accumulates, share of the dense network's", lambda row: row["macs"]),
    "latency": (
        "time, share of the dense network's (both optimized)",
        lambda row: 1 / next(iter(row["latency"].values()))["speedup"] if "latency" in row else None,
    ),
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws accuracy against weights, work and time, a curve for each network.

    Args:
        rows: those of the task; only the summaries are drawn.
        folder: made if need be; gets ``accuracy_against_sparsity.png``, ``..._macs.png`` and, where programs were
            timed, ``..._latency.png``.

    Returns:
        What was written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summaries = [row for row in rows if row.get("summary")]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (label, left) in _LEFT.items():
        curves: dict[str, list[Row]] = {}
        for row in summaries:
            if left(row) is not None:
                curves.setdefault(row["network"], []).append(row)
        if not curves:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for network, found in curves.items():
            found = sorted(found, key=lambda row: left(row) or 0.0)
            points = [(left(row), row["pruned"]["mean"], row["pruned"]["spread"]) for row in found]
            dense = found[0]["dense"]
            x, y, spread = zip(*points, (1.0, dense["mean"], dense["spread"]))
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=network)
        axes.set(xscale="log", xlabel=label, ylabel="accuracy, % (± spread of the folds)")
        axes.legend()
        axes.grid(alpha=0.3)
        path = folder / f"accuracy_against_{name}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        written.append(path)
    return written
