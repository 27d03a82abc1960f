"""What is asked for and what is got: shares of the work, counted on the programs that come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import optax

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, verdict_cell
from jaxinfer.models.zoo import load
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.sparsity.groups import Groups

# What is got may be off by this share of the dense work, or by one unit where that is more.
_TOLERANCE = 0.01


def sparsify_targets(
    request: Request,
    networks: Mapping[str, int | None],
    shares: Sequence[float],
    methods: Sequence[str],
    steps: int,
) -> list[Row]:
    """Asks every method for every share of the work of every network, shrinks, and counts what is left.

    Args:
        request: where to print and write; its models play no part.
        networks: names in the zoo, with random weights, and the side of the images they are trained on in pixels, or
            None for all of the image; what is asked for and got is counted on whole images in any case.
        shares: of the dense program's multiply-accumulates.
        methods: names in `autoinfer`.
        steps: of training, on made-up targets.

    Raises:
        MeasurementError: a run failed in its process.
    """
    rows = []
    for name, side in networks.items():
        for method in methods:
            options = {"side": side, "shares": list(shares), "method": method, "steps": steps, "tiny": request.tiny}
            found = fresh(measure, name=name, **options)
            append(request.output, found)
            rows += found
    columns = ("model", "method", "asked for", "got", "one unit", "holds")
    note = (
        f"shares of the dense multiply-accumulates; holds: within {_TOLERANCE:.0%}, or within one unit if that is more"
    )
    request.console.print(Sheet("Targets in FLOPs", columns, tuple(map(_cells, rows)), (2, 3, 4), note))
    return rows


def measure(name: str, side: int | None, shares: Sequence[float], method: str, steps: int, tiny: bool) -> list[Row]:
    """One network and method, here and now: a row for each share."""
    model = load(name, tiny=tiny, pretrained=False)
    seen = model.inputs if side is None else tuple(x[:, :side, :side] for x in model.inputs)
    groups = autoinfer.channel_groups(model.apply, model.variables, *model.inputs)
    dense = groups.macs()
    rows = []
    for share in shares:
        learned = autoinfer.learn_masks(
            lambda variables, batch: model.loss(variables, *batch),
            model.variables,
            [seen],
            autoinfer.Target(flops=share),
            optax.sgd(1e-4),
            method=getattr(autoinfer, method)(),
            granularity="channel",
            groups=groups,
            steps=steps,
            progress=False,
        )
        small, small_variables = autoinfer.shrink(model.apply, learned.params, learned.masks, *model.inputs)
        got = autoinfer.channel_groups(small, small_variables, *model.inputs).macs() / dense
        unit = _largest_unit(groups, learned.kept) / dense
        rows.append(
            {
                "task": "sparsify_targets",
                "model": name,
                "tiny": tiny,
                "method": method,
                "side": side,
                **environment(),
                "asked": share,
                "got": got,
                "unit": unit,
                "holds": abs(got - share) <= max(_TOLERANCE, unit),
            }
        )
    return rows


def _largest_unit(groups: Groups, kept: dict[str, tuple[int, int]]) -> float:
    """The most work that one further unit of a group would bring back, all others as they are."""
    flags = {name: np.arange(size) < count for name, (count, size) in kept.items()}
    now, most = groups.macs(flags), 0.0
    for name, (count, size) in kept.items():
        more = {**flags, name: np.arange(size) < count + 1}
        most = max(most, groups.macs(more) - now)
    return most


def _cells(row: Row) -> tuple[Cell, ...]:
    return (
        Cell(row["model"] + (" (tiny)" if row["tiny"] else "")),
        Cell(row["method"]),
        Cell(f"{row['asked']:.1%}"),
        Cell(f"{row['got']:.2%}"),
        Cell(f"{row['unit']:.2%}"),
        verdict_cell(row["holds"]),
    )
