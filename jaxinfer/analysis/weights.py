"""Parameters on their way to the products that read them, and the domain that meets them there.

A parameter may be transposed, reshaped or cast before a product reads it. Whoever wants it to travel in another form
(two factors, integers) overrides what happens at the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.matrices import as_matrix
from jaxinfer.analysis.products import PRODUCTS
from jaxinfer.graph import Graph, Node, interpret
from jaxinfer.graph.emit import Emit

_MOVES = frozenset(["reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "convert_element_type"])

Move = Callable[[Any], Any]
Read = tuple[int, Move]


@dataclass(frozen=True)
class Weights:
    """A parameter on its way to the product that reads it.

    Attributes:
        leaf: its position.
        value: its array, or what stands in its place.
        move: what was done to it so far.
        place: the same without casts.
    """

    leaf: int
    value: Any
    move: Move
    place: Move

    @staticmethod
    def of(leaf: int, value: Any) -> Weights:
        """A parameter that nothing was done to yet."""
        return Weights(leaf, value, _same, _same)


class OnWeights(Emit):
    """Runs a program and meets parameters where products read them."""

    def __init__(self) -> None:
        super().__init__({})

    def product(self, node: Node, side: int, weights: Weights, x: Any) -> Any:
        """The result of a product with a parameter; ``x`` is its other operand."""
        w = self.array(weights)
        return bound(node, [x, w] if side else [w, x])

    def array(self, weights: Weights) -> Any:
        """A parameter as a whole array, moved."""
        return weights.move(weights.value)

    def meets(self, node: Node, side: int) -> bool:
        """Whether a product is met at its weights."""
        return as_matrix(node, side) is not None

    def lookup(self, node: Node, weights: Weights, *indices: Any) -> Any:
        """The result of an operation that takes whole rows of a parameter, which was cast at most."""
        return bound(node, [self.other(weights), *indices])

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        found = [i for i, x in enumerate(inputs) if isinstance(x, Weights)]
        if found == [0] and node.op in _MOVES and len(inputs) == 1:
            (weights,) = inputs
            move = _after(node, weights.move)
            place = weights.place if node.op == "convert_element_type" else _after(node, weights.place)
            return [Weights(weights.leaf, weights.value, move, place)]
        if len(found) == 1 and node.op in PRODUCTS and self.meets(node, found[0]):
            (side,) = found
            with _jax.at_source(node.source, node.context):
                return [self.product(node, side, inputs[side], inputs[1 - side])]
        if found == [0] and takes_rows(node) and inputs[0].place is _same:
            with _jax.at_source(node.source, node.context):
                return [self.lookup(node, *inputs)]
        return super().default(node, *map(self.other, inputs))

    def other(self, x: Any) -> Any:
        """A value that something else than its product reads."""
        return self.array(x) if isinstance(x, Weights) else x

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


def run_on(graph: Graph, domain: OnWeights, inputs: Sequence[Any]) -> list[Any]:
    """The results of a program in such a domain, typed as the program's."""
    found = map(domain.other, interpret(graph, domain, *inputs))
    return [_jax.with_aval(x, a) if hasattr(a, "dtype") else x for x, a in zip(found, graph.out_avals)]


def takes_rows(node: Node) -> bool:
    """Whether it takes whole slices along the first axis of its first operand, by their numbers."""
    if node.op not in ("gather", "dynamic_slice"):
        return False
    sizes = node.params["slice_sizes"]
    if sizes[:1] != (1,) or sizes[1:] != node.inputs[0].shape[1:]:
        return False
    if node.op == "dynamic_slice":
        return True
    numbers = node.params["dimension_numbers"]
    batched = numbers.operand_batching_dims or numbers.start_indices_batching_dims
    return not batched and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)


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


def bound(node: Node, operands: Sequence[Any]) -> Any:
    """The result of an operation."""
    return _jax.bind(node.primitive, operands, dict(node.params.get("_original", node.params)))[0]


def _after(node: Node, move: Move) -> Move:
    params = dict(node.params.get("_original", node.params))
    return lambda v: _jax.bind(node.primitive, [move(v)], params)[0]


def _same(x: Any) -> Any:
    return x
