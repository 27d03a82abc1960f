"""What networks for digits and the G2P model lose in fewer bits, item by item, and what training recovers.

Every item is judged once, by a program that was calibrated, and trained if it is, on others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer.experiments import digit_networks
from jaxinfer.experiments.digit_networks import NETWORKS
from jaxinfer.experiments.folds import paired_loss, stratified_folds
from jaxinfer.experiments.one_shot import is_spelled
from jaxinfer.experiments.quantize_ways import Items, Lesson, facts, figure, quantized
from jaxinfer.experiments.task import Row
from jaxinfer.models import g2p
from jaxinfer.models.pronunciations import pronunciations
from jaxinfer.models.zoo import load

# With one-sided 95 % confidence a network may lose this many points more than its goal says.
MARGIN = 0.3
_EVERY = {False: 1, True: 25}
# Words longer than this have no room for their end mark.
_LETTERS = 19


@dataclass(frozen=True)
class Fold:
    """What one fold is about.

    Attributes:
        apply: (parameters, *items) → results.
        params: trained.
        is_right: (what `apply` returns) → bool[items]: which of the held-out items are done rightly.
        held_out: the items to judge by.
        seen: batches of others, to calibrate with.
        lesson: what it learns by.
    """

    apply: Callable[..., Any]
    params: Any
    is_right: Callable[[Any], np.ndarray]
    held_out: Items
    seen: list[Items]
    lesson: Lesson


def digits(name: str, options: Mapping[str, Any], fold: int, folds: int, kept: str | None, tiny: bool) -> Fold:
    """A network of `digit_networks.NETWORKS`, trained on what is not held out.

    Args:
        name: of the network.
        options: ``training`` (fields of `digit_networks.Training`), and of images to calibrate with: ``calibration``
            in all, ``batch`` at a time.
        fold, folds: which of how many.
        kept: a folder for weights that were trained, where they are looked for as well; None for none.
        tiny: a few items and steps.
    """
    network, fields = NETWORKS[name], dict(options["training"])
    training = digit_networks.Training(**{**fields, "steps": 6} if tiny else fields)
    images, classes = (x[:: _EVERY[tiny]] for x in network.data())
    train_on, held_out = stratified_folds(classes, folds, 0)[fold]
    feed = training.batches(network, images[train_on], classes[train_on], fold)

    def trained() -> Any:
        return digit_networks.train(network, network.start(images, jax.random.key(fold)), feed, training)

    path = None if kept is None else Path(kept, f"{name}-{_key(asdict(training), fold, folds, len(images))}.npz")
    params = remembered(path, trained, network.start(images, jax.random.key(fold)))
    others = np.random.default_rng(fold).permutation(train_on)[
        : 2 * options["batch"] if tiny else options["calibration"]
    ]
    x = network.inputs(images[others])

    def batch(step: int, size: int) -> Items:
        again = digit_networks.Training(training.steps, size, reach=training.reach)
        return again.batches(network, images[train_on], classes[train_on], 1_000 + fold)(step)

    def loss(variables: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        return network.loss(variables, (x, labels))[0]  # type: ignore[arg-type]

    return Fold(
        network.apply,
        params,
        lambda logits: np.asarray(logits).argmax(1) == classes[held_out],
        (network.inputs(images[held_out]),),
        [(x[i : i + options["batch"]],) for i in range(0, len(x), options["batch"])],
        Lesson(loss, batch),
    )


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps([*what, jax.__version__]).encode()).hexdigest()[:16]


def remembered(path: Path | None, make: Callable[[], Any], like: Any) -> Any:
    """A tree of arrays from a file, or made now and written there.

    Args:
        path: the file; None remembers nothing.
        make: makes the tree.
        like: a tree of the same structure.
    """
    if path is None:
        return make()
    leaves, tree = jax.tree.flatten(like)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, *map(np.asarray, jax.tree.leaves(make())))
        partial.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return jax.tree.unflatten(tree, [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))])


def words(name: str, options: Mapping[str, Any], fold: int, folds: int, kept: str | None, tiny: bool) -> Fold:
    """The pretrained G2P model; it may have learned the words it is judged by, in float32 as in fewer bits.

    Args:
        name: of the model.
        options: ``words`` of the dictionary to judge by in all folds; of other ones, ``calibration`` to calibrate with,
            ``batch`` at a time.
        fold, folds: which of how many.
        kept: plays no part.
        tiny: the small variant, and a few words.
    """
    model = load(name, tiny=tiny)
    known = pronunciations()
    usable = sorted(
        word for word, sounds in known.items() if len(word) <= _LETTERS and len(sounds) < model.module.steps
    )
    count = 5 * folds if tiny else options["words"]
    order = np.random.default_rng(0).permutation(len(usable))
    judged, others = order[:count], np.random.default_rng(1 + fold).permutation(order[count:])
    held_out = (g2p.encode([usable[i] for i in judged[fold::folds]]),)
    calibration, size = (4, 2) if tiny else (options["calibration"], options["batch"])
    seen = g2p.encode([usable[i] for i in others[:calibration]])
    to_learn = others[calibration:]

    def batch(step: int, size: int) -> Items:
        chosen = np.random.default_rng((fold, step)).choice(to_learn, size, replace=False)
        sounds = np.full((size, model.module.steps), g2p.END, np.int32)
        for row, i in zip(sounds, chosen):
            spelled = known[usable[i]]
            row[: len(spelled)] = [g2p.PHONEMES.index(sound) for sound in spelled]
        return g2p.encode([usable[i] for i in chosen]), sounds

    def loss(variables: Any, letters: jax.Array, sounds: jax.Array) -> jax.Array:
        return spelling_loss(*model.apply(variables, letters), sounds)

    return Fold(
        model.apply,
        model.variables,
        lambda results: is_spelled(held_out, results),
        held_out,
        [(seen[i : i + size],) for i in range(0, len(seen), size)],
        Lesson(loss, batch),
    )


def spelling_loss(chosen: jax.Array, logits: jax.Array, sounds: jax.Array) -> jax.Array:
    """Mean cross-entropy of the sounds of words, up to the first one that was chosen wrongly and the end.

    Later logits follow what was chosen, so that the dictionary says nothing about them.

    Args:
        chosen: int[batch, steps].
        logits: [batch, steps, phonemes].
        sounds: int[batch, steps], END from the end on.
    """

    def before(x: jax.Array) -> jax.Array:
        return jnp.cumsum(x, 1) - x

    counted = (before((chosen != sounds).astype(jnp.int32)) + before((sounds == g2p.END).astype(jnp.int32))) == 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, sounds)
    return jnp.sum(losses * counted) / jnp.sum(counted)


def one_fold(name: str, options: Mapping[str, Any], fold: int, folds: int, kept: str | None, tiny: bool) -> list[Row]:
    """One fold of a network, here and now: a row for each way."""
    here = (digits if name in NETWORKS else words)(name, options, fold, folds, kept, tiny)
    before = here.is_right(jax.device_get(jax.jit(here.apply)(here.params, *here.held_out)))
    rows = []
    for way, how in options["ways"].items():
        if tiny and how.get("training"):
            how = {**how, "training": {**how["training"], "steps": 3, "batch": 4}}
        found = quantized(here.apply, here.params, how, here.seen, here.lesson)
        after = here.is_right(jax.device_get(found(*here.held_out)))
        row = facts(name, way, how, found)
        rows.append(
            {**row, "fold": fold, "items": len(before), "wrong": {"before": _wrong(before), "after": _wrong(after)}}
        )
    return rows


def _wrong(right: np.ndarray) -> list[int]:
    return np.flatnonzero(~right).tolist()


def summaries(rows: Sequence[Row]) -> list[Row]:
    """All folds of a network: a row for each way, the points of accuracy it loses, and what was asked for.

    A way with ``recovers`` says which other one's loss it is to make good, half of it at least.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if row["way"] in found:
            continue
        mine = [r for r in rows if r["way"] == row["way"]]
        before, after = ([_right(r, which) for r in mine] for which in ("before", "after"))
        loss = paired_loss(before, after)
        goal = row["options"].get("goal")
        lost = figure("points lost", loss.points, goal, most=True, bound=loss.bound, spread=loss.spread)
        if goal is not None:
            lost["holds"] = lost["holds"] and loss.bound <= goal + MARGIN
        figures = [
            lost,
            figure("accuracy in float32, %", 100 * np.concatenate(before).mean()),
            figure("accuracy, %", 100 * np.concatenate(after).mean()),
        ]
        other = row["options"].get("recovers")
        # Where nothing was lost, nothing can be recovered.
        if other is not None and (whole := found[other]["figures"][0]["value"]) > 0:
            figures.append(figure(f"of what {other} loses recovered, %", 100 * (1 - loss.points / whole), 50))
        common = {k: v for k, v in row.items() if k not in ("fold", "wrong", "items")}
        found[row["way"]] = {**common, "summary": True, "folds": len(mine), "figures": figures}
        found[row["way"]]["items"] = sum(r["items"] for r in mine)
    return list(found.values())


def _right(row: Row, which: str) -> np.ndarray:
    found = np.ones(row["items"], bool)
    found[row["wrong"][which]] = False
    return found
