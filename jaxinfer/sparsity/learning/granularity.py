"""What is removed at once within one parameter: an entry, one of N:M, a block, a row or a column.

Rows and columns are those of the last two axes, as in a dense layer's (inputs, outputs) and a convolution's
(height, width, inputs, outputs): a row is what reads one input, a column what makes one output, and all leading axes go
along with both. Channels and attention heads, which own slices of several parameters, are found on the graph:
see :mod:`jaxinfer.sparsity.groups`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Grain(ABC):
    """How one parameter is divided into units. The methods take the parameter's shape and have no state."""

    least_rank = 0
    """How many axes a parameter needs."""

    @abstractmethod
    def units(self, shape: Shape) -> Shape:
        """The shape of an array with one entry for each unit."""

    @abstractmethod
    def spread(self, z: Any, shape: Shape) -> Any:
        """One value for each unit → an array that multiplies the parameter (it may rely on broadcasting)."""

    @abstractmethod
    def pool(self, x: Any) -> Any:
        """An array of the parameter's shape → its sum over each unit."""

    def sizes(self, shape: Shape) -> np.ndarray:
        """How many entries each unit has; a number for all where they are alike."""
        return np.asarray(math.prod(shape) / max(math.prod(self.units(shape)), 1), np.float32)

    def winners(self, scores: Any, shape: Shape) -> Any:
        """Which units are kept in any case, bool of the shape of ``scores``: the best of all."""
        flat = scores.reshape(-1)
        return (jnp.arange(flat.size) == jnp.argmax(flat)).reshape(scores.shape)


@dataclass(frozen=True)
class Element(Grain):
    """Every entry by itself."""

    def units(self, shape: Shape) -> Shape:
        return shape

    def spread(self, z: Any, shape: Shape) -> Any:
        return z

    def pool(self, x: Any) -> Any:
        return x


@dataclass(frozen=True)
class NM(Element):
    """``n`` of every ``m`` entries that follow one another along an axis are kept.

    Where the axis is no multiple of ``m``, the last few entries make a shorter run, of which ``n`` are kept too.

    Attributes:
        n: how many are kept.
        m: of how many.
        axis: the axis they follow one another along; −2, the inputs of a layer's kernel, is what hardware wants.

    Raises:
        ValueError: not 0 < n < m.
    """

    n: int = 2
    m: int = 4
    axis: int = -2
    least_rank = 1

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"of {self.m} entries {self.n} cannot be kept: N:M needs 0 < N < M")

    def winners(self, scores: Any, shape: Shape) -> Any:
        length = scores.shape[self.axis]
        moved = jnp.moveaxis(scores, self.axis, -1)
        runs = -(-length // self.m)
        padding = [(0, 0)] * (moved.ndim - 1) + [(0, runs * self.m - length)]
        runs_of = jnp.pad(moved, padding, constant_values=-jnp.inf).reshape(*moved.shape[:-1], runs, self.m)
        # An entry's rank is the number of better ones in its run; equal ones are told apart by their place.
        better = runs_of[..., None, :] > runs_of[..., :, None]
        before = np.tril(np.ones((self.m, self.m), bool), -1)
        equal = (runs_of[..., None, :] == runs_of[..., :, None]) & before
        kept = (better | equal).sum(-1) < self.n
        return jnp.moveaxis(kept.reshape(*moved.shape[:-1], runs * self.m)[..., :length], -1, self.axis)

    def share(self, shape: Shape) -> float:
        """The share of entries that is kept of a parameter."""
        whole, rest = divmod(shape[self.axis], self.m)
        return (whole * self.n + min(rest, self.n)) / shape[self.axis] if shape[self.axis] else 1.0


@dataclass(frozen=True)
class Block(Grain):
    """Blocks of ``rows`` × ``columns`` entries of the last two axes; blocks at the ends may be smaller.

    Raises:
        ValueError: a block without entries.
    """

    rows: int
    columns: int
    least_rank = 2

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a block of {self.rows} × {self.columns} has no entries")

    def units(self, shape: Shape) -> Shape:
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))

    def spread(self, z: Any, shape: Shape) -> Any:
        full = jnp.repeat(jnp.repeat(z, self.rows, axis=-2), self.columns, axis=-1)
        return full[..., : shape[-2], : shape[-1]]

    def pool(self, x: Any) -> Any:
        *lead, down, across = self.units(x.shape)
        ends = [(0, down * self.rows - x.shape[-2]), (0, across * self.columns - x.shape[-1])]
        padded = jnp.pad(x, [(0, 0)] * len(lead) + ends)
        return padded.reshape(*lead, down, self.rows, across, self.columns).sum((-3, -1))

    def sizes(self, shape: Shape) -> np.ndarray:
        down = np.minimum(self.rows, shape[-2] - self.rows * np.arange(-(-shape[-2] // self.rows)))
        across = np.minimum(self.columns, shape[-1] - self.columns * np.arange(-(-shape[-1] // self.columns)))
        return np.broadcast_to(np.outer(down, across), self.units(shape)).astype(np.float32)


@dataclass(frozen=True)
class Row(Grain):
    """Slices along the last axis but one: all that reads one input."""

    least_rank = 2

    def units(self, shape: Shape) -> Shape:
        return (shape[-2],)

    def spread(self, z: Any, shape: Shape) -> Any:
        return z[:, None]

    def pool(self, x: Any) -> Any:
        return x.sum(tuple(i for i in range(x.ndim) if i != x.ndim - 2))


@dataclass(frozen=True)
class Column(Grain):
    """Slices along the last axis: all that makes one output."""

    least_rank = 2

    def units(self, shape: Shape) -> Shape:
        return (shape[-1],)

    def spread(self, z: Any, shape: Shape) -> Any:
        return z

    def pool(self, x: Any) -> Any:
        return x.sum(tuple(range(x.ndim - 1)))


Granularity = Literal["element", "row", "column", "channel", "head"] | Grain
_NAMED: dict[str, Grain] = {"element": Element(), "row": Row(), "column": Column()}
_GROUPED = ("channel", "head")


def as_grain(granularity: Granularity) -> Grain | None:
    """The division within parameters that is meant, None for channels and heads.

    Raises:
        ValueError: there is no such granularity.
    """
    if isinstance(granularity, Grain):
        return granularity
    if granularity not in _NAMED and granularity not in _GROUPED:
        names = ", ".join(map(repr, (*_NAMED, *_GROUPED)))
        raise ValueError(f"no granularity {granularity!r}; there are {names}, NM(n, m) and Block(rows, columns)")
    return _NAMED.get(granularity)


def check_rank(grain: Grain, name: str, leaf: jax.Array) -> None:
    """Raises a :class:`ValueError` for a parameter that has too few axes to be divided so."""
    least = max(grain.least_rank, -grain.axis if isinstance(grain, NM) else 0)
    if len(leaf.shape) < least:
        raise ValueError(f"{grain} needs {least} axes, but {name} is {leaf.dtype}{list(leaf.shape)}: leave it out")
