"""Time against work: programs that lost channels and heads, beside the dense ones, both optimized.

What is removed is drawn at random: for time only the shapes count. Work is counted on both programs as they are traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import (
    Request,
    Row,
    append,
    environment,
    speed_beside_itself,
    speed_cell,
    verdict_cell,
)
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself
from jaxinfer.sparsity.groups import Groups

# A program with a share s of the work is to be 0.6 / s times as fast or better.
_REALIZED = 0.6
# Groups of fewer units than this are rounded to single units.
_SMALL = 32


def sparsify_speed(
    request: Request, networks: Sequence[str], shares: Sequence[float], multiple_of: int, seconds: float
) -> list[Row]:
    """Times every network at every share of its work and every batch size, each in a fresh process.

    Args:
        request: where to print and write, and the batch sizes; its models play no part.
        networks: names in the zoo.
        shares: of the dense program's multiply-accumulates.
        multiple_of: kept counts are multiples of this, in groups of 32 units or more.
        seconds: to spend on timing each pair.

    Raises:
        MeasurementError: a measurement failed in its process.
    """
    rows = []
    options = {"tiny": request.tiny, "multiple_of": multiple_of, "optimize": dict(request.optimize), "seconds": seconds}
    for name in networks:
        for batch in request.batches:
            for share in shares:
                rows.append(fresh(measure, name=name, batch=batch, share=share, **options))
                append(request.output, rows[-1:])
    columns = ("model", "batch", "MACs left", "dense", "small", "speed (95 % bounds)", "speed / MAC ratio", "holds")
    note = f"holds: at least {_REALIZED} of the ratio of multiply-accumulates is realized"
    sheet = Sheet("Time against work, both optimized", columns, tuple(map(_cells, rows)), (1, 2, 3, 4, 5, 6), note)
    request.console.print(sheet)
    return rows


def measure(
    name: str, batch: int, share: float, tiny: bool, multiple_of: int, optimize: Mapping[str, Any], seconds: float
) -> Row:
    """One network at one share and batch size, here and now."""
    model = load(name, tiny=tiny)
    inputs = model.make_inputs(batch)
    groups = autoinfer.channel_groups(model.apply, model.variables, *inputs)
    kept = random_units(groups, share, multiple_of, np.random.default_rng(0))
    small, small_variables = autoinfer.shrink(model.apply, model.variables, groups.masks(kept), *inputs)
    before = autoinfer.optimize(model.apply, **optimize).freeze(model.variables)
    after = autoinfer.optimize(small, **optimize).freeze(small_variables)
    timing = beside_itself(lambda: before(*inputs), lambda: after(*inputs), budget_s=seconds)
    dense_macs = groups.macs()
    small_macs = autoinfer.channel_groups(small, small_variables, *inputs).macs()
    ratio = dense_macs / small_macs
    row = speed_beside_itself(timing)
    return {
        "task": "sparsify_speed",
        "model": name,
        "batch": batch,
        "share": share,
        "tiny": tiny,
        **environment(),
        "optimize": dict(optimize),
        "kept": {group.name: [int(kept[group.name].sum()), group.size] for group in groups if group.name in kept},
        "macs": {"dense": dense_macs, "small": small_macs},
        "weights": {"dense": _entries(model.variables), "small": _entries(small_variables)},
        **row,
        "realized": row["speedup"] / ratio,
        "holds": row["speedup"] >= _REALIZED * ratio,
    }


def random_units(groups: Groups, share: float, multiple_of: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Units to keep so that about this share of the work is left: of every group the same part, drawn at random.

    Inputs are all kept, and so are features within attention heads, of which whole heads go.

    Args:
        groups: what `autoinfer.channel_groups` found.
        share: of all multiply-accumulates.
        multiple_of: kept counts are multiples of this, in groups of 32 units or more.
        rng: draws the units.
    """
    of_heads = {member.path for group in groups if group.kind == "head" for member in group.members}
    ranks = {
        group.name: rng.permutation(group.size)
        for group in groups
        if group.kind == "head"
        or (group.kind == "channel" and not all(member.path in of_heads for member in group.members))
    }

    def kept(part: float) -> dict[str, np.ndarray]:
        found = {}
        for name, rank in ranks.items():
            unit = multiple_of if len(rank) >= _SMALL else 1
            count = min(len(rank), max(unit, unit * round(part * len(rank) / unit)))
            found[name] = rank < count
        return found

    total = groups.macs()
    parts = np.linspace(0, 1, 257)[1:]
    return kept(min(parts, key=lambda part: abs(groups.macs(kept(part)) / total - share)))


def _entries(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _cells(row: Row) -> tuple[Cell, ...]:
    return (
        Cell(row["model"] + (" (tiny)" if row["tiny"] else "")),
        Cell(str(row["batch"])),
        Cell(f"{row['macs']['small'] / row['macs']['dense']:.1%}"),
        Cell(numbers.milliseconds(row["before_ms"])),
        Cell(numbers.milliseconds(row["after_ms"])),
        speed_cell(row),
        Cell(f"{row['realized']:.2f}"),
        verdict_cell(row["holds"]),
    )
