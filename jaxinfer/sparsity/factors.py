"""Weights as products of two thin factors, and the domain that runs a program on them.

A parameter that exactly one product reads, possibly transposed, reshaped or cast before, is that product's weights. As
a matrix W of what is summed by what is kept it may be replaced with two factors, L R: a matrix product becomes two, a
convolution one to a few channels followed by one with a window of one position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Graph, Node, interpret
from jaxinfer.graph.emit import Emit

_MOVES = frozenset(["reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "convert_element_type"])


Read = tuple[int, Callable[[Any], Any]]


class Factors(NamedTuple):
    """What takes the place of a parameter, as the product that reads it takes its weights.

    Attributes:
        left: [summed, rank], for a convolution [*window, features in, rank].
        right: [rank, kept], kept in the order of the product's axes.
    """

    left: Any
    right: Any


@dataclass(frozen=True)
class Weights:
    """A parameter on its way to the product that reads it.

    Attributes:
        leaf: its position.
        value: its array, or the factors in its place.
        move: what was done to it so far.
    """

    leaf: int
    value: Any
    move: Callable[[Any], Any]

    def array(self) -> Any:
        """The parameter as a whole array, moved."""
        if isinstance(self.value, Factors):
            raise FactorsError(self.leaf)
        return self.move(self.value)


class FactorsError(Exception):
    """A factored parameter is read by something else than the product it was factored for."""

    def __init__(self, leaf: int):
        super().__init__(leaf)
        self.leaf = leaf


class OnWeights(Emit):
    """Runs a program and meets parameters where products read them."""

    def __init__(self) -> None:
        super().__init__({})

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        """The result of a product with a parameter; ``x`` is its other operand."""
        w = weights.array()
        return _bound(node, [x, w] if side else [w, x])

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        found = [i for i, x in enumerate(inputs) if isinstance(x, Weights)]
        if found == [0] and node.op in _MOVES and len(inputs) == 1:
            (weights,) = inputs
            params = dict(node.params.get("_original", node.params))

            def move(v: Any) -> Any:
                return _jax.bind(node.primitive, [weights.move(v)], params)[0]

            return [Weights(weights.leaf, weights.value, move)]
        if len(found) == 1 and node.op in PRODUCTS and as_matrix(node, found[0]) is not None:
            (side,) = found
            with _jax.at_source(node.source, node.context):
                return [self.product(node, side, inputs[side], inputs[1 - side])]
        return super().default(node, *map(self.other, inputs))

    def other(self, x: Any) -> Any:
        """A value that something else than its product reads."""
        return x.array() if isinstance(x, Weights) else x

    def body(self, graph: Graph) -> Callable[..., list[Any]]:
        def run(*inputs: Any) -> list[Any]:
            found = map(self.other, interpret(graph, self, *inputs))
            return [_jax.with_aval(x, aval) for x, aval in zip(found, graph.out_avals)]

        return run

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        consts = node.params["num_consts"]
        given = [*inputs[:consts], *map(self.other, inputs[consts:])]
        if not any(isinstance(x, Weights) for x in given):
            return super().scan(node, *given)
        return self.loop(node, given)

    def loop(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        """A scan some of whose constants are parameters."""
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body = node.params["body"]
        step_of = self.body(body)

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            out = step_of(*inputs[:consts], *carry, *xs)
            return tuple(out[:carries]), tuple(out[carries:])

        carry, ys = lax.scan(step, carries_of(node, inputs), tuple(inputs[consts + carries :]), **loop_options(node))
        return [*carry, *ys]

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return super().while_loop(node, *map(self.other, inputs))

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        return super().cond(node, self.other(index), *map(self.other, inputs))

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return super().remat(node, *map(self.other, inputs))


class OnFactors(OnWeights):
    """Runs a program in which some parameters are factored."""

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        factors = weights.value
        return (
            with_factors(node, side, x, factors)
            if isinstance(factors, Factors)
            else super().product(node, side, weights, x)
        )


class Gathering(OnWeights):
    """Runs a program and gathers what the products that read parameters are fed with.

    Attributes:
        grams: by leaf, XᵀX of all rows X that its product multiplies it with (float32, [summed, summed]).
        reads: by leaf, the products that read it (None for anything else), each with the side that the parameter is on
            and how it comes there.
    """

    def __init__(self, most: int, only: frozenset[int] | None = None) -> None:
        super().__init__()
        self.most = most
        self.only = only
        self.grams: dict[int, Any] = {}
        self.reads: dict[int, dict[Node | None, Read]] = {}

    def other(self, x: Any) -> Any:
        if isinstance(x, Weights):
            self.reads.setdefault(x.leaf, {})[None] = (0, x.move)
        return super().other(x)

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        self.reads.setdefault(weights.leaf, {})[node] = (side, weights.move)
        rows = rows_of(node, side, x) if self.only is None or weights.leaf in self.only else None
        if rows is not None and rows.shape[1] <= self.most:
            rows = rows.astype(jnp.float32)
            gram = lax.dot_general(rows, rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
            self.grams[weights.leaf] = gram + self.grams.get(weights.leaf, 0)
        return super().product(node, side, weights, x)

    def loop(self, node: Node, inputs: Sequence[Any]) -> list[Any]:
        consts, carries = node.params["num_consts"], node.params["num_carry"]
        body = node.params["body"]

        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            inner = Gathering(self.most, self.only)
            out = inner.body(body)(*inputs[:consts], *carry, *xs)
            for leaf, reads in inner.reads.items():
                self.reads.setdefault(leaf, {}).update(reads)
            return tuple(out[:carries]), (tuple(out[carries:]), inner.grams)

        carry, (ys, grams) = lax.scan(
            step, carries_of(node, inputs), tuple(inputs[consts + carries :]), **loop_options(node)
        )
        for leaf, gram in grams.items():
            self.grams[leaf] = gram.sum(0) + self.grams.get(leaf, 0)
        return [*carry, *ys]


def carries_of(node: Node, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The carries that a scan begins with, typed as its body has them."""
    start, end = node.params["num_consts"], node.params["num_consts"] + node.params["num_carry"]
    body = node.params["body"]
    return tuple(_jax.with_aval(x, n.aval) for x, n in zip(inputs[start:end], body.inputs[start:end]))


def loop_options(node: Node) -> dict[str, Any]:
    """Length and direction of a scan."""
    length = node.params["length"]
    return {
        "length": length if isinstance(length, int) else None,
        "reverse": node.params["reverse"],
        "unroll": node.params["unroll"],
    }


# -- weights as a matrix ----------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """How the weights of a product are a matrix.

    Attributes:
        summed: axes that are summed over, those of a convolution's window first.
        kept: axes that remain.
    """

    summed: tuple[int, ...]
    kept: tuple[int, ...]


def as_matrix(node: Node, side: int) -> Matrix | None:
    """How the weights of a product are a matrix; None where they are several of them (batched, grouped)."""
    params = node.params
    if node.op == "dot_general":
        contract, batch = params["dimension_numbers"]
        if batch[side]:
            return None
        kept = [a for a in range(len(node.inputs[side].shape)) if a not in contract[side]]
        return Matrix(tuple(contract[side]), tuple(kept))
    if side == 0 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"].rhs_spec
    return Matrix((*numbers[2:], numbers[1]), (numbers[0],))


def matrix_of(node: Node, side: int, weights: Any) -> Any:
    """The weights of a product as a matrix [summed, kept]."""
    form = as_matrix(node, side)
    assert form is not None
    moved = jnp.transpose(weights, (*form.summed, *form.kept))
    return moved.reshape(math.prod(moved.shape[: len(form.summed)]), -1)


def factors_of(node: Node, side: int, left: Any, right: Any) -> Factors:
    """Two factors of that matrix, shaped for :func:`with_factors`."""
    form = as_matrix(node, side)
    assert form is not None
    shape = node.inputs[side].shape
    return Factors(
        left.reshape(*(shape[a] for a in form.summed), -1), right.reshape(-1, *(shape[a] for a in form.kept))
    )


def rows_of(node: Node, side: int, x: Any) -> Any:
    """What the matrix of weights is multiplied with from the left: [positions, summed]."""
    if node.op == "dot_general":
        contract, _ = node.params["dimension_numbers"]
        mine = contract[1 - side]
        others = [a for a in range(x.ndim) if a not in mine]
        return lax.transpose(x, (*others, *mine)).reshape(-1, math.prod(x.shape[a] for a in mine))
    params = node.params
    numbers = params["dimension_numbers"]
    window = [node.inputs[1].shape[a] for a in numbers.rhs_spec[2:]]
    rank = len(window)
    plain = lax.ConvDimensionNumbers(
        numbers.lhs_spec, (rank + 1, rank, *range(rank)), (0, rank + 1, *range(1, rank + 1))
    )
    columns = lax.conv_general_dilated_patches(
        x,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        plain,
        precision=lax.Precision.HIGHEST,
    )
    # Patches come with features before window positions.
    features = x.shape[numbers.lhs_spec[1]]
    apart = columns.reshape(-1, features, math.prod(window))
    return jnp.swapaxes(apart, 1, 2).reshape(apart.shape[0], -1)


def with_factors(node: Node, side: int, x: Any, factors: Factors) -> Any:
    """A product whose weights are two factors: the left one first, which leaves few channels."""
    left, right = factors
    params: Mapping[str, Any] = node.params.get("_original", node.params)
    if node.op == "conv_general_dilated":
        return _convolution(node, params, x, left, right)
    contract, _ = params["dimension_numbers"]
    mine = contract[1 - side]
    ranks = left.ndim - 1
    few = lax.dot_general(x, left, ((mine, tuple(range(ranks))), ((), ())), precision=params["precision"])
    wide = params["preferred_element_type"]
    out = lax.dot_general(
        few,
        right,
        (((few.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=wide,
    )
    if side:
        return out
    # Results have the axes of the first operand first.
    kept = right.ndim - 1
    return lax.transpose(out, (*range(out.ndim - kept, out.ndim), *range(out.ndim - kept)))


def _convolution(node: Node, params: Mapping[str, Any], x: Any, left: Any, right: Any) -> Any:
    numbers = params["dimension_numbers"]
    rank = len(numbers.rhs_spec) - 2
    kernel = (rank + 1, rank, *range(rank))
    few = lax.conv_general_dilated(
        x,
        left,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.ConvDimensionNumbers(numbers.lhs_spec, kernel, numbers.out_spec),
        precision=params["precision"],
    )
    return lax.conv_general_dilated(
        few,
        right.reshape(*(1,) * rank, *right.shape),
        (1,) * rank,
        [(0, 0)] * rank,
        dimension_numbers=lax.ConvDimensionNumbers(numbers.out_spec, kernel, numbers.out_spec),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _bound(node: Node, operands: Sequence[Any]) -> Any:
    return _jax.bind(node.primitive, operands, dict(node.params.get("_original", node.params)))[0]
