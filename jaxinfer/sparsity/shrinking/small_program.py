"""A program without the slices of its parameters that masks removed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Graph
from jaxinfer.graph.retrace import Program, Static, is_data, split
from jaxinfer.sparsity.errors import ShrinkError
from jaxinfer.sparsity.shrinking.plan import Parameter
from jaxinfer.sparsity.shrinking.replay import Replay, replay
from jaxinfer.sparsity.shrinking.report import ShrinkReport
from jaxinfer.sparsity.shrinking.slices import Undefined, whole


class Shrunk:
    """A program without the slices that masks removed; called like the whole one, with the small parameters.

    It is traced anew for each kind of arguments, so it takes any batch size that the whole program takes, and composes
    with ``jit``, ``grad``, ``vmap``, ``scan`` and ``optimize`` like any function.

    Attributes:
        masks: masks of the small parameters, a tree like them: what is masked but could not go. None for leaves that
            keep everything.
        report: what went and what stayed.
        kept: for each parameter by name, for each axis, the slices of the whole parameter that are left.
    """

    def __init__(self, program: Program, parameters: Sequence[Parameter], masks: Any, report: ShrinkReport):
        self._program = program
        self._parameters = tuple(parameters)
        self._jit = jax.jit(self._run, static_argnums=1)
        self.masks = masks
        self.report = report
        self.kept = {
            p.name: tuple(np.arange(n) if k is None else k for n, k in zip(p.shape, p.keep)) for p in self._parameters
        }
        functools.update_wrapper(self, program.fun, updated=())

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The whole function's results.

        Raises:
            ValueError: if the parameters are not of the small shapes.
            ShrinkError: if the whole program does something for these arguments that it did not for those it was shrunk
                for, with slices that were left out.
        """
        self._check(params)
        arrays, structure = split((params, args, kwargs))
        try:
            return self._jit(arrays, structure)
        except Undefined as error:
            raise ShrinkError(
                f"for arguments of these shapes the program needs {error}, which nothing depended on in the call it "
                "was shrunk for, so it was left out: shrink it with such arguments"
            ) from error

    def explain(self) -> str:
        """What went, what stayed, and why, as text."""
        return str(self.report)

    def __repr__(self) -> str:
        return f"Shrunk({self.report.small:,} of {self.report.size:,} entries)"

    def _check(self, params: Any) -> None:
        leaves = [x for x in jax.tree.leaves(params) if is_data(x)]
        if len(leaves) != len(self._parameters):
            raise ValueError(f"expected {len(self._parameters)} arrays of parameters, got {len(leaves)}")
        for p, x in zip(self._parameters, leaves):
            if tuple(np.shape(x)) != p.small:
                why = ", as in the whole program" if tuple(np.shape(x)) == p.shape else ""
                raise ValueError(f"{p.name} has the shape {tuple(np.shape(x))}{why}; the small one is {p.small}")

    def _run(self, arrays: Sequence[Any], structure: Static) -> Any:
        graph, tree = self._program.trace(arrays, structure, keep_custom=True)
        results = replayed(graph, Replay(), self._parameters, arrays)
        return jax.tree.unflatten(tree, results)


def replayed(graph: Graph, domain: Replay, parameters: Sequence[Parameter], arrays: Sequence[Any]) -> list[Any]:
    """The results of a program for small parameters and further arguments."""
    count = len(parameters)
    values = [p.value(jnp.asarray(x), i) if p.is_plain else x for i, (p, x) in enumerate(zip(parameters, arrays))]
    others = [whole(jnp.asarray(x)) if _is_plain(n.aval) else x for x, n in zip(arrays[count:], graph.inputs[count:])]
    return replay(graph, domain, [*values, *others])


def _is_plain(aval: Any) -> bool:
    return isinstance(getattr(aval, "dtype", None), np.dtype)
