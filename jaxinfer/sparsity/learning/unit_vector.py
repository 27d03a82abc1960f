"""All units of a model as one vector: what they multiply, what they cost, how scores of entries become theirs.

Learners know nothing of trees or groups: they hold a gate, a score or a flag for each of ``size`` units. Units that lie
within one parameter (entries, blocks, rows, ...) and units that own slices of several (channels, heads) look alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sparsity.groups import Group, Groups
from jaxinfer.sparsity.learning.granularity import NM, Grain, check_rank
from jaxinfer.sparsity.learning.leaves import Leaves
from jaxinfer.sparsity.learning.selection import ranks, select
from jaxinfer.sparsity.learning.target import Measure, Target, TargetError


@dataclass(frozen=True)
class Segment:
    """Units that belong together, ``start`` to ``stop`` of the vector: those of one parameter or of one group."""

    name: str
    start: int
    stop: int


class Units(ABC):
    """The units of a model.

    Attributes:
        leaves: the parameters.
        segments: the parts of the vector of units, in order. Of each at least one unit is kept.
    """

    leaves: Leaves
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return self.segments[-1].stop if self.segments else 0

    @abstractmethod
    def spread(self, z: jax.Array) -> dict[int, Any]:
        """float32[units] → factors that broadcast to the parameters, by the position of the leaf."""

    @abstractmethod
    def pool(self, entries: Mapping[int, Any]) -> jax.Array:
        """Arrays of the parameters' shapes, by position → their sums over each unit, float32[units]."""

    @abstractmethod
    def cost(self, z: jax.Array, measure: Measure) -> jax.Array:
        """What is left, beside the dense model, when units are kept with probabilities ``z``; differentiable."""

    def winners(self, scores: jax.Array) -> jax.Array:
        """Units that are kept in any case, bool[units]: the best of each segment."""
        best = [jnp.arange(s.stop - s.start) == jnp.argmax(scores[s.start : s.stop]) for s in self.segments]
        return jnp.concatenate(best)

    @property
    @abstractmethod
    def sizes(self) -> jax.Array:
        """Number of entries of each unit, float32[units]."""

    def strengths(self, trained: Any) -> jax.Array:
        """The magnitude of each unit, float32[units]: the root of the mean of squares of its entries."""
        squares = {i: jnp.square(x.astype(jnp.float32)) for i, x in self.entries(trained).items()}
        return jnp.sqrt(self.pool(squares) / self.sizes)

    def entries(self, trained: Any) -> dict[int, Any]:
        """The trained leaves that units have a part in, by position."""
        leaves = iter(jax.tree.leaves(trained))
        by_position = {i: next(leaves) for i, t in enumerate(self.leaves.trained) if t}
        return {i: by_position[i] for i in self.positions}

    @property
    @abstractmethod
    def positions(self) -> tuple[int, ...]:
        """Positions of the leaves that units have a part in."""

    def select(self, scores: jax.Array, measure: Measure, left: Any, by_layer: bool = False) -> jax.Array:
        """The best units, as many as fit: bool[units].

        Args:
            scores: float32[units].
            measure: what is counted.
            left: how much may be left, beside the dense model.
            by_layer: compare scores within each segment only, so that all give the same share.
        """
        protected = self.winners(scores)
        if by_layer:
            scores = jnp.concatenate([ranks(scores[s.start : s.stop]) for s in self.segments])
        return select(scores, protected, lambda z: self.cost(z, measure), left)

    def masks(self, keep: Any) -> Any:
        """bool[units] → a tree of masks like the parameters, None for those that no unit has a part in."""
        factors = jax.jit(self.spread)(jnp.asarray(keep, jnp.float32))
        found = [
            jnp.asarray(np.broadcast_to(np.asarray(factors[i]) > 0, aval.shape)) if i in factors else None
            for i, aval in enumerate(self.leaves.avals)
        ]
        return self.leaves.treedef.unflatten(found)

    def left(self, keep: Any) -> dict[str, float]:
        """What is left in every measure that is known."""
        costs = jax.jit(lambda z: [self.cost(z, measure) for measure in self.measures])
        return dict(zip(self.measures, map(float, costs(jnp.asarray(keep, jnp.float32)))))

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """What can be counted."""

    def _least(self, measure: Measure) -> float:
        """What is left if nothing is kept but what is kept in any case."""
        least = jax.jit(lambda: self.cost(self.winners(jnp.zeros(self.size)).astype(jnp.float32), measure))
        with jax.ensure_compile_time_eval():
            return float(least())

    def check(self, target: Target) -> None:
        """Raises a :class:`TargetError` if a target cannot be met by these units."""
        if target.measure not in self.measures:
            raise TargetError(
                "a target in FLOPs needs the function and an example of its arguments: give fun= and args="
            )
        least = self._least(target.measure)
        if least > target.value * (1 + 1e-6):
            raise TargetError(
                f"{target.measure}={target.value} cannot be met: with one unit left of each of the "
                f"{len(self.segments)} layers or groups, {least:.4g} of the {target.measure} remain"
            )


class LeafUnits(Units):
    """Units within parameters.

    Args:
        leaves: the parameters.
        grain: how each is divided.
        positions: the leaves that are divided.
        macs: multiply-accumulates that each leaf takes part in, by position, and those of the whole program; None if
            they are not known.
    """

    def __init__(
        self,
        leaves: Leaves,
        grain: Grain,
        positions: Sequence[int],
        macs: tuple[Mapping[int, float], float] | None = None,
    ):
        self.leaves, self.grain, self._positions, self._macs = leaves, grain, tuple(positions), macs
        self._shapes = {i: leaves.avals[i].shape for i in positions}
        segments, start = [], 0
        for i in positions:
            check_rank(grain, leaves.names[i], leaves.avals[i])
            stop = start + int(np.prod(grain.units(self._shapes[i]), dtype=np.int64))
            segments.append(Segment(leaves.names[i], start, stop))
            start = stop
        self.segments = tuple(segments)

    @property
    def positions(self) -> tuple[int, ...]:
        return self._positions

    def _parts(self, z: Any) -> dict[int, Any]:
        """The vector cut into arrays of the shapes of each leaf's units."""
        return {
            i: z[s.start : s.stop].reshape(self.grain.units(self._shapes[i]))
            for i, s in zip(self._positions, self.segments)
        }

    def spread(self, z: jax.Array) -> dict[int, Any]:
        return {i: self.grain.spread(part, self._shapes[i]) for i, part in self._parts(z).items()}

    def pool(self, entries: Mapping[int, Any]) -> jax.Array:
        return jnp.concatenate([self.grain.pool(entries[i]).reshape(-1) for i in self._positions])

    @property
    def sizes(self) -> jax.Array:
        each = [
            jnp.broadcast_to(self.grain.sizes(self._shapes[i]), self.grain.units(self._shapes[i])).reshape(-1)
            for i in self._positions
        ]
        return jnp.concatenate(each)

    def winners(self, scores: jax.Array) -> jax.Array:
        best = [self.grain.winners(part, self._shapes[i]).reshape(-1) for i, part in self._parts(scores).items()]
        return jnp.concatenate(best)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return ("fraction", "bytes") if self._macs is None else ("fraction", "bytes", "flops")

    def _weights(self, measure: Measure) -> tuple[dict[int, float], float]:
        """What each divided leaf and the whole model count for."""
        if measure == "fraction":
            each = {i: float(self.leaves.size(i)) for i in self._positions}
            return each, sum(each.values())
        if measure == "bytes":
            return {i: float(self.leaves.bytes(i)) for i in self._positions}, float(self.leaves.total_bytes)
        if self._macs is None:
            raise TargetError("the FLOPs of this model are not known: give fun= and args=")
        return {i: float(self._macs[0].get(i, 0.0)) for i in self._positions}, float(self._macs[1])

    def cost(self, z: jax.Array, measure: Measure) -> jax.Array:
        each, whole = self._weights(measure)
        total: Any = 1.0 - sum(each.values()) / whole
        for i, part in self._parts(z).items():
            # Summed axis by axis: one long sum of ones would stop growing at 2²⁴ in float32.
            kept = (part * self.grain.sizes(self._shapes[i])).sum(-1).sum() / self.leaves.size(i)
            total = total + each[i] / whole * kept
        return jnp.asarray(total, jnp.float32)

    def check(self, target: Target) -> None:
        grain = self.grain
        if isinstance(grain, NM):
            # N:M leaves no choice.
            exact = self._least(target.measure)
            if abs(exact - target.value) > 0.01 and target.measure in self.measures:
                raise TargetError(
                    f"{grain.n}:{grain.m} leaves {exact:.4g} of the {target.measure}, not {target.value}: "
                    "leave the target out (None) or ask for that"
                )
            return
        super().check(target)


class GroupUnits(Units):
    """Units that own slices of several parameters.

    Args:
        leaves: the parameters.
        groups: found on the graph of a function of the same parameters.
        chosen: the groups whose units may go.

    Raises:
        ValueError: the groups are not those of these parameters, or there is no group.
    """

    def __init__(self, leaves: Leaves, groups: Groups, chosen: Sequence[Group]):
        self.leaves, self._groups, self._chosen = leaves, groups, tuple(chosen)
        self._along: dict[int, list[tuple[int, np.ndarray]]] = {}
        segments, start = [], 0
        for group in self._chosen:
            segments.append(Segment(group.name, start, start + group.size))
            for member in group.members:
                position = self._position(member.path, group)
                if leaves.is_prunable(position):
                    index = np.where(member.unit_of >= 0, member.unit_of + start, -1)
                    self._along.setdefault(position, []).append((member.axis, index))
            start += group.size
        self.segments = tuple(segments)
        if not segments:
            kinds = sorted({group.kind for group in groups})
            raise ValueError(f"there is nothing to prune: no such group; there are {', '.join(kinds) or 'none at all'}")

    def _position(self, path: Any, group: Group) -> int:
        for i, (have, aval) in enumerate(zip(self.leaves.paths, self._shapes_of_groups)):
            if have == path and self.leaves.avals[i] is not None and self.leaves.avals[i].shape == aval:
                return i
        raise ValueError(
            f"group {group.name!r} owns a parameter {jax.tree_util.keystr(path)} that the parameters to train do not "
            "have: find the groups with a function of the very same parameters"
        )

    @cached_property
    def _shapes_of_groups(self) -> list[Any]:
        found = jax.tree_util.tree_leaves_with_path(self._groups.params)
        shapes = {path: getattr(leaf, "shape", None) for path, leaf in found}
        return [shapes.get(path) for path in self.leaves.paths]

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self._along)

    def _vectors(self, z: Any, position: int) -> dict[int, Any]:
        """For each axis of a leaf that units lie along, a factor for each index."""
        extended = jnp.append(z, jnp.ones((), z.dtype))  # the last one belongs to no unit
        vectors: dict[int, Any] = {}
        for axis, index in self._along[position]:
            vectors[axis] = vectors.get(axis, 1.0) * extended[index]
        return vectors

    def spread(self, z: jax.Array) -> dict[int, Any]:
        factors: dict[int, Any] = {}
        for i in self.positions:
            rank = len(self.leaves.avals[i].shape)
            factor: Any = 1.0
            for axis, vector in self._vectors(z, i).items():
                factor = factor * vector.reshape([-1 if a == axis else 1 for a in range(rank)])
            factors[i] = factor
        return factors

    def pool(self, entries: Mapping[int, Any]) -> jax.Array:
        total = jnp.zeros(self.size + 1, jnp.float32)
        for i in self.positions:
            x = entries[i].astype(jnp.float32)
            for axis, index in self._along[i]:
                total = total.at[index].add(x.sum(tuple(a for a in range(x.ndim) if a != axis)))
        return total[:-1]

    @cached_property
    def _sizes(self) -> np.ndarray:
        total = np.zeros(self.size + 1, np.float32)
        for i in self.positions:
            shape = self.leaves.avals[i].shape
            for axis, index in self._along[i]:
                np.add.at(total, index, self.leaves.size(i) / shape[axis])
        return np.maximum(total[:-1], 1)

    @property
    def sizes(self) -> jax.Array:
        return jnp.asarray(self._sizes)

    def strengths(self, trained: Any) -> jax.Array:
        """Magnitudes beside the mean of their group: groups of different layers become comparable."""
        found = super().strengths(trained)
        means = [jnp.mean(found[s.start : s.stop]) for s in self.segments]
        tiny = jnp.finfo(jnp.float32).tiny
        return jnp.concatenate(
            [found[s.start : s.stop] / jnp.maximum(mean, tiny) for s, mean in zip(self.segments, means)]
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        return ("fraction", "bytes", "flops") if self._groups.products else ("fraction", "bytes")

    def cost(self, z: jax.Array, measure: Measure) -> jax.Array:
        gates = {s.name: z[s.start : s.stop] for s in self.segments}
        if measure == "flops":
            return self._groups.expected_macs(gates) / self._groups.macs()
        if measure == "bytes":
            return self._groups.expected_bytes(gates) / self._groups.bytes()
        total: Any = 0.0
        for i in self.positions:
            share: Any = float(self.leaves.size(i))
            for vector in self._vectors(z, i).values():
                share = share * vector.mean()
            total = total + share
        return total / sum(self.leaves.size(i) for i in self.positions)
