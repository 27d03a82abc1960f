"""Mixed precision: products run in 16 bits, and what needs the range or digits of float32 keeps them.

A domain that runs a float32 program. Products take their operands in 16 bits and give 16 bits (their sums are float32);
moves, sums of two, products of two and ReLUs stay in the 16 bits they are given; everything else (exponentials,
squares, reductions, divisions, functions with derivatives of their own, ``while`` loops, loop carries, results) is
computed in the type the program says. Derivatives go the same way back.

Reference: Micikevicius et al., "Mixed precision training", ICLR 2018; which operations keep 16 bits follows the lists
of torch.amp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.analysis.weights import loop_options
from jaxinfer.graph import Graph, Node, Value, interpret
from jaxinfer.graph.emit import Emit
from jaxinfer.graph.retrace import Program, split
from jaxinfer.quantization.program import QuantizeError

_NUMBERS = {"bf16": jnp.bfloat16, "f16": jnp.float16}
# Exact in 16 bits, or with no more than the rounding of one operation; all operands and the result have one type.
_KEEP = frozenset(
    "reshape transpose squeeze expand_dims slice rev copy copy_p broadcast_in_dim concatenate pad "
    "add add_any sub mul neg max min abs select_n".split()
)


def mixed_precision(fun: Callable[..., Any], number: Literal["bf16", "f16"] = "bf16") -> Callable[..., Any]:
    """A function that computes its products in 16 bits.

    Parameters stay float32, and so do gradients in them: optimizers see nothing of it. float16 needs
    :func:`loss_scaling`; bfloat16, which has float32's range, does not.

    Args:
        fun: any function, such as a loss of parameters and a batch.
        number: ``"bf16"`` or ``"f16"``.

    Returns:
        A function with the same arguments, and results of the same types. It composes with JAX's transformations.

    Raises:
        QuantizeError: when called, if the program reads or writes Refs.
    """
    if number not in _NUMBERS:
        raise ValueError(f"number={number!r}: choose 'bf16' or 'f16'")
    narrow = np.dtype(_NUMBERS[number])

    @functools.wraps(fun)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        arrays, static = split((None, args, kwargs))
        program = Program(lambda _, *a, **k: fun(*a, **k), (), QuantizeError)
        graph, tree = program.trace(arrays, static, keep_custom=True)
        inputs = [x if hasattr(x, "dtype") else jnp.asarray(x, n.aval.dtype) for x, n in zip(arrays, graph.inputs)]
        found = interpret(graph, Narrowed(narrow), *inputs)
        out = [_as(x, a) for x, a in zip(found, graph.out_avals)]
        return jax.tree.unflatten(tree, out)

    return mixed


class Narrowed(Emit):
    """Runs a program with values that are float32, or 16 bits in the place of float32.

    Args:
        narrow: the type of 16 bits.
    """

    def __init__(self, narrow: np.dtype) -> None:
        super().__init__({})
        self._narrow = narrow

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        if node.op in PRODUCTS and all(v.dtype == jnp.float32 for v in (*node.inputs, node.aval)):
            with _jax.at_source(node.source, node.context):
                return [self._product(node, inputs)]
        if self._stays(node, inputs):
            return self._kept(node, inputs)
        return super().default(node, *(_as(x, v.aval) for x, v in zip(inputs, node.inputs)))

    def _product(self, node: Node, inputs: Sequence[Any]) -> Any:
        params = {**node.params.get("_original", node.params), "precision": None}
        # A sum that is told its type adds up in float32 and rounds once.
        params["preferred_element_type"] = self._narrow
        return _jax.bind(node.primitive, [x.astype(self._narrow) for x in inputs], params)[0]

    def _stays(self, node: Node, inputs: Sequence[Any]) -> bool:
        """Whether an operation is done in 16 bits."""
        if node.op not in _KEEP or node.aval.dtype != jnp.float32:
            return False
        if node.op == "mul" and node.inputs[0] == node.inputs[1]:
            return False
        wide = [(x, v) for x, v in zip(inputs, node.inputs) if v.dtype == jnp.float32]
        return any(x.dtype == self._narrow for x, _ in wide) and all(self._may(node, x, v) for x, v in wide)

    def _may(self, node: Node, x: Any, value: Value) -> bool:
        """Whether an operand is, or may be, in 16 bits: scalars that they can tell from 0 and infinity, and biases."""
        if x.dtype == self._narrow:
            return True
        if value.node.is_const and np.size(x) == 1 and _jax.is_concrete(x):
            number = np.asarray(x, np.float32)
            with np.errstate(over="ignore"):
                rounded = number.astype(self._narrow).astype(np.float32)
            return bool(np.all(np.isfinite(rounded) == np.isfinite(number)) and np.all((rounded == 0) == (number == 0)))
        return node.op == "add" and value.node.op == "broadcast_in_dim"

    def _kept(self, node: Node, inputs: Sequence[Any]) -> Sequence[Any]:
        given = [x.astype(self._narrow) if v.dtype == jnp.float32 else x for x, v in zip(inputs, node.inputs)]
        return super().default(node, *given)

    # -- bodies compute in 16 bits inside and take and give what the program says --

    def constant(self, node: Node) -> Any:
        value = super().constant(node)
        return value if hasattr(value, "dtype") else np.asarray(value, node.aval.dtype)

    def body(self, graph: Graph) -> Callable[..., list[Any]]:
        return lambda *inputs: [_as(x, a) for x, a in zip(interpret(graph, self, *inputs), graph.out_avals)]

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body = node.params["body"]
        run = self.body(body)
        typed = [_as(x, n.aval) for x, n in zip(inputs, body.inputs[: consts + carries])]
        xs = [_as(x, v.aval) for x, v in zip(inputs[consts + carries :], node.inputs[consts + carries :])]

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            out = run(*typed[:consts], *carry, *xs)
            return tuple(out[:carries]), tuple(out[carries:])

        carry, ys = jax.lax.scan(step, tuple(typed[consts:]), tuple(xs), **loop_options(node))
        return [*carry, *ys]

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return super().default(node, *self._typed(node, inputs))

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        branches = [self.body(b) for b in node.params["branches"]]
        _, *given = self._typed(node, (index, *inputs))
        return jax.lax.switch(index, branches, *given)

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        body = self.body(node.params["body"])
        params = node.params["_original"]
        again = jax.checkpoint(body, policy=params.get("policy"), prevent_cse=params.get("prevent_cse", True))
        return again(*self._typed(node, inputs))

    def _typed(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        return [_as(x, v.aval) for x, v in zip(inputs, node.inputs)]


def _as(x: Any, aval: Any) -> Any:
    """A value in the type that the program gives it."""
    if not hasattr(aval, "dtype"):
        return x
    if hasattr(x, "dtype") and x.dtype != aval.dtype:
        x = x.astype(aval.dtype)
    return _jax.with_aval(x, aval)
