"""The Laplacian Σᵢ ∂²f/∂xᵢ², computed forward in one pass over the graph.

Along every edge flow a value, its Jacobian and its Laplacian. For y = f(x) it is
L(y) = Σₐ fₐ L(xₐ) + Σₐᵦ fₐᵦ Σᵢ Jᵢ(xₐ) Jᵢ(xᵦ), so that second derivatives meet rows of the Jacobian only in sums, and no
Hessian is formed. The Jacobian is kept as sparse as it is; see `blocks`.

Reference: R. Li et al., A computational framework for neural network-based variational Monte Carlo with Forward
Laplacian, Nature Machine Intelligence 6, 2024.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.differentiation.checks import check_inputs
from jaxinfer.differentiation.laplacian import control, determinants, elementwise, moves, opaque, products, sums
from jaxinfer.differentiation.laplacian.blocks import identity
from jaxinfer.differentiation.laplacian.terms import Term, Triple, is_active, primal
from jaxinfer.differentiation.program import Derivation, Traced
from jaxinfer.differentiation.transform import Derivative
from jaxinfer.graph import Node, interpret
from jaxinfer.graph.emit import Emit


class Forward(Emit):
    """The domain of values with Jacobians and Laplacians; what does not depend on the inputs is an array."""

    table: ClassVar[Mapping[str, Callable[..., Sequence[Any]]]] = {
        **elementwise.RULES,
        **moves.RULES,
        **sums.RULES,
        **products.RULES,
    }

    def __init__(self, borrowed: Counter[str]) -> None:
        super().__init__({})
        self._borrowed = borrowed
        self._counted: set[Node] = set()

    def bind(self, node: Node, *values: Any) -> Sequence[Any]:
        """The operation itself on arrays."""
        return Emit.default(self, node, *values)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if not any(map(is_active, inputs)):
            return self._known(node, *inputs)
        if not any(hasattr(a, "dtype") and _jax.is_inexact(a.dtype) for a in node.avals):
            return self.bind(node, *map(primal, inputs))
        with _jax.at_source(node.source, node.context):
            if (axis := opaque.slogdet_axis(node)) is not None:
                return determinants.slogdet(inputs[0], axis)
            return self.table.get(node.op, type(self).unknown)(self, node, *inputs)

    def _known(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """Indices made of known numbers are computed now, so that it is known which elements they pick."""
        small = all(hasattr(a, "dtype") and a.dtype in (np.int32, np.int64, bool) for a in node.avals)
        if small and node.is_pure and node.inputs and all(map(_jax.is_concrete, inputs)):
            with jax.ensure_compile_time_eval():
                return self.bind(node, *inputs)
        return self.bind(node, *inputs)

    def unknown(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """JAX's own derivative of the operation, twice, for each row of the Jacobian."""
        found = opaque.pointwise_custom(self, node, inputs)
        if found is not None:
            return found
        # Bodies of loops are walked several times.
        self._borrowed[node.op] += node not in self._counted
        self._counted.add(node)
        return opaque.opaque(self, node, *inputs)

    def jointly(self, value: Any, fun: Callable[..., Any], *inputs: Any, batched: bool = False) -> Any:
        """A value that is linear in several operands together; `batched`: `fun` takes rows as leading axes itself."""
        return opaque.jointly(value, fun, inputs, batched)

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(control.scan, Emit.scan, node, *inputs)

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(control.while_loop, Emit.while_loop, node, *inputs)

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        return self._control(control.branches, Emit.cond, node, primal(index), *inputs)

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if not any(map(is_active, inputs)):
            return Emit.remat(self, node, *inputs)
        return interpret(node.params["body"], self, *inputs)

    def _control(self, rule: Callable[..., Any], inactive: Callable[..., Any], node: Node, *inputs: Any) -> Any:
        if not any(map(is_active, inputs)):
            return inactive(self, node, *inputs)
        with _jax.at_source(node.source, node.context):
            return rule(self, node, *inputs)


def laplacian(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, has_value: bool = False
) -> Derivative:
    """A function that computes the Laplacian Σᵢ ∂²f/∂xᵢ²: the trace of `jax.hessian`, without the Hessian.

    Args:
        fun: a function of arrays or pytrees of them; results are real or complex, of any shape.
        argnums: which positional arguments to differentiate: real arrays or pytrees of them. The sum is over all their
            elements.
        has_aux: whether ``fun`` returns a pair, whose second part is passed on.
        has_value: whether to return the value as well.

    Returns:
        A function with ``fun``'s arguments that returns the Laplacian, with the structure and shapes of ``fun``'s
        result: ``laplacian``, or ``(value, laplacian)`` with ``has_value``; with ``has_aux`` a pair of that and the
        second part.

    Raises:
        TypeError: when called, if a chosen argument is not real, or a result has no derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxinfer import autoinfer
        >>> float(autoinfer.laplacian(lambda x: jnp.sum(x**2))(jnp.ones(3)))
        6.0
    """

    def finish(traced: Traced, values: Sequence[Any]) -> Any:
        count = len(traced.graph.outputs)
        lap = traced.unflatten(values[count:])
        found = (traced.unflatten(values[: traced.outputs]), lap) if has_value else lap
        return (found, traced.aux(values[traced.outputs : count])) if has_aux else found

    return Derivative(fun, "laplacian", argnums, has_aux, _program, finish, _check)


def _check(argument: Any) -> None:
    check_inputs(argument, "laplacian", holomorphic=False, allow_int=False)
    for leaf in jax.tree.leaves(argument):
        if jnp.issubdtype(_jax.aval_of(leaf).dtype, jnp.complexfloating):
            raise TypeError(
                "laplacian requires real-valued inputs, but got complex ones: write the function in terms of real and "
                "imaginary parts"
            )


def _program(traced: Traced) -> Derivation:
    for aval in traced.graph.out_avals[: traced.outputs]:
        if not _jax.has_tangent(aval):
            raise TypeError(f"laplacian requires real- or complex-valued outputs, but got {aval.str_short()}")
    return traced.derive(functools.partial(_values_and_laplacians, traced))


def _values_and_laplacians(traced: Traced, borrowed: Counter[str], *operands: Any) -> list[Any]:
    inputs, first = [], 0
    for active, value in zip(traced.active, operands):
        if active and value.size:
            block = identity(value.shape, value.dtype, first)
            inputs.append(Triple(value, (Term(None, block),)))
            first += math.prod(value.shape)
        else:
            inputs.append(value)
    results = interpret(traced.graph, Forward(borrowed), *inputs)
    laplacians = [r.curvature if is_active(r) else jnp.zeros_like(r) for r in results[: traced.outputs]]
    return [*map(primal, results), *laplacians]
