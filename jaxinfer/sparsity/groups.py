"""Which slices of which parameters can only go together: units, groups of units, and what they cost.

A *unit* is what is removed at once: a channel, a neuron, an attention head, an input pixel. It owns slices of several
arrays (the column of a kernel, its bias, the row of the next kernel). A *group* is a set of units of one kind that own
slices of the same arrays. An index of an axis may belong to units of several groups (a column of a projection to its
head and to its place within all heads); it goes as soon as one of them goes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxinfer.graph.retrace import leaf_name
from jaxinfer.report.groups import GroupRow, draw_groups, groups_sheet
from jaxinfer.report.sheet import Sheet

Kind = Literal["channel", "head", "input"]
NO_UNIT = -1
"""In a vector of units: this index belongs to none."""


@dataclass(frozen=True, eq=False)
class Member:
    """What the units of a group own of one parameter.

    Attributes:
        path: key path of the leaf of ``params``, as JAX's tree functions give it.
        axis: the axis along which units own slices.
        unit_of: int[size of the axis]: for each index the unit it belongs to, or :data:`NO_UNIT`.
    """

    path: tuple[Any, ...]
    axis: int
    unit_of: np.ndarray

    @property
    def name(self) -> str:
        """The parameter's name, keys joined by slashes."""
        return leaf_name(self.path)


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind that own slices of the same parameters.

    Attributes:
        name: unique among the groups of a function.
        size: number of units.
        members: what they own; no two members have the same path and axis.
        kind: ``"head"`` for units that meet in the batch axes of products of activations, ``"input"`` for features of
            the function's inputs, which are removed from the parameters that read them; else ``"channel"``.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    kind: Kind = "channel"


@dataclass(frozen=True, eq=False)
class ProductAxis:
    """An axis of a product along which work goes away with units.

    Attributes:
        groups: int[size of the axis, k]: positions in :class:`Groups` of the up to k groups that each index belongs to,
            filled up with :data:`NO_UNIT`.
        units: int[size of the axis, k]: the units in those groups.
    """

    groups: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product or convolution.

    Attributes:
        name: where it stands in the user's program, as far as is known.
        macs: multiply-accumulates of the dense program, all steps of the loops around it included.
        axes: the axes along which it can become smaller. What is left of it is ``macs`` times, for each of them, the
            mean over its indices of whether all of an index's units are kept.
    """

    name: str
    macs: float
    axes: tuple[ProductAxis, ...]


class Groups(Sequence[Group]):
    """The groups of a function's parameters.

    Args:
        groups: the groups.
        products: the products whose work depends on what is kept, and those whose does not.
        params: the parameters; of its leaves only shapes and dtypes are kept.
        locked: for each parameter and axis no index of which can go, why.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        products: Sequence[Product],
        params: Any,
        locked: Mapping[tuple[str, int], str] | None = None,
    ):
        self._groups = tuple(groups)
        self.products = tuple(products)
        self.params = jax.tree.map(_struct, params)
        self.locked = dict(locked or {})

    def __getitem__(self, index: Any) -> Any:
        return self.named[index] if isinstance(index, str) else self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @cached_property
    def named(self) -> dict[str, Group]:
        """The groups by name."""
        return {group.name: group for group in self._groups}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of units of each group, by name."""
        return {group.name: group.size for group in self._groups}

    @cached_property
    def _members(self) -> dict[str, list[tuple[Group, Member]]]:
        found: dict[str, list[tuple[Group, Member]]] = {}
        for group in self._groups:
            for member in group.members:
                found.setdefault(jax.tree_util.keystr(member.path), []).append((group, member))
        return found

    # -- what is left --

    def masks(self, kept: Mapping[str, Any]) -> Any:
        """Masks of the parameters: False in every slice of a unit that is not kept.

        Args:
            kept: for each group, by name, bool[size]; groups that are not named keep everything.

        Returns:
            A tree like ``params`` of bool arrays of the parameters' shapes; None in place of what is no array.

        Raises:
            KeyError: there is no such group.
            ValueError: a vector is not as long as its group is large.
        """
        flags = self._flags(kept)

        def mask(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return None
            found = np.ones(leaf.shape, bool)
            for axis, along in enumerate(self._kept_along(path, leaf.shape, flags)):
                shape = [1] * len(leaf.shape)
                shape[axis] = -1
                found &= along.reshape(shape)
            return jnp.asarray(found)

        return jax.tree_util.tree_map_with_path(mask, self.params)

    def macs(self, kept: Mapping[str, Any] | None = None) -> float:
        """Multiply-accumulates of all products with the units that are kept (all by default)."""
        flags = self._flags(kept or {})
        gates = [flags[group.name].astype(float) for group in self._groups]
        return float(sum(p.macs * np.prod([_share(a, gates, np) for a in p.axes]) for p in self.products))

    def bytes(self, kept: Mapping[str, Any] | None = None) -> int:
        """Bytes of the parameters with the units that are kept (all by default)."""
        flags, total = self._flags(kept or {}), 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                left = [int(along.sum()) for along in self._kept_along(path, leaf.shape, flags)]
                total += int(np.prod(left)) * leaf.dtype.itemsize
        return total

    def expected_macs(self, gates: Mapping[str, jax.Array]) -> jax.Array:
        """:meth:`macs` when each unit is kept with a probability, differentiable.

        Args:
            gates: for each group, by name, float[size]; groups that are not named are kept. Units are independent.
        """
        by_group = [jnp.asarray(gates.get(group.name, np.ones(group.size, np.float32))) for group in self._groups]
        total = jnp.zeros(())
        for product in self.products:
            work: Any = product.macs
            for axis in product.axes:
                work = work * _share(axis, by_group, jnp)
            total = total + work
        return total

    def expected_bytes(self, gates: Mapping[str, jax.Array]) -> jax.Array:
        """:meth:`bytes` when each unit is kept with a probability, differentiable; ``gates`` as there."""
        total = jnp.zeros(())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                continue
            along: list[Any] = [np.ones(d, np.float32) for d in leaf.shape]
            for group, member in self._members.get(jax.tree_util.keystr(path), ()):
                if group.name in gates:
                    gate = jnp.append(jnp.asarray(gates[group.name]), 1.0)
                    along[member.axis] = along[member.axis] * gate[member.unit_of]
            size: Any = float(leaf.dtype.itemsize)
            for values in along:
                size = size * values.sum()
            total = total + size
        return total

    # -- to look at --

    def table(self) -> Sheet:
        """The groups as a table: ``rich.print(groups.table())``."""
        return groups_sheet(self._rows(), self.macs(), self.bytes())

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, highlight=False)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def draw(self, path: str) -> None:
        """Draws which parameters each group ties, along which axes.

        Args:
            path: where the drawing goes; its ending says in which format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: Matplotlib is not installed (it comes with ``jaxinfer[experiments]``).
        """
        draw_groups(self._rows(), path)

    def _rows(self) -> list[GroupRow]:
        macs, size = self.macs(), self.bytes()
        rows = []
        for group in self._groups:
            without = {group.name: np.zeros(group.size, bool)}
            members = tuple((m.name, m.axis) for m in group.members)
            gone = macs - self.macs(without), size - self.bytes(without)
            rows.append(GroupRow(group.name, group.kind, group.size, members, *gone))
        return rows

    def _flags(self, kept: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if unknown := [name for name in kept if name not in self.named]:
            raise KeyError(f"no group {unknown[0]!r}; there are {', '.join(self.named)}")
        flags = {}
        for group in self._groups:
            flag = np.asarray(kept.get(group.name, np.ones(group.size, bool)), bool)
            if flag.shape != (group.size,):
                raise ValueError(
                    f"what is kept of {group.name!r} is bool{list(flag.shape)}, but the group has {group.size} units"
                )
            flags[group.name] = flag
        return flags

    def _kept_along(self, path: Any, shape: Sequence[int], flags: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """For each axis of a leaf, which indices are kept."""
        along = [np.ones(d, bool) for d in shape]
        for group, member in self._members.get(jax.tree_util.keystr(path), ()):
            along[member.axis] &= np.append(flags[group.name], True)[member.unit_of]
        return along


def _share(axis: ProductAxis, gates: Sequence[Any], xp: Any) -> Any:
    """The mean over an axis of whether (or how probably) all units of an index are kept."""
    kept: Any = np.ones(axis.groups.shape)
    for group in np.unique(axis.groups[axis.groups >= 0]):
        here = axis.groups == group
        kept = kept * xp.where(here, gates[group][np.where(here, axis.units, 0)], 1)
    return kept.prod(axis=1).mean()


def _struct(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else leaf
