"""Which batch a step gets, the same one whether a run was interrupted or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

Batches = Iterable[Any] | Callable[[int], Any]


class BatchesExhausted(RuntimeError):
    """There were fewer batches than steps.

    Attributes:
        last: the state when they ended, a :class:`jaxinfer.sparsity.learning.result.Learned`.
    """

    last: Any = None


class Feed:
    """Batches by step.

    Args:
        batches: a function of the step (0, 1, ...); or an iterable, which is begun again whenever it ends. An iterator,
            which cannot be begun again, must hold one batch for each step.
        first: the step that the first batch asked for belongs to; an iterable's earlier ones are passed over.
        steps: how many there will be, for messages.
    """

    def __init__(self, batches: Batches, first: int, steps: int):
        self._batches, self._steps = batches, steps
        self._next = first
        self._iterator: Iterator[Any] | None = None

    def __call__(self, step: int) -> Any:
        """The batch of a step; steps are asked for in order."""
        if callable(self._batches):
            return self._batches(step)
        if self._iterator is None:
            self._skip(self._next)
        batch = self._take(step)
        self._next = step + 1
        return batch

    def _skip(self, count: int) -> None:
        assert not callable(self._batches)
        if isinstance(self._batches, Sized) and len(self._batches):
            count %= len(self._batches)
        self._iterator = iter(self._batches)
        for step in range(count):
            self._take(step)

    def _take(self, step: int) -> Any:
        assert not callable(self._batches) and self._iterator is not None
        for again in (False, True):
            if again:
                self._iterator = iter(self._batches)
            try:
                return next(self._iterator)
            except StopIteration:
                continue
        raise BatchesExhausted(
            f"batches ended at step {step} of {self._steps}: give a list, a function of the step, or fewer steps"
        )


def number_of_steps(batches: Batches, steps: int | None) -> int:
    """The number of steps asked for, else one pass over the batches.

    Raises:
        ValueError: the number is negative, or not given and not known.
    """
    if steps is None:
        if callable(batches) or not isinstance(batches, Sized):
            raise ValueError("say how many steps to train: steps=")
        return len(batches)
    if steps < 0:
        raise ValueError(f"steps={steps} is negative")
    return steps
