"""Pruning as an Optax transformation, for people who own their training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxinfer.sparsity.groups import Groups
from jaxinfer.sparsity.learning.division import divide
from jaxinfer.sparsity.learning.granularity import Granularity
from jaxinfer.sparsity.learning.leaves import Leaves
from jaxinfer.sparsity.learning.schedule import Cubic
from jaxinfer.sparsity.learning.target import Target, as_target
from jaxinfer.sparsity.learning.unit_vector import Units


class PruneState(NamedTuple):
    """The state of :func:`prune_updates`.

    Attributes:
        step: number of updates that were made.
        masks: a tree like the parameters of bool arrays of their shapes, True where an entry is kept; None in place of
            those that are not pruned.
        scores: running averages of Taylor scores, float32[units]; None if magnitudes decide.
    """

    step: jax.Array
    masks: Any
    scores: jax.Array | None


def prune_updates(
    target: Target | float | None,
    *,
    steps: int,
    schedule: Cubic | None = None,
    granularity: Granularity = "element",
    score: Literal["magnitude", "taylor"] = "magnitude",
    scope: Literal["model", "layer"] = "model",
    memory: float = 0.98,
    prune: Callable[[str, Any], bool] | None = None,
    groups: Groups | None = None,
    fun: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning as the last link of an Optax chain.

    Updates are changed so that parameters are exactly zero where a mask is False once they are applied. What is masked
    stays zero, so it never comes back. The masks are in the state: ``optax.tree_utils.tree_get(state, "masks")``.

    Args:
        target: how much is to be left at the end of the schedule; a number means the fraction of entries; None with
            :class:`NM`.
        steps: number of updates that the schedule's shares are shares of.
        schedule: how what is left falls; :class:`Cubic` by default.
        granularity: as for :func:`learn_masks`.
        score: what units are ranked by. ``"taylor"`` needs the gradients: ``update(updates, state, params,
            gradients=gradients)``.
        scope: rank the units of the ``"model"`` as a whole, or each ``"layer"`` by itself.
        memory: of Taylor scores, the weight of what was before at each step.
        prune: as for :func:`learn_masks`; so are ``groups``, ``fun`` and ``args``.

    Returns:
        A transformation; its ``update`` needs ``params``.

    Raises:
        TargetError: the target cannot be met (by ``init``).
        ValueError: unknown settings; ``update`` without parameters, or without gradients where they are needed.

    Example:
        >>> optimizer = optax.chain(optax.adam(1e-3), prune_updates(0.1, steps=1000))
    """
    schedule = Cubic() if schedule is None else schedule
    wanted = as_target(target) if target is not None else None
    if score not in ("magnitude", "taylor") or scope not in ("model", "layer"):
        raise ValueError(f"score is 'magnitude' or 'taylor' and scope 'model' or 'layer', not {score!r} and {scope!r}")
    known: dict[Any, Units] = {}

    def units_of(params: Any) -> Units:
        leaves = Leaves.of(params)
        key = (leaves.treedef, leaves.avals)
        if key not in known:
            known[key] = divide(params, granularity, wanted, prune=prune, groups=groups, fun=fun, args=args)
        return known[key]

    def init(params: Any) -> PruneState:
        units = units_of(params)
        scores = jnp.zeros(units.size, jnp.float32) if score == "taylor" else None
        return PruneState(jnp.zeros((), jnp.int32), _masks(units, jnp.ones(units.size, bool)), scores)

    def update(
        updates: Any, state: PruneState, params: Any = None, *, gradients: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError("prune_updates needs the parameters: update(updates, state, params)")
        units, step, scores = units_of(params), state.step + 1, state.scores
        if scores is not None:
            if gradients is None:
                raise ValueError("Taylor scores need gradients: update(updates, state, params, gradients=gradients)")
            scores = memory * scores + (1 - memory) * _taylor(units, params, gradients)

        def select(_: Any) -> Any:
            moved, _rest = units.leaves.split(optax.apply_updates(params, updates))
            ranked = units.strengths(moved) if scores is None else scores
            left = schedule.left(step, steps, wanted.value if wanted else 0.0)
            return _masks(units, units.select(ranked, wanted.measure if wanted else "fraction", left, scope == "layer"))

        masks = jax.lax.cond(schedule.is_update(step, steps), select, lambda _: state.masks, None)
        return _to_zero(units.leaves, updates, params, masks), PruneState(step, masks, scores)

    return optax.GradientTransformationExtraArgs(init, update)


def _masks(units: Units, keep: jax.Array) -> Any:
    """bool[units] → a tree of masks; the same as :meth:`Units.masks` under ``jit``."""
    factors = units.spread(keep.astype(jnp.float32))
    flags = [
        jnp.broadcast_to(factors[i] > 0, aval.shape) if i in factors else None
        for i, aval in enumerate(units.leaves.avals)
    ]
    return units.leaves.treedef.unflatten(flags)


def _taylor(units: Units, params: Any, gradients: Any) -> jax.Array:
    """What each unit's removal would change of the loss by first order, squared."""
    weights, slopes = (units.entries(units.leaves.split(tree)[0]) for tree in (params, gradients))
    changes = {i: w.astype(jnp.float32) * slopes[i].astype(jnp.float32) for i, w in weights.items()}
    return jnp.square(units.pool(changes))


def _to_zero(leaves: Leaves, updates: Any, params: Any, masks: Any) -> Any:
    """Updates after which parameters are zero where masks are False: −p there, which adds up exactly."""
    flat, old, flags = (leaves.treedef.flatten_up_to(tree) for tree in (updates, params, masks))
    return leaves.treedef.unflatten([u if m is None else jnp.where(m, u, -p) for u, p, m in zip(flat, old, flags)])
