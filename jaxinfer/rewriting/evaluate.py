"""Evaluation one operation at a time: on the arrays as they are, over the real numbers, and over the integers.

These are the prover's instruments. :class:`OpByOp` runs each operation by itself, so that what is bit for bit equal
does not depend on how a compiler fuses the rest. :class:`Reals` and :class:`Integers` run a program of any
floating-point dtype with float64 or with whole numbers modulo 2**64 in place of its floats, mostly in NumPy, which
makes them an oracle independent of XLA. Narrowing casts that the program writes are functions of their own and still
round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Domain, Node, interpret
from jaxinfer.graph.emit import Emit
from jaxinfer.rewriting.numpy_operations import NUMPY, is_floating, narrows


class NotExact(Exception):
    """A program is no polynomial with whole coefficients, so it cannot be run over the integers."""


class Stepwise(Domain[Any]):
    """Control flow on concrete values: loops loop, branches are chosen."""

    def empty(self, aval: Any) -> Any:
        """The stacked outputs of a scan of no steps."""
        return np.zeros(aval.shape, aval.dtype)

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
        fixed, carry = inputs[:consts], list(inputs[consts : consts + carries])
        xs, length = inputs[consts + carries :], node.params["length"]
        order = range(length - 1, -1, -1) if node.params["reverse"] else range(length)
        rows: dict[int, list[Any]] = {}
        for i in order:
            out = interpret(body, self, *fixed, *carry, *(x[i] for x in xs))
            carry, rows[i] = out[:carries], out[carries:]
        if not length:
            return [*carry, *(self.empty(aval) for aval in node.avals[carries:])]
        return [*carry, *(_stack(column) for column in zip(*(rows[i] for i in range(length))))]

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body, carry = inputs[:n_cond], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]
        while np.all(interpret(node.params["cond"], self, *for_cond, *carry)[0]):
            carry = tuple(interpret(node.params["body"], self, *for_body, *carry))
        return carry

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        branches = node.params["branches"]
        return interpret(branches[int(np.clip(index, 0, len(branches) - 1))], self, *inputs)


class OpByOp(Stepwise, Emit):
    """Each primitive bound by itself, in its own dtype."""

    def __init__(self) -> None:
        super().__init__({})

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return interpret(node.params["body"], self, *inputs)


class Reals(Stepwise):
    """Every floating-point number is a float64, whatever dtype the program gives it."""

    number: ClassVar[Any] = np.float64

    def lifted(self, dtype: Any) -> Any:
        """The dtype that stands for ``dtype`` here."""
        if _jax.is_extended(dtype):
            return dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return np.dtype(np.complex128)
        return np.dtype(self.number) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)

    def lift(self, value: Any) -> Any:
        """An array of the program as a value of this domain."""
        dtype = _jax.aval_of(value).dtype
        return value if _jax.is_extended(dtype) else np.asarray(value).astype(self.lifted(dtype))

    def constant(self, node: Node) -> Any:
        return self.lift(node.value)

    def empty(self, aval: Any) -> Any:
        return np.zeros(aval.shape, self.lifted(aval.dtype))

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        compute = NUMPY.get(node.op) if _numpy_agrees(node) else None
        with np.errstate(all="ignore"):
            if compute is None:
                results = self._by_jax(node, *inputs)
            elif node.op == "split":
                results = compute(node, *inputs)
            else:
                results = [compute(node, *_together(node, self, inputs))]
            return [self._checked(node, i, y) for i, y in enumerate(results)]

    def _checked(self, node: Node, index: int, result: Any) -> Any:
        aval = node.avals[index]
        if _jax.is_extended(aval.dtype):
            return result
        result = np.asarray(result)
        if result.shape != aval.shape:
            raise AssertionError(f"{node!r} was evaluated to the shape {result.shape}")
        return result.astype(self.lifted(aval.dtype))

    def _by_jax(self, node: Node, *inputs: Any) -> Sequence[Any]:
        with jax.enable_x64(True):
            operands = [x if _is_key(x) else jnp.asarray(x) for x in inputs]
            if node.op in _SCATTERS:
                options = {k: node.params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
                return [_SCATTERS[node.op](*operands, node.params["dimension_numbers"], **options)]
            params = {name: self._param(node, value) for name, value in node.params.items()}
            return _jax.bind(node.primitive, operands, params)

    def _param(self, node: Node, value: Any) -> Any:
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            raise NotImplementedError(f"the prover cannot evaluate {node!r} over the reals: it holds a program")
        return self.lifted(value) if isinstance(value, np.dtype) else value


class Integers(Reals):
    """Every floating-point number is a whole number modulo 2**64.

    Two polynomials with whole coefficients that agree at random points are equal with high probability (Schwartz, 1980;
    Zippel, 1979), and no rounding blurs the comparison.
    """

    number: ClassVar[Any] = np.int64

    def lift(self, value: Any) -> Any:
        if jnp.issubdtype(_jax.aval_of(value).dtype, jnp.inexact):
            array = np.asarray(value).astype(np.complex128)
            if not np.all(array == np.rint(array.real)):
                raise NotExact("a constant is no whole number")
        return super().lift(value)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        avals = [*(v.aval for v in node.inputs), *node.avals]
        kinds = [jnp.result_type(a.dtype) for a in avals if not _jax.is_extended(a.dtype)]
        if any(jnp.issubdtype(k, jnp.complexfloating) for k in kinds):
            raise NotExact(f"{node.op} of complex numbers")
        if any(jnp.issubdtype(k, jnp.floating) for k in kinds) and not _is_ring_operation(node):
            raise NotExact(f"{node.op} is no ring operation")
        return super().default(node, *inputs)


# fmt: off
_RING = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "conv_general_dilated", "copy", "copy_p", "cumsum",
    "dot_general", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather", "iota", "mul", "neg",
    "optimization_barrier", "pad", "reduce_sum", "reshape", "rev", "scatter", "scatter-add", "select_n", "slice",
    "split", "square", "squeeze", "stack", "sub", "tile", "transpose",
})
# fmt: on


def _is_ring_operation(node: Node) -> bool:
    if node.op == "integer_pow":
        return node.params["y"] >= 0
    if node.op == "convert_element_type":
        return is_floating(node.aval) and not narrows(node)
    return node.op in _RING


def _numpy_agrees(node: Node) -> bool:
    """Whether NumPy's operation means the same as JAX's: integers are divided differently, typed keys are unknown."""
    avals = (*(v.aval for v in node.inputs), *node.avals)
    if any(_jax.is_extended(a.dtype) for a in avals):
        return False
    return node.op not in ("div", "integer_pow") or _jax.is_inexact(node.aval.dtype)


# Their parameters hold the update as a program in the original dtype, so they are called by their public names.
_SCATTERS: dict[str, Callable[..., Any]] = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter-min": jax.lax.scatter_min,
    "scatter-max": jax.lax.scatter_max,
}


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and _jax.is_extended(value.dtype)


def _stack(rows: Sequence[Any]) -> Any:
    return np.stack(rows) if all(isinstance(r, np.ndarray) for r in rows) else jnp.stack(rows)


def _together(node: Node, domain: Reals, inputs: Sequence[Any]) -> Sequence[Any]:
    """Products of small integers into a wider dtype are taken in that dtype."""
    if node.op in ("dot_general", "conv_general_dilated"):
        return [x.astype(domain.lifted(node.aval.dtype)) for x in inputs]
    return inputs
