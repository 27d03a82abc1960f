"""A program replayed on values some slices of which are not there."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from jaxinfer import _jax
from jaxinfer.analysis.structure import is_static
from jaxinfer.graph import Graph, Node, Value, interpret, trace
from jaxinfer.graph.emit import Emit
from jaxinfer.sparsity.shrinking import (
    slices_control,
    slices_custom,
    slices_elementwise,
    slices_moves,
    slices_products,
    slices_reductions,
)
from jaxinfer.sparsity.shrinking.slices import (
    LARGEST_KNOWN,
    NONE,
    Indices,
    Sliced,
    Undefined,
    dense,
    evaluate,
    part,
    whole,
)


class Replay(Emit):
    """The domain of values some slices of which are not there.

    What has no rule gets its operands in full, so any program can be replayed.

    Attributes:
        expanded: for each parameter and axis the missing slices that had to be put back as they were read.
        notes: where whole values had to be put together again: operation and source line, and how often.
    """

    table: ClassVar[Mapping[str, Callable[..., Sequence[Any]]]] = {
        **slices_elementwise.RULES,
        **slices_moves.RULES,
        **slices_products.RULES,
        **slices_reductions.RULES,
        **slices_custom.RULES,
    }

    def __init__(self) -> None:
        super().__init__({})
        self.expanded: dict[tuple[int, int], set[int]] = {}
        self.notes: Counter[tuple[str, str]] = Counter()
        self._emit = Emit({})
        self._at: list[Node] = []
        self._silent = 0
        self._graphs: dict[int, tuple[Any, Graph]] = {}

    def constant(self, node: Node) -> Any:
        value = node.value
        if not is_static(Value(node, 0)) or not (hasattr(value, "dtype") or np.isscalar(value)):
            return value
        if not _jax.is_concrete(value) or math.prod(np.shape(value)) > LARGEST_KNOWN:
            return whole(value) if hasattr(value, "dtype") else value
        return whole(np.asarray(value, node.aval.dtype), known=True)

    def default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        with _jax.at_source(node.source, node.context):
            return self._noted(self._default, node, *inputs)

    def _default(self, node: Node, *inputs: Any) -> Sequence[Any]:
        results = [Value(node, i) for i in range(len(node.avals))]
        if not is_static(*node.inputs, *results) or not all(isinstance(x, Sliced) for x in inputs):
            return self.plainly(node, *inputs)
        if self._is_known(node, inputs):
            arrays = [dense(x) for x in inputs]
            return [whole(y, known=True) for y in evaluate(node, *arrays)]
        rule = self.table.get(node.op)
        if rule is not None:
            return rule(self, node, *inputs)
        if all(x.is_dense for x in inputs):
            return self.plainly(node, *inputs)
        return slices_reductions.along(self, node, *inputs)

    def _is_known(self, node: Node, inputs: Sequence[Sliced]) -> bool:
        """Whether the results are known, small, and better looked at as numbers than as something repeated."""
        if not node.is_pure or any(True for _ in node.subgraphs) or not all(x.known for x in inputs):
            return False
        small = all(math.prod(a.shape) <= LARGEST_KNOWN for a in (*node.avals, *(x.array for x in inputs)))
        return small and node.op not in ("broadcast_in_dim", *slices_elementwise.RULES, *slices_custom.RULES)

    def _noted(self, rule: Callable[..., Sequence[Any]], node: Node, *inputs: Any) -> Sequence[Any]:
        self._at.append(node)
        try:
            return rule(node, *inputs)
        except Undefined as error:
            if error.where:
                raise
            where = f"{node.op} ({_jax.source_line(node.source)})"
            raise Undefined(error.value, error.axis, error.indices, where) from error
        finally:
            self._at.pop()

    def plainly(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """The operation itself, on whole operands."""
        return self._wrapped(node, Emit.default(self, node, *(dense(x, log=self.log) for x in inputs)))

    def densely(self, node: Node, *inputs: Any) -> Sequence[Any]:
        """The operation itself, control flow included, on whole operands."""
        arrays = [dense(x, log=self.log) for x in inputs]
        return self._wrapped(node, interpret_one(self._emit, node, arrays))

    def _wrapped(self, node: Node, results: Sequence[Any]) -> list[Any]:
        return [whole(y) if is_static(Value(node, i)) else y for i, y in enumerate(results)]

    def full(self, x: Sliced, axis: int) -> Sliced:
        """The value with one axis in full."""
        if x.keep[axis] is None and not x.repeated[axis]:
            return x
        array = part(x, {axis: None}, repeat=True, log=self.log)
        shape = list(array.shape)
        shape[axis] = x.shape[axis]
        if x.repeated[axis]:
            on: Any = np if x.known else slices_moves.jnp
            array = on.broadcast_to(array, shape)
        return replace(
            x,
            array=array,
            keep=tuple(None if a == axis else k for a, k in enumerate(x.keep)),
            repeated=tuple(r and a != axis for a, r in enumerate(x.repeated)),
            void=tuple(NONE if a == axis else v for a, v in enumerate(x.void)),
        )

    def log(self, x: Sliced, axis: int, indices: Indices) -> None:
        """Remembers that missing slices were put back."""
        if self._silent:
            return
        if x.leaf and (at := x.leaf[axis]) is not None and not x.known:
            self.expanded.setdefault(at, set()).update(indices.tolist())
        elif indices.size:
            self.note()

    def note(self) -> None:
        """Remembers that a value was put together again at the operation that is being replayed."""
        if self._at and not self._silent:
            node = self._at[-1]
            self.notes[node.op, _jax.source_line(node.source)] += 1

    @contextlib.contextmanager
    def unlogged(self) -> Iterator[None]:
        """Looks at a body to find out what its results keep, which is no use of its operands yet."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    def traced(self, jaxpr: Any) -> Graph:
        """The graph of a nested program."""
        held = self._graphs.get(id(jaxpr))
        if held is None or held[0] is not jaxpr:
            held = self._graphs[id(jaxpr)] = (jaxpr, trace(_jax.close_jaxpr(jaxpr), keep_custom=True))
        return held[1]

    def scan(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(slices_control.scan, node, *inputs)

    def while_loop(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(slices_control.while_loop, node, *inputs)

    def cond(self, node: Node, index: Any, *inputs: Any) -> Sequence[Any]:
        return self._control(slices_control.cond, node, index, *inputs)

    def remat(self, node: Node, *inputs: Any) -> Sequence[Any]:
        return self._control(slices_control.remat, node, *inputs)

    def _control(self, rule: Callable[..., Sequence[Any]], node: Node, *inputs: Any) -> Sequence[Any]:
        if all(not isinstance(x, Sliced) or x.is_whole for x in inputs) or node.effects:
            return self.densely(node, *inputs)
        with _jax.at_source(node.source, node.context):
            return self._noted(lambda n, *xs: rule(self, n, *xs), node, *inputs)


_METHODS = {"scan": Emit.scan, "while": Emit.while_loop, "cond": Emit.cond, "remat": Emit.remat}


def interpret_one(domain: Emit, node: Node, inputs: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation."""
    return _METHODS.get(node.op, Emit.default)(domain, node, *inputs)


def replay(graph: Graph, domain: Replay, inputs: Sequence[Any]) -> list[Any]:
    """Runs a program on values some slices of which are not there; results are whole.

    Raises:
        Undefined: if something is needed that is not there.
    """
    results = interpret(graph, domain, *inputs)
    arrays = [dense(y, log=domain.log) for y in results]
    return [_jax.with_aval(x, a) if hasattr(a, "dtype") else x for x, a in zip(arrays, graph.out_avals)]
