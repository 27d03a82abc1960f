"""Drawings of what fewer bits cost: the first figure of each way against size, and against speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinfer.experiments.task import Row


def draw(rows: Sequence[Row], folder: Path, speeds: Path | None = None) -> list[Path]:
    """Draws a panel for each network: its first figure against size, a point for each way.

    Args:
        rows: those of the task; of networks with folds, the summaries are drawn.
        folder: made if need be; gets ``accuracy_against_size.png`` and ``accuracy_against_speed.png``.
        speeds: a file with rows of the task quantize_speed. Where it has the scheme of a network's way, that is drawn
            against speed; without any there is no such drawing.

    Returns:
        What was written.
    """
    shown = [row for row in rows if row.get("summary") or "fold" not in row]
    drawn = {"size": (lambda row: row["bytes"]["after"] / row["bytes"]["before"], "size, share of float32's")}
    known = _speeds(speeds)
    if known:
        drawn["speed"] = (lambda row: known.get(_what(row)), "speed, times float32's (both optimized)")
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        _panels(shown, where, label, folder / f"accuracy_against_{name}.png") for name, (where, label) in drawn.items()
    ]
    return [path for path in found if path is not None]


def _what(row: Row) -> tuple[str, str]:
    return row["network"], row["options"]["scheme"]["name"]


def _speeds(path: Path | None) -> dict[tuple[str, str], float]:
    """The last measured speed of each network and scheme, at the smallest batch."""
    if path is None or not path.exists():
        return {}
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if not row["tiny"]]
    return {(r["model"], r["scheme"]): r["speedup"] for r in sorted(rows, key=lambda r: -r["batch"])}


def _panels(rows: Sequence[Row], where: Callable[[Row], float | None], label: str, path: Path) -> Path | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks: dict[str, list[Row]] = {}
    for row in rows:
        if where(row) is not None:
            networks.setdefault(row["network"], []).append(row)
    if not networks:
        return None
    figure, panels = pyplot.subplots(
        1, len(networks), figsize=(4.5 * len(networks), 4), layout="constrained", squeeze=False
    )
    for axes, (network, found) in zip(panels[0], networks.items()):
        for row in found:
            first = row["figures"][0]
            above = [[0], [max(first.get("bound", first["value"]) - first["value"], 0)]]
            axes.errorbar([where(row)], [first["value"]], yerr=above, marker="o", capsize=3, label=row["way"])
        axes.set(title=network, xlabel=label, ylabel=found[0]["figures"][0]["what"])
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
