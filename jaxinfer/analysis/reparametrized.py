"""Programs some of whose parameters are held in another form: two factors, integers."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from jaxinfer.analysis.weights import OnWeights, Weights, run_on
from jaxinfer.graph import Graph
from jaxinfer.graph.retrace import Program, Static, is_data, split


class Reparametrized(ABC):
    """Called like the original, with the new parameters; it is an ordinary function of an ordinary pytree.

    It is traced anew for each kind of arguments, so it takes any batch size the original takes.

    Attributes:
        program: the original.
        names: key paths of the parameters.
    """

    form: ClassVar[type]
    """What stands in the place of a parameter: a pytree that knows the parameter's ``dtype``."""

    def __init__(self, program: Program, names: Sequence[str]):
        self.program, self.names = program, tuple(names)
        self._jit = jax.jit(self._run, static_argnums=2)
        functools.update_wrapper(self, program.fun, updated=())

    @abstractmethod
    def domain(self, graph: Graph) -> OnWeights:
        """What runs a trace of the program and meets the new parameters where products read them."""

    @classmethod
    def is_held(cls, x: Any) -> bool:
        """Whether a node of a tree stands in the place of a parameter."""
        return isinstance(x, cls.form)

    def values(self, params: Any) -> list[Any]:
        """The arrays among the parameters, and what stands in the place of others.

        Raises:
            ValueError: there are not as many as the program has.
        """
        leaves = jax.tree.leaves(params, is_leaf=self.is_held)
        found = [x for x in leaves if self.is_held(x) or is_data(x)]
        if len(found) != len(self.names):
            raise ValueError(f"expected {len(self.names)} parameters, got {len(found)}")
        return found

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        values = self.values(params)
        types = iter(self.types(values))
        whole = jax.tree.map(
            lambda x: next(types) if self.is_held(x) or is_data(x) else x, params, is_leaf=self.is_held
        )
        arrays, static = split((whole, args, kwargs))
        return self._jit(values, arrays[len(values) :], static)

    def types(self, values: Sequence[Any]) -> list[Any]:
        """The values, with the types of whole arrays for what stands in their place."""
        pairs = zip(self.program.shapes, values, strict=True)
        return [jax.ShapeDtypeStruct(s, x.dtype) if self.is_held(x) else x for s, x in pairs]

    def trace(self, values: Sequence[Any], others: Sequence[Any], static: Static) -> tuple[Graph, Any]:
        """The original for such a call, and the structure of its results."""
        return self.program.trace([*self.types(values), *others], static, keep_custom=True)

    def _run(self, values: Sequence[Any], others: Sequence[Any], static: Static) -> Any:
        graph, tree = self.trace(values, others, static)
        inputs = [Weights.of(i, x) if self.is_held(x) else x for i, x in enumerate(values)]
        return jax.tree.unflatten(tree, run_on(graph, self.domain(graph), [*inputs, *others]))
