"""The Laplacian Σᵢ ∂²f/∂xᵢ², computed forward in one pass over the graph.

Along every edge flow a value, its Jacobian and its Laplacian. For y = f(x) it is
L(y) = Σₐ fₐ L(xₐ) + Σₐᵦ fₐᵦ Σᵢ Jᵢ(xₐ) Jᵢ(xᵦ), so that second derivatives meet rows of the Jacobian only in sums, and no Hessian is formed. The Jacobian is kept as
sparse as it is; see `laplacian_blocks`.

Reference: R. Li et al., A computational framework for neural network-based variational Monte Carlo with Forward
Laplacian, Nature Machine Intelligence 6, 2024.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation import (
    laplacian_control,
    laplacian_elementwise,
    laplacian_moves,
    laplacian_opaque,
    laplacian_products,
)
from jaxinfer.differentiation.laplacian_blocks import identity
from jaxinfer.differentiation.laplacian_terms import Term, Triple, is_active, primal
from jaxinfer.graph import Graph, Node, interpret, trace
from jaxinfer.graph.emit import Emit


@dataclass(frozen=True)
class LaplacianReport:
    """How a Laplacian is computed.

    Attributes:
        inputs: number of inputs that are differentiated.
        nodes: operations that values depending on them go through, bodies of loops counted once.
        fallbacks: (operation, the user's line) -> how often JAX's own derivative of an operation is taken twice, for
            each row of the Jacobian, because it has no rule here or the user gave it a derivative.
    """

    inputs: int
    nodes: int
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.inputs} inputs, {self.nodes} operations depend on them"]
        for (op, line), count in sorted(self.fallbacks.items()):
            lines.append(f"JAX's own derivative, twice for each row: {op} ×{count} at {line or 'an unknown line'}")
        return "\n".join(lines)


class Forward(Emit):
    """The domain of values with Jacobians and Laplacians; what does not depend on the inputs is an array."""

    table: ClassVar[Mapping[str, Callable[..., Sequence[Any]]]] = {
        **laplacian_elementwise.RULES,
        **laplacian_moves.RULES,
        **laplacian_products.RULES,
    }

    def __init__(self) -> None:
        super().__init__({})
        self.nodes: set[Node] = set()
        self.fallbacks: dict[Node, None] = {}

    def bind(self, node: Node, *values: Any) -> Sequence[Any]:
        """The operation itself on arrays."""
        return Emit.default(self, node, *values)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if not any(map(is_active, inputs)):
            return self._known(node, *inputs)
        self.nodes.add(node)
        if not any(hasattr(a, "dtype") and _jax.is_inexact(a.dtype) for a in node.avals):
            return self.bind(node, *map(primal, inputs))
        with _jax.at_source(node.source, node.context):
            if laplacian_opaque.is_slogdet(node):
                return laplacian_products.slogdet(self, node, *inputs)
            return self.table.get(node.op, type(self).opaque)(self, node, *inputs)

    def _known(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """Indices made of known numbers are computed now, so that it is known which elements they pick."""
        small = all(hasattr(a, "dtype") and a.dtype in (np.int32, np.int64, bool) for a in node.avals)
        if small and node.is_pure and node.inputs and all(map(_jax.is_concrete, inputs)):
            with jax.ensure_compile_time_eval():
                return self.bind(node, *inputs)
        return self.bind(node, *inputs)

    def opaque(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """JAX's own derivative of the operation, twice, for each row of the Jacobian."""
        found = laplacian_opaque.pointwise_custom(self, node, inputs)
        if found is not None:
            return found
        self.fallbacks[node] = None
        return laplacian_opaque.opaque(self, node, *inputs)

    def jointly(self, value: Any, fun: Callable[..., Any], *inputs: Any, batched: bool = False) -> Any:
        """A value that is linear in several operands together; `batched`: `fun` takes rows as leading axes itself."""
        return laplacian_opaque.jointly(value, fun, inputs, batched)

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(laplacian_control.scan, Emit.scan, node, *inputs)

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(laplacian_control.while_loop, Emit.while_loop, node, *inputs)

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        return self._control(laplacian_control.branches, Emit.cond, node, primal(index), *inputs)

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if not any(map(is_active, inputs)):
            return Emit.remat(self, node, *inputs)
        return interpret(node.params["body"], self, *inputs)

    def _control(self, rule: Callable[..., Any], inactive: Callable[..., Any], node: Node, *inputs: Any) -> Any:
        if not any(map(is_active, inputs)):
            return inactive(self, node, *inputs)
        self.nodes.add(node)
        with _jax.at_source(node.source, node.context):
            return rule(self, node, *inputs)


class Laplacian:
    """The Laplacian of a function as a function of the same arguments; made by :func:`laplacian`."""

    def __init__(self, fun: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, has_value: bool):
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        self._has_aux = has_aux
        self._has_value = has_value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Laplacian; `(value, laplacian)` with `has_value`, and the auxiliary output behind it with `has_aux`."""
        results, tree, aux, _, _ = self._run(args, kwargs)
        value = jax.tree.unflatten(tree, [primal(r) for r in results])
        lap = jax.tree.unflatten(tree, [r.curvature if is_active(r) else jnp.zeros_like(r) for r in results])
        found = (value, lap) if self._has_value else lap
        return (found, aux) if self._has_aux else found

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def explain(self, *args: Any, **kwargs: Any) -> LaplacianReport:
        """What is computed for such arguments, and for which operations JAX's own derivatives are taken."""
        report: list[LaplacianReport] = []

        def walk(args: Any, kwargs: Any) -> None:
            _, _, _, count, domain = self._run(args, kwargs)
            lines = Counter((node.op, _jax.source_line(node.source)) for node in domain.fallbacks)
            report.append(LaplacianReport(count, len(domain.nodes), lines))

        jax.eval_shape(walk, args, kwargs)
        return report[0]

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The program of the function that is walked, with custom derivatives kept."""
        return self._traced(args, kwargs)[0]

    def _traced(self, args: Sequence[Any], kwargs: Any) -> tuple[Graph, list[Any], list[tuple[int, int]], Any]:
        count = len(args)
        for number in self._argnums:
            if not -count <= number < count:
                raise ValueError(f"laplacian: argnums names argument {number}, the call has {count}")
        numbers = {n % count for n in self._argnums}
        leaves: list[Any] = []
        places: list[tuple[int, int]] = []
        first = 0
        for number, arg in enumerate(args):
            for leaf in jax.tree.leaves(arg):
                if number in numbers:
                    _require_real(leaf, number)
                    places.append((len(leaves), first))
                    first += math.prod(jnp.shape(leaf))
                leaves.append(leaf)
        leaves += jax.tree.leaves(kwargs)
        structure = jax.tree.structure((tuple(args), kwargs))
        out: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            args, kwargs = jax.tree.unflatten(structure, leaves)
            result, aux = self._fun(*args, **kwargs) if self._has_aux else (self._fun(*args, **kwargs), ())
            results, tree = jax.tree.flatten(result)
            extra, aux_tree = jax.tree.flatten(aux)
            out.append((tree, len(results), aux_tree))
            return [*map(jnp.asarray, results), *extra]

        # What the function closes over may be someone's tracers: it goes in as further arguments.
        jaxpr, consts = _jax.without_constvars(_jax.make_jaxpr(flat, [_jax.abstract(x) for x in leaves]))
        places = [(place + len(consts), first) for place, first in places]
        return trace(_jax.close_jaxpr(jaxpr), keep_custom=True), [*consts, *leaves], places, out[-1]

    def _run(self, args: Sequence[Any], kwargs: Any) -> tuple[list[Any], Any, Any, int, Forward]:
        graph, leaves, places, (tree, count, aux_tree) = self._traced(args, kwargs)
        for aval in graph.out_avals[:count]:
            if not _jax.is_inexact(aval.dtype):
                raise TypeError(f"laplacian takes functions of real or complex values; a result is {aval.str_short()}")
        inputs, total = list(leaves), 0
        for place, first in places:
            value = jnp.asarray(leaves[place])
            total = first + value.size
            inputs[place] = (
                Triple(value, (Term(None, identity(value.shape, value.dtype, first)),)) if value.size else value
            )
        domain = Forward()
        results = interpret(graph, domain, *inputs)
        aux = jax.tree.unflatten(aux_tree, [primal(r) for r in results[count:]])
        return results[:count], tree, aux, total, domain


def _require_real(leaf: Any, number: int) -> None:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"laplacian differentiates with respect to real inputs; argument {number} holds {dtype}")


def laplacian(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, *, has_aux: bool = False, has_value: bool = False
) -> Laplacian:
    """The Laplacian Σᵢ ∂²f/∂xᵢ² of a function: the trace of `jax.hessian`, without the Hessian.

    Args:
        fun: a function of arrays or pytrees of them; results are real or complex, of any shape.
        argnums: which arguments are differentiated: real arrays or pytrees of them. The sum is over all their elements.
        has_aux: whether `fun` returns a pair whose second part is handed through.
        has_value: whether to return `(value, laplacian)`.

    Returns:
        A function of the same arguments. Its result has the structure and shapes of `fun`'s. `.explain(*args)` says
        where JAX's own derivatives are taken. It composes with `jax.jit`, `vmap`, `grad` and itself.

    Raises:
        TypeError: when called with differentiated arguments that are not real, or if results are integers.
        ValueError: when called with fewer arguments than `argnums` names.

    Example:
        >>> import jax.numpy as jnp
        >>> float(laplacian(lambda x: jnp.sum(x**2))(jnp.ones(3)))
        6.0
    """
    return Laplacian(fun, argnums, has_aux, has_value)
