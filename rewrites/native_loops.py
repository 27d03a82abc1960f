"""Loops over single rows, such as recurrent cells of one sequence, as one kernel for all steps.

A loop qualifies if all that changes from step to step are vectors of float32, put together by operations that the
kernel knows or that move no elements, and by products with constant weights. Products of one vector become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.analysis.loops import Loop, below, cut
from jaxinfer.analysis.products import free_axes
from jaxinfer.analysis.structure import is_static, size
from jaxinfer.graph import Graph, Node, Value, run
from jaxinfer.native import Instruction, Place, VectorLoop, library, pack, vector_loop
from jaxinfer.native.loop import MOST_SPACES
from jaxinfer.rewrites.loop_operands import match_loop, replace_loop
from jaxinfer.rewriting import Find, Match, Rule

_LEAST_STEPS = 4
_MOST_OPERATIONS = 256
# Vectors begin where a line of the cache does.
_ALIGNED = 16
# Operations by the kernel's name for them.
_UNARY = {"neg": "neg", "abs": "abs", "exp": "exp", "tanh": "tanh", "logistic": "logistic"}
_BINARY = {"add": "add", "add_any": "add", "sub": "sub", "mul": "mul", "div": "div", "max": "max", "min": "min"}
# What may change the shape of a vector and not the order of its elements.
_SHAPES = frozenset("reshape squeeze expand_dims copy transpose broadcast_in_dim".split())


class _NotKnown(Exception):
    """The body does something that the kernel cannot do."""


class _Compiler:
    """Makes instructions of a loop's body.

    Space 0 is the loop's own memory; those of operands count up from 1, those of results down from -1 until all
    operands are known.

    Args:
        loop: the loop.

    Attributes:
        operands: what the kernel is given: for each operand a function from what :attr:`constants` and the loop's own
            operands are.
        constants: values of the body that are the same in each step.
    """

    def __init__(self, loop: Loop):
        _, carries, rows = loop.steps_inputs
        self._loop = loop
        self._needed = below(loop.body.outputs)
        varying: set[Node] = {v.node for v in (*carries, *rows)}
        for node in loop.body.nodes:
            if any(v.node in varying for v in node.inputs):
                varying.add(node)
        self._varying = varying
        self.constants: list[Value] = []
        self.operands: list[Callable[[Sequence[Any], Sequence[Any]], Any]] = []
        self._moves: list[bool] = []
        self._code: list[Instruction] = []
        self._places: dict[Value, Place] = {}
        self._vectors: dict[tuple[Value, int], Place] = {}
        self._memory = 0
        self._slots = {v: self._room(size(v)) for v in carries}
        self._places.update(self._slots)
        for i, value in enumerate(rows):
            if value.node in self._needed:
                self._check(value)
                self._places[value] = self._operand(lambda _, outer, i=i: outer[len(carries) + i], moves=True)

    def program(self) -> VectorLoop:
        """The whole loop.

        Raises:
            _NotKnown: if the kernel cannot do it.
        """
        loop = self._loop
        carries = loop.steps_inputs[1]
        first = []
        for i, value in enumerate(carries):
            self._check(value)
            start = self._operand(lambda _, outer, i=i: outer[i])
            first.append(_copy(size(value), self._slots[value], start))
        results = [self._place(v, aval.size) for v, aval in zip(loop.body.outputs, loop.body.out_avals)]
        step = list(self._code)
        for i, value in enumerate(loop.rows):
            step.append(_copy(size(value), Place(-1 - len(carries) - i, 0), results[len(carries) + i]))
        # A carry may go on as another one, so all are read before the first is written.
        moved = [self._room(size(v)) if p in self._slots.values() else p for v, p in zip(carries, results)]
        step += [_copy(size(v), to, p) for v, to, p in zip(carries, moved, results) if to != p]
        step += [_copy(size(v), self._slots[v], p) for v, p in zip(carries, moved)]
        last = [_copy(size(v), Place(-1 - i, 0), self._slots[v]) for i, v in enumerate(carries)]
        avals = loop.node.avals
        moves = (*self._moves, *(i >= len(carries) for i in range(len(avals))))
        if 1 + len(moves) > MOST_SPACES or not step or any(str(a.dtype) != "float32" for a in avals):
            raise _NotKnown
        return VectorLoop(
            *(tuple(map(self._numbered, part)) for part in (first, step, last)),
            steps=loop.length or 0,
            backwards=bool(loop.node.params["reverse"]),
            memory=self._memory,
            results=tuple(a.shape for a in avals),
            moves=moves,
        )

    # -- places --

    def _numbered(self, instruction: Instruction) -> Instruction:
        count = len(self.operands)

        def place(p: Place) -> Place:
            return p if p.space >= 0 else Place(count - p.space, p.offset)

        return instruction._replace(to=place(instruction.to), a=place(instruction.a), b=place(instruction.b))

    def _room(self, count: int) -> Place:
        begin = self._memory
        self._memory += -(-count // _ALIGNED) * _ALIGNED
        return Place(0, begin)

    def _operand(self, make: Callable[[Sequence[Any], Sequence[Any]], Any], moves: bool = False) -> Place:
        self.operands.append(make)
        self._moves.append(moves)
        return Place(len(self.operands), 0)

    def _check(self, value: Value) -> None:
        if not is_static(value) or str(value.dtype) != "float32" or 0 in value.shape:
            raise _NotKnown

    def _constant(self, value: Value) -> int:
        if value not in self.constants:
            self.constants.append(value)
        return self.constants.index(value)

    def _place(self, value: Value, count: int) -> Place:
        """Where a value lies in each step; a constant of one element is repeated ``count`` times."""
        if value.node not in self._varying:
            return self._constant_vector(value, count)
        if value not in self._places:
            self._check(value)
            self._places[value] = self._compute(value)
        if size(value) != count:
            raise _NotKnown
        return self._places[value]

    def _constant_vector(self, value: Value, count: int) -> Place:
        self._check(value)
        if size(value) not in (1, count):
            raise _NotKnown
        if (value, count) not in self._vectors:
            i = self._constant(value)
            place = self._operand(lambda found, _: jnp.broadcast_to(found[i].reshape(-1), (count,)))
            self._vectors[value, count] = place
        return self._vectors[value, count]

    # -- operations --

    def _compute(self, value: Value) -> Place:
        node = value.node
        if node.op in _SHAPES:
            source = node.inputs[0]
            if len(node.inputs) > 1 or not _keeps_order(node):
                raise _NotKnown
            return self._place(source, size(value))
        if node.op in ("slice", "split"):
            return self._part(value)
        if node.op == "concatenate":
            return self._joined(value)
        if node.op == "dot_general":
            return self._product(value)
        return self._elementwise(value)

    def _elementwise(self, value: Value) -> Place:
        node, count = value.node, size(value)
        if node.op in _UNARY:
            operation, operands = _UNARY[node.op], [node.inputs[0]] * 2
        elif node.op in _BINARY:
            operation, operands = _BINARY[node.op], list(node.inputs)
        elif node.op == "square" or (node.op == "integer_pow" and node.params["y"] == 2):
            operation, operands = "mul", [node.inputs[0]] * 2
        else:
            raise _NotKnown
        a, b = (self._place(v, count) for v in operands)
        to = self._room(count)
        self._code.append(Instruction(operation, count, 0, to, a, b))
        return to

    def _part(self, value: Value) -> Place:
        """A part that lies together: all axes before the one that is cut have one element."""
        node = value.node
        whole = node.inputs[0].shape
        if node.op == "split":
            axis, sizes = node.params["axis"], node.params["sizes"]
            starts, strides = [0] * len(whole), None
            starts[axis] = sum(sizes[: value.index])
        else:
            starts, strides = list(node.params["start_indices"]), node.params["strides"]
        cuts = [i for i, d in enumerate(whole) if value.shape[i] != d]
        if len(cuts) > 1 or any(s != 1 for s in strides or ()) or any(d != 1 for i in cuts for d in whole[:i]):
            raise _NotKnown
        place = self._place(node.inputs[0], math.prod(whole))
        offset = sum(starts[i] * math.prod(whole[i + 1 :]) for i in cuts)
        return Place(place.space, place.offset + offset)

    def _joined(self, value: Value) -> Place:
        node = value.node
        if any(d != 1 for d in value.shape[: node.params["dimension"]]):
            raise _NotKnown
        parts = [(size(v), self._place(v, size(v))) for v in node.inputs]
        to = self._room(size(value))
        offset = to.offset
        for count, place in parts:
            self._code.append(_copy(count, Place(0, offset), place))
            offset += count
        return to

    def _product(self, value: Value) -> Place:
        """A product of a vector with weights, together with all others of that vector."""
        x, *_ = self._factors(value.node)
        alike = [
            node
            for node in self._loop.body.nodes
            if node.op == "dot_general" and node in self._needed and self._is_product_of(node, _source(x))
        ]
        if value.node not in alike:
            raise _NotKnown
        columns = [node.aval.size for node in alike]
        weights = []
        for node in alike:
            _, constant, side = self._factors(node)
            weights.append((node, self._constant(constant), side))

        def make(found: Sequence[Any], _: Sequence[Any]) -> Any:
            joined = jnp.concatenate([_columns(node, found[i], side) for node, i, side in weights], 1)
            found_library = library()
            assert found_library is not None
            return pack(joined[None, None], found_library.panel)

        depth, to = size(x), self._room(sum(columns))
        self._code.append(Instruction("product", sum(columns), depth, to, self._place(x, depth), self._operand(make)))
        for i, node in enumerate(alike):
            self._places[Value(node, 0)] = Place(to.space, to.offset + sum(columns[:i]))
        return self._places[value]

    def _factors(self, node: Node) -> tuple[Value, Value, int]:
        """The vector and the weights of a product, and which operand the weights are."""
        varying = [v.node in self._varying for v in node.inputs]
        if varying[0] == varying[1] or node.params["dimension_numbers"][1][0]:
            raise _NotKnown
        side = varying.index(True)
        x, weights = node.inputs[side], node.inputs[1 - side]
        if any(x.shape[i] != 1 for i in free_axes(node)[side]):
            raise _NotKnown
        self._check(x)
        self._check(weights)
        return x, weights, 1 - side

    def _is_product_of(self, node: Node, x: Value) -> bool:
        try:
            return _source(self._factors(node)[0]) == x and str(node.aval.dtype) == "float32" and node.aval.size > 0
        except _NotKnown:
            return False


def _copy(count: int, to: Place, place: Place) -> Instruction:
    return Instruction("copy", count, 0, to, place, place)


def _keeps_order(node: Node) -> bool:
    """Whether an operation on one vector leaves its elements in their order, and as many."""
    source, result = node.inputs[0].shape, node.aval.shape
    if math.prod(source) != math.prod(result):
        return False
    if node.op == "transpose":
        moved = [i for i in node.params["permutation"] if source[i] != 1]
        return moved == sorted(moved)
    return True


def _source(value: Value) -> Value:
    """What a vector is but for its shape."""
    while value.node.op in _SHAPES and len(value.node.inputs) == 1 and _keeps_order(value.node):
        value = value.node.inputs[0]
    return value


def _columns(node: Node, weights: Any, side: int) -> Any:
    """The weights of a product with a vector, operand ``side``, as [elements of the vector, elements of the result]."""
    contract, _ = node.params["dimension_numbers"]
    order = [axis for _, axis in sorted(zip(contract[1 - side], contract[side]))]
    return lax.transpose(weights, (*order, *free_axes(node)[side])).reshape(-1, node.aval.size)


# -- the rule ---------------------------------------------------------------------------------------------------------


def _find(graph: Graph, node: Node) -> Match | None:
    loop = Loop.of(node)
    if library() is None or loop.length is None or loop.length < _LEAST_STEPS:
        return None
    if len(loop.body.nodes) > _MOST_OPERATIONS or not all(n.is_pure for n in loop.body.nodes):
        return None
    try:
        compiler = _Compiler(loop)
        program = compiler.program()
    except _NotKnown:
        return None

    def build(read: Callable[[Value], Any]) -> Sequence[Any]:
        fixed, init, xs = ([read(v) for v in values] for values in (loop.fixed, loop.init, loop.xs))
        found = run(cut(compiler.constants, loop.steps_inputs[0]), {}, *fixed)
        return vector_loop(program, [make(found, [*init, *xs]) for make in compiler.operands])

    return match_loop(graph, node, build)


# -- cases ------------------------------------------------------------------------------------------------------------


def _cases(s: Any) -> Iterator[Any]:
    s.only("float32")
    width, steps, reverse = s.choice((20, 48)), s.choice((5, 6)), s.choice((False, True))

    def lstm(u: Any, v: Any, b: Any, h: Any, c: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            h, c = carry
            i, f, g, o = jnp.split(h @ u + x + b, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c) - h @ v
            return (h, c), h

        return lax.scan(step, (h, c), xs, reverse=reverse)

    weights = (s.frozen(width, 4 * width), s.frozen(width, width), s.frozen(4 * width))
    yield lstm, (*weights, s.array(1, width), s.array(1, width), s.array(steps, 1, 4 * width))

    def other(u: Any, a: Any, b: Any, xs: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            a, b = carry
            new = jnp.maximum(jnp.abs(u @ a) / (1 + b**2), -x)
            return (b, jnp.minimum(jnp.exp(-new), 2.0)), (jnp.concatenate([a[3:], new]), jnp.full(3, 2.0))

        return lax.scan(step, (a, b), xs, reverse=reverse)

    yield other, (s.array(width, width), s.array(width), s.array(width), s.array(steps, width))


RULES: tuple[Rule, ...] = (
    Rule(
        "loop-kernel",
        "scan over vectors: elementwise operations and products with constant weights → one kernel for all steps",
        Find(("scan",), _find),
        replace_loop,
        "reassociate",
        kind="offer",
        cases=_cases,
        platforms=frozenset({"cpu"}),
        native=True,
    ),
)
