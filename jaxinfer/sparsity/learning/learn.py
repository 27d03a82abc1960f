"""Learning masks: the public face."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxinfer.sparsity.groups import Groups
from jaxinfer.sparsity.learning.batches import Batches, number_of_steps
from jaxinfer.sparsity.learning.distillation import Distillation
from jaxinfer.sparsity.learning.division import divide
from jaxinfer.sparsity.learning.granularity import Granularity
from jaxinfer.sparsity.learning.l0 import L0
from jaxinfer.sparsity.learning.method import Method, Plan
from jaxinfer.sparsity.learning.result import Learned
from jaxinfer.sparsity.learning.run import Run
from jaxinfer.sparsity.learning.step import Trainer
from jaxinfer.sparsity.learning.target import Target, as_target

_KINDS = {"channel": ("channel", "input"), "head": ("head",)}


def learn_masks(
    loss: Callable[..., Any],
    params: Any,
    batches: Batches,
    target: Target | float | None,
    optimizer: optax.GradientTransformation,
    *,
    method: Method | None = None,
    granularity: Granularity = "element",
    steps: int | None = None,
    has_aux: bool = False,
    prune: Callable[[str, Any], bool] | None = None,
    groups: Groups | None = None,
    fun: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    distillation: Distillation | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Learned:
    """Trains parameters together with masks that leave as much of them as is asked for.

    Floating-point leaves are trained; other leaves stay as they are. Of a Flax variables dictionary only the collection
    ``"params"`` is trained and pruned; with ``has_aux``, collections that the loss returns, as
    ``mutable=["batch_stats"]`` gives them, take the place of the old ones at each step.

    Args:
        loss: ``loss(params, batch)``, a scalar; with ``has_aux`` a pair of it and anything. Scalars in a dictionary
            there go to the history. :class:`Wanda` without training steps takes any function that runs the model.
        params: a pytree.
        batches: an iterable of batches, begun again whenever it ends, or a function of the step (0, 1, ...). A run that
            is resumed sees the same batches if that gives the same ones again.
        target: how much is to be left; a number means the fraction of entries. None with :class:`NM` and methods that
            need no other target.
        optimizer: of the weights; it keeps its state from the search to the last step.
        method: :class:`L0` by default, :class:`StraightThrough`, :class:`Magnitude`, :class:`Taylor` or :class:`Wanda`.
        granularity: ``"element"``, :class:`NM`, :class:`Block`, ``"row"``, ``"column"``, ``"channel"`` or ``"head"``.
        steps: number of training steps; by default one pass over the batches, and none with :class:`Wanda`.
        has_aux: see ``loss``.
        prune: called with a parameter's name and type (or a group's name and :class:`Group`), says whether it may be
            pruned. By default parameters with two axes or more, and all groups of the granularity.
        groups: which channels or heads go together; by default those of ``fun``.
        fun: ``fun(params, *args)``, the model, where channels, heads or FLOPs are asked for.
        args: an example of its other arguments; shapes are enough.
        distillation: learn from the dense model too.
        checkpoint: a folder; a run that finds checkpoints of its own there goes on from the latest. Needs Orbax.
        checkpoint_every: steps between two checkpoints; by default a tenth of all.
        key: of all random draws; ``jax.random.key(0)`` by default.
        progress: show a progress bar.

    Returns:
        The parameters, the masks and the history. What is left is at most what was asked for, and one unit less than
        too much.

    Raises:
        TargetError: the target cannot be met.
        ValueError: nothing can be pruned, or there are too few steps for the method.
        TypeError: the loss is no floating-point scalar.
        Diverged: the loss or its gradient is not finite. The state before that step is in the exception, and in the
            checkpoint folder if there is one.
        BatchesExhausted: an iterator held fewer batches than there are steps; ``last`` is the state by then.
        CheckpointMismatch: the folder holds a run with other settings.
        ImportError: checkpoints are asked for and Orbax is not there.

    Example:
        >>> result = learn_masks(loss, params, batches, 0.1, optax.adam(1e-3), steps=2000)
        >>> print(result)
    """
    method = L0() if method is None else method
    steps = number_of_steps(batches, method.default_steps if steps is None else steps)
    wanted = as_target(target) if target is not None else None
    ready = method.prepare(loss, params, batches)
    if (least := ready.settled_at(steps)) > steps:
        raise ValueError(f"{method} settles masks after {least} steps: it needs more than steps={steps}")
    units = divide(params, granularity, wanted, prune=prune, groups=groups, fun=fun, args=args, readable=ready.readable)
    key = jax.random.key(0) if key is None else key
    plan = Plan(units, wanted, steps)
    trainer = Trainer(plan, ready, loss, optimizer, has_aux, distillation, jax.random.key_impl(key))
    settings = {"target": str(wanted), "method": str(method), "granularity": str(granularity)}
    run = Run(trainer, batches, params, key, settings, checkpoint, checkpoint_every or max(steps // 10, 1))
    return run(progress)
