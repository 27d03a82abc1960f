"""Which slices of which parameters go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxinfer.graph import Graph
from jaxinfer.sparsity.shrinking.flow import (
    ALIVE,
    DYNAMIC,
    NUMBER,
    PARAMETER,
    UNUSED,
    ZERO,
    Entry,
    Needs,
    needs_of,
    uniform,
)
from jaxinfer.sparsity.shrinking.flow_rules import RULES
from jaxinfer.sparsity.shrinking.slices import NONE, Indices, Sliced, made, merged, without


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of the whole program and what of it is there.

    Attributes:
        name: its key path.
        shape: in the whole program.
        masked: its number of masked entries.
        removed: for each axis the slices that go.
        void: for each axis those of them that nothing depends on.
        frozen: for each axis those of them whose values still count, as constants.
        dtype: its type; None where it is no array of numbers.
        constants: for each axis what stands in the slices that go, or None where that is zero or void.
    """

    name: str
    shape: tuple[int, ...]
    masked: int
    removed: tuple[Indices, ...]
    void: tuple[Indices, ...]
    frozen: tuple[Indices, ...]
    dtype: Any
    constants: tuple[np.ndarray | None, ...]

    @property
    def keep(self) -> tuple[Indices | None, ...]:
        """For each axis the slices that stay, None where all do."""
        return tuple(without(n, r) if r.size else None for n, r in zip(self.shape, self.removed))

    @property
    def is_plain(self) -> bool:
        """Whether it is an array of numbers, of which slices can go (a random key is not)."""
        return self.dtype is not None

    @property
    def constant_bytes(self) -> int:
        """Bytes of what stands in the slices that go."""
        return sum(c.nbytes for c in self.constants if c is not None)

    @property
    def fill(self) -> np.ndarray:
        """What stands in the slices that go, in an array of its whole shape, or of one number where that is zero."""
        if not self.constant_bytes:
            return np.zeros((1,) * len(self.shape), self.dtype)
        fill = np.zeros(self.shape, self.dtype)
        for axis, (indices, constants) in enumerate(zip(self.removed, self.constants)):
            if constants is not None:
                fill[(slice(None),) * axis + (indices,)] = constants
        return fill

    @property
    def small(self) -> tuple[int, ...]:
        """Its shape in the small program."""
        return tuple(n - len(r) for n, r in zip(self.shape, self.removed))

    def value(self, array: Any, number: int) -> Sliced:
        """The parameter in the whole program, as the slices that are there."""
        fill = self.fill.astype(array.dtype)
        leaf = tuple((number, a) for a in range(len(self.shape)))
        return made(self.shape, array, self.keep, None, fill, self.void, leaf=leaf)

    def taken(self, array: Any) -> np.ndarray:
        """The slices of a whole array that stay."""
        array = np.asarray(array)
        for axis, keep in enumerate(self.keep):
            array = array if keep is None else np.take(array, keep, axis)
        return array


def whole_parameter(name: str, array: Any, mask: np.ndarray | None) -> Parameter:
    """A parameter none of which goes."""
    none = (NONE,) * np.ndim(array)
    masked = 0 if mask is None else int((~mask).sum())
    dtype = array.dtype if isinstance(array, np.ndarray) else None
    return Parameter(name, tuple(np.shape(array)), masked, none, none, none, dtype, (None,) * np.ndim(array))


@dataclass(frozen=True, eq=False)
class Uses:
    """What parameters are needed for.

    Attributes:
        now: for each parameter, with the masks.
        before: without them.
        reaches: for each result whether inputs still reach it.
        reached: for each result whether they did without the masks.
    """

    now: tuple[Needs, ...]
    before: tuple[Needs, ...]
    reaches: tuple[bool, ...]
    reached: tuple[bool, ...]


def uses(graph: Graph, masks: Sequence[np.ndarray | None]) -> Uses:
    """What parameters are needed for; they are the first inputs of the graph."""
    count = len(masks)
    entries = []
    for i, node in enumerate(graph.inputs):
        rank = len(getattr(node.aval, "shape", ()))
        kind = uniform(PARAMETER if i < count else DYNAMIC, rank)
        mask = masks[i] if i < count else None
        masked = kind if mask is None else np.where(mask, np.uint8(PARAMETER), np.uint8(ZERO))
        entries.append(Entry(masked, kind))
    now, before, results = needs_of(graph, RULES, entries)
    return Uses(
        tuple(now[:count]),
        tuple(before[:count]),
        tuple(bool((r.now == DYNAMIC).any()) for r in results),
        tuple(bool((r.before == DYNAMIC).any()) for r in results),
    )


def decide(
    parameter: Parameter,
    values: np.ndarray,
    mask: np.ndarray | None,
    now: Needs,
    before: Needs,
    *,
    stays: Sequence[Indices],
    only_masked: bool = False,
    hide: bool = False,
) -> Parameter:
    """Which slices of a parameter go.

    A slice goes if all its entries are masked, or no longer needed alive, because of the masks.

    Args:
        parameter: the parameter.
        values: its masked values.
        mask: its mask.
        now: what it is needed for with the masks.
        before: what it was needed for without them.
        stays: for each axis slices that do not go in any case.
        only_masked: let only slices go that are masked altogether.
        hide: what is masked and needed by nothing is void instead of zero, so that nobody has to put zeros back.
    """
    shape = parameter.shape
    now, before = np.broadcast_to(now, shape), np.broadcast_to(before, shape)
    masked = np.zeros(shape, bool) if mask is None else ~mask
    cut = (now < ALIVE) & (before == ALIVE)
    spare = masked if only_masked else masked | (now < ALIVE)
    if 0 in shape:
        return parameter
    removed, void, frozen = [], [], []
    for axis in range(len(shape)):
        others = tuple(a for a in range(len(shape)) if a != axis)
        goes = spare.all(axis=others) & (masked.all(axis=others) | cut.any(axis=others))
        goes[stays[axis]] = False
        removed.append(np.flatnonzero(goes))
    for axis in range(len(shape)):
        others = tuple(a for a in range(len(shape)) if a != axis)
        # What goes along another axis anyway says nothing about this one.
        there = _there(shape, [NONE if a == axis else r for a, r in enumerate(removed)])
        rest = there & ~masked
        needed, unused = (rest & (now == NUMBER)).any(axis=others), (rest & (now == UNUSED)).any(axis=others)
        hidden = (~there | (now == UNUSED)).all(axis=others) if hide else False
        frozen.append(np.intersect1d(removed[axis], np.flatnonzero(needed)))
        void.append(np.intersect1d(removed[axis], np.flatnonzero((unused & ~needed) | hidden)))
    fill = np.where(_there(shape, void), values, np.zeros((), values.dtype))
    # A parameter none of which is needed may as well be zero.
    count = bool(np.any(~masked & (now != UNUSED)))
    constants = [np.take(fill, r, axis) if count else None for axis, r in enumerate(removed)]
    return replace(
        parameter,
        removed=tuple(removed),
        void=tuple(void),
        frozen=tuple(frozen),
        constants=tuple(c if c is not None and np.any(c) else None for c in constants),
    )


def _there(shape: Sequence[int], gone: Sequence[Indices]) -> np.ndarray:
    """The entries none of whose slices are gone."""
    there = np.ones(shape, bool)
    for axis, indices in enumerate(gone):
        there[(slice(None),) * axis + (indices,)] = False
    return there


def with_slices(stays: Sequence[Indices], more: dict[int, set[int]]) -> tuple[Indices, ...]:
    """Slices that stay, and more of them by axis."""
    return tuple(merged(s, np.array(sorted(more[a]), np.int64)) if more.get(a) else s for a, s in enumerate(stays))
