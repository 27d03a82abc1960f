"""The same program for another batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxinfer import _jax
from jaxinfer.analysis.axes import resized, ways
from jaxinfer.analysis.batch import BatchAxes, Spread, Spreads, batch_axes
from jaxinfer.graph import Domain, Graph, Node, interpret, trace_function
from jaxinfer.graph.emit import Emit


def rebatch(graph: Graph, size: int, axes: BatchAxes | None = None) -> Graph | None:
    """The program for ``size`` examples.

    What depends on the batch size as a number (a mean over the batch written out by hand) keeps the old one: every
    example gives what it gave before.

    Args:
        graph: the program.
        size: number of examples, at least 1.
        axes: the batch axes, if known; by default the examples lie along axis 0 of the inputs.

    Returns:
        The program, or None where examples meet; see :func:`jaxinfer.analysis.batch.batch_axes`.
    """
    found = axes or batch_axes(graph)
    if found is None:
        return None
    domain = _Resize(found.size, size)

    def aval(node: Node, axis: int | None) -> Any:
        shape = [d // found.size * size if i == axis else d for i, d in enumerate(node.aval.shape)]
        return node.aval if axis is None else node.aval.update(shape=tuple(shape))

    def fun(*inputs: Any) -> list[Any]:
        pieces = [_Piece(x, Spread(axis)) for x, axis in zip(inputs, found.inputs)]
        results = interpret(graph, domain, *pieces)
        return [_jax.with_aval(piece.value, a) for piece, a in zip(results, graph.out_avals, strict=True)]

    return trace_function(fun, *(aval(node, axis) for node, axis in zip(graph.inputs, found.inputs)))


@dataclass(frozen=True)
class _Piece:
    """A JAX value, made smaller where it has a batch axis.

    Attributes:
        value: the array.
        spread: how it is spread over the examples.
        compute: for a value of full size, computes the smaller one of equal blocks along an axis; None to cut it out.
    """

    value: Any
    spread: Spread
    compute: Callable[[int], Any] | None = None


class _Resize(Domain[_Piece]):
    """Runs a program for another number of examples.

    Args:
        old: number of examples of the program.
        new: number wanted.
    """

    def __init__(self, old: int, new: int):
        self.old, self.new = old, new
        self.spreads = Spreads(old)
        self.whole = Emit({})

    def along(self, piece: _Piece, axis: int | None) -> Any:
        """The value of a piece used as one with the given batch axis."""
        if axis is None or piece.spread.axis == axis:
            return piece.value
        if piece.compute is not None:
            return piece.compute(axis)
        blocks = -(-self.new // self.old)
        many = jnp.concatenate([piece.value] * blocks, axis) if blocks > 1 else piece.value
        return lax.slice_in_dim(many, 0, piece.value.shape[axis] // self.old * self.new, axis=axis)

    def constant(self, node: Node) -> _Piece:
        return _Piece(node.value, self.spreads.constant(node))

    def default(self, node: Node, *inputs: _Piece) -> Sequence[_Piece]:
        spreads = self.spreads.default(node, *(p.spread for p in inputs))
        if all(p.spread.axis is None for p in inputs):
            values = self.whole.default(node, *(p.value for p in inputs))
            return [
                _Piece(value, spread, partial(self._smaller, node, inputs, i))
                for i, (value, spread) in enumerate(zip(values, spreads))
            ]
        way = self.spreads.way(node, [p.spread for p in inputs])
        return [_Piece(value, spread) for value, spread in zip(self._bind(node, way, inputs), spreads)]

    def _smaller(self, node: Node, inputs: Sequence[_Piece], index: int, axis: int) -> Any:
        """A result of equal blocks, computed from what its operands need fewer of."""
        for way in ways(node, self.old):
            fits = all(a is None or p.spread.fits(a) for p, a in zip(inputs, way.operands))
            if fits and way.results[index] == axis:
                return self._bind(node, way, inputs)[index]
        raise AssertionError(f"{node!r} does not repeat along axis {axis}")

    def _bind(self, node: Node, way: Any, inputs: Sequence[_Piece]) -> list[Any]:
        operands = [self.along(p, a) for p, a in zip(inputs, way.operands)]
        with _jax.at_source(node.source, node.context):
            return _jax.bind(node.primitive, operands, dict(resized(node, way, self.old, self.new)))

    # -- control flow --

    def scan(self, node: Node, *inputs: _Piece) -> Sequence[_Piece]:
        if all(p.spread.axis is None for p in inputs):
            return self._shared(node, self.whole.scan, self.spreads.scan, inputs)
        body, consts, carries = node.params["body"], node.params["num_consts"], node.params["num_carry"]
        spreads = self.spreads.scan(node, *(p.spread for p in inputs))
        kept = spreads[:carries]
        fixed, steps = inputs[:consts], inputs[consts + carries :]

        def step(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            now = [_Piece(x, s) for x, s in zip(carry, kept)]
            elements = [_Piece(x, self.spreads.element(p.spread)) for x, p in zip(xs, steps)]
            out = interpret(body, self, *fixed, *now, *elements)
            return self._carried(out[:carries], kept, body.inputs[consts:]), tuple(p.value for p in out[carries:])

        init = self._carried(inputs[consts : consts + carries], kept, body.inputs[consts:])
        with _jax.at_source(node.source, node.context):
            carry, ys = lax.scan(
                step,
                init,
                tuple(p.value for p in steps),
                length=node.params["length"],
                reverse=node.params["reverse"],
                unroll=node.params["unroll"],
            )
        return [_Piece(value, s) for value, s in zip((*carry, *ys), spreads)]

    def while_loop(self, node: Node, *inputs: _Piece) -> Sequence[_Piece]:
        if all(p.spread.axis is None for p in inputs):
            return self._shared(node, self.whole.while_loop, self.spreads.while_loop, inputs)
        cond, body = node.params["cond"], node.params["body"]
        n_cond, n_body = node.params["cond_nconsts"], node.params["body_nconsts"]
        for_cond, for_body = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        kept = self.spreads.while_loop(node, *(p.spread for p in inputs))

        def now(carry: Sequence[Any]) -> list[_Piece]:
            return [_Piece(x, s) for x, s in zip(carry, kept)]

        def step(carry: Sequence[Any]) -> tuple[Any, ...]:
            return self._carried(interpret(body, self, *for_body, *now(carry)), kept, body.inputs[n_body:])

        init = self._carried(inputs[n_cond + n_body :], kept, body.inputs[n_body:])
        with _jax.at_source(node.source, node.context):
            out = lax.while_loop(lambda carry: interpret(cond, self, *for_cond, *now(carry))[0].value, step, init)
        return [_Piece(value, s) for value, s in zip(out, kept)]

    def cond(self, node: Node, index: _Piece, *inputs: _Piece) -> Sequence[_Piece]:
        spreads = self.spreads.cond(node, index.spread, *(p.spread for p in inputs))
        if all(p.spread.axis is None for p in inputs):
            return self._shared(node, self.whole.cond, self.spreads.cond, (index, *inputs))

        def branch(graph: Graph) -> Callable[..., list[Any]]:
            def taken(*values: Any) -> list[Any]:
                out = interpret(graph, self, *(_Piece(x, p.spread) for x, p in zip(values, inputs)))
                typed = zip(out, spreads, node.avals)
                return [_jax.with_aval(self.along(p, s.axis), aval) for p, s, aval in typed]

            return taken

        with _jax.at_source(node.source, node.context):
            number = lax.convert_element_type(index.value, jnp.int32)
            out = lax.switch(number, [branch(b) for b in node.params["branches"]], *(p.value for p in inputs))
        return [_Piece(value, s) for value, s in zip(out, spreads)]

    def remat(self, node: Node, *inputs: _Piece) -> Sequence[_Piece]:
        return self._shared(node, self.whole.remat, self.spreads.remat, inputs)

    def _shared(self, node: Node, run_whole: Any, look: Any, inputs: Sequence[_Piece]) -> list[_Piece]:
        """Control flow that no example enters, as it is."""
        values = run_whole(node, *(p.value for p in inputs))
        return [_Piece(value, s) for value, s in zip(values, look(node, *(p.spread for p in inputs)))]

    def _carried(self, pieces: Sequence[_Piece], spreads: Sequence[Spread], inputs: Sequence[Node]) -> tuple[Any, ...]:
        """What a loop carries: with the batch axes it settles on and the very types of the body's inputs."""
        return tuple(_jax.with_aval(self.along(p, s.axis), n.aval) for p, s, n in zip(pieces, spreads, inputs))
