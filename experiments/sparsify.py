"""Networks for digits, pruned while they are trained and shrunk: accuracy, work and time beside the dense network's.

Dense and pruned networks start from the same weights and see the same batches for the same number of steps under the
same optimizer. Every item of the data is held out once, and both are judged on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import autoinfer
from jaxinfer.experiments.digit_networks import NETWORKS, Network, Training, is_right, train
from jaxinfer.experiments.folds import paired_loss, stratified_folds
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.sparsify_plots import draw
from jaxinfer.experiments.task import Request, Row, append, environment, speed_beside_itself, speed_cell
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet
from jaxinfer.search.measure import beside_itself
from jaxinfer.sparsity.groups import Groups

# With one-sided 95 % confidence a network may lose this many points more than its goal says.
_MARGIN = 0.3
# Added to the seed of batches that pretraining sees.
_EARLIER = 1_000_000
_TINY = {"every": 25, "steps": 6, "folds": 2}


class Split(NamedTuple):
    """Which part of the data a network is judged on.

    Attributes:
        fold: the fold that is held out.
        folds: how many there are.
        seed: of the folds, the first weights and the batches.
        every: take every so many items only.
    """

    fold: int
    folds: int
    seed: int
    every: int = 1


def sparsify(
    request: Request,
    networks: Mapping[str, Mapping[str, Any] | None],
    folds: int,
    seed: int,
    timed: int,
    seconds: float,
    plots: str | None,
) -> list[Row]:
    """Trains every network densely and towards each of its goals, fold by fold, each fold in a fresh process.

    Rows are written as they come: one for each network, goal and fold, then one over all folds.

    Args:
        request: where to print and write, and the batch sizes to time; its models play no part.
        networks: names in `digit_networks.NETWORKS`, each with ``training`` (fields of `Training`), ``pretraining``
            (the same, or None: what both networks learn before anything is pruned), ``method`` (its ``name`` in
            `autoinfer`, and its fields), ``granularity``, ``teach`` (the weight of distillation from the dense network)
            and ``goals`` (each a ``target`` and the ``loss`` in points that is allowed); None leaves one out.
        folds: how many.
        seed: of the folds, the first weights and the batches.
        timed: in how many folds programs are timed.
        seconds: to spend on timing each pair of programs.
        plots: a folder for drawings, None for no drawings.

    Raises:
        MeasurementError: a fold failed in its process.
    """
    folds = _TINY["folds"] if request.tiny else folds
    rows: list[Row] = []
    for name, options in networks.items():
        if options is None:
            continue
        of_network: list[Row] = []
        for fold in range(folds):
            found = fresh(
                learn,
                name=name,
                options=_smallest(options) if request.tiny else dict(options),
                split=Split(fold, folds, seed, _TINY["every"] if request.tiny else 1)._asdict(),
                optimize=dict(request.optimize),
                batches=list(request.batches),
                seconds=seconds if fold < timed else 0,
            )
            append(request.output, found)
            of_network += found
            request.console.print(f"{name}: fold {fold + 1} of {folds}")
        sums = [summary(of_network, goal) for goal in range(len(options["goals"]))]
        append(request.output, sums)
        request.console.print(table(sums))
        rows += of_network + sums
    if plots is not None:
        draw(rows, Path(plots))
    return rows


def _smallest(options: Mapping[str, Any]) -> dict[str, Any]:
    phases = {k: {**options[k], "steps": _TINY["steps"]} for k in ("pretraining", "training") if options.get(k)}
    return {**options, **phases}


def learn(
    name: str,
    options: Mapping[str, Any],
    split: Mapping[str, int],
    optimize: Mapping[str, Any],
    batches: Sequence[int],
    seconds: float,
) -> list[Row]:
    """One fold, here and now: a row for each goal.

    Args:
        name: the network.
        options: as in :func:`sparsify`.
        split: fields of `Split`.
        optimize: options of `autoinfer.optimize`.
        batches: sizes to time.
        seconds: to spend on timing each pair of programs; 0 times nothing.
    """
    network, training, here = NETWORKS[name], Training(**options["training"]), Split(**split)
    images, classes = (x[:: here.every] for x in network.data())
    train_on, held_out = stratified_folds(classes, here.folds, here.seed)[here.fold]
    seed = here.folds * here.seed + here.fold
    feed = training.batches(network, images[train_on], classes[train_on], seed)
    start = network.start(images, jax.random.key(seed))
    if options.get("pretraining"):
        first = Training(**options["pretraining"])
        earlier = first.batches(network, images[train_on], classes[train_on], _EARLIER + seed)
        start = train(network, start, earlier, first)
    dense = train(network, start, feed, training)
    x, judged = network.inputs(images[held_out]), classes[held_out]
    dense_right = is_right(network.apply, dense, x, judged)
    common = {"task": "sparsify", "network": name, **here._asdict(), **environment(), "options": dict(options)}
    groups = autoinfer.channel_groups(network.apply, start, x[:1])
    rows = []
    for goal in options["goals"]:
        teach = options["teach"]
        learned = autoinfer.learn_masks(
            network.loss,
            start,
            feed,
            autoinfer.Target(**goal["target"]),
            training.optimizer(),
            method=method(options["method"]),
            granularity=options["granularity"],
            steps=training.steps,
            has_aux=True,
            fun=network.apply,
            args=(x[:1],),
            distillation=autoinfer.Distillation(network.outputs, dense, teach) if teach else None,
            key=jax.random.key(seed),
            progress=False,
        )
        small, small_params = autoinfer.shrink(network.apply, learned.params, learned.masks, x[:2])
        right = is_right(small, small_params, x, judged)
        row = {
            **common,
            "goal": goal,
            "dense": _figures(dense_right, dense, groups.macs()),
            "pruned": _figures(right, small_params, autoinfer.channel_groups(small, small_params, x[:1]).macs()),
            "same_as_masked": bool((right == is_right(network.apply, learned.params, x, judged)).all()),
            "left": learned.left,
            "kept": learned.kept,
            "units": _units_left(groups, learned.kept) if options["granularity"] == "channel" else None,
            "nonzero": sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(small_params["params"])),
            "shapes": _shapes(small_params),
        }
        if seconds:
            row["latency"] = {
                str(size): _latency(network, dense, (small, small_params), x[:size], optimize, seconds)
                for size in batches
            }
        rows.append(row)
    return rows


def method(options: Mapping[str, Any]) -> Any:
    """A method of `autoinfer.learn_masks` from its name and fields; ``schedule`` holds the fields of a `Cubic`."""
    fields = {key: value for key, value in options.items() if key != "name"}
    if "schedule" in fields:
        fields["schedule"] = autoinfer.Cubic(**fields["schedule"])
    return getattr(autoinfer, options["name"])(**fields)


def _figures(right: np.ndarray, variables: Any, macs: float) -> Row:
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {
        "accuracy": float(100 * right.mean()),
        "wrong": np.flatnonzero(~right).tolist(),
        "items": len(right),
        "weights": weights,
        "macs": macs,
    }


def _units_left(groups: Groups, kept: Mapping[str, tuple[int, int]]) -> float:
    """The share of channels and neurons that is left; input features are no channels."""
    counted = [kept[group.name] for group in groups if group.kind != "input" and group.name in kept]
    return sum(count for count, _ in counted) / sum(size for _, size in counted)


def _shapes(variables: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _latency(
    network: Network, dense: Any, small: tuple[Any, Any], x: np.ndarray, optimize: Mapping[str, Any], seconds: float
) -> Row:
    """The dense and the small program, both optimized with their weights known."""
    before = autoinfer.optimize(network.apply, **optimize).freeze(dense)
    after = autoinfer.optimize(small[0], **optimize).freeze(small[1])
    given = jax.numpy.asarray(x)
    return speed_beside_itself(beside_itself(lambda: before(given), lambda: after(given), budget_s=seconds))


def summary(rows: Sequence[Row], goal: int) -> Row:
    """All folds of a network and one of its goals, the first being 0."""
    first = rows[0]
    goals = first["options"]["goals"]
    mine = rows[goal :: len(goals)]

    def right(row: Row, which: str) -> np.ndarray:
        found = np.ones(row[which]["items"], bool)
        found[row[which]["wrong"]] = False
        return found

    loss = paired_loss(*([right(row, which) for row in mine] for which in ("dense", "pruned")))
    allowed = goals[goal]["loss"]
    row: Row = {
        "task": "sparsify",
        "network": first["network"],
        "goal": goals[goal],
        "summary": True,
        "folds": len(mine),
        "items": sum(row["dense"]["items"] for row in mine),
        "points": loss.points,
        "bound": loss.bound,
        "folds_bound": loss.folds_bound,
        "spread": loss.spread,
        "reached": loss.points <= allowed and loss.bound <= allowed + _MARGIN,
    }
    for which in ("dense", "pruned"):
        values = np.array([r[which]["accuracy"] for r in mine])
        row[which] = {"mean": float(values.mean()), "spread": float(values.std(ddof=1))}
    for what in ("weights", "macs"):
        row[what] = float(np.mean([r["pruned"][what] / r["dense"][what] for r in mine]))
    row["nonzero"] = float(np.mean([r["nonzero"] / r["dense"]["weights"] for r in mine]))
    row["left"] = {k: float(np.mean([r["left"][k] for r in mine])) for k in first["left"]}
    if first["units"] is not None:
        row["units"] = float(np.mean([r["units"] for r in mine]))
    timings = [r["latency"] for r in mine if "latency" in r]
    if timings:
        row["latency"] = timings[0]
    return row


def table(rows: Sequence[Row]) -> Sheet:
    """Summaries as people read them."""
    columns = (
        "network",
        "target",
        "dense, %",
        "pruned, %",
        "lost",
        "bound",
        "weights",
        "MACs",
        "units",
        "speed",
        "goal",
    )
    note = (
        f"lost: points on the same {rows[0]['items']} items, and the one-sided 95 % bound; weights: not zero; "
        f"± is the spread of {rows[0]['folds']} folds"
    )
    return Sheet("Pruned while trained, and shrunk", columns, tuple(map(_cells, rows)), (2, 3, 4, 5, 6, 7, 8, 9), note)


def _cells(row: Row) -> tuple[Cell, ...]:
    ((measure, value),) = row["goal"]["target"].items()
    timing = next(iter(row.get("latency", {}).values()), None)
    return (
        Cell(row["network"]),
        Cell(f"{value:.1%} of {measure}"),
        *(Cell(f"{row[which]['mean']:.2f} ± {row[which]['spread']:.2f}") for which in ("dense", "pruned")),
        Cell(f"{row['points']:.2f}"),
        Cell(f"{row['bound']:.2f}"),
        Cell(f"{row['nonzero']:.1%}"),
        Cell(f"{row['macs']:.1%}"),
        Cell(f"{row['units']:.1%}" if "units" in row else numbers.UNKNOWN),
        speed_cell(timing) if timing else Cell(numbers.UNKNOWN),
        Cell("reached", "good") if row["reached"] else Cell("MISSED", "bad"),
    )
