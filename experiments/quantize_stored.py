"""LeNet-300-100 pruned while it is trained, quantized, and stored: the sizes of files beside what is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from jaxinfer import autoinfer
from jaxinfer.experiments.digit_networks import NETWORKS, Training, train
from jaxinfer.experiments.folds import stratified_folds
from jaxinfer.experiments.quantize_folds import summaries
from jaxinfer.experiments.quantize_ways import facts, figure, made, quantized
from jaxinfer.experiments.task import Row

_EVERY = {False: 1, True: 25}


def one_fold(name: str, options: Mapping[str, Any], fold: int, folds: int, kept: str | None, tiny: bool) -> list[Row]:
    """One fold, here and now: a row for each way.

    Dense and pruned networks start from the same weights and see the same batches. Both are stored in the same way,
    for any batch size, and judged as they come from their files.

    Args:
        name: of the network, in `digit_networks.NETWORKS`.
        options: ``pretraining`` (fields of `Training`: what both networks learn before anything is pruned) and
            ``training``, ``method`` of `autoinfer.learn_masks`, ``fraction`` of weights
            that is left, ``teach`` (the weight of distillation from the dense network), and the ``ways``, each with the
            ``goal``, how many points may be lost, and ``smaller``, how many times as small the file is to be.
        fold, folds: which of how many.
        kept: plays no part.
        tiny: a few items and steps.
    """
    network = NETWORKS[name]
    earlier, training = (
        Training(**{**options[phase], "steps": 12} if tiny else options[phase]) for phase in ("pretraining", "training")
    )
    images, classes = (x[:: _EVERY[tiny]] for x in network.data())
    train_on, held_out = stratified_folds(classes, folds, 0)[fold]
    feed = training.batches(network, images[train_on], classes[train_on], fold)
    first = earlier.batches(network, images[train_on], classes[train_on], 1_000 + fold)
    start = train(network, network.start(images, jax.random.key(fold)), first, earlier)
    dense = train(network, start, feed, training)
    learned = autoinfer.learn_masks(
        network.loss,
        start,
        feed,
        autoinfer.Target(fraction=options["fraction"]),
        training.optimizer(),
        method=made(options["method"]),
        granularity="element",
        steps=training.steps,
        has_aux=True,
        distillation=autoinfer.Distillation(network.outputs, dense, options["teach"]) if options["teach"] else None,
        key=jax.random.key(fold),
        progress=False,
    )
    x, judged = network.inputs(images[held_out]), classes[held_out]
    seen = [(network.inputs(images[train_on][:500]),)]
    before, size = _stored(network.apply, dense, x)
    rows = []
    for way, how in options["ways"].items():
        found = quantized(network.apply, learned.params, how, seen)
        after, small = _stored(*found, x)
        wrong = {k: np.flatnonzero(v.argmax(1) != judged).tolist() for k, v in (("before", before), ("after", after))}
        more = {
            "fold": fold,
            "items": len(x),
            "wrong": wrong,
            "left": learned.left,
            "file": {"before": size, "after": small},
        }
        rows.append({**facts(name, way, how, found), **more})
    return rows


def _stored(fun: Any, params: Any, x: np.ndarray) -> tuple[np.ndarray, int]:
    """What a program gives as it comes from its file, and the bytes of that."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-") as folder:
        path = Path(folder, "program.safetensors")
        # One program, for batches of any size.
        (count,) = export.symbolic_shape("count")
        autoinfer.save((fun, params), path, jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype))
        return np.asarray(autoinfer.load(path)(x)), path.stat().st_size


def stored_summaries(rows: Sequence[Row]) -> list[Row]:
    """All folds: a row for each way, the points lost and how many times as small the largest file is."""
    found = summaries(rows)
    for row in found:
        files = [r["file"] for r in rows if r["way"] == row["way"]]
        times = min(f["before"] / f["after"] for f in files)
        row["figures"].append(figure("file, times as small (least of the folds)", times, row["options"].get("smaller")))
        row["file"] = {k: float(np.mean([f[k] for f in files])) for k in ("before", "after")}
        row["bytes"] = row["file"]
    return found
