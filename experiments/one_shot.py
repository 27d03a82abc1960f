"""Pretrained models pruned at once, without training: Wanda beside magnitude, judged on what neither has seen.

MiniLM reads sentences of Python's language reference; the G2P model spells words of the CMU Pronouncing Dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfer import autoinfer
from jaxinfer.experiments.folds import upper_bound
from jaxinfer.experiments.process import fresh
from jaxinfer.experiments.task import Request, Row, append, environment, verdict_cell
from jaxinfer.models import g2p, minilm
from jaxinfer.models.pronunciations import pronunciations
from jaxinfer.models.prose import sentences
from jaxinfer.models.zoo import load
from jaxinfer.report import numbers
from jaxinfer.report.sheet import Cell, Sheet

Items = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Subject:
    """A pretrained model, and data it was not pruned on.

    Attributes:
        items: (count, seed) → inputs, the first axis of each being the items.
        outputs: what is compared, from what the model returns: [items, ...].
        is_pruned: by a parameter's name, whether it is pruned.
        inputs_first: by a parameter's name, whether its first axis is the one that is summed over, and not the last but
            one: projections into heads, which have two axes of outputs.
        is_right: (inputs, what the model returns) → which items are done rightly, bool[items]; None where nothing says.
    """

    items: Callable[[int, int], Items]
    outputs: Callable[[Any], jax.Array]
    is_pruned: Callable[[str], bool]
    inputs_first: Callable[[str], bool]
    is_right: Callable[[Items, Any], np.ndarray] | None = None


def _sentences(count: int, seed: int) -> Items:
    return minilm.tokenize(sentences(seed)[:count], 64)


def _words(count: int, seed: int) -> Items:
    words = sorted(word for word in pronunciations() if len(word) < 20)
    return (g2p.encode([words[index] for index in np.random.default_rng(seed).permutation(len(words))[:count]]),)


def is_spelled(items: Items, results: Any) -> np.ndarray:
    """Which words are spelled as the dictionary has them."""
    known = pronunciations()
    words = ["".join(g2p.GRAPHEMES[letter] for letter in row if letter > g2p.WORD_END) for row in items[0]]
    return np.array([tuple(sounds) == known[word] for word, sounds in zip(words, g2p.decode(np.asarray(results[0])))])


def _is_kernel(name: str) -> bool:
    return name.endswith("kernel")


SUBJECTS = {
    "minilm": Subject(
        _sentences,
        lambda vectors: vectors,
        _is_kernel,
        lambda name: name.endswith(("query/kernel", "key/kernel", "value/kernel")),
    ),
    # The first phoneme's logits depend on everything but the decoder's later steps, which follow what was chosen.
    "g2p": Subject(
        _words, lambda results: jax.nn.softmax(results[1][:, 0]), _is_kernel, lambda name: False, is_spelled
    ),
}


def one_shot(
    request: Request, networks: Sequence[str], granularities: Sequence[str], calibration: int, held_out: int, batch: int
) -> list[Row]:
    """Prunes every model to half of its weights in every way, prints a table and writes the rows.

    Args:
        request: where to print and write; its models play no part.
        networks: of `SUBJECTS`.
        granularities: "element" and "2:4".
        calibration: batches that Wanda sees.
        held_out: items that outputs are compared on.
        batch: items in a batch.

    Raises:
        MeasurementError: a comparison failed in its process.
    """
    rows = []
    for name in networks:
        for granularity in granularities:
            options = {"calibration": calibration, "held_out": held_out, "batch": batch, "tiny": request.tiny}
            rows.append(fresh(measure, name=name, granularity=granularity, **options))
            append(request.output, rows[-1:])
    columns = ("model", "half of the weights", "magnitude", "Wanda", "difference", "Wanda is better", "right, %")
    note = (
        "mean distance of the outputs of held-out items from the dense model's; of the difference, the 95 % bound; "
        "right: dense, magnitude, Wanda"
    )
    request.console.print(Sheet("Pruned at once", columns, tuple(map(_cells, rows)), (2, 3, 4, 6), note))
    return rows


def measure(name: str, granularity: str, calibration: int, held_out: int, batch: int, tiny: bool) -> Row:
    """One model and granularity, here and now."""
    subject = SUBJECTS[name]
    model = load(name)
    calibration, held_out = (1, 4) if tiny else (calibration, held_out)
    items = subject.items(held_out + calibration * batch, 0)
    unseen = tuple(x[:held_out] for x in items)
    seen = [tuple(x[start : start + batch] for x in items) for start in range(held_out, len(items[0]), batch)]

    run = jax.jit(model.apply)

    def outputs(results: Any) -> np.ndarray:
        return np.asarray(subject.outputs(results), np.float64).reshape(held_out, -1)

    results = {"dense": run(model.variables, *unseen)}
    distance, left = {}, {}
    for method in ("magnitude", "wanda"):
        variables = pruned(model, subject, method, granularity, seen)
        results[method] = run(variables, *unseen)
        distance[method] = np.linalg.norm(outputs(results[method]) - outputs(results["dense"]), axis=1)
        left[method] = _share_left(subject, variables)
    bound = upper_bound(distance["wanda"] - distance["magnitude"])
    return {
        "task": "one_shot",
        "model": name,
        "granularity": granularity,
        **environment(),
        "calibration_items": sum(len(x[0]) for x in seen),
        "held_out_items": held_out,
        "left": left,
        "distance": {k: float(x.mean()) for k, x in distance.items()},
        "spread": {k: float(x.std(ddof=1)) for k, x in distance.items()},
        "difference_bound": bound,
        "holds": bound < 0,
        "right": None
        if subject.is_right is None
        else {k: float(100 * subject.is_right(unseen, x).mean()) for k, x in results.items()},
    }


def pruned(model: Any, subject: Subject, method: str, granularity: str, batches: Sequence[Items]) -> Any:
    """The variables with half of the weights zero, those of each layer for magnitude, of each output for Wanda.

    Args:
        model: of the zoo.
        subject: which of its parameters are pruned.
        method: "magnitude" or "wanda".
        granularity: "element" or "2:4".
        batches: what Wanda sees.

    Raises:
        ValueError: there is no such granularity.
    """
    if granularity not in ("element", "2:4"):
        raise ValueError(f"the granularity is 'element' or '2:4', not {granularity!r}")

    def loss(variables: Any, batch: Items) -> jax.Array:
        return jnp.mean(subject.outputs(model.apply(variables, *batch)))

    def learn(variables: Any, grain: Any, is_pruned: Callable[[str], bool]) -> Any:
        ranked: Any = autoinfer.Wanda(len(batches)) if method == "wanda" else autoinfer.Magnitude(scope="layer")
        return autoinfer.learn_masks(
            loss,
            variables,
            batches,
            0.5 if grain == "element" else None,
            optax.sgd(0.0),
            method=ranked,
            granularity=grain,
            prune=lambda name, _: is_pruned(name),
            steps=0,
            progress=False,
        ).params

    if granularity == "element":
        return learn(model.variables, "element", subject.is_pruned)
    if method == "wanda":
        # Its runs of four follow the sum of each output, wherever that lies in the array.
        return learn(model.variables, autoinfer.NM(2, 4), subject.is_pruned)
    names = [name for name in _names(model.variables) if subject.is_pruned(name)]
    inputs_first = [name for name in names if subject.inputs_first(name)]
    inputs_last = [name for name in names if not subject.inputs_first(name)]
    variables = learn(model.variables, autoinfer.NM(2, 4, axis=-2), inputs_last.__contains__)
    if inputs_first:
        variables = learn(variables, autoinfer.NM(2, 4, axis=-3), inputs_first.__contains__)
    return variables


def _names(variables: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _share_left(subject: Subject, variables: Any) -> float:
    leaves = [x for name, x in zip(_names(variables), jax.tree.leaves(variables)) if subject.is_pruned(name)]
    return sum(int(jnp.count_nonzero(x)) for x in leaves) / sum(x.size for x in leaves)


def _cells(row: Row) -> tuple[Cell, ...]:
    return (
        Cell(row["model"]),
        Cell(row["granularity"]),
        *(Cell(f"{row['distance'][k]:.4f} ± {row['spread'][k]:.4f}") for k in ("magnitude", "wanda")),
        Cell(f"{row['difference_bound']:.4f}"),
        verdict_cell(row["holds"]),
        Cell(", ".join(f"{x:.1f}" for x in row["right"].values()) if row["right"] else numbers.UNKNOWN),
    )
