"""What the products that read a parameter are fed with, found on the graph of any function.

A domain that runs the program and knows which values are parameters that were only moved around (transposed, reshaped,
cut, cast). Where such a value meets data in a product, y = Σ x·w, the sum of x² over all that each entry of w is
multiplied with is the derivative of Σ x²·w in w; it is moved back to the parameter the way it came. Loops sum over
their steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import _jax
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Domain, Graph, Node, interpret
from jaxinfer.sparsity.learning.leaf_macs import trace_leaves

# Linear in their first operand, or in all of them, and nothing but moves.
_MOVES = frozenset(
    "reshape transpose squeeze expand_dims slice dynamic_slice split unstack concatenate stack pad rev copy".split()
)
_CASTS = frozenset(["convert_element_type", "reduce_precision", "stop_gradient", "optimization_barrier"])


class Fed(NamedTuple):
    """What is known of a parameter; arrays of its shape.

    Attributes:
        squares: the sum of squares of all inputs that each entry is multiplied with (float32).
        outputs: numbers that are equal for entries of one output, 0 for entries that no product reads (float32).
        places: the place of an entry among those of its output, in the order they are summed (float32).
    """

    squares: Any
    outputs: Any
    places: Any


@dataclass(frozen=True)
class _Origin:
    """A parameter that a value is made of, and the way back: linear, from the value's shape to the parameter's."""

    leaf: int
    back: Callable[[Any], Any]


@dataclass(frozen=True)
class _Flow:
    """A value, and the parameters it is made of if it is made of nothing else."""

    value: Any
    origins: tuple[_Origin, ...] = ()


def inputs_of_products(fun: Callable[..., Any], params: Any, *args: Any) -> Callable[..., dict[int, Fed]]:
    """A function that says what the products of a program feed each parameter with.

    Args:
        fun: ``fun(params, *args)``; whatever it returns, only its products count.
        params: a pytree; shapes are enough.
        *args: an example of the other arguments; shapes are enough.

    Returns:
        ``fed(params, *args)``, which can be compiled: what is known by the position of the leaf of ``params``, for
        those that products read. Parameters that are computed with first (scaled, added) and those read inside
        ``while`` loops are not among them.
    """
    graph, count = trace_leaves(fun, params, args)
    positions = [i for i, x in enumerate(jax.tree.leaves(params)) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def fed(params: Any, *args: Any) -> dict[int, Fed]:
        arrays = [x for x in jax.tree.leaves((params, args)) if hasattr(x, "shape") and hasattr(x, "dtype")]
        domain = _Inputs()
        flows = [_Flow(x, (_Origin(i, _same),) if i < count else ()) for i, x in enumerate(arrays)]
        interpret(graph, domain, *flows)
        return {positions[leaf]: found for leaf, found in domain.found.items()}

    return fed


class _Inputs(Domain[_Flow]):
    """Runs a program and gathers what parameters are fed with."""

    def __init__(self) -> None:
        self.found: dict[int, Fed] = {}

    def constant(self, node: Node) -> _Flow:
        return _Flow(node.value)

    def default(self, node: Node, *inputs: _Flow) -> Sequence[_Flow]:
        values = [x.value for x in inputs]
        params = dict(node.params.get("_original", node.params))
        with _jax.at_source(node.source, node.context):
            results = _jax.bind(node.primitive, values, params)
        if node.op in PRODUCTS:
            self._product(node, inputs)
        if node.op in _CASTS:
            return [_Flow(y, x.origins) for x, y in zip(inputs, results)]
        if node.op not in _MOVES:
            return [_Flow(y) for y in results]
        return [_Flow(y, tuple(self._moved(node, params, inputs, k))) for k, y in enumerate(results)]

    def _moved(self, node: Node, params: dict[str, Any], inputs: Sequence[_Flow], which: int) -> list[_Origin]:
        """The ways back from one result of a move to what its operands are made of."""
        found: list[_Origin] = []
        for place, x in enumerate(inputs):
            if not x.origins:
                continue

            def move(v: Any, place: int = place) -> Any:
                operands = [
                    v if i == place else jnp.zeros(y.value.shape) if _jax.is_inexact(y.value.dtype) else y.value
                    for i, y in enumerate(inputs)
                ]
                return _jax.bind(node.primitive, operands, params)[which]

            transposed = jax.linear_transpose(move, jax.ShapeDtypeStruct(x.value.shape, jnp.float32))
            found += [_Origin(o.leaf, _after(o.back, transposed)) for o in x.origins]
        return found

    def _product(self, node: Node, inputs: Sequence[_Flow]) -> None:
        """Notes what a product feeds the parameter on one of its sides with."""
        if bool(inputs[0].origins) == bool(inputs[1].origins):
            return  # no parameter, or nothing else
        side = 1 if inputs[1].origins else 0
        weights, x = inputs[side], inputs[1 - side]
        if node.op == "conv_general_dilated" and side == 0:
            return  # a parameter in the place of an image
        squares = jnp.square(x.value.astype(jnp.float32))
        params = {**node.params.get("_original", node.params), "preferred_element_type": jnp.dtype("float32")}

        def product(w: Any) -> Any:
            (result,) = _jax.bind(node.primitive, [squares, w] if side else [w, squares], params)
            return result

        shape = jax.ShapeDtypeStruct(weights.value.shape, jnp.float32)
        (fed,) = jax.linear_transpose(product, shape)(jnp.ones(node.aval.shape, jnp.float32))
        outputs, places = _numbers(node, side, weights.value.shape)
        for origin in weights.origins:
            self.note(origin.leaf, Fed(*map(origin.back, (fed, outputs, places))))

    def note(self, leaf: int, fed: Fed) -> None:
        """Adds what a use of a parameter feeds it with; its first use says which entries make which output."""
        old = self.found.get(leaf)
        self.found[leaf] = fed if old is None else old._replace(squares=old.squares + fed.squares)

    # -- control flow: a body gathers for its own inputs, and the loop passes that on --

    def scan(self, node: Node, *inputs: _Flow) -> Sequence[_Flow]:
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body, tracked = node.params["body"], _tracked(inputs, range(consts, consts + carries))
        fixed = [x.value for x in inputs[:consts]]

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            outputs, found = _run(body, [*fixed, *carry, *xs], tracked)
            return tuple(outputs[:carries]), (tuple(outputs[carries:]), found)

        init = tuple(
            _jax.with_aval(x.value, n.aval)
            for x, n in zip(inputs[consts : consts + carries], body.inputs[consts : consts + carries])
        )
        xs = tuple(x.value for x in inputs[consts + carries :])
        carry, (ys, found) = jax.lax.scan(
            step, init, xs, length=node.params["length"], reverse=node.params["reverse"], unroll=node.params["unroll"]
        )
        for i, fed in found.items():
            if i < consts:
                whole = Fed(fed.squares.sum(0), fed.outputs[0], fed.places[0])
            else:
                # Each step has outputs of its own.
                steps = jnp.arange(fed.outputs.shape[0], dtype=jnp.float32).reshape(-1, *[1] * (fed.outputs.ndim - 1))
                many = fed.outputs.max() + 1
                whole = fed._replace(outputs=jnp.where(fed.outputs > 0, fed.outputs + steps * many, 0))
            self._pass_on(inputs[i], whole)
        return [_Flow(x) for x in (*carry, *ys)]

    def while_loop(self, node: Node, *inputs: _Flow) -> Sequence[_Flow]:
        return self.default(node, *inputs)

    def cond(self, node: Node, index: _Flow, *inputs: _Flow) -> Sequence[_Flow]:
        tracked, values = _tracked(inputs, ()), [x.value for x in inputs]
        branches = node.params["branches"]
        shapes: dict[int, Any] = {}
        for branch in branches:
            shapes.update(jax.eval_shape(lambda *v, branch=branch: _run(branch, v, tracked)[1], *values))

        def taken(branch: Graph) -> Callable[..., Any]:
            def run(*values: Any) -> Any:
                outputs, found = _run(branch, values, tracked)
                blank = {i: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), s) for i, s in shapes.items()}
                return outputs, {**blank, **found}

            return run

        outputs, found = jax.lax.switch(index.value, [taken(b) for b in branches], *values)
        for i, fed in found.items():
            self._pass_on(inputs[i], fed)
        return [_Flow(x) for x in outputs]

    def _pass_on(self, x: _Flow, fed: Fed) -> None:
        for origin in x.origins:
            self.note(origin.leaf, Fed(*map(origin.back, fed)))


def _run(body: Graph, values: Sequence[Any], tracked: frozenset[int]) -> tuple[list[Any], dict[int, Fed]]:
    """The results of a body, and what those of its inputs that are parameters are fed with in it."""
    domain = _Inputs()
    flows = [_Flow(x, (_Origin(i, _same),) if i in tracked else ()) for i, x in enumerate(values)]
    outputs = [_jax.with_aval(x.value, aval) for x, aval in zip(interpret(body, domain, *flows), body.out_avals)]
    return outputs, domain.found


def _tracked(inputs: Sequence[_Flow], but: Any) -> frozenset[int]:
    return frozenset(i for i, x in enumerate(inputs) if x.origins and i not in but)


def _numbers(node: Node, side: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """For each entry of a product's factor, which output it goes into (from 1), and its place among those summed."""
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        summed = list(contract[side])
    else:
        numbers = node.params["dimension_numbers"].rhs_spec
        summed = [*numbers[2:], numbers[1]]
    free = [axis for axis in range(len(shape)) if axis not in summed]
    return _count(shape, free) + 1, _count(shape, summed)


def _count(shape: tuple[int, ...], axes: Sequence[int]) -> Any:
    """Numbers the indices of some axes, the last of them fastest, the same along all other axes (float32)."""
    total: Any = jnp.zeros(shape, jnp.float32)
    for place, axis in enumerate(axes):
        stride = math.prod(shape[a] for a in axes[place + 1 :])
        total = total + stride * jax.lax.broadcasted_iota(jnp.float32, shape, axis)
    return total


def _after(back: Callable[[Any], Any], transposed: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: back(transposed(x)[0])


def _same(x: Any) -> Any:
    return x
