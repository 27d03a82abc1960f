"""A function of a tree of parameters, as a program over the whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer import _jax
from jaxinfer.graph import Graph, trace


class ShrinkError(Exception):
    """A program cannot be shrunk, or a shrunk program not be used like this."""


@dataclass(frozen=True)
class Structure:
    """What of a call is no array: the tree of its arguments, and those of its leaves that are something else."""

    tree: Any
    others: tuple[Any, ...]


def is_data(leaf: Any) -> bool:
    """Whether a leaf of a call is an array or a number; flags and names are structure."""
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or type(leaf) in (int, float, complex)


def split_call(call: Any) -> tuple[list[Any], Structure]:
    """The arrays of a call, and everything else."""
    leaves, tree = jax.tree.flatten(call)
    others = tuple(None if is_data(x) else (x,) for x in leaves)
    return [x for x in leaves if is_data(x)], Structure(tree, others)


def join_call(arrays: Sequence[Any], structure: Structure) -> Any:
    """The inverse of :func:`split_call`."""
    rest = iter(arrays)
    return jax.tree.unflatten(structure.tree, [next(rest) if x is None else x[0] for x in structure.others])


class WholeProgram:
    """A function of a tree of parameters and further arguments, traced at the shapes of the whole parameters.

    Args:
        fun: the function.
        shapes: shape of each array among the leaves of its first argument.
    """

    def __init__(self, fun: Callable[..., Any], shapes: Sequence[tuple[int, ...]]):
        self.fun = fun
        self.shapes = tuple(shapes)

    def trace(self, arrays: Sequence[Any], structure: Structure, *, keep_custom: bool) -> tuple[Graph, Any]:
        """The program for a call, and a tree of the results' names in place of the results.

        Args:
            arrays: arrays or types of the call's arguments, the first of which are parameters of any shape.
            structure: the rest of the call.
            keep_custom: keep functions with derivatives of their own as they are.

        Raises:
            ShrinkError: if the program uses Refs.
        """
        out: list[Any] = []

        def flat(*values: Any) -> list[Any]:
            params, args, kwargs = join_call(values, structure)
            found, tree = jax.tree_util.tree_flatten_with_path(self.fun(params, *args, **kwargs))
            names = ["result" + jax.tree_util.keystr(path) for path, _ in found]
            out[:] = [jax.tree.unflatten(tree, names)]
            return [leaf for _, leaf in found]

        avals = [_jax.abstract(x) for x in arrays]
        whole = [jax.ShapeDtypeStruct(s, a.dtype) for s, a in zip(self.shapes, avals)]
        closed = _jax.make_jaxpr(flat, [*whole, *avals[len(whole) :]])
        if _jax.uses_refs(closed):
            raise ShrinkError("a program that reads or writes Refs cannot be shrunk: pass their values as arrays")
        return trace(closed, keep_custom=keep_custom), out[0]
