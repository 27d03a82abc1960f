"""A call of a function whose sparse derivative is wanted, as programs of its tangents and of its cotangents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation.forward import Dual, Forward
from jaxinfer.differentiation.program import Traced
from jaxinfer.differentiation.reverse import vjp as run_vjp
from jaxinfer.differentiation.rules import filled
from jaxinfer.graph import Graph, interpret, run, trace_function


class Program:
    """A call of a function as a program, its tangents, and its cotangents.

    Args:
        fun: the function.
        args, kwargs: of the call; arrays among them are inputs, everything else is used as it is.
        argnums: positions of the arguments to differentiate.
        has_aux: whether the function returns a pair.

    Attributes:
        traced: the function over (chosen leaves, other arrays).
        chosen: how many leaves are differentiated.
    """

    def __init__(self, fun: Callable[..., Any], call: Call, has_aux: bool):
        self.call = call
        self.traced = Traced(call.bound(fun), (call.chosen, call.others), {}, (0, 1), has_aux)
        self.chosen = len(call.chosen)

    @property
    def outputs(self) -> Sequence[Any]:
        """Avals of the leaves of the result."""
        return self.traced.graph.out_avals[: self.traced.outputs]

    @property
    def inputs(self) -> Sequence[Any]:
        """Avals of the leaves that are differentiated."""
        first = self.traced.captured
        return [n.aval for n in self.traced.graph.inputs[first : first + self.chosen]]

    def push(self, borrowed: Any, operands: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Tangents of the result from tangents of the chosen leaves."""
        first = self.traced.captured
        moving = [*[None] * first, *tangents, *[None] * (len(operands) - first - self.chosen)]
        found = interpret(self.traced.graph, Forward({}, borrowed), *map(Dual, operands, moving))
        return [filled(d.tangent, d.primal) for d in found[: self.traced.outputs]]

    def pull(self, borrowed: Any, operands: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        """Cotangents of the chosen leaves from cotangents of the result."""
        first, graph = self.traced.captured, self.traced.graph
        active = [first <= i < first + self.chosen for i in range(len(operands))]
        outs, back = run_vjp(graph, {}, active, self.traced.useful, *operands, borrowed=borrowed)
        found = back([*cotangents, *[None] * (len(outs) - self.traced.outputs)])
        return [filled(ct, x) for ct, x, a in zip(found, operands, active) if a]

    def aux(self, operands: Sequence[Any]) -> list[Any]:
        """Arrays of the auxiliary part."""
        if len(self.traced.graph.outputs) == self.traced.outputs:
            return []
        return run(self.traced.graph, {}, *operands)[self.traced.outputs :]

    def linear_program(self, reverse: bool) -> tuple[Graph, list[bool]]:
        """The program of tangents, or of cotangents, and which of its inputs they are."""
        count, move = len(self.traced.operands), self.pull if reverse else self.push

        def fun(*values: Any) -> list[Any]:
            return move(Counter(), values[:count], values[count:])

        seeds = self.outputs if reverse else self.inputs
        graph = trace_function(fun, *(n.aval for n in self.traced.graph.inputs), *seeds)
        return graph, [i >= count for i in range(len(graph.inputs))]


class Call:
    """Arguments of a call, taken apart into what is differentiated, other arrays, and the rest."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any], argnums: Sequence[int]):
        trees = [(args[i] if i in argnums else None) for i in argnums]
        self.chosen, self.chosen_tree = jax.tree.flatten(trees)
        rest = ([None if i in argnums else a for i, a in enumerate(args)], kwargs)
        leaves, self._rest_tree = jax.tree.flatten(rest)
        self._is_array = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
        self.others = [x for x, is_array in zip(leaves, self._is_array) if is_array]
        self._static = [x for x, is_array in zip(leaves, self._is_array) if not is_array]
        self._argnums = argnums

    @property
    def key(self) -> Any:
        """Equal for calls with the same kinds of arrays and the same of everything else."""
        static = tuple((type(x), x if _is_hashable(x) else id(x)) for x in self._static)
        types = tuple(_jax.type_key(x) for x in (*self.chosen, *self.others))
        return (self.chosen_tree, self._rest_tree, tuple(self._is_array), types, static, _jax.settings_key())

    def bound(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The function of (chosen leaves, other arrays)."""

        def call(chosen: Sequence[Any], others: Sequence[Any]) -> Any:
            arrays, static = iter(others), iter(self._static)
            leaves = [next(arrays) if is_array else next(static) for is_array in self._is_array]
            args, kwargs = jax.tree.unflatten(self._rest_tree, leaves)
            for i, arg in zip(self._argnums, jax.tree.unflatten(self.chosen_tree, chosen)):
                args[i] = arg
            return fun(*args, **kwargs)

        return call


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
