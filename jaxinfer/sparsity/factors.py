"""Weights as products of two thin factors, and the domain that runs a program on them.

A parameter that exactly one product reads, possibly transposed, reshaped or cast before, is that product's weights. As
a matrix W of what is summed by what is kept it may be replaced with two factors, L R: a matrix product becomes two, a
convolution one to a few channels followed by one with a window of one position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.matrices import as_matrix, rows_of
from jaxinfer.analysis.weights import OnWeights, Read, Weights, carries_of, loop_options
from jaxinfer.graph import Node


class Factors(NamedTuple):
    """What takes the place of a parameter, as the product that reads it takes its weights.

    Attributes:
        left: [summed, rank], for a convolution [*window, features in, rank].
        right: [rank, kept], kept in the order of the product's axes.
    """

    left: Any
    right: Any

    @property
    def dtype(self) -> Any:
        """Element type of the parameter."""
        return self.left.dtype


class FactorsError(Exception):
    """A factored parameter is read by something else than the product it was factored for."""

    def __init__(self, leaf: int):
        super().__init__(leaf)
        self.leaf = leaf


class OnFactors(OnWeights):
    """Runs a program in which some parameters are factored."""

    def array(self, weights: Weights) -> Any:
        if isinstance(weights.value, Factors):
            raise FactorsError(weights.leaf)
        return super().array(weights)

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


# -- weights as a matrix ----------------------------------------------------------------------------------------------


def factors_of(node: Node, side: int, left: Any, right: Any) -> Factors:
    """Two factors of that matrix, shaped for :func:`with_factors`."""
    form = as_matrix(node, side)
    assert form is not None
    shape = node.inputs[side].shape
    return Factors(
        left.reshape(*(shape[a] for a in form.summed), -1), right.reshape(-1, *(shape[a] for a in form.kept))
    )


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
