"""Folds over all items, and what a change costs, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Fold(NamedTuple):
    """Indices of the items to learn from, and of those to judge by."""

    train: np.ndarray
    held_out: np.ndarray


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> list[Fold]:
    """Splits items so that each is held out once, and every fold holds out the same share of each class.

    Args:
        labels: the class of each item.
        folds: how many.
        seed: of the order within each class.

    Raises:
        ValueError: a class has fewer items than there are folds.
    """
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), int)
    for label in np.unique(labels):
        items = np.flatnonzero(labels == label)
        if len(items) < folds:
            raise ValueError(f"class {label} has {len(items)} items, fewer than {folds} folds")
        owner[rng.permutation(items)] = np.arange(len(items)) % folds
    return [Fold(np.flatnonzero(owner != fold), np.flatnonzero(owner == fold)) for fold in range(folds)]


@dataclass(frozen=True)
class Loss:
    """How many points of accuracy a model loses against another, judged on the same items.

    Attributes:
        points: the mean loss, in per cent of the items; negative where it is better.
        bound: the loss is no greater than this, with 95 % confidence (one-sided).
        folds_bound: the same, from the losses of the folds alone, which differ by the training too.
        spread: standard deviation of the folds' losses, in points.
    """

    points: float
    bound: float
    folds_bound: float
    spread: float


def paired_loss(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Loss:
    """The loss of accuracy from `before` to `after`.

    With d the difference of both on each of n items (1 where only `before` was right, -1 where only `after` was),
    the bound is mean(d) + t(0.95, n - 1) · std(d) / √n. For the folds, d are the k mean losses and n is k.

    Args:
        before, after: for each fold, which of its items were classified rightly: bool[items].

    Raises:
        ValueError: there are fewer than two folds, or the two do not go together.
    """
    if len(before) < 2:
        raise ValueError(f"a spread needs at least two folds, and there are {len(before)}")
    of_items = [b.astype(float) - a.astype(float) for b, a in zip(before, after, strict=True)]
    of_folds = np.array([100 * d.mean() for d in of_items])
    every = 100 * np.concatenate(of_items)
    return Loss(float(every.mean()), upper_bound(every), upper_bound(of_folds), float(of_folds.std(ddof=1)))


def upper_bound(values: np.ndarray) -> float:
    """One-sided 95 % bound of the mean, by Student's distribution."""
    return float(values.mean() + student.ppf(0.95, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
