"""The loop over training steps: history, checkpoints, and ways to end without losing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sparsity.learning.batches import Batches, BatchesExhausted, Feed
from jaxinfer.sparsity.learning.checkpoint import Store
from jaxinfer.sparsity.learning.progress import Progress
from jaxinfer.sparsity.learning.result import Diverged, Learned
from jaxinfer.sparsity.learning.step import Carry, Trainer

_ROWS = 100  # of the history, about so many
_BLIND = 50  # steps at most between two looks at whether all is finite


class Run:
    """One run.

    Args:
        trainer: the compiled programs.
        batches: by step.
        params: what training starts from.
        key: of all random draws.
        settings: what the run is defined by, beside parameters and steps.
        folder: of checkpoints, or None.
        every: steps between two of them.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Batches,
        params: Any,
        key: jax.Array,
        settings: Mapping[str, Any],
        folder: str | os.PathLike[str] | None,
        every: int,
    ):
        self._trainer, self._batches, self._every = trainer, batches, every
        self._plan, self._steps = trainer.plan, trainer.plan.steps
        self._settle_at = trainer.method.settled_at(self._steps)
        self._look = max(1, min(self._steps // _ROWS, _BLIND))
        self._history: list[dict[str, Any]] = []
        distillation = trainer.distillation
        self._teacher = None
        if distillation is not None:
            self._teacher = trainer.taught(params if distillation.teacher is None else distillation.teacher)
        self._store = Store(folder, {**settings, **self._identity}) if folder is not None else None
        self._carry: Carry = trainer.start(params, key)
        self._step = 0
        self._settled = False
        self._checked = False

    @property
    def _identity(self) -> dict[str, Any]:
        """What the run is about, for checkpoints to compare."""
        leaves, segments = self._plan.units.leaves, self._plan.units.segments
        arrays = [(n, a) for n, a in zip(leaves.names, leaves.avals) if a is not None]
        return {
            "steps": self._steps,
            "parameters": [f"{name} {aval.dtype}{list(aval.shape)}" for name, aval in arrays],
            "units": [[s.name, s.stop - s.start] for s in segments],
        }

    def __call__(self, shown: bool) -> Learned:
        """Makes the steps that are left.

        Args:
            shown: whether to show a progress bar.
        """
        try:
            self._resume()
            feed = Feed(self._batches, self._step, self._steps)
            with Progress(self._steps, shown) as bar:
                bar.show(self._step, {})
                while self._step < self._steps:
                    figures = self._advance(feed(self._step))
                    if self._step % self._look == 0 or self._step == self._steps:
                        self._record(figures, bar)
                    if self._step % self._every == 0 or self._step == self._steps:
                        self._save()
                self._prepare()
            return self.result()
        except BatchesExhausted as error:
            self._check()
            self._save()
            error.last = self.result()
            raise
        except Diverged:
            raise
        except BaseException:
            self._save()
            raise
        finally:
            if self._store is not None:
                self._store.close()

    def _resume(self) -> None:
        """Goes on from the latest checkpoint, if there is one. It was made before what is due at its step."""
        at = self._store.latest if self._store is not None else None
        if at is None or self._store is None:
            return
        self._settled = at > self._settle_at
        like = jax.eval_shape(self._trainer.settle, self._carry) if self._settled else self._carry
        self._carry, self._history = self._store.load(at, like)
        self._carry["failed"] = jnp.full((), -1, jnp.int32)
        self._step = at

    def _prepare(self) -> None:
        """What is due before the next step, or at the end."""
        settles = self._step == self._settle_at and not self._settled
        updates = 0 < self._step < self._settle_at and self._trainer.method.is_update(self._step, self._steps)
        if settles or updates:
            self._check()
            self._carry = (self._trainer.settle if settles else self._trainer.update)(self._carry)
            self._settled = self._settled or settles

    def _advance(self, batch: Any) -> Mapping[str, Any]:
        """One step."""
        if not self._checked:
            self._trainer.check(self._carry, batch)
            self._checked = True
        self._prepare()
        step = self._trainer.tune if self._settled else self._trainer.search
        self._carry, figures = step(self._carry, batch, self._teacher)
        self._step += 1
        return figures

    def _record(self, figures: Mapping[str, Any], bar: Progress) -> None:
        """A row of the history."""
        self._check()
        row = {"step": self._step, **{name: float(x) for name, x in figures.items()}}
        self._history.append(row)
        bar.show(self._step, row)

    def _check(self) -> None:
        """Raises :class:`Diverged` if a step was not finite; what is carried is then still the state before it."""
        failed = int(self._carry["failed"])
        if failed < 0:
            return
        self._step = failed
        self._history = [row for row in self._history if row["step"] <= failed]
        where = f"; the state before it is in {self._store.folder}" if self._store is not None else ""
        self._save()
        raise Diverged(
            f"the loss or its gradient was not finite at step {failed} of {self._steps}: the parameters before that "
            f"step are in .last of this exception{where}. A lower learning rate or clipped gradients may help",
            failed,
            self.result(),
        )

    def _save(self) -> None:
        """Writes a checkpoint, unless a failed step took what is carried with it."""
        if self._store is None or any(x.is_deleted() for x in jax.tree.leaves(self._carry)):
            return
        step = int(self._carry["step"])
        # What is due at a step is done again by the run that resumes; masks can be settled only once.
        if not (self._settled and step == self._settle_at):
            self._store.save(step, self._carry, self._history)

    def result(self) -> Learned:
        """What there is by now."""
        units, leaves = self._plan.units, self._plan.units.leaves
        params = leaves.merge(self._carry["trained"], self._carry["rest"])
        if not self._settled:
            return Learned(params, None, self._history, {}, {}, self._step)
        keep = np.asarray(self._carry["method"]["keep"])
        masks = units.masks(keep)
        kept = {s.name: (int(keep[s.start : s.stop].sum()), s.stop - s.start) for s in units.segments}
        return Learned(leaves.masked(params, masks), masks, self._history, units.left(keep), kept, self._step)
