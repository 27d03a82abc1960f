"""Parameters as a flat list: which of them are trained, which can be pruned, what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph.retrace import leaf_name


@dataclass(frozen=True, eq=False)
class Leaves:
    """What is known of a tree of parameters before it is trained.

    Attributes:
        treedef: its structure.
        paths: key path of each leaf.
        avals: shape and dtype of each leaf, None for what is no array.
        trained: whether a leaf is trained: floating-point and complex arrays. Of a Flax variables dictionary, those of
            the collection ``"params"`` only.
        static: the leaves that are no arrays (numbers, functions), by position. They stay as they are.
    """

    treedef: Any
    paths: tuple[Any, ...]
    avals: tuple[Any, ...]
    trained: tuple[bool, ...]
    static: Mapping[int, Any]

    @staticmethod
    def of(params: Any) -> Leaves:
        """The leaves of a tree."""
        found, treedef = jax.tree_util.tree_flatten_with_path(params)
        collections = is_variables(params)

        def is_trained(path: Any, leaf: Any) -> bool:
            inside = not collections or _key(path[0]) == "params"
            return inside and _is_array(leaf) and _jax.is_inexact(leaf.dtype)

        return Leaves(
            treedef,
            tuple(path for path, _ in found),
            tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else None for _, x in found),
            tuple(is_trained(*item) for item in found),
            {i: x for i, (_, x) in enumerate(found) if not _is_array(x)},
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Each leaf's key path as text."""
        return tuple(map(leaf_name, self.paths))

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where a leaf stands in the list, by name."""
        return {name: i for i, name in enumerate(self.names)}

    @property
    def total_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.bytes(i) for i in range(len(self.avals)))

    def size(self, index: int) -> int:
        """Number of entries of a leaf."""
        return int(np.prod(self.avals[index].shape, dtype=np.int64))

    def bytes(self, index: int) -> int:
        """Bytes of a leaf."""
        aval = self.avals[index]
        return 0 if aval is None or _jax.is_extended(aval.dtype) else self.size(index) * aval.dtype.itemsize

    def is_prunable(self, index: int) -> bool:
        """Whether a leaf is one that masks may be learned for: trained, real and not empty."""
        aval = self.avals[index]
        return self.trained[index] and jnp.issubdtype(aval.dtype, jnp.floating) and self.size(index) > 0

    def split(self, params: Any) -> tuple[Any, list[Any]]:
        """The trained leaves as a tree (None elsewhere), and the other arrays as a list."""
        leaves = self.treedef.flatten_up_to(params)
        trained = self.treedef.unflatten([x if t else None for x, t in zip(leaves, self.trained)])
        return trained, [leaves[i] for i in self.others]

    @cached_property
    def others(self) -> tuple[int, ...]:
        """Positions of the arrays that are not trained."""
        return tuple(i for i, t in enumerate(self.trained) if not t and i not in self.static)

    def merge(self, trained: Any, rest: Sequence[Any]) -> Any:
        """The inverse of :meth:`split`."""
        some, others = iter(jax.tree.leaves(trained)), iter(rest)

        def one(i: int) -> Any:
            return next(some) if self.trained[i] else self.static[i] if i in self.static else next(others)

        return self.treedef.unflatten([one(i) for i in range(len(self.trained))])

    def whole(self, arrays: Sequence[Any]) -> Any:
        """A tree from all its arrays."""
        found = iter(arrays)
        return self.treedef.unflatten(
            [self.static[i] if i in self.static else next(found) for i in range(len(self.paths))]
        )

    def multiply(self, trained: Any, factors: Mapping[int, Any], straight: bool = False) -> Any:
        """Trained leaves times factors that broadcast to them, by position; each keeps its dtype.

        Args:
            trained: the first result of :meth:`split`.
            factors: by the position of the leaf.
            straight: let derivatives pass as if nothing had been multiplied (the straight-through estimator).
        """
        places = [i for i, t in enumerate(self.trained) if t]
        treedef: Any
        leaves, treedef = jax.tree.flatten(trained)

        def one(i: int, x: Any) -> Any:
            if i not in factors:
                return x
            product = x * factors[i].astype(x.dtype)
            return x + jax.lax.stop_gradient(product - x) if straight else product

        return treedef.unflatten([one(i, x) for i, x in zip(places, leaves)])

    def masked(self, params: Any, masks: Any) -> Any:
        """Parameters with zeros where masks are False; ``masks`` is as they are, with None for whole leaves."""
        leaves = self.treedef.flatten_up_to(params)
        flags = self.treedef.flatten_up_to(masks)
        return self.treedef.unflatten(
            [x if m is None else jnp.where(m, x, jnp.zeros((), x.dtype)) for x, m in zip(leaves, flags)]
        )

    def choose(self, prune: Callable[[str, Any], bool] | None, readable: frozenset[int] | None = None) -> list[int]:
        """Positions of the leaves to prune: those the user names, else all with two axes or more.

        Args:
            prune: what the user says of a name and a type.
            readable: positions of the only ones that can be; None: of all.

        Raises:
            ValueError: none is left, or the user names one that cannot be.
        """
        able = [i for i in range(len(self.avals)) if self.is_prunable(i)]
        if prune is None:
            found = [i for i in able if len(self.avals[i].shape) >= 2 and (readable is None or i in readable)]
        else:
            found = [i for i in able if prune(self.names[i], self.avals[i])]
            if lost := [self.names[i] for i in found if readable is not None and i not in readable]:
                raise ValueError(f"no product reads {lost[0]} as it is: nothing is known of its inputs, leave it out")
        if found:
            return found
        why = "prune says no to every parameter" if prune is not None else "no parameter has two axes or more"
        raise ValueError(f"there is nothing to prune: {why} (of {', '.join(self.names[:8]) or 'none'})")


def is_variables(params: Any) -> bool:
    """Whether a tree is a Flax variables dictionary: a collection ``"params"`` beside others."""
    return isinstance(params, Mapping) and "params" in params and len(params) > 1


def collection(path: Any) -> Any:
    """The collection that a leaf of a Flax variables dictionary belongs to."""
    return _key(path[0])


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _key(entry: Any) -> Any:
    return getattr(entry, "key", getattr(entry, "name", None))
