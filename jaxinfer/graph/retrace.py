"""Functions of parameters that now have other shapes: traced as if they had the old ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph.node import Graph
from jaxinfer.graph.trace import trace


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """What of a call is structure: the tree of arguments, and those of its leaves that are no arrays."""

    tree: Any
    others: tuple[Any, ...]


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text, keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def result_names(tree: Any) -> list[str]:
    """What messages call the results of a program, by their structure."""
    places = jax.tree.unflatten(tree, range(tree.num_leaves))
    return ["result" + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(places)[0]]


def is_data(leaf: Any) -> bool:
    """Whether a leaf of a call is an array or a number."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or type(leaf) in (int, float, complex)


def split(call: Any) -> tuple[list[Any], Static]:
    """The arrays among the leaves of a call, and the rest of it."""
    leaves, tree = jax.tree.flatten(call)
    return [x for x in leaves if is_data(x)], Static(tree, tuple(None if is_data(x) else (x,) for x in leaves))


def merge(arrays: Sequence[Any], static: Static) -> Any:
    """The call that :func:`split` took apart, with other arrays."""
    rest = iter(arrays)
    return jax.tree.unflatten(static.tree, [next(rest) if x is None else x[0] for x in static.others])


class Parameters:
    """A tree of parameters as the arrays in it.

    Attributes:
        names: their key paths.
        arrays: the arrays and numbers among its leaves, as they are.
    """

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self._leaves = [leaf for _, leaf in leaves]
        self.names = [leaf_name(path) for path, leaf in leaves if is_data(leaf)]
        self.arrays = [leaf for leaf in self._leaves if is_data(leaf)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each array."""
        return [np.shape(x) for x in self.arrays]

    def with_arrays(self, values: Iterable[Any]) -> Any:
        """The tree with other values in place of its arrays."""
        rest = iter(values)
        return jax.tree.unflatten(self._structure, [next(rest) if is_data(x) else x for x in self._leaves])


class Program:
    """A function of a tree of parameters and further arguments, traced at the shapes of the whole parameters.

    Args:
        fun: the function.
        shapes: shape of each array among the leaves of its first argument.
        error: what to raise for programs that cannot be run on other parameters.
    """

    def __init__(self, fun: Callable[..., Any], shapes: Sequence[tuple[int, ...]], error: type[Exception]):
        self.fun = fun
        self.shapes = tuple(shapes)
        self._error = error

    def trace(self, arrays: Sequence[Any], static: Static, *, keep_custom: bool) -> tuple[Graph, Any]:
        """The program for a call, and the structure of its results.

        Args:
            arrays: arrays or types of the call's arguments, the first of which are parameters of any shape.
            static: the rest of the call.
            keep_custom: keep functions with derivatives of their own as they are.
        """
        out: list[Any] = []

        def flat(*values: Any) -> list[Any]:
            params, args, kwargs = merge(values, static)
            leaves, tree = jax.tree.flatten(self.fun(params, *args, **kwargs))
            out[:] = [tree]
            return leaves

        avals = [_jax.abstract(x) for x in arrays]
        whole = [jax.ShapeDtypeStruct(s, a.dtype) for s, a in zip(self.shapes, avals)]
        closed = _jax.make_jaxpr(flat, [*whole, *avals[len(whole) :]])
        if _jax.uses_refs(closed):
            raise self._error("the program reads or writes Refs: pass their values as arrays")
        return trace(closed, keep_custom=keep_custom), out[0]
