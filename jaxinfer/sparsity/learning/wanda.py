"""One-shot pruning by weights and activations, without training: score(w) = |w|·‖x‖.

‖x‖ is the norm, over all calibration data, of the input that the weight is multiplied with. Weights compete with those
of the same output only.

Reference: Sun, Liu, Bair and Kolter, "A simple and effective pruning approach for large language models", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sparsity.learning.activations import Fed, inputs_of_products
from jaxinfer.sparsity.learning.batches import Batches, Feed
from jaxinfer.sparsity.learning.granularity import NM, Grain
from jaxinfer.sparsity.learning.method import Method, Plan, State
from jaxinfer.sparsity.learning.unit_vector import LeafUnits


@dataclass(frozen=True)
class Wanda(Method):
    """Pruning by weights and activations before the first training step, if there are any.

    Entries and N:M only; the entries that N:M counts are those that follow one another in an output's sum, wherever
    they lie in the array. The products that read a parameter are found on the graph of the loss. Of a parameter that no
    product reads as it is, everything is kept.

    Attributes:
        calibration: the number of batches, from the first on, that norms are taken over.
        fed: what each parameter's products read, by the position of its leaf; found before training, not given.

    Raises:
        ValueError: no batch.
    """

    calibration: int = 8
    fed: Mapping[int, Fed] = field(default_factory=dict, repr=False, compare=False)
    default_steps: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        if self.calibration < 1:
            raise ValueError(f"calibration={self.calibration}: it takes one batch at least")

    def prepare(self, loss: Callable[..., Any], params: Any, batches: Batches) -> Method:
        feed = Feed(batches, 0, self.calibration)
        first = feed(0)
        fed = jax.jit(inputs_of_products(loss, params, first))
        total = jax.device_get(fed(params, first))
        for step in range(1, self.calibration):
            new = jax.device_get(fed(params, feed(step)))
            total = {i: x._replace(squares=x.squares + new[i].squares) for i, x in total.items()}
        return replace(self, fed=total)

    @property
    def readable(self) -> frozenset[int]:
        return frozenset(self.fed)

    def settled_at(self, steps: int) -> int:
        return 0

    def start(self, plan: Plan, trained: Any, key: jax.Array) -> State:
        if not isinstance(plan.units, LeafUnits) or plan.measure != "fraction":
            raise ValueError("Wanda ranks entries of each output: it takes a fraction, and no channels or heads")
        grain = plan.units.grain
        keep = [
            _keep(np.asarray(w, np.float32), self.fed[i], grain, plan.value).reshape(-1)
            for i, w in plan.units.entries(trained).items()
        ]
        return {"keep": jnp.asarray(np.concatenate(keep))}

    def settle(self, plan: Plan, state: State, trained: Any) -> tuple[jax.Array, Any]:
        return state["keep"], trained


def _keep(weights: np.ndarray, fed: Fed, grain: Grain, fraction: float) -> np.ndarray:
    """Which entries of a parameter are kept, of its shape."""
    scores = np.abs(weights).ravel() * np.sqrt(np.asarray(fed.squares, np.float64)).ravel()
    outputs = np.rint(fed.outputs).astype(np.int64).ravel()
    if isinstance(grain, NM):
        places = np.rint(fed.places).astype(np.int64).ravel()
        runs = outputs * (places.max(initial=0) // grain.m + 1) + places // grain.m
        order, starts, sizes = _ranked(scores, runs)
        quota = np.minimum(grain.n, sizes)
    elif grain.units(weights.shape) == weights.shape:
        order, starts, sizes = _ranked(scores, outputs)
        # What rounding takes from one output it gives to the next: the whole comes out right.
        quota = np.floor((starts + sizes) * fraction + 1e-9) - np.floor(starts * fraction + 1e-9)
    else:
        raise ValueError(f"Wanda ranks entries of each output: it takes 'element' or NM(n, m), not {grain}")
    rank = np.arange(scores.size) - np.repeat(starts, sizes)
    keep = np.zeros(scores.size, bool)
    keep[order[rank < np.repeat(quota, sizes)]] = True
    return keep.reshape(weights.shape)


def _ranked(scores: np.ndarray, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices sorted by run and then from the best score on; where each run starts among them, and how long it is."""
    order = np.lexsort((-scores, runs))
    sorted_runs = runs[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_runs[1:] != sorted_runs[:-1]]))
    return order, starts, np.diff(np.append(starts, scores.size))
