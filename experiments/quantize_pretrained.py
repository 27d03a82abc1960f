"""What pretrained models lose in fewer bits, judged by their own answers in float32.

EfficientNet-Lite0 sees crops of photographs, MiniLM reads sentences of Python's language reference; both are calibrated
on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from jaxinfer import autoinfer
from jaxinfer.experiments.quantize_ways import Items, facts, figure, quantized
from jaxinfer.experiments.task import Row
from jaxinfer.models import images, minilm
from jaxinfer.models.prose import sentences
from jaxinfer.models.zoo import Model, load

_TOKENS = 64
_TINY_ITEMS = 4
# Of the numbers that items to calibrate with are drawn by.
_OTHER = 1_000


def crops(name: str, options: Mapping[str, Any], tiny: bool) -> list[Row]:
    """How often EfficientNet-Lite0 in fewer bits names the class that it names in float32: a row for each way.

    Args:
        name: of the network.
        options: ``held_out`` crops of each photograph and ``calibration`` other ones, the ``batch`` and the ``ways``,
            each as :func:`quantized` takes it, with the ``goal`` in per cent.
        tiny: the small variant, and a few crops.
    """
    model = load(name, tiny=tiny)
    size, batch = model.inputs[0].shape[1], options["batch"]
    held_out, calibration = (_TINY_ITEMS,) * 2 if tiny else (options["held_out"], options["calibration"])
    shown = {p: images.crops(p, held_out, 0, size) for p in images.PHOTOGRAPHS}
    # Batches hold as many crops of one photograph as of the other.
    others = np.stack([images.crops(p, calibration, _OTHER, size) for p in images.PHOTOGRAPHS], 1)
    others = others.reshape(-1, *others.shape[2:])
    seen = [(others[start : start + batch],) for start in range(0, len(others), batch)]
    plain = jax.jit(model.apply)

    def answers(run: Callable[[Any], Any]) -> dict[str, np.ndarray]:
        return {p: np.concatenate([run(x[i : i + batch]) for i in range(0, len(x), batch)]) for p, x in shown.items()}

    before = answers(lambda x: plain(model.variables, x))
    rows = []
    for way, how in options["ways"].items():
        found = quantized(model.apply, model.variables, how, seen)
        after = answers(found)
        kept = {p: before[p].argmax(1) == after[p].argmax(1) for p in shown}
        every = np.concatenate(list(kept.values()))
        error = np.sqrt(sum(np.sum((after[p] - before[p]) ** 2) for p in shown))
        figures = [
            figure("top-1 kept, %", 100 * every.mean(), how.get("goal")),
            *(figure(f"top-1 kept, {p}, %", 100 * k.mean()) for p, k in kept.items()),
            figure("error of the logits, %", 100 * error / np.sqrt(sum(np.sum(x**2) for x in before.values()))),
        ]
        rows.append({**facts(name, way, how, found), "items": len(every), "figures": figures})
    return rows


def embeddings(name: str, options: Mapping[str, Any], tiny: bool) -> list[Row]:
    """What becomes of MiniLM's embeddings, and of the order of the similarities of all pairs: a row for each way.

    Args:
        name: of the network.
        options: ``held_out`` sentences and ``calibration`` other ones, the ``batch`` and the ``ways``, each with the
            ``goal`` for the mean cosine and for Spearman's coefficient.
        tiny: the small variant, and a few random sentences.
    """
    model = load(name, tiny=tiny)
    held_out, seen = _sentences(model, options, tiny)
    batch = options["batch"]
    plain = jax.jit(model.apply)

    def vectors(run: Callable[..., Any]) -> np.ndarray:
        parts = [run(*(x[i : i + batch] for x in held_out)) for i in range(0, len(held_out[0]), batch)]
        return np.concatenate([np.asarray(part, np.float64) for part in parts])

    before = vectors(lambda *x: plain(model.variables, *x))
    rows = []
    for way, how in options["ways"].items():
        found = quantized(model.apply, model.variables, how, seen)
        cosine, order = resemblance(before, vectors(found))
        figures = [
            figure("mean cosine", cosine.mean(), how.get("goal")),
            figure("least cosine", cosine.min()),
            figure("Spearman of similarities", order, how.get("goal")),
        ]
        rows.append({**facts(name, way, how, found), "items": len(cosine), "figures": figures})
    return rows


def resemblance(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, float]:
    """How alike two sets of vectors [items, features] are.

    Returns:
        The cosine of each item's vectors, and Spearman's coefficient of the cosines of all pairs of different items.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (before, after))
    pairs = np.triu_indices(len(a), 1)
    return np.sum(a * b, 1), float(spearmanr((a @ a.T)[pairs], (b @ b.T)[pairs]).statistic)


def products(name: str, options: Mapping[str, Any], tiny: bool) -> list[Row]:
    """What each of MiniLM's products errs by on sentences that were not seen: Σ‖XW − X̂Ŵ‖², a row for each way.

    Args:
        name: of the network.
        options: ``held_out`` sentences and ``calibration`` other ones, the ``batch`` and the ``ways``; one with
            ``beside`` is compared with that way, whose error is to be ``goal`` times as large at least.
        tiny: the small variant, and a few random sentences.
    """
    model = load(name, tiny=tiny)
    held_out, seen = _sentences(model, options, tiny)
    batch = options["batch"]
    unseen = [tuple(x[i : i + batch] for x in held_out) for i in range(0, len(held_out[0]), batch)]
    errors: dict[str, np.ndarray] = {}
    rows = []
    for way, how in options["ways"].items():
        found = quantized(model.apply, model.variables, how, seen)
        layers = autoinfer.product_errors(*found, model.variables, unseen)
        errors[way] = np.array([layer.error for layer in layers])
        size = np.array([layer.size for layer in layers])
        figures = [figure("error of the products, %", 100 * np.sqrt((errors[way] / size).mean()))]
        if "beside" in how:
            ratios = errors[how["beside"]] / errors[way]
            what = f"squared error of {how['beside']} over it"
            figures += [
                figure(f"{what}, all products", errors[how["beside"]].sum() / errors[way].sum(), how["goal"]),
                figure(f"{what}, mean", np.exp(np.log(ratios).mean()), how["goal"]),
                figure(f"{what}, least", ratios.min()),
                figure("products where it is better, %", 100 * (ratios > 1).mean()),
            ]
        by_name = {layer.name: {"error": layer.error, "size": layer.size} for layer in layers}
        more = {"items": len(held_out[0]), "products": by_name, "figures": figures}
        rows.append({**facts(name, way, how, found), "network": f"{name}, products", **more})
    return rows


def _sentences(model: Model, options: Mapping[str, Any], tiny: bool) -> tuple[Items, list[Items]]:
    """Sentences to judge by, and batches of others to calibrate with."""
    held_out, calibration, batch = (options[k] for k in ("held_out", "calibration", "batch"))
    if tiny:
        held_out = calibration = _TINY_ITEMS
        items: Items = tuple(map(np.asarray, model.make_inputs(held_out + calibration)))
    else:
        items = minilm.tokenize(sentences()[: held_out + calibration], _TOKENS)
    seen = [tuple(x[i : i + batch] for x in items) for i in range(held_out, held_out + calibration, batch)]
    return tuple(x[:held_out] for x in items), seen
